"""How much work a lost host would cost, as the event log tells it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ftrain.launch.words import age_text


@dataclass(frozen=True, slots=True)
class SavedStatus:
    """The newest versions that survive the memory of all hosts, and the disk."""

    durable_step: int = -1  # -1: none was published in what the log reaches back to
    durable_age_s: float = 0.0
    copied_step: int = -1  # in the object store
    copied_age_s: float = 0.0  # of that version: what its copy lags behind
    copies_failed: int = 0  # since the last one that went well


def read_saved(events: Iterable[Mapping[str, Any]], now_s: float | None = None) -> SavedStatus:
    """What the events say; ``now_s``: Unix time, None: now."""
    now_s = time.time() if now_s is None else now_s
    durable_step, durable_s, copied_step, copied_s, failed = -1, now_s, -1, now_s, 0
    for event in events:
        kind = event["kind"]
        if kind == "published":
            durable_step, durable_s = int(event["version"]["step"]), float(event["wall_s"])
        elif kind == "copied":
            copied_step, failed = int(event["step"]), 0
            copied_s = float(event["wall_s"]) - float(event["behind_s"])
        elif kind == "copy_failed":
            failed += 1
    return SavedStatus(
        durable_step=durable_step,
        durable_age_s=max(0.0, now_s - durable_s),
        copied_step=copied_step,
        copied_age_s=max(0.0, now_s - copied_s),
        copies_failed=failed,
    )


def saved_text(saved: SavedStatus) -> str:
    """One line; empty when there is nothing to say."""
    parts = []
    if saved.durable_step >= 0:
        parts.append(f"durable: step {saved.durable_step}, {age_text(saved.durable_age_s)} old")
    if saved.copied_step >= 0:
        parts.append(f"copied away: step {saved.copied_step}, {age_text(saved.copied_age_s)} old")
    if saved.copies_failed:
        parts.append(f"{saved.copies_failed} copies failed since")
    return "; ".join(parts)
