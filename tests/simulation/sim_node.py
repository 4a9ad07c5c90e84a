"""A simulated node: agent, snapshot manager and ranks around the real machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sim_checkers import CommitChecker, demand
from sim_memory import Image, Memory

from ftrain.checkpoint.protocol.commit import Committed
from ftrain.comms.protocol.effects import (
    Exit,
    FinishCaptures,
    FlushVersion,
    ForkRanks,
    HoldRanks,
    KillRanks,
    ReleaseRanks,
)
from ftrain.comms.protocol.messages import (
    Formation,
    NodeReport,
    Phases,
    RankFailure,
    Sealed,
    VersionId,
)
from ftrain.snapshot.protocol.custody import Custody
from ftrain.snapshot.protocol.messages import Standing

if TYPE_CHECKING:
    from sim_cluster import Cluster

_FLUSH_PATIENCE_TICKS = 60


@dataclass(slots=True)
class SimRank:
    """One rank: steps in lockstep with its group, captures behind its steps, can die."""

    rank: int
    epoch: int
    world_size: int
    boundary: int = -1  # -1: not restored yet
    joined: int = -1  # it takes part in the collective of the step that ends at this boundary
    in_step: bool = False
    alive: bool = True
    ended: bool = False  # with code 0
    stopped: bool = False  # at the boundary of a stop
    finished_at: int = -1  # tick at which it did its last step
    hold: bool = False
    stop_at: int = -1
    capturing: int = -1  # slot


@dataclass(slots=True)
class Life:
    """A process's life: work begun in it is forgotten when it ends."""

    alive: bool = True


class SimNode:
    """One node in one incarnation; its memory dies with it."""

    def __init__(self, cluster: Cluster, number: int, incarnation: int) -> None:
        options = cluster.options
        self.cluster = cluster
        self.number = number
        self.incarnation = incarnation
        self.life = Life()
        self.exit_code: int | None = None
        self.ranks: dict[int, SimRank] = {}
        self.formation: Formation | None = None
        self.stalled_until = -1
        self.blind_until = -1  # notices nothing that its ranks do
        self.memory = Memory(number, options.sharded)
        self.checker = CommitChecker(number)
        self.smp_starts = 0
        self.flush: tuple[FlushVersion, int] | None = None
        self.disk_full_until = -1
        self.member = cluster.machines.node(
            node=number, incarnation=incarnation, local_world=options.local_world, host=f"h{number}"
        )
        self.driver = cluster.machines.driver(
            self.member, lambda _: None, self._send, self._perform
        )
        self.start_smp()

    # ------------------------------------------------------------------ agent

    def _send(self, address: object, message: object) -> None:
        assert isinstance(message, NodeReport)
        self.cluster.network.send(self.cluster.now, self.number, address, message)

    def _perform(self, effect: object) -> None:
        match effect:
            case ForkRanks(formation):
                self._fork(formation)
            case FinishCaptures(epoch):
                self._work(lambda: self._finish_captures(epoch))
            case KillRanks(epoch):
                self._work(lambda: self._ranks_gone(epoch))
            case HoldRanks(epoch):
                for rank in self.ranks.values():
                    rank.hold = True
                self.member.holding(epoch, [r.boundary + r.in_step for r in self.ranks.values()])
            case ReleaseRanks(_, stop_step):
                for rank in self.ranks.values():
                    rank.stop_at = stop_step
            case FlushVersion():
                demand(self.flush is None, "two flushes at once")
                self.flush = (effect, self.cluster.now)
            case Exit(code):
                demand(not self.alive_ranks(), f"node {self.number} exits and leaves ranks")
                self.exit_code = code
                self.life.alive = False

    def _work(self, answer: Callable[[], None]) -> None:
        """Answer after a while, unless the node is dead by then."""
        self.cluster.later(self.life, answer, self.driver.pump)

    def _fork(self, formation: Formation) -> None:
        if not self.cluster.checkers.formations.get(formation.epoch):
            demand(False, f"node {self.number} forks for an epoch never announced")
        self.cluster.checkers.ranks_forked(self.number, self.incarnation, formation)
        self.formation = formation
        place = next(p for p in formation.places if p.node == self.number)
        self.memory.first_rank = place.first_rank
        self.memory.local_world = place.local_world
        self.memory.world_size = formation.world_size
        self._set_group(formation)
        self.ranks = {}
        if self.cluster.take("fork_fails", self.number):
            failure = RankFailure(place.first_rank, "fork", "out of processes", self.cluster.now)
            self._work(lambda: self.member.rank_failed(formation.epoch, failure))
            return
        self.ranks = {
            r: SimRank(r, formation.epoch, formation.world_size) for r in self.memory.ranks
        }
        self._work(lambda: self.member.ranks_forked(formation.epoch))
        for rank in self.ranks.values():
            self._work(lambda rank=rank: self._restore(rank, formation))

    def _restore(self, rank: SimRank, formation: Formation) -> None:
        if not rank.alive:
            return
        version = formation.restore.version
        seats = {p.node for p in formation.places}
        if formation.restore.level == "memory" and not self.cluster.restorable(version, seats):
            self.kill(rank.rank, "exception", "RuntimeError: the version is gone")
            return
        rank.boundary = 0 if version is None else version.step

    def _finish_captures(self, epoch: int) -> None:
        rng = self.cluster.rng
        for rank in self.ranks.values():
            if rank.capturing < 0:
                continue
            if rank.alive or rng.random() < 0.5:
                self.seal(rank)
            else:
                del self.memory.images[rank.rank, rank.capturing]
                self.custody.abandon(rank.rank, rank.capturing)
                rank.capturing = -1
        self.member.captures_finished(epoch, self.memory.held())

    def _ranks_gone(self, epoch: int) -> None:
        for rank in self.ranks.values():
            rank.alive = False
        self.member.ranks_gone(epoch, self.memory.held())

    def alive_ranks(self) -> list[SimRank]:
        """Ranks that have a process now."""
        return [r for r in self.ranks.values() if r.alive]

    def kill(self, rank: int, kind: str, cause: str) -> None:
        """A rank dies; the agent notices at once."""
        victim = self.ranks[rank]
        victim.alive = False
        self.member.rank_failed(
            victim.epoch, RankFailure(rank, kind, cause, noticed_ns=self.cluster.now)
        )
        self.driver.pump()

    def tick(self) -> None:
        """The engine looks after its ranks, then the machine's time goes on."""
        if self.cluster.now < self.stalled_until:
            return
        self._observe()
        self._watch_flush()
        self.driver.tick()
        self.smp.tick()
        if self.cluster.now % 3 == 0 and self._behind():
            self._tell_standing()

    def _observe(self) -> None:
        ranks = list(self.ranks.values())
        if self.cluster.now < self.blind_until or not ranks:
            return
        if any(not r.alive and not r.ended for r in ranks):
            return
        epoch = ranks[0].epoch
        boundaries = [r.boundary for r in ranks]
        if all(b >= 0 for b in boundaries):
            newest = self.commit.newest
            furthest = max(boundaries)
            self.member.progress(min(boundaries), furthest, furthest, newest, 0.0, 0.0)
        restored = self.formation.restore.version if self.formation else None
        began = restored.step if restored else 0
        if all(b > began for b in boundaries):
            self.member.ranks_stepped(epoch, Phases(stepped_ns=self.cluster.now))
        if all(r.ended for r in ranks):
            stopped = [r.boundary for r in ranks if r.stopped]
            self.member.ranks_done(epoch, min(stopped, default=-1))

    # ------------------------------------------------------------------ ranks

    def begin_capture(self, rank: SimRank) -> None:
        """A boundary was reached: capture it if there is a slot."""
        version = VersionId(rank.epoch, rank.boundary)
        grant = self.custody.grant(rank.rank, version)
        if grant.slot >= 0:
            old = self.memory.images.get((rank.rank, grant.slot))
            if old is not None and old.sealed:
                self.commit.dropped_here(old.version)
            self.memory.images[rank.rank, grant.slot] = Image(version)
            rank.capturing = grant.slot
        else:
            self._tell_standing()

    def seal(self, rank: SimRank) -> None:
        """The capture behind this rank's step is done."""
        image = self.memory.images[rank.rank, rank.capturing]
        image.sealed = True
        self.custody.seal(rank.rank, rank.capturing, image.version)
        rank.capturing = -1
        self.cluster.sealed.setdefault(image.version, set()).add(rank.rank)
        self._image_sealed(image.version)
        self.smp.pump()

    def withdraw(self, rank: SimRank) -> bool:
        """At its barrier the rank finds that its tensors are not what it captured."""
        version = VersionId(rank.epoch, rank.boundary)
        if rank.capturing >= 0 or not self.custody.withdraw(rank.rank, version):
            return False
        for place, image in list(self.memory.images.items()):
            if place[0] == rank.rank and image.version == version:
                del self.memory.images[place]
        self.cluster.checkers.withdrawn.add(version)
        self.commit.dropped_here(version)
        self.smp.pump()
        self._tell_standing()
        self.member.withdrawn(version)
        self.driver.pump()
        return True

    # ------------------------------------------------------------------ snapshot manager

    def start_smp(self) -> None:
        """A new snapshot manager process over the memory that is there."""
        self.smp_starts += 1
        self.checker.process_restarted()
        self.custody = Custody(self.cluster.options.slots)
        for (rank, slot), image in sorted(self.memory.images.items()):
            if image.sealed:
                self.custody.seal(rank, slot, image.version)
            else:
                self.custody.writes(rank, slot, image.version)
        self.commit = self.cluster.machines.commit(me=self.number)
        self.smp = self.cluster.machines.driver(
            self.commit, lambda _: None, self._gossip, self._committed
        )
        if self.formation is not None:
            self._set_group(self.formation)
        self.smp.pump()
        self.member.smp(f"h{self.number}:{self.smp_starts}")
        self.driver.pump()

    def _set_group(self, formation: Formation) -> None:
        nodes = [p.node for p in formation.places]
        restore = formation.restore
        base = restore.version if restore.level == "memory" else None
        self.custody.set_group(formation.epoch, self.memory.ranks, base)
        self.commit.new_group(formation.epoch, nodes, nodes)
        for version in reversed(self.custody.sealed_versions()):
            self._image_sealed(version)
        self.smp.pump()

    def _image_sealed(self, version: VersionId) -> None:
        if version.epoch == self.custody.epoch and self.custody.complete(version):
            mine = tuple(h for h in self.memory.held() if h.whole and h.version == version)
            sealed = Sealed(version, self.number, self.incarnation, mine, tuple(b"" for _ in mine))
            self.commit.sealed_here(version, sealed)

    def _gossip(self, address: object, message: object) -> None:
        network = self.cluster.network
        network.send(self.cluster.now, ("smp", self.number), ("smp", address), message)

    def _tell_standing(self) -> None:
        standing = self.custody.standing()
        if standing is not None and self.formation is not None:
            for place in self.formation.places:
                if place.node != self.number:
                    self._gossip(place.node, Standing(self.number, self.incarnation, *standing))

    def _behind(self) -> bool:
        newest = self.custody.committed
        return any(
            version.epoch == self.custody.epoch and (newest is None or version > newest)
            for version in self.custody.sealed_versions()
        )

    def hear_gossip(self, message: object) -> None:
        """A message from another snapshot manager: small sections are kept, then it is judged."""
        places = () if self.formation is None else self.formation.places
        if isinstance(message, Standing):
            if (message.node, message.incarnation) in {(p.node, p.incarnation) for p in places}:
                self.custody.hear(message.node, message.floor, message.possible)
            return
        if isinstance(message, Sealed) and message.version.epoch == self.custody.epoch:
            self.memory.keep_smalls(message.held, self._needs)
        self.smp.receive(message)

    def _needs(self, version: VersionId) -> bool:
        anchor = self.custody.anchor
        if version in (anchor, self.custody.base):
            return True
        return (anchor is None or version > anchor) and not self.custody.dead(version)

    def _committed(self, effect: object) -> None:
        assert isinstance(effect, Committed)
        version = effect.version
        lacks = "" if version.epoch == self.custody.epoch else "its epoch has passed"
        if self.memory.sealed(version) != set(self.memory.ranks):
            lacks = "its own ranks have not sealed it"
        if self.memory.known(version) != set(range(self.memory.world_size)):
            lacks = f"only ranks {self.memory.known(version)} have"
        self.checker.committed(version, lacks)
        self.custody.commit(version)

    def _watch_flush(self) -> None:
        if self.flush is None:
            return
        order, since = self.flush
        newest = self.commit.newest
        # A version that the coordinator knows to be whole everywhere may be of an older group,
        # which can't commit here any more.
        if self._whole(order.version) and (
            newest == order.version or order.version.epoch < self.commit.epoch
        ):
            self._write(order, order.version)
        elif newest is not None and newest > order.version and since == self.cluster.now - 1:
            self._refuse("passed over")
        elif newest is not None and newest >= order.version and self._whole(newest):
            self._write(order, newest)
        elif self.cluster.now - since > _FLUSH_PATIENCE_TICKS:
            self._refuse("not committed in time")

    def _whole(self, version: VersionId) -> bool:
        return self.memory.sealed(version) == set(self.memory.ranks)

    def _refuse(self, why: str) -> None:
        self.flush = None
        self.member.flush_refused(why)

    def _write(self, order: FlushVersion, version: VersionId) -> None:
        self.flush = None
        if self.cluster.now < self.disk_full_until:
            self.cluster.delivered["disk full"] += 1
            self.member.flush_refused("disk full", write_failed=True)
        elif self.cluster.take("torn_write", self.number):
            self._work(lambda: self.member.flush_refused("torn", write_failed=True))
        else:
            ranks = set(self.memory.ranks)
            self._work(lambda: self._written(order.fence, version, ranks))

    def _written(self, fence: int, version: VersionId, ranks: set[int]) -> None:
        self.cluster.files.setdefault((fence, version), set()).update(ranks)
        self.member.flushed(version)
