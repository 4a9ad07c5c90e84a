"""The benchmark of erasure coding runs, with tiny stripes, and notices who computes wrongly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftrain.snapshot.erasure.code import ErasureCode

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def erasure(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark as a module; it imports its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import erasure as found

    monkeypatch.setattr(found, "PIECE_BYTES", 16)
    yield found
    del sys.modules["erasure"]


def test_every_arm_is_measured_and_shown(
    erasure: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(erasure, "write_results", lambda name, found: written.update({name: found}))
    words = ["erasure.py", "--mib", "0.1", "--data", "1", "3", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", words)
    erasure.main()
    cases = written["erasure"]["cases"]
    assert [(c["threads"], c["data"], c["parity"], c["lost"]) for c in cases] == [
        (threads, data, parity, lost)
        for threads in (1, 2)
        for data in (1, 3)
        for parity in (1, 2)
        for lost in range(min(parity, data) + 1)
    ]
    for case in cases:
        assert case["to_memcpy"]["memcpy"] == 1
        assert {"ours", "ours, as read", "ours, NumPy", "pyeclib"} <= case["gb_per_s"].keys()
        assert ("reedsolo (extrapolated)" in case["gb_per_s"]) == (case["threads"] == 1)
        assert all(len(rates) == 2 for rates in case["all"].values())
    shown = capsys.readouterr().out
    assert "erasure coding of 0.1 MiB of data, 2 of" in shown
    assert "rebuild 2" in shown


def test_a_wrong_result_ends_it(erasure: ModuleType) -> None:
    work = erasure.Work(ErasureCode(2, 1), erasure.stripe_of(ErasureCode(2, 1), 4096), (0,))
    job = erasure.in_place(erasure.Numpy())(work)
    with ThreadPoolExecutor(1) as pool:
        assert erasure.timed([job], pool, "ours") > 0
        work.chunks[0] = memoryview(bytes(4096))
        with pytest.raises(RuntimeError, match="ours computes wrongly"):
            erasure.timed([job], pool, "ours")
