"""What is proposed about intervals, and when nothing is."""

from __future__ import annotations

from typing import Any

from ftrain.configs.schema import CheckpointConfig
from ftrain.launch.advice import History, advise


def event(kind: str, wall_s: float, launch: str = "a", **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "wall_s": wall_s, "launch": launch, **fields}


def test_history_is_read_over_launches_without_the_time_between_them() -> None:
    events = [
        event("launch", 100),
        event("written", 150, data={"cost_s": 0.7}),
        event("incident", 160),
        event("launch", 5000, "b"),
        event("incident", 5040, "b"),
        event("written", 5050, "b", data={"cost_s": 0.5}),
    ]
    assert History.read(events) == History(cost_s=0.5, incidents=2, elapsed_s=110.0)
    assert History.read([]) == History()


def test_the_interval_is_proposed_from_a_given_mtbf() -> None:
    said = advise(CheckpointConfig(mtbf_s=3600.0), History(cost_s=0.5))
    assert "checkpoint.durable_every_s=60 would lose 1.7%" in said
    assert "300 loses 4.3%" in said


def test_the_interval_is_proposed_from_what_broke() -> None:
    said = advise(CheckpointConfig(), History(cost_s=0.5, incidents=4, elapsed_s=14_400.0))
    assert "every 3600 s (4 incidents)" in said


def test_nothing_is_said_without_knowledge_or_gain() -> None:
    known = History(cost_s=0.5, incidents=4, elapsed_s=14_400.0)
    assert advise(CheckpointConfig(), History(cost_s=0.5, incidents=2, elapsed_s=100.0)) == ""
    assert advise(CheckpointConfig(mtbf_s=3600.0), History()) == ""
    assert advise(CheckpointConfig(durable_every_s=60.0), known) == ""
    assert advise(CheckpointConfig(durable_every_steps=10), known) == ""
    assert advise(CheckpointConfig(enabled=False), known) == ""
