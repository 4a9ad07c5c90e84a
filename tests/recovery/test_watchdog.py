"""The watchdog's rules: tables, random healthy hours, and broken variants that must be caught."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from watchdog_scenarios import SCENARIOS, healthy
from watchdog_world import World, named

from ftrain.comms.protocol.phases import Phase, Where
from ftrain.recovery.protocol import watchdog
from ftrain.recovery.protocol.watchdog import Verdict, Watchdog


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario: Callable[[], None]) -> None:
    scenario()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_an_hour_of_healthy_training(seed: int) -> None:
    healthy(seed, hours=1.0)


def _never(*_: Any) -> Iterator[Verdict]:
    yield from ()


def _no_majority(self: Watchdog) -> Iterator[Verdict]:
    for step, counts in self._counts.items():
        if len(set(counts.values())) > 1:
            yield Verdict(max(counts), "desync", f"boundary {step}", watchdog.RESTART)


BROKEN: list[tuple[str, object, str, object]] = [
    ("no patience", watchdog, "_PATIENCE", 0.1),
    ("the whole limit used up", watchdog, "_PATIENCE", 1.1),
    ("gaps count in full", watchdog, "_GAP_POLLS", 1e9),
    ("disk wait is a hang", watchdog, "_BUSY_STATES", frozenset()),
    ("any wake-up is progress", watchdog, "_IDLE_SHARE", 0.0),
    ("half a core is nothing", watchdog, "_IDLE_SHARE", 0.9),
    ("declared phases are judged", watchdog, "_QUIET_PHASES", frozenset()),
    ("stale places are believed", watchdog, "_BEAT_FRESH_NS", 10**15),
    ("tracing stops only", watchdog, "_STOPPED_STATES", frozenset("t")),
    ("who left is waited for", watchdog, "_left", lambda sample: False),
    ("no stopped rule", Watchdog, "_judge_stopped", _never),
    ("no gil rule", Watchdog, "_judge_gil", _never),
    ("no user rule", Watchdog, "_judge_user", _never),
    ("no counts rule", Watchdog, "_judge_counts", _never),
    ("no waiting rule", Watchdog, "_judge_waiting", _never),
    ("no all-waiting rule", Watchdog, "_judge_all_waiting", _never),
    ("the highest rank is blamed", Watchdog, "_judge_counts", _no_majority),
    ("everybody joined", watchdog._Track, "joined", True),
    ("nobody joined", watchdog._Track, "joined", False),
]


@pytest.mark.parametrize(("what", "owner", "name", "value"), BROKEN, ids=[row[0] for row in BROKEN])
def test_broken_variant_is_caught(
    what: str, owner: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, value)
    for scenario in SCENARIOS:
        try:
            scenario()
        except AssertionError:
            return
    pytest.fail(f"no scenario noticed: {what}")


def test_random_hangs_are_blamed_on_the_right_rank() -> None:
    """Healthy steps, then one rank hangs in a random way: it alone is named, within the limit."""
    for seed in range(200):
        chance = random.Random(seed)
        world = World(ranks=chance.choice((2, 3, 4)), median_s=chance.choice((0.01, 0.1, 0.5)))
        for _ in range(chance.randint(1, 20)):
            for rank in world.samples:
                world.step(rank)
            assert world.run(0.25) == []
        victim = chance.randrange(world.ranks)
        for rank, sample in world.samples.items():
            if rank != victim:
                count = sample.collectives + 1
                world.set(rank, where=Where.COLLECTIVE, collectives=count)
        kind = chance.choice(("stopped", "gil", "desync"))
        if kind == "stopped":
            world.set(victim, state="T")
        elif kind == "gil":
            world.beating[victim] = False
        else:
            world.set(victim, step=world.samples[victim].step + 1, where=Where.USER)
        world.began_ns = world.now_ns
        limit_s = world.watchdog.limit_ns / 1e9
        assert named(world.run(limit_s)) == [(victim, kind, "restart")], (seed, kind)


def test_evidence_is_in_plain_words() -> None:
    world = World()
    world.set(1, state="T", phase=Phase.STEP)
    [verdict] = world.run(3)
    assert verdict.evidence == "the process has been stopped (state T) for 2.5 s"
