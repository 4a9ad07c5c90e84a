"""A simulation that catches no mistakes is worthless: each deliberate one has to be caught."""

from __future__ import annotations

import pytest
from sim_mutants import MUTANTS, Mutant
from sim_schedule import draw
from sim_shrink import failure, shrink

QUICK_SEEDS = 40
SEEDS_MAX = 800
TABLE_SEEDS = 40  # seeds that are counted for the table

# Those that a few dozen seeds catch; the others take hundreds.
QUICK = (
    "commit on majority",
    "duplicates count",
    "committed more than once",
    "epoch granted again",
    "stop not awaited",
    "stale epoch accepted",
    "stopped reported too early",
    "same identity after restart",
    "restore without small sections",
    "restore an older version",
)


def first_catch(mutant: Mutant, seeds: int) -> int | None:
    """The first seed in which the mutant fails."""
    return next((s for s in range(seeds) if failure(draw(s), mutant.machines)), None)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in QUICK], ids=lambda m: m.name)
def test_common_mistake_is_caught(mutant: Mutant) -> None:
    assert first_catch(mutant, QUICK_SEEDS) is not None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_mistake_is_caught() -> None:
    missed = []
    print(f"\n{'mutant':34s} {'of ' + str(TABLE_SEEDS):>6s} {'first':>6s}  faults  what is said")
    for mutant in MUTANTS:
        caught = [s for s in range(TABLE_SEEDS) if failure(draw(s), mutant.machines)]
        first = caught[0] if caught else first_catch(mutant, SEEDS_MAX)
        if first is None:
            missed.append(mutant.name)
            continue
        shrunk = shrink(draw(first), mutant.machines)
        said = failure(shrunk, mutant.machines).splitlines()[0][:90]
        sizes = f"{len(draw(first).faults)}->{len(shrunk.faults)}"
        print(f"{mutant.name:34s} {len(caught):6d} {first:6d}  {sizes:6s}  {said}")
    assert missed == []
