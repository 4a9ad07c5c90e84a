"""The benchmarks' arithmetic, and that their jobs never outlive them."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

# A job that steps for ever, and starts anew when one of its "ranks" is killed.
JOB = """
import json, os, subprocess, sys, time
RANK = '''
import json, os, sys, time
epoch, pid = int(sys.argv[1]), os.getpid()
with open("steps/rank0.jsonl", "a", buffering=1) as file:
    for step in range(1000000):
        record = dict(step=step, t_ns=time.monotonic_ns(), epoch=epoch, pid=pid)
        file.write(json.dumps(record) + chr(10))
        time.sleep(0.01)
'''
os.mkdir("steps")
for epoch in range(100):
    subprocess.run([sys.executable, "-c", RANK, str(epoch)])
"""


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """The benchmarks as modules; they import each other as scripts do."""
    sys.path.insert(0, str(FOLDER))
    import common
    import overhead
    import restart

    yield {"common": common, "restart": restart, "overhead": overhead}
    sys.path.remove(str(FOLDER))


def record(step: int, t_s: float, epoch: int = 0, rank: int = 0) -> dict[str, int]:
    """A step record."""
    return {"step": step, "t_ns": int(t_s * 1e9), "epoch": epoch, "rank": rank}


def test_median_step_skips_restarts(benchmarks: dict[str, ModuleType]) -> None:
    """Only consecutive steps of one start of one rank count."""
    records = [record(0, 0), record(0, 0.5, rank=1), record(1, 1), record(2, 3)]
    records += [record(2, 60, epoch=1), record(3, 61, epoch=1)]
    assert benchmarks["common"].median_step_s(records) == 1.0


def test_completed_looks_at_the_newest_start(benchmarks: dict[str, ModuleType]) -> None:
    """Every rank has to be there."""
    completed = benchmarks["restart"].completed
    records = [record(0, 0), record(0, 0, rank=1), record(1, 1)]
    assert completed(records, 0, 2, 1)
    assert not completed(records, 0, 2, 2)
    assert not completed(records, 1, 2, 1)
    assert not completed([*records, record(1, 5, epoch=1)], 1, 2, 1)
    assert completed([*records, record(1, 5, 1), record(1, 5, 1, rank=1)], 1, 2, 1)


def test_a_kill_is_measured_and_the_job_ended(
    benchmarks: dict[str, ModuleType], tmp_path: Path
) -> None:
    """A real job, a real SIGKILL; the leak check sees to it that nothing is left."""
    restart = benchmarks["restart"]

    def pid_of(launch: object, rank: int) -> int | None:
        lines = (tmp_path / "steps" / f"rank{rank}.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["pid"])

    arm = restart.Arm("fake", lambda *_: [], {}, pid_of)
    args = argparse.Namespace(ranks=1, patience_s=20)
    with benchmarks["common"].launched([sys.executable, "-c", JOB], tmp_path) as launch:
        kills = [restart.kill_once(launch, arm, "0.5m", args, random.Random(0)) for _ in range(2)]
    assert [kill.first for kill in kills] == [True, False]
    assert all(kill.at_once for kill in kills)
    assert all(0.01 < kill.pause_s < 5 for kill in kills)
    assert all(kill.recomputed > 5 for kill in kills)  # this job begins at 0 again
    assert launch.process.returncode is not None


def test_a_job_that_ends_early_is_said(benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    """With the end of its output."""
    common = benchmarks["common"]
    command = [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"]
    with (
        common.launched(command, tmp_path) as launch,
        pytest.raises(common.LaunchError, match=r"(?s)ended with 3.*no such thing"),
    ):
        launch.wait_for(lambda records: False, 20)


def test_overhead_arithmetic(benchmarks: dict[str, ModuleType]) -> None:
    """Two ranks, ten steps, 100 MB copied per step."""
    overhead = benchmarks["overhead"]

    def rank(wall_s: float, process_s: float, copied_bytes: float) -> dict[str, object]:
        window = {"wall_s": wall_s, "process_s": process_s, "bytes_copied": copied_bytes}
        window |= {"capture_thread_s": 0.1, "manager_s": 0.02, "barrier_ns": 1e7}
        reference = {"memcpy": 0.1, "hash": 0.1}
        return {"state_bytes": 1e8, "reference": reference, "window": window}

    off = overhead.per_step([rank(1.0, 0.9, 0), rank(1.0, 0.9, 0)], 10)
    on = overhead.per_step([rank(1.1, 1.0, 5e8), rank(1.1, 1.0, 5e8)], 10)
    found = overhead.compare({"off": [off], "on": [on]})
    assert found["lost_percent"] == pytest.approx(10)
    assert on["copied_mb"] == pytest.approx(100)
    assert on["barrier_ms"] == pytest.approx(1)
    assert found["core_ms_per_mb"]["capture_core"] == pytest.approx(0.2)
    assert found["capture_to_reference"] == pytest.approx((0.2 + 0.02) / 0.2)
    assert found["core_ms_per_mb"]["added_core"] == pytest.approx(0.2)
