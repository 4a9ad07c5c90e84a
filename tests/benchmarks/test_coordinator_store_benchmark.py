"""The benchmark of the coordinator's store runs, and ends the leaders that it starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "coordinator_store.py"


def test_it_measures_a_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--saves", "20", "--kills", "2", "--no-results"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=True)
    row = next(line for line in done.stdout.splitlines() if line.startswith("directory"))
    assert row.split()[1:2] == ["none"]
    assert list(tmp_path.iterdir()) == []
