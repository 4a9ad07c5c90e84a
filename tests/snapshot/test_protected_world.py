"""Versions that are protected come back, whatever is lost: many schedules, and broken variants that
these must catch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from unittest import mock

import pytest
from protected_node import Rules, Violation
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


@dataclass(frozen=True)
class Mutant:
    """A broken variant, and a seed that is known to catch it early."""

    rules: Rules
    first_seed: int = 0


MUTANTS = {
    "keeps its own newest round": Mutant(Rules(keeping=KeepsItsOwnNewest)),
    "gives up what is whole": Mutant(Rules(keeping=GivesUpWhatIsWhole)),
    "gives up newer versions": Mutant(Rules(keeping=GivesUpByNumber)),
    "heeds old beginnings": Mutant(Rules(keeping=HeedsOldBeginnings), 245),
    "is over when it is done here": Mutant(Rules(protection=IsOverWhenDone)),
    "never reminds": Mutant(Rules(protection=NeverReminds)),
    "does not freeze": Mutant(Rules(freezes=False)),
    "thaws when it starts again": Mutant(Rules(stays_frozen=False)),
    "does not pin": Mutant(Rules(pins=False)),
    "numbers its rounds from one": Mutant(Rules(numbers_on=False)),
    "forgets rounds when it starts again": Mutant(Rules(finds=False)),
    "rebuilds what was given up since": Mutant(Rules(rebuilds_once=False), 69),
    "takes an older epoch's round": Mutant(Rules(tells_epochs=False)),
    "keeps the newest round that serves": Mutant(Rules(plan=keeps_newest_that_serves)),
    "keeps the newest round of all": Mutant(Rules(plan=keeps_newest_of_all)),
    "keeps another round than it uses": Mutant(Rules(plan=keeps_another_than_it_uses)),
    "goes back to the least of the newest": Mutant(Rules(plan=goes_back_to_least_of_the_newest)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mistake_is_caught(name: str) -> None:
    mutant = MUTANTS[name]
    for seed in range(mutant.first_seed, mutant.first_seed + 200):
        try:
            play(mutant.rules, seed)
        except Violation as violation:
            print(f"seed {seed}: {violation}")
            return
    pytest.fail(f"a group that {name} went through 200 schedules")
