"""An agent's snapshot manager: set up, told its group, and given its memory back after a death."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftrain.comms.environment import inherited_environment
from ftrain.comms.errors import UsageError
from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import Formation
from ftrain.configs.schema import SnapshotConfig
from ftrain.launch.contract import place_of
from ftrain.launch.helper import HelperProcess
from ftrain.launch.protection import guard_groups, slots_for_parity
from ftrain.launch.reaper import Reaper
from ftrain.snapshot.protocol.messages import (
    Drop,
    Hold,
    ManagerStarted,
    Peer,
    Ping,
    Pong,
    RankDied,
    SetGroup,
    Setup,
    SetupRefused,
    Taken,
)

_START_LEASES = 12  # until the first answer; a slow disk may hold up the start
_PING_S = 1.0
_HUNG_S = 5.0  # without an answer; replacing one that was only slow costs nothing but a moment


class ManagerLink:
    """Keeps one snapshot manager running, and replaces one that answers no more.

    Args:
        on_started: the manager serves, as it says; also after a restart.
        on_message: any other message for the agent.
        on_down: it died, and why; a new one is on its way.
        on_mistake: no manager has ever served here, and none will before the user mends this.
        say: takes a sentence for the user.
    """

    def __init__(
        self,
        job: JobSpec,
        node: int,
        incarnation: int,
        reaper: Reaper,
        *,
        on_started: Callable[[ManagerStarted], None],
        on_message: Callable[[Any], None],
        on_down: Callable[[str], None],
        on_mistake: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self.socket_path = str(Path(job.run_dir, "state", f"smp{node}.sock"))
        self._setup = _setup(job, node, incarnation, self.socket_path)
        self._on_started = on_started
        self._on_message = on_message
        self._slots: dict[Taken, int] = {}  # descriptors kept for the next manager
        self._group: SetGroup | None = None
        self._loop = asyncio.get_running_loop()
        self._start_s_max = _START_LEASES * job.config.detection.node_lease_s
        self._served = False
        self._generation = 0  # of managers, so that no number of theirs is used twice
        self._config = job.config.snapshot
        self._refusal = ""  # told already
        self._on_mistake = on_mistake
        self._say = say
        self._deadline: asyncio.TimerHandle | None = None  # of the answer to a ping
        self._next_ping: asyncio.TimerHandle | None = None
        self._on_down = on_down
        self._process = HelperProcess(
            "ftrain.snapshot.manager",
            inherited_environment(),
            reaper,
            on_start=self._set_up,
            on_message=self._received,
            on_down=self._went_down,
            on_refused=lambda why: say(
                f"the snapshot manager can't be started ({why}): it is tried again"
            ),
        )

    @property
    def pid(self) -> int:
        """The manager's process; 0 while there is none."""
        return self._process.pid

    def start(self) -> None:
        """Start the manager, which answers with ``on_started``; raises OSError if that can't be."""
        self._process.start()

    def post(self, message: object) -> None:
        """Send a message; lost when there is no manager (``on_started`` says when to ask again)."""
        self._process.post(message)

    def set_group(self, formation: Formation, dead: tuple[int, ...] = ()) -> None:
        """Tell the manager, and each one after it, which group this node's ranks form."""
        self._group = _group(formation, self._setup.node, dead, self._config)
        self.post(self._group)

    def rank_died(self, epoch: int, rank: int) -> None:
        """Tell the manager, and each one after it, that a rank of the group ended."""
        if self._group is not None and self._group.epoch == epoch:
            self._group = replace(self._group, dead=(*self._group.dead, rank))
        self.post(RankDied(epoch, rank))

    def close(self) -> None:
        """Let go of the manager, which ends by itself, and of its memory."""
        self._process.close()
        with suppress(OSError):  # else a copy of the directory would trip over it
            os.unlink(self.socket_path)
        self._stop_pings()
        for fd in self._slots.values():
            os.close(fd)
        self._slots.clear()

    def _set_up(self) -> None:
        taken = tuple(self._slots)
        self._generation += 1
        setup = replace(self._setup, taken=taken, generation=self._generation)
        self._process.post(setup, [self._slots[slot] for slot in taken])
        if self._group is not None:
            self._process.post(self._group)
        self._ping(self._start_s_max)

    def _received(self, message: Any, fds: list[int]) -> None:
        if isinstance(message, Hold) and len(fds) == 1:
            self._forget(Taken(message.rank, message.slot))
            self._slots[Taken(message.rank, message.slot)] = fds.pop()
        for fd in fds:
            os.close(fd)
        if isinstance(message, Drop):
            self._forget(Taken(message.rank, message.slot))
        elif isinstance(message, ManagerStarted):
            self._served, self._refusal = True, ""
            self._on_started(message)
        elif isinstance(message, SetupRefused):
            self._refused(message)
        elif isinstance(message, Pong):
            self._stop_pings()
            self._next_ping = self._loop.call_later(_PING_S, self._ping)
        elif not isinstance(message, Hold):
            self._on_message(message)

    def _refused(self, message: SetupRefused) -> None:
        """A manager before may have served as well: then what is in the way may go again, and the
        memory that is kept here is worth trying until it does."""
        if message.exit_code == UsageError.exit_code and not self._served:
            self.close()
            self._on_mistake(message.why)
        elif message.why != self._refusal:
            self._refusal = message.why
            self._say(f"the snapshot manager can't serve: {message.why}")

    def _ping(self, limit_s: float = _HUNG_S) -> None:
        self._stop_pings()
        self._deadline = self._loop.call_later(limit_s, self._replace)
        self.post(Ping())

    def _stop_pings(self) -> None:
        for timer in (self._deadline, self._next_ping):
            if timer is not None:
                timer.cancel()

    def _replace(self) -> None:
        """It is stopped, or caught in something: its memory is here, the next one takes it over."""
        self._say("the snapshot manager does not answer: it is being replaced")
        self._process.kill()

    def _went_down(self, how: str) -> None:
        self._stop_pings()
        self._on_down(how)

    def _forget(self, slot: Taken) -> None:
        fd = self._slots.pop(slot, -1)
        if fd >= 0:
            os.close(fd)


def _setup(job: JobSpec, node: int, incarnation: int, socket_path: str) -> Setup:
    config = job.config
    folder = config.checkpoint.dir or str(Path(job.run_dir, "checkpoints"))
    return Setup(
        run_id=job.run_id,
        secret=job.secret,
        node=node,
        incarnation=incarnation,
        socket_path=socket_path,
        bind=config.launch.bind,
        host=config.launch.host,
        slots=config.snapshot.slots + slots_for_parity(job),
        # nodes on one machine share its memory
        memory_share_max=config.snapshot.memory_share_max / job.local_agents,
        bytes_per_s_max=config.checkpoint.bytes_per_s_max,
        checkpoint_dir=folder if config.checkpoint.enabled else "",
        parity_bytes_per_s_max=config.snapshot.parity_bytes_per_s_max,
        scrub_every_s=config.snapshot.scrub_every_s,
    )


def _group(
    formation: Formation, node: int, dead: tuple[int, ...], config: SnapshotConfig
) -> SetGroup:
    place = place_of(formation, node)
    others = (p for p in formation.places if p.node != node)
    restore = formation.restore
    mine = next(g for g in guard_groups(formation.places, config) if node in g.nodes)
    return SetGroup(
        epoch=formation.epoch,
        first_rank=place.first_rank,
        local_world=place.local_world,
        world_size=formation.world_size,
        peers=tuple(Peer(p.node, p.incarnation, p.smp_address) for p in others),
        base=restore.version if restore.in_memory else None,
        dead=dead,
        guards=mine.nodes if mine.parity else (),
        parity=mine.parity,
        kept=restore.round,
        rebuild=next((r for r in restore.rebuilds if r.node == node), None),
    )
