"""A rank that leaves out what the others wait for is named, wherever the others are."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import events, run

pytestmark = pytest.mark.slow

SENTENCE = "it ended with code 0 while others wait for it in a collective"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_collective_skipped_on_another_node_is_a_desync(tmp_path: Path, rank: int) -> None:
    faults = ["faults.kind=skip_collective", "faults.at_step=30", f"faults.rank={rank}"]
    nodes = ["--local-nodes", "2", "--nproc-per-node", "1"]
    run(tmp_path / "run", [*nodes, *faults], ["--steps", "120"])
    (incident,) = events(tmp_path / "run", "incident")
    assert [(f["rank"], f["kind"]) for f in incident["failures"]] == [(rank, "desync")]
    assert "collectives up to boundary" in incident["cause"]


@pytest.mark.soak
def test_a_rank_that_leaves_is_named_when_connections_break(tmp_path: Path) -> None:
    """Each time anew: the job ends, and says why."""
    leaving = ["--steps", "60", "--leave-at", "10", "--leave-again"]
    options = ["--nproc-per-node", "2", "launch.max_restarts=1"]
    output = run(tmp_path / "run", options, leaving, code=1)
    assert f"rank 1 (node 0) failed: {SENTENCE}" in output
    (end,) = events(tmp_path / "run", "error")
    assert SENTENCE in end["text"]
    assert "2 failures in a row" in end["text"]


def test_a_rank_that_leaves_is_named_when_nothing_breaks(tmp_path: Path) -> None:
    """The other one waits for ever: only the watchdog can know."""
    leaving = ["--steps", "60", "--leave-at", "10", "--alone-in-store"]
    run(tmp_path / "run", ["--nproc-per-node", "2"], leaving)
    (incident,) = events(tmp_path / "run", "incident")
    assert [f["rank"] for f in incident["failures"]] == [1]
    assert SENTENCE in incident["cause"]
