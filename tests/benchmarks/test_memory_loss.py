"""The benchmark of what kills lose: its arithmetic, and all of it at a tiny size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def memory_loss(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import memory_loss

    return memory_loss


def line(kind: str, rank: int, epoch: int, done: int, digest: str) -> dict[str, object]:
    """What a rank writes."""
    return {"kind": kind, "rank": rank, "epoch": epoch, "done": done, "digest": digest}


def test_lost_is_counted_from_the_foremost_rank(memory_loss: ModuleType) -> None:
    lines = [line("done", rank, 0, step, f"{rank}-{step}") for rank in (0, 1) for step in (1, 2)]
    lines.append(line("done", 1, 0, 3, "1-3"))
    right = [line("loaded", rank, 1, 2, f"{rank}-2") for rank in (0, 1)]
    assert memory_loss.outcome(lines + right, 1) == memory_loss.Kill(3, 2, True)
    swapped = [line("loaded", rank, 1, 2, f"{1 - rank}-2") for rank in (0, 1)]
    assert memory_loss.outcome(lines + swapped, 1) == memory_loss.Kill(3, 2, False)
    # A version that nobody had completed has nothing to be compared with: it is not right.
    beyond = [line("loaded", rank, 1, 3, "1-3") for rank in (0, 1)]
    assert memory_loss.outcome(lines + beyond, 1).exact is False
    nothing = memory_loss.outcome(lines + [line("loaded", r, 1, 0, "") for r in (0, 1)], 1)
    assert (nothing.lost, nothing.exact) == (3, None)


def test_what_survives_is_where_its_rank_looks(memory_loss: ModuleType, tmp_path: Path) -> None:
    held = tmp_path / "node1" / "runs" / "run" / "topology" / "step-20"
    held.mkdir(parents=True)
    for rank in (0, 1):
        (held / f"rank-{rank}.pt").write_text(f"{rank} of node 1")
    own = tmp_path / "node0" / "runs" / "run" / "topology" / "step-10" / "rank-0.pt"
    own.parent.mkdir(parents=True)
    own.write_text("0 of node 0")
    memory_loss.hand_over(tmp_path)
    brought = own.parents[1] / "step-20" / "rank-0.pt"
    assert brought.read_text() == "0 of node 1"
    assert own.read_text() == "0 of node 0"
    files = sorted(path.name for path in tmp_path.rglob("*.pt"))
    assert files == ["rank-0.pt", "rank-0.pt", "rank-0.pt", "rank-1.pt"]


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("lm_resiliency") is None, reason="lm-resiliency is not installed"
)
def test_both_lose_little_and_load_what_was_there(memory_loss: ModuleType, tmp_path: Path) -> None:
    size = ["--width", "128", "--kills", "1", "--modes", "all", "node", "--first", "12"]
    size += ["--span", "4"]
    rates = ["--rate-mib", "1", "--rate-ranks", "2", "--rate-rounds", "2", "--rate-turns", "1"]
    found = memory_loss.main([*size, *rates, "--dir", str(tmp_path), "--no-results"])
    for mode, arms in found["losses"].items():
        assert set(arms) == set(memory_loss.ARMS)
        for arm, figures in arms.items():
            assert figures["never_back"] == figures["wrong"] == 0, (mode, arm)
            (kill,) = figures["kills"]
            assert 0 <= kill["loaded"] <= kill["completed"]
            if arm == "ftrain":
                assert figures["exact"] == 1
    assert found["losses"]["all"]["ftrain"]["lost_max"] <= 3
    # Its disk has nothing before step 100, and its memory is gone with the trainers.
    assert found["losses"]["all"]["lm-resiliency"]["nothing"] == 1
    assert {one["arm"] for one in found["rates"]} == {"ftrain", "lm-resiliency"}
    assert all(one["gb_per_s"] > 0 and one["memory_multiple"] > 1 for one in found["rates"])
    assert not list(tmp_path.iterdir())
