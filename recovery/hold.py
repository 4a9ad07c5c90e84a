"""Keeping the coordinator down for a while: the fault injector asks, the front obeys.

The file says until when, by the wall clock, so that the wish of an injector that was killed passes.
"""

from __future__ import annotations

import time
from pathlib import Path

_FILE = "hold-coordinator"


def hold_coordinator(run_dir: Path, down_s: float) -> None:
    """Have the front start no coordinator for ``down_s``, or until :func:`let_go`."""
    path = run_dir / _FILE
    fresh = path.with_name(f"{_FILE}.new")
    fresh.write_text(f"{time.time() + down_s}\n")
    fresh.replace(path)


def let_go(run_dir: Path) -> None:
    """Let the front start the coordinator."""
    (run_dir / _FILE).unlink(missing_ok=True)


def is_held(run_dir: Path) -> bool:
    """Whether the coordinator is to stay down at this moment."""
    try:
        return time.time() < float((run_dir / _FILE).read_text())
    except (OSError, ValueError):
        return False
