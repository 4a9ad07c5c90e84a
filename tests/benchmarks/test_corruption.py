"""Two hundred random corruptions of a version that a real job wrote: each noticed, none loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of the peers' loads
@pytest.mark.soak
def test_every_corruption_is_noticed_and_none_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors", reason="safetensors, a peer, is not installed")
    monkeypatch.syspath_prepend(FOLDER)
    import corruption

    found = corruption.main(["--trials", "200", "--peer-trials", "20", "--no-results"])
    ours = found["ftrain"]["ends"]
    # Where the newest version could not be loaded an older one was, and that was told.  A bit of
    # the zeros between chunks is nobody's data: it is found by verify.
    assert set(ours) <= {"noticed, loaded right", "harmless to the load"}
    assert ours["noticed, loaded right"] >= 195
    assert {kind.partition(":")[0] for kind in found["ftrain"]["by_kind"]} == set(corruption.KINDS)
    for peer in ("torch.save", "DCP", "safetensors"):
        assert found[peer]["ends"]["loaded wrong"]  # so a corruption is one, and would be seen
