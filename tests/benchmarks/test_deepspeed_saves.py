"""The benchmark of DeepSpeed's saves at a tiny size: both engines run, and what is told adds up."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
def test_both_engines_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import deepspeed_saves

    size = ["--width", "64", "--layers", "2", "--batch-size", "4", "--steps", "6", "--every", "2"]
    options = ["--arms", "torch", "ftrain", "--rounds", "1", "--dir", str(tmp_path)]
    found = deepspeed_saves.main([*size, *options, "--no-results"])
    assert found["absent"] == {}
    for figures in found["arms"].values():
        assert figures["blocking_ms"] > 0
        assert figures["durable_ms"] > 0
        # Weights and two moments of 4 bytes, the master weights once more.
        assert figures["checkpoint_mb"] > 2 * 64 * 65 * 16 / 1e6
    assert not list(tmp_path.iterdir())


def test_lost_time_is_what_training_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import deepspeed_saves

    bare = [{"total_s": seconds, "saves": 0, "blocked_s": 0.0} for seconds in (10.0, 20.0)]
    more = {"saves": 4, "blocked_s": 1.0, "durable_s": 0.5, "checkpoint_bytes": 2e6}
    found = deepspeed_saves.summary([{"total_s": 12.0} | more, {"total_s": 22.4} | more], bare)
    assert found["lost_ms_of_rounds"] == pytest.approx([500.0, 600.0])
    assert found["lost_ms"] == pytest.approx(550.0)
    assert (found["blocking_ms"], found["durable_ms"]) == (250.0, 500.0)
    assert found["checkpoint_mb"] == 2.0
