"""The benchmarks of fleets at their smallest, which are tests themselves; and the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LOADED = ("--hog", "--pulses", "--storms")


def shown(script: str, *arguments: str, timeout_s: float = 110) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--no-results"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.soak
def test_the_rest_goes_on_whatever_happens_to_a_member() -> None:
    text = shown("ring_faults.py", "--trials", "2", "--mib", "1")
    rows = [line for line in text.splitlines() if line.startswith(("kill,", "stop,", "partition,"))]
    assert len(rows) == 6 - ("left out" in text)
    assert all(row.split()[-1] == "0" for row in rows), text


@pytest.mark.slow
def test_nothing_is_wrong_or_left_over_for_a_moment() -> None:
    text = shown("churn.py", "--minutes", "0.25")
    assert text.splitlines()[-1].split() == ["wrong", "0"]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [(), ("--tcp",), LOADED], ids=["memory", "tcp", "loaded"])
def test_nothing_is_wrong_or_left_over(options: tuple[str, ...]) -> None:
    text = shown("churn.py", "--minutes", "10", *options, timeout_s=800)
    assert text.splitlines()[-1].split() == ["wrong", "0"]
