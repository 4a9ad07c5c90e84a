"""The benchmark of DeepSpeed's saves at a tiny size: both engines run, and what is told adds up."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.soak
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
def test_both_engines_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import deepspeed_saves

    size = ["--width", "64", "--layers", "2", "--batch-size", "4", "--steps", "2", "--blocks", "2"]
    options = ["--arms", "torch", "ftrain", "--rounds", "1", "--dir", str(tmp_path)]
    found = deepspeed_saves.main([*size, *options, "--no-results"])
    assert found["absent"] == {}
    for figures in found["arms"].values():
        assert figures["blocking_ms"] > 0
        assert figures["durable_ms"] > 0
        # Weights and two moments of 4 bytes, the master weights once more.
        assert figures["checkpoint_mb"] > 2 * 64 * 65 * 16 / 1e6
    assert not list(tmp_path.iterdir())


def test_lost_time_is_what_a_block_with_a_save_takes_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import deepspeed_saves

    def run(*lost_s: float) -> dict[str, object]:
        blocks = []
        for seconds in lost_s:
            blocks += [{"total_s": 2.0, "blocked_s": 0.0}]
            blocks += [{"total_s": 2.0 + seconds, "blocked_s": 0.25}]
        return {"blocks": blocks, "durable_s": 0.5, "checkpoint_bytes": 2e6}

    found = deepspeed_saves.summary([run(0.1, 0.3), run(0.2, 0.5, 0.4)])
    assert found["lost_ms"] == pytest.approx(300.0)
    assert found["lost_ms_quartiles"] == pytest.approx([200.0, 400.0])
    assert (found["blocking_ms"], found["durable_ms"]) == (250.0, 500.0)
    assert (found["checkpoint_mb"], found["block_ms"], found["saves"]) == (2.0, 2000.0, 5)
