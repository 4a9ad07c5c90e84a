"""Random faults in a real job: the same numbers, at most one step recomputed per incident."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from chaos_runs import STEPS, History, Schedule, check, draw, histories, launch

from ftrain.comms.errors import FtrainError
from ftrain.recovery.victims import check_memory_trap

QUICK = (4,)
ALL = range(40)
FRESH = int(os.environ.get("FTRAIN_CHAOS_SEED", time.time_ns() % 10**6))
FRESH_COUNT = int(os.environ.get("FTRAIN_CHAOS_COUNT", "40"))


def can_trap_memory() -> bool:
    """Whether a kernel OOM kill can be confined to its victim here."""
    try:
        check_memory_trap()
    except FtrainError:
        return False
    return True


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[History]]:
    """The history of a run without faults, by world size; made when first asked for."""
    folder = tmp_path_factory.mktemp("undisturbed")

    class Runs(dict[int, list[History]]):
        def __missing__(self, world_size: int) -> list[History]:
            run_dir = folder / f"world{world_size}"
            launch(run_dir, Schedule(-1, 1, world_size, ()))
            self[world_size] = histories(run_dir, world_size)
            assert all(set(h.losses) == set(range(STEPS)) for h in self[world_size])
            return self[world_size]

    return Runs()


def survive(tmp_path: Path, schedule: Schedule, undisturbed: dict[int, list[History]]) -> None:
    reference = undisturbed[schedule.world_size]
    print(f"\n{schedule}")
    launch(tmp_path / "run", schedule)
    print(check(tmp_path / "run", schedule, reference))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", QUICK)
def test_a_few_schedules(tmp_path: Path, undisturbed: dict[int, list[History]], seed: int) -> None:
    survive(tmp_path, draw(seed, oom=can_trap_memory()), undisturbed)


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", ALL)
def test_forty_schedules(tmp_path: Path, undisturbed: dict[int, list[History]], seed: int) -> None:
    survive(tmp_path, draw(seed, oom=can_trap_memory(), down_s=30.0), undisturbed)


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(FRESH, FRESH + FRESH_COUNT))
def test_fresh_schedules(tmp_path: Path, undisturbed: dict[int, list[History]], seed: int) -> None:
    survive(tmp_path, draw(seed, oom=can_trap_memory(), down_s=30.0), undisturbed)
