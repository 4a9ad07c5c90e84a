"""A simulation that catches no mistakes is worthless: each deliberate one has to be caught."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sim_mutants import MUTANTS, Mutant
from sim_schedule import draw
from sim_shrink import failure, shrink

QUICK_SEEDS = 40
SEEDS_MAX = 1000
TABLE_SEEDS = 30  # seeds that are counted for the table

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


# Seeds that caught the rarest ones when last looked for, tried before all others.
KNOWN = {
    "announcement not resent": 88,
    "late stop ends unsaved": 111,
    "spares told like members": 145,
    "stale formation taken": 141,
    "publication not awaited": 210,
    "flush under old fence counts": 498,
}


def first_catch(mutant: Mutant, seeds: int) -> int | None:
    """The first seed in which the mutant fails."""
    tried = (KNOWN.get(mutant.name, 0), *range(seeds))
    return next((s for s in tried if failure(draw(s), mutant.machines)), None)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in QUICK], ids=lambda m: m.name)
def test_common_mistake_is_caught(mutant: Mutant) -> None:
    assert first_catch(mutant, QUICK_SEEDS) is not None


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows that are printed when all mutants are through."""
    rows = [f"{'mutant':34s} {'of ' + str(TABLE_SEEDS):>6s} {'first':>6s}  faults  what is said"]
    yield rows
    print("\n" + "\n".join(rows))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_every_mistake_is_caught(mutant: Mutant, table: list[str]) -> None:
    caught = [s for s in range(TABLE_SEEDS) if failure(draw(s), mutant.machines)]
    first = caught[0] if caught else first_catch(mutant, SEEDS_MAX)
    assert first is not None
    shrunk = shrink(draw(first), mutant.machines)
    said = failure(shrunk, mutant.machines).splitlines()[0][:90]
    sizes = f"{len(draw(first).faults)}->{len(shrunk.faults)}"
    table.append(f"{mutant.name:34s} {len(caught):6d} {first:6d}  {sizes:6s}  {said}")
