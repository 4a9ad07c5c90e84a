"""Versions that are protected come back, whatever is lost: many schedules, and broken variants that
these must catch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
from protected_node import Group, Node, Rules, Violation
from protected_world import World

from ftrain.comms.protocol.messages import Held, NodePlace, RestorePlan, RoundId, VersionId
from ftrain.recovery.protocol import planner
from ftrain.recovery.protocol.planner import Memory, plan_restore
from ftrain.recovery.protocol.rebuilds import Round, rebuilds_for, round_to_keep
from ftrain.snapshot.protocol.keeping import Keeping
from ftrain.snapshot.protocol.protection import Protected, Protection

FIXED_SEEDS = 150
LEAST = {  # of each kind, in all fixed seeds together
    "message lost": 10_000,
    "message twice": 8_000,
    "message late": 6_000,
    "manager killed": 200,
    "manager killed while stopping": 100,
    "manager started again": 300,
    "rank killed": 60,
    "1 nodes lost at once": 40,
    "2 nodes lost at once": 8,
    "node lost during rebuilding": 5,
    "node lost before all was protected again": 10,
    "more lost than parity stands": 2,
    "rank skipped a version by itself": 100,
    "denied reader": 500,
    "denied peers behind": 500,
    "denied skipped elsewhere": 500,
    "a contributor was not there, or not that far": 300,
    "unable: a contributor was not there for too long": 10,
    "unable: no memory": 60,
    "committed": 1_000,
    "round over": 800,
    "rebuilt": 40,
    "rebuilt while stopping": 1,
    "rebuilding waits for a manager": 15,
    "plan from memory": 30,
    "plan from parity": 50,
    "plan from fresh": 10,
    "loss imagined": 8_000,
}


def play(rules: Rules, seed: int) -> Counter[str]:
    world = World(rules, seed)
    world.run()
    return world.counts


def play_all(seeds: Sequence[int]) -> Counter[str]:
    total: Counter[str] = Counter()
    for seed in seeds:
        try:
            total.update(play(Rules(), seed))
        except Violation as violation:
            pytest.fail(f"seed {seed}: {violation}")
    print(dict(total))
    return total


def test_what_was_protected_comes_back() -> None:
    total = play_all(range(FIXED_SEEDS))
    scarce = {what: total[what] for what, least in LEAST.items() if total[what] < least}
    assert not scarce, f"the schedules are too polite: {scarce}"


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_fresh_schedules() -> None:
    fresh = random.randrange(1 << 30)
    print("fresh seeds from", fresh)
    play_all(range(fresh, fresh + 1500))


# ---------------------------------------------------------------- mutants


class KeepsItsOwnNewest(Keeping):
    """Every node keeps its own newest round, whatever the plan names."""

    def new_group(self, epoch: int, kept: RoundId | None) -> list[RoundId]:
        whole = [round_ for round_ in self.rounds if self.is_whole(round_) or kept is None]
        return super().new_group(epoch, max(whole, default=None))


class GivesUpWhatIsWhole(Keeping):
    """A round that begins takes the place of all before it, whether they are over or not."""

    def _is_given_up(self, round_: RoundId, first: int, over: int) -> bool:
        return True


class GivesUpByNumber(Keeping):
    """A later round takes the place of all before it, also of those of newer versions."""

    def _replaced_by(self, over: RoundId) -> list[RoundId]:
        return [round_ for round_ in self.rounds if round_ < over]


class HeedsOldBeginnings(Keeping):
    """A round that is long past is begun, and newer ones count as given up."""

    def begin(self, number: int, version: VersionId, first: int, over: int) -> list[RoundId]:
        new = RoundId(self._epoch, number)
        newer = [r for r in self.rounds if r > new and self._is_given_up(r, first, over)]
        return [*super().begin(number, version, first, over), *self._give_up(newer)]


class IsOverWhenDone(Protection):
    """A round is over where the parity is there, before it is elsewhere."""

    def done(self, round_: int) -> None:
        super().done(round_)
        if round_ == self._round and self._version is not None:
            self._effects.append(Protected(round_, self._version))


class NeverReminds(Protection):
    """The leader is silent about rounds that are settled."""

    def _remind(self) -> None:
        pass


def newest_that_serves(
    rounds: Sequence[Round],
    places: Sequence[NodePlace],
    held: dict[int, tuple[Held, ...]],
    refused: object = (),
) -> RoundId | None:
    """However many further losses it stands."""
    found = [r.id for r in rounds if not rebuilds_for(r, places, held)[1]]
    return max(found, default=None)


def newest_of_all(
    rounds: Sequence[Round], places: object, held: object, refused: object = ()
) -> RoundId | None:
    """However few nodes have it."""
    return max((r.id for r in rounds), default=None)


def keeps_newest_that_serves(memory: Memory) -> RestorePlan:
    with mock.patch.object(planner, "round_to_keep", newest_that_serves):
        return plan_restore(memory, None)


def keeps_newest_of_all(memory: Memory) -> RestorePlan:
    with mock.patch.object(planner, "round_to_keep", newest_of_all):
        return plan_restore(memory, None)


def keeps_another_than_it_uses(memory: Memory) -> RestorePlan:
    kept = round_to_keep(planner.rounds_of(memory.parity), memory.places, memory.held)
    return replace(keeps_newest_that_serves(memory), round=kept)


def goes_back_to_least_of_the_newest(memory: Memory) -> RestorePlan:
    """The oldest of the nodes' newest versions, whether the others still have that or not."""
    plan = plan_restore(memory, None)
    newest = [max(h.version for h in held) for held in memory.held.values() if held]
    if plan.level != "memory" or len(newest) < len(memory.places):
        return plan
    return replace(plan, version=min(newest))


MUTANTS = {
    "keeps its own newest round": Rules(keeping=KeepsItsOwnNewest),
    "gives up what is whole": Rules(keeping=GivesUpWhatIsWhole),
    "gives up newer versions": Rules(keeping=GivesUpByNumber),
    "heeds old beginnings": Rules(keeping=HeedsOldBeginnings),
    "is over when it is done here": Rules(protection=IsOverWhenDone),
    "never reminds": Rules(protection=NeverReminds),
    "does not freeze": Rules(freezes=False),
    "does not pin": Rules(pins=False),
    "numbers its rounds from one": Rules(numbers_on=False),
    "forgets rounds when it starts again": Rules(finds=False),
    "rebuilds what was given up since": Rules(rebuilds_once=False),
    "keeps the newest round that serves": Rules(plan=keeps_newest_that_serves),
    "keeps the newest round of all": Rules(plan=keeps_newest_of_all),
    "keeps another round than it uses": Rules(plan=keeps_another_than_it_uses),
    "goes back to the least of the newest": Rules(plan=goes_back_to_least_of_the_newest),
}


# Few schedules catch these; test_keeping.py has all but the last step by step.
RARE = (
    "gives up newer versions",
    "heeds old beginnings",
    "never reminds",
    "rebuilds what was given up since",
)


def is_caught(name: str, schedules: int) -> bool:
    for seed in range(schedules):
        try:
            play(MUTANTS[name], seed)
        except Violation as violation:
            print(f"seed {seed}: {violation}")
            return True
    return False


@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in RARE])
def test_every_mistake_is_caught(name: str) -> None:
    assert is_caught(name, 60), f"a group that {name} went through 60 schedules"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RARE)
def test_rare_mistakes_are_caught(name: str) -> None:
    assert is_caught(name, 6000), f"a group that {name} went through 6000 schedules"


class Trio:
    """Three nodes of one rank each, whose messages arrive at once."""

    def __init__(self, rules: Rules) -> None:
        self.queue: list[tuple[int, object]] = []
        self.nodes = [
            Node(
                number,
                1,
                (number,),
                4,
                rules,
                post=lambda _, to, message: self.queue.append((to, message)),
                on_protected=lambda *_: None,
                on_committed=lambda _: None,
                count=lambda _: None,
            )
            for number in range(3)
        ]
        for node in self.nodes:
            node.set_group(Group(1, {0: 1, 1: 1, 2: 1}, None, None, 1))

    def capture(self, step: int) -> None:
        for node in self.nodes:
            assert not node.begin(node.number, VersionId(1, step))
            node.seal(node.number, ahead=False)

    def settle(self, workers: Sequence[int]) -> None:
        for _ in range(12):
            for node in self.nodes:
                node.tick()
            while self.queue:
                to, message = self.queue.pop(0)
                self.nodes[to].receive(message)
            for number in workers:
                self.nodes[number].work(lambda node: self.nodes[node])


@pytest.mark.parametrize("stays_frozen", [True, False])
def test_a_manager_that_starts_after_its_nodes_last_word_must_change_nothing(
    stays_frozen: bool,
) -> None:
    """Else it helps a round to its end of which the plan does not know that it has its part, and
    the others give up the round before."""
    trio = Trio(Rules(stays_frozen=stays_frozen))
    trio.capture(1)
    trio.settle([0, 1, 2])
    assert [node.protected for node in trio.nodes] == [VersionId(1, 1)] * 3
    trio.capture(2)
    trio.settle([0, 2])
    first, last = trio.nodes[:2]
    last.said_last = True
    last.freeze()
    held, parity = {1: last.held()}, {1: last.parities()}
    last.start()
    trio.settle([0, 1, 2])
    first.freeze()
    held[0], parity[0] = first.held(), first.parities()
    places = tuple(NodePlace(n, 1, rank, 1, "", "") for rank, n in enumerate((0, 1, 3)))
    plan = plan_restore(Memory(places, held, parity, 9, 1.0), None)  # node 2 is lost
    assert plan.version == (VersionId(1, 1) if stays_frozen else None)
