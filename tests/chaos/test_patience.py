"""What merely takes long is left alone; what is hung is noticed within its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chaos_runs import lines
from small_runs import events, run

LIMIT_S = 3.0  # detection.hang_s; ten steps of this job are shorter


def launch(folder: Path, overrides: list[str], arguments: list[str], timeout_s: float) -> Path:
    """Run the small job on two ranks; returns the run directory."""
    folder.mkdir(exist_ok=True)
    run_dir = folder / "run"
    run(run_dir, ["--nproc-per-node", "2", *overrides], arguments, timeout_s=timeout_s)
    return run_dir


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    return events(run_dir, "incident")


@pytest.mark.slow
def test_slow_user_code_is_left_alone(tmp_path: Path) -> None:
    """Every slowness exceeds the limit of 3 s for a hang, none is declared."""
    arguments = ["--first-s", "5", "--evaluate-s", "5", "--save-s", "4", "--steps", "60"]
    assert incidents(launch(tmp_path, [], arguments, 100)) == []


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_minutes_of_undeclared_slowness_are_left_alone(tmp_path: Path) -> None:
    arguments = ["--first-s", "15", "--evaluate-s", "20", "--save-s", "10", "--steps", "160"]
    assert incidents(launch(tmp_path, [], arguments, 280)) == []


def noticed_after(run_dir: Path) -> list[float]:
    """Seconds from each fault to the moment the watchdog noticed it."""
    struck = sorted(
        event["monotonic_ns"]
        for event in lines(run_dir / "faults.jsonl")
        if event["kind"] == "fault_end"
    )
    noticed = sorted(incident["noticed_ns"] for incident in incidents(run_dir))
    assert len(struck) == len(noticed), (struck, noticed)
    return [(b - a) / 1e9 for a, b in zip(struck, noticed, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigstop", "gil_hang", "skip_collective"])
def test_a_hang_is_noticed_within_its_limit(tmp_path: Path, kind: str) -> None:
    run_dir = launch(tmp_path, [f"faults.kind={kind}", "faults.at_step=30"], ["--steps", "60"], 100)
    assert max(noticed_after(run_dir)) <= LIMIT_S


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["sigstop", "gil_hang", "skip_collective"])
def test_ten_hangs_are_noticed_within_their_limit(tmp_path: Path, kind: str) -> None:
    schedule = ",".join(f"{{kind:{kind},at_step:{step}}}" for step in range(20, 220, 20))
    run_dir = launch(tmp_path, [f"faults.schedule=[{schedule}]"], ["--steps", "240"], 280)
    found = noticed_after(run_dir)
    print(f"{kind}: noticed after {sorted(round(seconds, 2) for seconds in found)} s")
    assert len(found) == 10
    assert max(found) <= LIMIT_S


@pytest.mark.slow
@pytest.mark.parametrize("topology", [pytest.param(("1", "2"), marks=pytest.mark.soak), ("2", "1")])
def test_a_version_with_a_left_out_collective_is_never_restored(
    tmp_path: Path, topology: tuple[str, str]
) -> None:
    nodes, local = topology
    overrides = ["--local-nodes", nodes, "--nproc-per-node", local]
    clean = launch(tmp_path / "clean", overrides, ["--steps", "50"], 100)
    fault = ["faults.kind=skip_collective", "faults.at_step=30"]
    broken = launch(tmp_path / "broken", [*overrides, *fault], ["--steps", "50"], 100)
    assert len(incidents(broken)) == 1
    # The last record of a step counts: the steps after the fault were computed twice.
    last = [
        {r["step"]: r["loss"] for r in lines(d / "steps/rank1.jsonl") if r["kind"] == "step"}
        for d in (clean, broken)
    ]
    assert last[0] == last[1]
