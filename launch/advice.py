"""Proposes how often to make versions durable: from what that costs, and how often things break."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ftrain.checkpoint.interval import best_interval_s, lost_share
from ftrain.checkpoint.retention import VersionKey
from ftrain.configs.schema import CheckpointConfig

_INCIDENTS_MIN = 3  # fewer say little about how often things break
_WORTH_SAYING = 1.1  # the configured interval loses at least so much more than the best


@dataclass(frozen=True, slots=True)
class History:
    """What the event log of a run directory says about it so far."""

    cost_s: float = 0.0  # training time that the newest durable version cost; 0: none was written
    incidents: int = 0
    elapsed_s: float = 0.0  # over all launches
    published: VersionKey | None = None  # the last durable version, which no sweep removes

    @classmethod
    def read(cls, events: Iterable[Mapping[str, Any]]) -> History:
        """From the events in order."""
        cost_s, incidents, elapsed_s = 0.0, 0, 0.0
        launch, began_s, published = None, 0.0, None
        for event in events:
            if event.get("launch") not in (None, launch):
                launch, began_s = event["launch"], event["wall_s"]
            elif launch is not None:
                elapsed_s += max(0.0, event["wall_s"] - began_s)
                began_s = event["wall_s"]
            if event["kind"] == "incident":
                incidents += 1
            elif event["kind"] == "written":
                cost_s = float(event["data"]["cost_s"])
            elif event["kind"] == "published":
                published = int(event["fence"]), int(event["version"]["step"])
        return cls(cost_s, incidents, elapsed_s, published)


def advise(config: CheckpointConfig, history: History) -> str:
    """One sentence for the user; "" when nothing is known, or there is nothing to gain."""
    mtbf_s, source = config.mtbf_s, "checkpoint.mtbf_s"
    if not mtbf_s and history.incidents >= _INCIDENTS_MIN:
        mtbf_s, source = history.elapsed_s / history.incidents, f"{history.incidents} incidents"
    if not (mtbf_s and history.cost_s and config.enabled) or config.durable_every_steps:
        return ""
    best_s = best_interval_s(history.cost_s, mtbf_s)
    now_s = config.durable_every_s
    best, now = (lost_share(s, history.cost_s, mtbf_s) for s in (best_s, now_s))
    if now < best * _WORTH_SAYING:
        return ""
    return (
        f"a durable version costs {history.cost_s:.2g} s and something breaks every {mtbf_s:.0f} s "
        f"({source}): checkpoint.durable_every_s={best_s:.0f} would lose {best:.1%} of the time if "
        f"memory did not survive, {now_s:g} loses {now:.1%} (Young and Daly)"
    )
