"""The benchmarks of parity and of lost nodes, at their smallest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def shown(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--no-results"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("parity", ["1", "2"])
def test_from_capture_to_parity(parity: str) -> None:
    text = shown("protect.py", "--mib", "6", "--parity", parity, "--rounds", "2")
    (row,) = [line for line in text.splitlines() if line.startswith("6 MiB")]
    assert f"4, {parity} may be lost" in row
    sent = float(row.split(" x state")[0].split()[-1])
    assert sent == pytest.approx(int(parity), rel=0.1)  # each node's state, once for each loss


@pytest.mark.soak
def test_lost_nodes() -> None:
    text = shown("node_loss.py", "--kills", "1", "--width", "64", "--apart", "15")
    assert "1 incidents, restored from parity; 0 losses differ" in text
