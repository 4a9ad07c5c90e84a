"""A group of nodes made of :class:`Custody` and nothing else, driven at random, and its checker.

Announcements and standings are delivered late, in any order, again and again.  The checker looks
from outside: whatever happens, some version that is at least as new as everything that any node
ever called committed is held by every node.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.protocol.custody import Custody, Slot, SlotState


class Violation(AssertionError):
    """The rules were broken."""


@dataclass
class Node:
    """One node's bookkeeping, and what really lies in its memory."""

    custody: Custody
    ranks: tuple[int, ...]
    memory: dict[tuple[int, int], VersionId | None] = field(default_factory=dict)  # sealed images
    cursor: dict[int, int] = field(default_factory=dict)  # newest step a rank came to
    heard: dict[VersionId, set[int]] = field(default_factory=dict)
    pins: list[tuple[list[tuple[int, int]], VersionId]] = field(default_factory=list)


class World:
    """``nodes`` nodes of ``ranks`` ranks each, in one group."""

    def __init__(
        self,
        custody_class: type[Custody],
        *,
        nodes: int,
        ranks: int,
        slots: int,
        rng: random.Random,
    ) -> None:
        self.rng = rng
        self.slots = slots
        self.custody_class = custody_class
        self.epoch = 1
        self.base: VersionId | None = None
        self.ever_committed: VersionId | None = None
        self.announced: list[tuple[int, VersionId]] = []
        self.standings: list[tuple[int, VersionId, tuple[VersionId, ...]]] = []
        self.counts: dict[str, int] = {}
        self.nodes = [
            Node(custody_class(slots), tuple(range(n * ranks, (n + 1) * ranks)))
            for n in range(nodes)
        ]
        for node in self.nodes:
            node.custody.set_group(1, node.ranks, None)

    # ------------------------------------------------------------ what can happen

    def begin(self) -> None:
        """A rank comes to its next boundary; ranks of a group are at most one step apart."""
        steps = [node.cursor.get(r, 0) for node in self.nodes for r in node.ranks]
        node = self.rng.choice(self.nodes)
        rank = self.rng.choice(node.ranks)
        step = node.cursor.get(rank, 0) + 1
        if step > min(steps) + 1:
            return None
        node.cursor[rank] = step
        if self.rng.random() < 0.1:
            return self._count("rank skipped a version by itself")
        grant = node.custody.grant(rank, VersionId(self.epoch, step))
        if grant.slot < 0:
            return self._count(f"denied {grant.reason.partition(':')[0]}")
        self._writable(node, rank, grant.slot)
        node.memory[rank, grant.slot] = None
        return self._count("granted")

    def seal(self) -> None:
        """A rank completes what it writes."""
        node = self.rng.choice(self.nodes)
        rank = self.rng.choice(node.ranks)
        number = node.custody.writing(rank)
        version = node.custody.slots(rank)[number].version if number >= 0 else None
        if version is None or version.epoch != self.epoch:
            return
        node.custody.seal(rank, number, version)
        node.memory[rank, number] = version
        self._announce(node, version)
        if self.rng.random() < 0.5:  # the next slot, granted ahead of its version
            grant = node.custody.grant(rank, None)
            if grant.slot >= 0:
                self._writable(node, rank, grant.slot)
                node.memory[rank, grant.slot] = None
                self._count("granted ahead")

    def deliver(self) -> None:
        """Some announcement, however old, reaches some node."""
        if self.announced:
            source, version = self.rng.choice(self.announced)
            self._hear(self.rng.choice(self.nodes), source, version)

    def tell(self) -> None:
        """A node says how it stands."""
        source = self.rng.randrange(len(self.nodes))
        standing = self.nodes[source].custody.standing()
        if standing is not None:
            self.standings.append((source, *standing))

    def hear(self) -> None:
        """Some standing, however old, reaches some node."""
        if self.standings:
            source, floor, possible = self.rng.choice(self.standings)
            target = self.rng.randrange(len(self.nodes))
            if target != source:
                self.nodes[target].custody.hear(source, floor, possible)

    def pin(self) -> None:
        """A node begins to read a version that it knows to be committed."""
        node = self.rng.choice(self.nodes)
        version = node.custody.anchor
        if version is not None and len(node.pins) < 1:
            places = node.custody.sealed(version)
            node.custody.pin(places)
            node.pins.append((places, version))

    def unpin(self) -> None:
        """A reader is done."""
        node = self.rng.choice(self.nodes)
        if node.pins:
            node.custody.unpin(node.pins.pop()[0])

    def restart_manager(self) -> None:
        """A node's snapshot manager dies; the next one has nothing but the memory."""
        node = self.rng.choice(self.nodes)
        old, node.pins, node.heard = node.custody, [], {}
        node.custody = self.custody_class(self.slots)
        node.custody.set_group(self.epoch, node.ranks, self.base)
        for rank in node.ranks:
            for number in range(self.slots):
                version = node.memory.get((rank, number))
                was = old.slots(rank)[number]
                if version is not None:
                    node.custody.seal(rank, number, version)
                elif was.state is SlotState.WRITING:
                    node.custody.writes(rank, number, was.version)
        for version in reversed(node.custody.sealed_versions()):
            self._announce(node, version)
        self._count("manager restarted")

    def new_epoch(self) -> None:
        """All ranks die; the group goes back to the newest version that every node holds."""
        version = self.restorable()
        if self.ever_committed is not None and version is None:
            raise Violation("nothing to restore from")
        self.epoch += 1
        self.base = version
        self.announced.clear()
        self.standings.clear()
        for node in self.nodes:
            while node.pins:
                node.custody.unpin(node.pins.pop()[0])
            node.custody.set_group(self.epoch, node.ranks, version)
            node.cursor = dict.fromkeys(node.ranks, version.step if version else 0)
            for rank in node.ranks:
                number = node.custody.writing(rank)
                if number >= 0:
                    node.custody.abandon(rank, number)
        self._count("epoch")

    # ------------------------------------------------------------ running and checking

    def run(self, operations: int) -> None:
        """Do that many random things, checking after each."""
        choices = [self.begin, self.seal, self.deliver, self.tell, self.hear]
        rare = [self.pin, self.unpin, self.restart_manager, self.new_epoch]
        for _ in range(operations):
            self.rng.choice(choices if self.rng.random() < 0.93 else rare)()
            self.check()
        self.settle()

    def restorable(self) -> VersionId | None:
        """The newest version that every rank of every node holds."""
        versions = {v for node in self.nodes for v in node.memory.values() if v is not None}
        complete = [v for v in versions if all(self._holds(node, v) for node in self.nodes)]
        return max(complete, default=None)

    def check(self) -> None:
        """The invariant."""
        committed = self.ever_committed
        found = self.restorable()
        if committed is not None and (found is None or found < committed):
            raise Violation(f"{committed} was committed, the newest complete version is {found}")
        for node in self.nodes:
            for places, version in node.pins:
                if any(node.memory[place] != version for place in places):
                    raise Violation(f"{version} was overwritten while it was read")

    def settle(self) -> None:
        """Once everything is delivered and nobody reads, versions are committed again."""
        for node in self.nodes:
            while node.pins:
                node.custody.unpin(node.pins.pop()[0])
        goal = self.ever_committed
        for _ in range(4):
            step = max(node.cursor.get(r, 0) for node in self.nodes for r in node.ranks) + 1
            for node in self.nodes:
                for rank in node.ranks:
                    self._step(node, rank, VersionId(self.epoch, step))
            for node_number, node in enumerate(self.nodes):
                for source, version in list(self.announced):
                    self._hear(node, source, version)
                for source, other in enumerate(self.nodes):
                    standing = other.custody.standing()
                    if source != node_number and standing is not None:
                        node.custody.hear(source, *standing)
            self.check()
        if self.ever_committed is None or (goal is not None and self.ever_committed <= goal):
            raise Violation("no progress: no version is committed although everybody is well")

    def _step(self, node: Node, rank: int, version: VersionId) -> None:
        number = node.custody.writing(rank)
        unfinished = node.custody.slots(rank)[number].version if number >= 0 else None
        if unfinished is not None:
            node.custody.seal(rank, number, unfinished)
            node.memory[rank, number] = unfinished
            self._announce(node, unfinished)
        node.cursor[rank] = version.step
        grant = node.custody.grant(rank, version)
        if grant.slot >= 0:
            self._writable(node, rank, grant.slot)
            node.custody.seal(rank, grant.slot, version)
            node.memory[rank, grant.slot] = version
            self._announce(node, version)

    def _announce(self, node: Node, version: VersionId) -> None:
        source = self.nodes.index(node)
        if version.epoch == self.epoch and node.custody.complete(version):
            self.announced.append((source, version))
            self._hear(node, source, version)

    def _hear(self, node: Node, source: int, version: VersionId) -> None:
        heard = node.heard.setdefault(version, set())
        heard.add(source)
        if len(heard) == len(self.nodes):
            node.custody.commit(version)
            if self.ever_committed is None or version > self.ever_committed:
                self.ever_committed = version
                self._count("committed")

    def _holds(self, node: Node, version: VersionId) -> bool:
        return all(
            any(node.memory.get((rank, number)) == version for number in range(self.slots))
            for rank in node.ranks
        )

    def _writable(self, node: Node, rank: int, number: int) -> None:
        slot: Slot = node.custody.slots(rank)[number]
        if slot.state is not SlotState.WRITING:
            raise Violation("a granted slot is not the rank's to write")

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
