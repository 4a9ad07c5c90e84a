"""The reader of versions against directories that were broken on purpose.

Whatever a file says: typed errors only, never a tensor that was not saved unless digests were
forged, never a byte outside of the tensors, bounded memory and time, no file outside of the
directory.
``pytest -m soak tests/runtime/test_fuzz.py -s`` goes on for ten minutes.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fuzz_reader.py")
CI_S, SOAK_S = 60, 600


def fuzz(folder: Path, seed: int, seconds: float) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), str(seed), str(seconds)],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    assert done.returncode == 0, f"from seed {seed}: {done.stderr[-4000:]}"
    print(f"\nfrom seed {seed}: {done.stdout}")
    assert int(done.stdout.split()[0]) >= 10 * seconds


@pytest.mark.slow
def test_for_a_minute(tmp_path: Path) -> None:
    fuzz(tmp_path, random.Random(time.time_ns()).randrange(10**6, 10**9), CI_S)


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 120)
def test_for_ten_minutes(tmp_path: Path) -> None:
    fuzz(tmp_path, random.Random(time.time_ns()).randrange(10**6, 10**9), SOAK_S)
