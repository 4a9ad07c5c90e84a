"""Rounds of protection on nodes whose messages get lost, come late and come twice."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.protocol.protection import Begin, Protect, Protected, Protection, Unable


class Violation(AssertionError):
    """The rules were broken."""


@dataclass
class Node:
    machine: Protection
    held: set[VersionId] = field(default_factory=set)  # images in memory
    begun: tuple[int, VersionId] | None = None
    parity: dict[int, VersionId] = field(default_factory=dict)  # by round, of this epoch
    protected: VersionId | None = None


class World:
    """Nodes that all come to hold version after version, and keep the newest ``keeps``."""

    def __init__(self, kind: type[Protection], seed: int) -> None:
        self.kind = kind
        self.draw = random.Random(seed)
        self.count = self.draw.randint(2, 5)
        self.loss = self.draw.choice((0.0, 0.1, 0.4))
        self.keeps = self.draw.randint(1, 3)
        self.epoch, self.step, self.incarnation = 1, 0, 0
        self.clock = 100  # what a process numbers its rounds from
        self.nodes = [Node(self.machine(number)) for number in range(self.count)]
        self.flying: list[tuple[int, object]] = []
        self.meant: dict[tuple[int, int], VersionId] = {}  # version of each epoch's rounds
        self.rounds = 0
        for node in self.nodes:
            node.machine.new_group(1, range(self.count), 0, None)

    def machine(self, number: int) -> Protection:
        self.clock += 1000
        return self.kind(number, self.clock)

    def pump(self) -> None:
        for number, node in enumerate(self.nodes):
            while ready := node.machine.ready():
                self.flying += [(int(str(to)), message) for to, message in ready.messages]
                for effect in ready.effects:
                    self.perform(number, node, effect)

    def perform(self, number: int, node: Node, effect: object) -> None:
        if isinstance(effect, Begin):
            meant = self.meant.setdefault((self.epoch, effect.round), effect.version)
            if meant != effect.version:
                raise Violation(f"round {effect.round} is of {meant} and of {effect.version}")
            if node.begun is not None and effect.round <= node.begun[0]:
                raise Violation(f"{effect} after {node.begun}")
            node.begun = (effect.round, effect.version)
        elif isinstance(effect, Protected):
            lacking = [n for n in self.nodes if n.parity.get(effect.round) != effect.version]
            if lacking:
                raise Violation(f"{effect} while {len(lacking)} nodes lack its parity")
            if node.protected is not None and effect.version < node.protected:
                raise Violation(f"{effect} after {node.protected}")
            node.protected = effect.version
            self.rounds += 1

    def advance(self) -> None:
        """All nodes come to hold the next version; old ones go, but what a round needs."""
        self.step += 1
        version = VersionId(self.epoch, self.step)
        for node in self.nodes:
            needed = {node.begun[1]} if node.begun is not None else set()
            node.held = {*sorted(node.held | {version})[-self.keeps :], *(node.held & needed)}
        for node in self.draw.sample(self.nodes, self.count):
            node.machine.held_by_all(version)

    def work(self, node: Node) -> None:
        """Answer to the newest Begin."""
        if node.begun is not None:
            round_, version = node.begun
            if version in node.held:
                node.parity[round_] = version
                node.machine.done(round_)
            else:
                node.machine.unable(round_)

    def restart(self, number: int) -> None:
        """The machine begins anew over the same images; the parity that was made stays."""
        node = self.nodes[number]
        node.machine, node.begun, node.protected = self.machine(number), None, None
        node.machine.new_group(self.epoch, range(self.count), self.incarnation, None)
        if node.held:
            node.machine.held_by_all(max(node.held))

    def new_epoch(self) -> None:
        """Back to the newest version, which all hold, with nothing of the old rounds."""
        base = max(self.nodes[0].held, default=None)
        self.epoch += 1
        for node in self.nodes:
            node.begun, node.parity, node.protected = None, {}, None
            node.machine.new_group(self.epoch, range(self.count), self.incarnation, base)

    def deliver(self) -> None:
        index = self.draw.randrange(len(self.flying))
        to, message = self.flying[index] if self.draw.random() < 0.1 else self.flying.pop(index)
        if self.draw.random() >= self.loss:
            self.nodes[to].machine.receive(message)

    def act(self) -> None:
        kind = self.draw.random()
        if kind < 0.6 and self.flying:
            self.deliver()
        elif kind < 0.63:
            self.advance()
        elif kind < 0.8:
            self.work(self.draw.choice(self.nodes))
        elif kind < 0.98:
            for node in self.nodes:
                node.machine.tick()
        elif kind < 0.995:
            self.restart(self.draw.randrange(self.count))
        else:
            self.new_epoch()
        self.pump()

    def settle(self) -> None:
        """Without faults the newest version gets protected."""
        self.loss = 0.0
        self.advance()
        for _ in range(60):
            self.pump()
            for node in self.nodes:
                self.work(node)
                node.machine.tick()
            self.pump()
            while self.flying:
                self.deliver()
                self.pump()
        newest = VersionId(self.epoch, self.step)
        if any(node.protected != newest for node in self.nodes):
            raise Violation(f"{newest} is not protected: {[n.protected for n in self.nodes]}")


def play(kind: type[Protection], seed: int, acts: int = 400) -> World:
    world = World(kind, seed)
    for _ in range(acts):
        world.act()
    world.settle()
    return world


def test_three_hundred_schedules() -> None:
    assert sum(play(Protection, seed).rounds for seed in range(300)) > 2500


class SaysSoBeforeItIsTrue(Protection):
    """Says that its parity is there when it begins."""

    def _begin(self, word: Protect) -> None:
        super()._begin(word)
        self.done(word.round)


class FollowsOldWords(Protection):
    """Takes up a round that is not newer than its own."""

    def _follow(self, message: Protect) -> None:
        if not self.leads and message.round != self._round:
            self._begin(message)


class NeverRepeats(Protection):
    def tick(self) -> None:
        self._commit.tick()


class DoesNotHeed(Protection):
    """A leader that waits for who can't."""

    def _heed(self, message: Unable) -> None:
        pass


class NumbersFromOne(Protection):
    """A leader that starts again uses numbers that were used."""

    def __init__(self, me: int, first_round: int) -> None:
        super().__init__(me, 1)


class EveryoneLeads(Protection):
    @property
    def leads(self) -> bool:
        return len(self._nodes) > 1


@pytest.mark.parametrize(
    "kind",
    [
        SaysSoBeforeItIsTrue,
        FollowsOldWords,
        NeverRepeats,
        DoesNotHeed,
        NumbersFromOne,
        EveryoneLeads,
    ],
)
def test_every_mistake_is_caught(kind: type[Protection]) -> None:
    for seed in range(400):
        try:
            play(kind, seed)
        except Violation:
            return
    pytest.fail(f"{kind.__name__} went through 400 schedules")


def test_a_node_alone_protects_nothing() -> None:
    machine = Protection(3, 1)
    machine.new_group(1, [3], 0, None)
    machine.held_by_all(VersionId(1, 1))
    assert not machine.ready()
