"""ZeRO-1 by torch's own optimizer: each rank keeps the moments of some parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

JOB = Path(__file__).with_name("zero_job.py")


def launch(
    folder: Path, ranks: int = 2, *tokens: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = ["launch", "--nproc-per-node", str(ranks), "--run-dir", str(folder / "run")]
    return subprocess.run(
        [sys.executable, "-m", "ftrain.launch.cli", *command, *tokens, JOB],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def losses(folder: Path) -> list[dict[int, float]]:
    """By rank and step; a step that was done twice must have the same loss twice."""
    found = []
    for log in sorted((folder / "run/steps").glob("rank*.jsonl")):
        mine: dict[int, float] = {}
        for record in map(json.loads, log.read_text().splitlines()):
            if record["kind"] == "step":
                assert mine.setdefault(record["step"], record["loss"]) == record["loss"]
        found.append(mine)
    return found


def undisturbed(folder: Path) -> list[dict[int, float]]:
    assert launch(folder).returncode == 0
    expected = losses(folder)
    assert [len(of_rank) for of_rank in expected] == [24, 24]
    return expected


def test_moments_that_are_spread_over_ranks_are_put_back(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "a")
    from_memory = launch(tmp_path / "b", KILL="1")
    assert "died: SIGKILL. Restarted from memory" in from_memory.stderr, from_memory.stderr
    assert losses(tmp_path / "b") == expected


@pytest.mark.soak
def test_so_they_are_from_files_and_other_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "a")
    ended = launch(tmp_path / "c", 2, "--max-restarts", "0", END="10")
    assert ended.returncode == 1, ended.stderr
    assert "laid over 3" in (other := launch(tmp_path / "c", 3)).stderr
    assert other.returncode == 2
    assert "launch with as many ranks as then" in other.stderr
    assert "Traceback" not in other.stderr
    assert launch(tmp_path / "c").returncode == 0
    assert losses(tmp_path / "c")[:2] == expected  # the third one trained nothing
