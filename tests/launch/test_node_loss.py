"""Nodes whose state is nowhere else are lost with their memory: parity gives it back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from sharded_job import ShardedRun, recomputed

PAUSE_S = 0.03  # a step that protecting fits into


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ShardedRun:
    """The run that every other one has to equal."""
    return ShardedRun(tmp_path_factory.mktemp("undisturbed") / "run", pause_s=PAUSE_S)


def kill(node: int, step: int, phase: str = "any") -> str:
    """One fault of a schedule."""
    return f"{{kind:node,node:{node},at_step:{step},phase:{phase}}}"


def schedule(*faults: str) -> str:
    """The option."""
    return f"faults.schedule=[{','.join(faults)}]"


def test_nodes_that_are_lost_one_after_the_other_cost_a_step_each(
    tmp_path: Path, undisturbed: ShardedRun
) -> None:
    """Node 0 among them, where the ranks meet and which leads the rounds."""
    faults = schedule(kill(2, 15), kill(0, 30, "forward_backward"), kill(2, 45, "optimizer"))
    run = ShardedRun(tmp_path / "run", faults, pause_s=PAUSE_S)
    run.require_equal(undisturbed)
    incidents = run.events("incident")
    assert len(incidents) == 3
    assert all(incident["restore"]["level"] == "parity" for incident in incidents)
    assert max(recomputed(incidents)) <= 2
    assert len(run.events("rebuilt")) == 3
    assert len(run.events("protected")) == 3  # each time until all was protected again
    assert "parity: any 1 of 4 nodes may be lost at once" in run.shown


def test_more_nodes_than_parity_stands_is_said_and_the_durable_version_serves(
    tmp_path: Path, undisturbed: ShardedRun
) -> None:
    faults = schedule(kill(1, 30), kill(2, 30))
    run = ShardedRun(tmp_path / "run", faults, "checkpoint.durable_every_steps=10", pause_s=PAUSE_S)
    run.require_equal(undisturbed)
    assert "lost with nodes 1, 2: 2 of 4, and its parity stands the loss of 1" in run.shown
    assert {i["restore"]["level"] for i in run.events("incident")} <= {"durable", "parity"}


@pytest.mark.soak
def test_all_trainers_at_once_keep_the_newest_version(
    tmp_path: Path, undisturbed: ShardedRun
) -> None:
    ranks = ",".join(f"{{kind:sigkill,rank:{rank},at_step:30}}" for rank in range(4))
    run = ShardedRun(tmp_path / "run", f"faults.schedule=[{ranks}]", pause_s=PAUSE_S)
    run.require_equal(undisturbed)
    incidents = run.events("incident")
    assert all(incident["restore"]["level"] == "memory" for incident in incidents)
    assert max(recomputed(incidents)) <= 1


@pytest.mark.soak
def test_two_nodes_at_once_with_two_spares(tmp_path: Path, undisturbed: ShardedRun) -> None:
    faults = schedule(kill(0, 30), kill(3, 30))
    options = ["snapshot.parity=2", "--spares=2"]
    run = ShardedRun(tmp_path / "run", faults, *options, pause_s=PAUSE_S)
    run.require_equal(undisturbed)
    incidents = run.events("incident")
    assert {incident["restore"]["level"] for incident in incidents} == {"parity"}
    assert max(recomputed(incidents)) <= 2


@pytest.mark.soak
def test_a_node_is_lost_while_there_is_no_coordinator(
    tmp_path: Path, undisturbed: ShardedRun
) -> None:
    """Rounds need none: the newest version is protected all the same."""
    down = "{kind:coordinator,at_step:15,down_s:8}"
    run = ShardedRun(tmp_path / "run", schedule(down, kill(1, 40)), pause_s=PAUSE_S)
    run.require_equal(undisturbed)
    (incident,) = run.events("incident")
    assert incident["restore"]["level"] == "parity"
    assert incident["steps_recomputed"] <= 2
