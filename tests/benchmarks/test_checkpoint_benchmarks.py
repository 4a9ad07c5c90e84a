"""The benchmarks of checkpoints: their arithmetic, and that each runs at all, with a tiny state."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """The benchmarks as modules; they import each other as scripts do."""
    sys.path.insert(0, str(FOLDER))
    import checkpoint_curve
    import load

    import checkpoint

    yield {"checkpoint": checkpoint, "curve": checkpoint_curve, "load": load}
    sys.path.remove(str(FOLDER))


def run(script: str, results: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark shows, and the JSON that it writes."""
    start = (
        "import pathlib, runpy, sys; folder, results, script, *words = sys.argv[1:];"
        "sys.path.insert(0, folder); import common; common.RESULTS = pathlib.Path(results);"
        "sys.argv = [script, *words]; runpy.run_path(folder + '/' + script, run_name='__main__')"
    )
    command = [sys.executable, "-c", start, str(FOLDER), str(results), script, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (written,) = results.glob("*.json")
    return done.stdout, json.loads(written.read_text())


def result(every: int, checkpoints: int, *, held_ms: float, tail_ms: float) -> dict[str, Any]:
    """A run with steps of 100 ms that holds training ``held_ms`` at each checkpoint."""
    rows, saved, now = [], [], 0.0
    for step in range(every * (checkpoints + 1)):
        held = held_ms if step and step % every == 0 else 0.0
        row = {"step": step, "boundary_ns": now, "held_ns": held, "compute_ns": 90.0}
        rows.append(row | {"barrier_ns": held / 2, "optimizer_ns": 10.0 + held / 2})
        if held:
            saved.append({"step": step, "staged_ns": now + held, "durable_ns": now + 3 * held})
        now += 100.0 + 1.5 * held
    rows = [{k: v if k == "step" else v * 1e6 for k, v in row.items()} for row in rows]
    saved = [{k: v if k == "step" else v * 1e6 for k, v in one.items()} for one in saved]
    ended = (now + tail_ms) * 1e6
    return {"rows": rows, "saved": saved, "done_ns": now * 1e6, "ended_ns": ended, "memory_gb": 1}


def test_blocking_lost_and_durable_are_told_apart(benchmarks: dict[str, ModuleType]) -> None:
    checkpoint = benchmarks["checkpoint"]
    setting = checkpoint.Setting("tiny", 16, 5, 20)
    with_it = checkpoint.account(result(5, 20, held_ms=40, tail_ms=200), setting, "DCP", 0.0)
    without = checkpoint.account(result(5, 20, held_ms=0, tail_ms=0), setting, "none", 0.0)
    assert with_it["checkpoints"] == with_it["durable"] == 20
    assert with_it["blocking_ms"] == pytest.approx(60)
    assert with_it["staged_ms"] == pytest.approx(40)
    assert with_it["durable_ms"] == pytest.approx(120)
    assert without["wall_s"] == pytest.approx(10)
    with_it["lost_s"] = with_it["wall_s"] - without["wall_s"]
    lost = checkpoint.over_rounds([with_it, with_it | {"lost_s": with_it["lost_s"] + 1}])
    assert lost["lost_ms_all"] == pytest.approx([70, 120])  # 60 held, 10 of the tail
    assert lost["lost_ms"] == pytest.approx(95)


def test_on_a_gpu_it_is_the_optimizer_that_waits(benchmarks: dict[str, ModuleType]) -> None:
    checkpoint = benchmarks["checkpoint"]
    free_ns = checkpoint.optimizer_ns(result(5, 20, held_ms=0, tail_ms=0))
    run = result(5, 20, held_ms=40, tail_ms=200)
    for row in run["rows"]:
        row["barrier_ns"] = 0.0  # the script does not
    found = checkpoint.account(run, checkpoint.Setting("4", 16, 5, 20), "DCP", free_ns)
    assert found["blocking_ms"] == pytest.approx(60)


def test_ratios_are_to_the_best_of_dcp(benchmarks: dict[str, ModuleType]) -> None:
    checkpoint = benchmarks["checkpoint"]
    arms = {
        "torch.save": {"blocking_ms": 300.0, "lost_ms": 400.0},
        "DCP": {"blocking_ms": 900.0, "lost_ms": 500.0},
        "DCP async thread": {"blocking_ms": 50.0, "lost_ms": 800.0},
        "DCP async process": {"failed": "it does not start"},
        "ours, every 10 steps": {"blocking_ms": 5.0, "lost_ms": 200.0},
    }
    checkpoint.compare(arms)
    ours = arms["ours, every 10 steps"]
    assert (ours["blocking_to_dcp"], ours["lost_to_torch"], ours["lost_to_dcp"]) == (0.1, 0.5, 0.4)


def test_the_number_of_tokens_is_found_between_those_measured(
    benchmarks: dict[str, ModuleType],
) -> None:
    tokens_for = benchmarks["checkpoint"].tokens_for
    measured = [(50.0, 16), (100.0, 64), (200.0, 256), (400.0, 512)]
    assert tokens_for(measured, 10) == 16  # it gets no shorter
    assert tokens_for(measured, 75) == 40
    assert tokens_for(measured, 300) == 384
    assert tokens_for(measured, 800) == 1024


def test_break_even_is_between_points(benchmarks: dict[str, ModuleType]) -> None:
    crossing = benchmarks["curve"].crossing
    assert crossing([(2.0, 0.5), (1.0, 1.5)], 1.0) == pytest.approx(1.5)
    assert crossing([(1.0, 0.9), (2.0, 0.5)], 1.0) == 1.0
    assert crossing([(1.0, 3.0), (2.0, 2.0)], 1.0) is None
    assert crossing([], 1.0) is None


def test_a_wrong_load_is_no_result(benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    loads = benchmarks["load"].Loads("tiny", tmp_path)
    assert loads.timed("safetensors", cold=True) > 0
    file = tmp_path / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"safetensors loaded .* wrongly"):
        loads.timed("safetensors", cold=False)


@pytest.mark.slow
def test_load_runs(tmp_path: Path) -> None:
    shown, found = run("load.py", tmp_path, "--sizes", "tiny", "--rounds", "1")
    assert "ours / fastest peer" in shown
    assert set(found["states"]["tiny"]["ours_to_fastest"]) == {"cold", "warm"}


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_checkpoint_runs(tmp_path: Path) -> None:
    """Ours under a launch, and a peer."""
    size = ("--sizes", "tiny", "--ratios", "1", "--rounds", "1")
    length = ("--every", "5", "--checkpoints", "3", "--arms", "ours", "torch.save")
    shown, found = run("checkpoint.py", tmp_path, *size, *length)
    assert shown.index("ceilings, ") < shown.index("checkpoint, ")
    (entry,) = found["states"]["tiny"]["ratios"]
    assert entry["ratio"] > 0
    for name in ("torch.save", "ours, every 5 steps", "ours, every step"):
        assert entry["arms"][name]["checkpoints"] > 0, name
    assert entry["arms"]["torch.save"]["durable"] == 3
    assert entry["arms"]["ours, every 5 steps"]["capture_ms"] > 0


@pytest.mark.slow
@pytest.mark.soak
def test_reshard_runs(tmp_path: Path) -> None:
    words = ("--size", "tiny", "--worlds", "2", "1", "--rounds", "1")
    shown, found = run("reshard.py", tmp_path, *words)
    assert "load 2 -> 1" in shown
    assert set(found["s"]) == {"ours", "DCP"}


@pytest.mark.soak
def test_codec_runs(tmp_path: Path) -> None:
    cache = ("--cache", str(tmp_path / "corpus"))
    words = ("--preset", "0.5m", "--steps", "3", "--rounds", "1", *cache)
    shown, found = run("codec.py", tmp_path, *words)
    assert "weights bf16" in shown
    assert found["data"]["weights bf16"]["ours"]["ratio"] > 1.1
