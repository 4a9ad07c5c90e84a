"""A power cut or a SIGKILL at any point of saving and publishing tears nothing and loses nothing.

``pytest -m soak tests/checkpoint/test_power_cuts.py -s`` cuts at 200 points and at as many fresh
ones, and kills at 200.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from power_cuts import Ledger, cut_once, kill_once, mounted

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="power cuts need root, to mount a file system and shut it down"
)

QUICK_POINTS = 10
POINTS = 200
MUTANT_POINTS = 40


def cut_at_points(folder: Path, seeds: range, mutant: str = "") -> None:
    """One disk, and many power cuts one after the other."""
    ledger = Ledger()
    with mounted(folder) as disk:
        for seed in seeds:
            try:
                cut_once(disk, ledger, seed, mutant)
            except Exception as error:
                raise AssertionError(
                    f"power cut {seed}: {type(error).__name__}: {error}"
                ) from error
    assert ledger.published
    print(
        f"\n{len(seeds)} power cuts: {len(ledger.published)} versions published, "
        f"{len(ledger.publishes - ledger.published)} under way, {len(ledger.begun)} fences"
    )


def kill_at_points(folder: Path, seeds: range) -> None:
    """One directory, and many writers that are killed one after the other."""
    ledger = Ledger()
    for seed in seeds:
        try:
            kill_once(folder / "checkpoints", ledger, seed)
        except Exception as error:
            raise AssertionError(f"SIGKILL {seed}: {type(error).__name__}: {error}") from error
    assert ledger.published
    print(f"\n{len(seeds)} SIGKILLs: {len(ledger.published)} versions published")


@pytest.mark.slow
def test_a_few_killed_writers(tmp_path: Path) -> None:
    kill_at_points(tmp_path, range(QUICK_POINTS))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_two_hundred_killed_writers(tmp_path: Path) -> None:
    kill_at_points(tmp_path, range(POINTS))


@needs_root
@pytest.mark.slow
def test_a_few_points(tmp_path: Path) -> None:
    cut_at_points(tmp_path, range(QUICK_POINTS))


@needs_root
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_two_hundred_points(tmp_path: Path) -> None:
    cut_at_points(tmp_path, range(POINTS))


@needs_root
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_fresh_points(tmp_path: Path) -> None:
    first = random.Random(time.time_ns()).randrange(10**6, 10**9)
    print(f"fresh points from {first}")
    cut_at_points(tmp_path, range(first, first + POINTS))


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["no folder sync", "no file sync"])
def test_a_writer_that_does_not_sync_is_caught(tmp_path: Path, mutant: str) -> None:
    with pytest.raises(AssertionError, match="power cut") as caught:
        cut_at_points(tmp_path, range(MUTANT_POINTS), mutant)
    print(f"\n{mutant}: {str(caught.value)[:300]}")
