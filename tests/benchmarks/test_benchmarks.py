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
    """Two ranks, blocks of ten steps, 100 MB copied per step; the second round is the busier."""
    overhead = benchmarks["overhead"]

    def block(arm: str, number: int, wall_s: float, process_s: float) -> dict[str, object]:
        counted = dict.fromkeys(("copy_ns", "hash_ns", "skipped"), 0.0)
        copied = {"bytes_copied": 5e8, "capture_thread_s": 0.1, "manager_s": 0.02}
        copied |= {"barrier_ns": 1e7, "boundary_s": 0.05}
        spent = copied if arm == "on" else dict.fromkeys(copied, 0.0)
        times = {"wall_s": wall_s, "process_s": process_s}
        return {"arm": arm, "round": number, "steps": 10, **times, **counted, **spent}

    blocks = [block("off", 0, 1.0, 0.9), block("on", 0, 1.1, 1.0)]
    blocks += [block("on", 1, 1.4, 1.0), block("off", 1, 1.2, 0.9)]
    references = [{"memcpy": 0.1, "hash": 0.1}, {"memcpy": 0.1, "hash": 0.1}]
    rank = {"state_bytes": 1e8, "reference": references, "blocks": blocks}
    found = overhead.summary([rank, rank])
    assert found["lost_ms"] == pytest.approx(15)  # 10 and 20
    assert found["lost_percent"] == pytest.approx(100 * 15 / 110)
    assert found["lost_ms_quartiles"] == pytest.approx((12.5, 17.5))
    assert found["copied_mb"] == pytest.approx(100)
    assert found["barrier_ms"] == pytest.approx(1)
    assert found["blocking_ms"] == pytest.approx(5)
    assert found["capture"] == pytest.approx(0.2)
    assert found["capture_to_reference"] == pytest.approx((0.2 + 0.02) / 0.2)
    assert found["all_added"] == pytest.approx(0.22)
