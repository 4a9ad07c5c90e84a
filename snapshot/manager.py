"""The snapshot manager's process: owns a node's snapshot memory, so that it outlives the ranks.

``python -m ftrain.snapshot.manager --fd N``: descriptor N is a local socket to the agent that
started it, whose first message is :class:`Setup`.  The process ends with the agent.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ftrain.comms.addresses import bound_address, format_address, listen_tcp, parse_address
from ftrain.comms.channel import Channel, Identity, serve
from ftrain.comms.errors import FtrainError, PeerLostError, RemoteProtocolError
from ftrain.comms.links import LocalLink
from ftrain.comms.local import LocalSocket, from_descriptor
from ftrain.comms.process import (
    allow_many_descriptors,
    die_with_parent,
    ignore_stop_signals,
    set_oom_score_adj,
)
from ftrain.comms.protocol.messages import Held, HeldParity, Notice, VersionId
from ftrain.snapshot.chunks import ChunkServer, Request
from ftrain.snapshot.counts import CountsNews
from ftrain.snapshot.fetch import serve_fetch
from ftrain.snapshot.flush import Flusher, Written
from ftrain.snapshot.gossip import Gossip
from ftrain.snapshot.parity_slots import ParitySlots
from ftrain.snapshot.protector import Made, Protector
from ftrain.snapshot.protocol.messages import (
    PARITY,
    AskInventory,
    BundleRequest,
    CapturesFinished,
    ChunkRequest,
    Committed,
    Drop,
    FetchRequest,
    FinishCaptures,
    Flush,
    Hold,
    Inventory,
    ManagerStarted,
    ParityComplete,
    Ping,
    Pong,
    RankDied,
    Repaired,
    SetGroup,
    Setup,
    SetupRefused,
    Withdrawn,
)
from ftrain.snapshot.ranks import RankServer
from ftrain.snapshot.rebuilder import Rebuilder, Rebuilt
from ftrain.snapshot.scrubber import Scrubber
from ftrain.snapshot.store import SlotStore

_SETUP_S_MAX = 30.0
_REPAIRS_REMEMBERED = 256
_PARITY_TOLD_EVERY_S = 5.0  # what a round took, for the event log
_GROWTH_SETTLES_S = 0.5  # moments come with the first optimizer step
_OOM_SCORE = -500  # what it holds is the way back for everybody else


class Manager:
    """Everything one snapshot manager does, in one event loop."""

    def __init__(self, sock: LocalSocket, setup: Setup, fds: Sequence[int]) -> None:
        self._setup = setup
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._finishing: dict[int, asyncio.TimerHandle] = {}  # epoch -> deadline
        self._news: VersionId | None = None  # committed, the agent was not told yet
        self._stating: asyncio.TimerHandle | None = None
        self._repairs: deque[str] = deque(maxlen=_REPAIRS_REMEMBERED)  # told already
        self._parity = 0  # nodes that may be lost at once
        self._parity_told_s = -_PARITY_TOLD_EVERY_S
        secret = bytes.fromhex(setup.secret)
        identity = Identity(setup.run_id, "smp", setup.node, setup.incarnation)
        self._store = SlotStore(
            run_id=setup.run_id,
            slots=setup.slots,
            memory_share_max=setup.memory_share_max,
            taken_bytes=sum(os.fstat(fd).st_size for fd in fds),
        )
        self._slots = ParitySlots(setup.run_id, self._store.budget, self._hold_parity)
        self._adopt(fds)
        self._listener = listen_tcp(format_address(setup.bind, 0))
        port = parse_address(bound_address(self._listener))[1]
        self._address = format_address(setup.host, port)
        self._ranks = RankServer(
            self._store,
            on_sealed=self._image_sealed,
            on_withdrawn=self._withdrawn,
            on_skipped=lambda: self._gossip.tell_standing(),
            on_change=self._captures_changed,
            on_hold=self._hold,
            on_grown=self._grown,
            on_repaired=self._repaired,
            on_trouble=self._trouble,
            settled=lambda version: self._rebuilder.settled(version),
        )
        self._gossip = Gossip(
            self._store,
            identity,
            secret,
            address=self._address,
            on_committed=self._committed,
            on_heard=lambda sealed: self._counts.add(sealed),
            on_parity=lambda message: self._protector.receive(message),
            on_trouble=self._trouble,
        )
        self._link = LocalLink(sock, self._from_agent, lambda _: self._over.set())
        self._counts = CountsNews(self._link.post)
        self._flusher = self._make_flusher()
        self._identity = identity
        self._secret = secret
        self._protector = self._make_protector()
        self._rebuilder = self._make_rebuilder()
        self._chunks = ChunkServer(self._store, self._slots, setup.node)
        self._scrubber = self._make_scrubber()
        self._handlers: dict[type, Callable[[Any], None]] = {
            SetGroup: self._set_group,
            RankDied: self._rank_died,
            FinishCaptures: self._finish_captures,
            AskInventory: lambda _: self._link.post(Inventory(*self._last_inventory())),
            Ping: lambda _: self._link.post(Pong()),
            Flush: self._flusher.request,
        }

    def _adopt(self, fds: Sequence[int]) -> None:
        """Take over what an earlier manager of this node left."""
        for taken, fd in zip(self._setup.taken, fds, strict=True):
            if taken.rank == PARITY:
                self._slots.adopt(taken.slot, fd)
            else:
                self._store.adopt(taken.rank, taken.slot, fd)

    def _make_flusher(self) -> Flusher:
        setup = self._setup
        return Flusher(
            self._store,
            setup.checkpoint_dir,
            setup.bytes_per_s_max,
            self._link.post,
            self._trouble,
            self._written,
        )

    def _make_protector(self) -> Protector:
        protector = Protector(
            self._store,
            self._slots,
            self._identity,
            self._secret,
            generation=self._setup.generation,
            bytes_per_s_max=self._setup.parity_bytes_per_s_max,
            post=self._gossip.post,
            address_of=self._gossip.address_of,
            on_made=self._parity_made,
            on_protected=self._protected,
            on_trouble=self._trouble,
        )
        protector.adopted()
        return protector

    def _make_rebuilder(self) -> Rebuilder:
        return Rebuilder(
            self._store,
            self._identity,
            self._secret,
            grow=self._ranks.grow,
            address_of=self._gossip.address_of,
            on_rebuilt=self._rebuilt,
            on_settled=self._protector.rebuilt,
            on_trouble=self._trouble,
        )

    def _make_scrubber(self) -> Scrubber:
        return Scrubber(
            self._slots,
            self._chunks,
            self._identity,
            self._secret,
            every_s=self._setup.scrub_every_s,
            address_of=self._gossip.address_of,
            on_mended=lambda text: self._link.post(Notice("repair", text, self._about_node)),
            on_trouble=self._trouble,
        )

    async def run(self) -> None:
        """Serve until the agent is gone."""
        server = await serve(self._listener, self._identity, self._secret, self._from_node)
        self._ranks.listen(self._setup.socket_path)
        self._link.post(ManagerStarted(self._address, *self._inventory()))
        try:
            await self._over.wait()
        finally:
            self._ranks.close()
            self._scrubber.close()
            self._chunks.close()
            self._protector.close()
            self._rebuilder.close()
            self._gossip.close()
            self._counts.close()
            if self._stating is not None:
                self._stating.cancel()
            self._flusher.close()
            self._link.close()
            server.close()
            await server.wait_closed()

    # ------------------------------------------------------------ the agent

    def _from_agent(self, message: object, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        handler = self._handlers.get(type(message))
        if handler is None:
            self._trouble(f"the snapshot manager does not know what a {type(message).__name__} is")
            return
        try:
            handler(message)
        except FtrainError as error:  # the memory must not be lost because of one message
            self._trouble(f"the snapshot manager can't obey a {type(message).__name__}: {error}")

    def _set_group(self, group: SetGroup) -> None:
        custody = self._store.custody
        new_epoch, self._parity = group.epoch > custody.epoch, group.parity
        ranks = range(group.first_rank, group.first_rank + group.local_world)
        if not custody.set_group(group.epoch, ranks, group.base):
            return
        if new_epoch:
            self._store.takeover.new_epoch()
            for epoch in [epoch for epoch in self._finishing if epoch < group.epoch]:
                self._answer_finishing(epoch)
        self._gossip.set_group(group)
        self._protector.set_group(group)
        peers = [peer.node for peer in group.peers]
        self._rebuilder.begin(group.rebuild, group.base, peers)
        if new_epoch:
            self._drop_surplus()  # of a node that had another seat before
        for version in reversed(self._store.custody.sealed_versions()):  # a new manager's finds;
            self._image_sealed(version)  # newest first: what is older needs no commit any more
        self._ranks.group_changed()
        self._flusher.group_changed()
        for rank in group.dead:
            self._rank_died(RankDied(group.epoch, rank))

    def _rank_died(self, death: RankDied) -> None:
        takeover = self._store.takeover
        if death.epoch != self._store.custody.epoch or death.rank in takeover.dead:
            return
        takeover.died(death.rank)
        self._store.reload_rank(death.rank)
        for version in reversed(self._store.custody.sealed_versions()):
            self._image_sealed(version)
        self._captures_changed()
        self._flusher.rank_ended()

    def _finish_captures(self, order: FinishCaptures) -> None:
        if order.epoch in self._finishing:
            return
        if order.epoch != self._store.custody.epoch:
            self._link.post(CapturesFinished(order.epoch, *self._last_inventory()))
            return
        loop = asyncio.get_running_loop()
        self._finishing[order.epoch] = loop.call_later(
            max(0.0, order.deadline_s), self._answer_finishing, order.epoch
        )
        self._captures_changed()

    def _answer_finishing(self, epoch: int) -> None:
        self._finishing.pop(epoch).cancel()
        for rank in self._store.takeover.dead:
            self._store.reload_rank(rank)
        self._link.post(CapturesFinished(epoch, *self._last_inventory()))

    def _inventory(self) -> tuple[tuple[Held, ...], tuple[HeldParity, ...]]:
        return self._store.inventory(), self._protector.held()

    def _last_inventory(self) -> tuple[tuple[Held, ...], tuple[HeldParity, ...]]:
        """What the next plan is made of: no round changes it any more."""
        self._protector.freeze()
        return self._inventory()

    def _hold(self, rank: int, slot: int, fd: int, nbytes: int) -> None:
        self._link.post(Hold(rank, slot, nbytes), [fd])

    def _hold_parity(self, slot: int, fd: int, nbytes: int) -> None:
        """Called by the thread that makes parity."""
        self._loop.call_soon_threadsafe(self._hold, PARITY, slot, fd, nbytes)

    def _grown(self) -> None:
        """State what the slots take, once they have stopped to grow."""
        if self._stating is not None:
            self._stating.cancel()
        loop = asyncio.get_running_loop()
        self._stating = loop.call_later(_GROWTH_SETTLES_S, self._state_memory)

    def _state_memory(self) -> None:
        nbytes, slots = self._store.memory_bytes + self._slots.memory_bytes, self._setup.slots
        ranks = len(self._store.custody.local_ranks)
        text = (
            f"node {self._setup.node}: snapshots take {-(-nbytes >> 20)} MiB of memory, "
            f"{slots} slots for each of {ranks} ranks"
        )
        figures = {"node": self._setup.node, "bytes": nbytes, "slots": slots, "ranks": ranks}
        self._link.post(Notice("memory", text, {**figures}))

    def _repaired(self, news: Repaired) -> None:
        """Told once, although every rank that reads an image finds its damage."""
        found = [text for text in news.damage if text not in self._repairs]
        if not found:
            return
        self._repairs += found
        what = " and ".join(text.removesuffix(": take another copy") for text in found)
        sources = " and ".join(news.sources)
        data = {
            "node": self._setup.node,
            "version": asdict(news.version),
            "damage": list(news.damage),
            "sources": list(news.sources),
        }
        remedy = f"repaired from {sources}" if sources else "what was in it was not needed"
        self._link.post(Notice("repair", f"{what}; {remedy}", data))

    def _protected(self, version: VersionId) -> None:
        self._link.post(ParityComplete(version, self._store.custody.epoch))

    def _parity_made(self, made: Made) -> None:
        if self._loop.time() < self._parity_told_s + _PARITY_TOLD_EVERY_S:
            return
        self._parity_told_s = self._loop.time()
        mib = -(-made.nbytes >> 20)
        text = f"node {self._setup.node}: parity of step {made.version.step}, {mib} MiB"
        self._link.post(Notice("parity", text, {"node": self._setup.node, **asdict(made)}))

    def _rebuilt(self, rebuilt: Rebuilt) -> None:
        version, mib = rebuilt.version, -(-rebuilt.nbytes >> 20)
        text = (
            f"node {self._setup.node}: step {version.step} of lost node {rebuilt.node} rebuilt "
            f"from parity, {mib} MiB in {rebuilt.seconds:.2f} s"
        )
        if rebuilt.damage:
            text += f"; done without what is damaged: {' and '.join(rebuilt.damage)}"
        self._link.post(Notice("rebuilt", text, {"by": self._setup.node, **asdict(rebuilt)}))

    def _written(self, written: Written) -> None:
        version, mib = written.version, -(-written.nbytes >> 20)
        text = f"node {self._setup.node}: step {version.step}, {mib} MiB in {written.seconds:.2f} s"
        self._link.post(Notice("written", text, {"node": self._setup.node, **asdict(written)}))

    def _trouble(self, text: str) -> None:
        self._link.post(Notice("warning", text, self._about_node))

    @property
    def _about_node(self) -> dict[str, object]:
        return {"node": self._setup.node}

    # ------------------------------------------------------------ captures and commit

    def _image_sealed(self, version: VersionId) -> None:
        custody = self._store.custody
        if version.epoch == custody.epoch and custody.complete(version):
            self._gossip.sealed(version)

    def _withdrawn(self, version: VersionId) -> None:
        """What is committed stays committed, but the coordinator has nobody restore from it."""
        self._gossip.withdrawn(version)
        self._flusher.withdrawn(version)
        self._protector.withdrawn(version)
        self._link.post(Withdrawn(version))

    def _captures_changed(self) -> None:
        """Somebody began, sealed, died or answered: hand out what a survivor can finish."""
        takeover, custody = self._store.takeover, self._store.custody
        for task in takeover.tasks(self._ranks.connected()):
            self._ranks.ask(task)
        if custody.epoch in self._finishing and not takeover.waiting():
            self._answer_finishing(custody.epoch)

    def _committed(self, version: VersionId) -> None:
        self._store.custody.commit(version)
        self._flusher.committed(version)
        if self._protector.leads and not self._gossip.replicated(version, self._parity):
            self._protector.held_by_all(version)
        self._drop_surplus()
        self._ranks.committed()
        if self._news is None:
            asyncio.get_running_loop().call_soon(self._tell_committed)
        self._news = version

    def _drop_surplus(self) -> None:
        for rank, slot in self._store.drop_surplus():
            self._link.post(Drop(rank, slot))

    def _tell_committed(self) -> None:
        if self._news is not None:
            self._link.post(Committed(self._news))
            self._news = None

    # ------------------------------------------------------------ other nodes

    async def _from_node(self, channel: Channel) -> None:
        """One authenticated connection from another node's manager or rank."""
        try:
            while True:
                message = await channel.receive()
                if isinstance(message, FetchRequest):
                    await self._rebuilder.settled(message.version)
                    await serve_fetch(self._store, channel, message)
                elif isinstance(message, Request) and channel.peer.role == "smp":
                    if isinstance(message, BundleRequest | ChunkRequest):
                        await self._rebuilder.settled(message.version)
                    await self._chunks.serve(channel, message)
                elif channel.peer.role == "smp":
                    self._gossip.receive(message, channel.peer)
                else:
                    raise RemoteProtocolError(f"{channel.peer} sent a {type(message).__name__}")
        except PeerLostError:
            return
        except FtrainError as error:
            self._trouble(f"the snapshot manager closed its connection to {channel.peer}: {error}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="ftrain.snapshot.manager")
    parser.add_argument("--fd", type=int, required=True, help="local socket to the agent")
    sock = from_descriptor(parser.parse_args(argv).fd)
    die_with_parent(sock.peer_pid)
    ignore_stop_signals()
    set_oom_score_adj(_OOM_SCORE)
    allow_many_descriptors()
    sock.settimeout(_SETUP_S_MAX)
    try:
        setup, fds = sock.receive()
    except (PeerLostError, TimeoutError):
        return 1  # the agent changed its mind
    if not isinstance(setup, Setup) or len(fds) != len(setup.taken):
        raise RemoteProtocolError("the first message to a snapshot manager has to be its Setup")

    async def serve_agent() -> None:
        await Manager(sock, setup, fds).run()

    try:
        asyncio.run(serve_agent())
    except FtrainError as error:
        with suppress(PeerLostError, TimeoutError):
            sock.send(SetupRefused(str(error), error.exit_code))
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
