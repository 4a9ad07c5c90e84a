"""What a rank writes about its own steps: one JSON line each."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ftrain.comms.errors import RunDirectoryError
from ftrain.comms.events import EventLog


class StepRecords:
    """``<run_dir>/steps/rank<r>.jsonl``: one line per completed step.

    Fields: ``step`` (0-based), ``epoch`` (membership epoch), ``t_ns`` (CLOCK_MONOTONIC at the
    boundary), ``step_s``, ``batch`` (data epoch, batch index, digest of its sample indices) and
    whatever ``Session.log`` was given.  Floats are written so that reading gives the same bits.
    """

    def __init__(self, run_dir: str, rank: int, epoch: int, bytes_max: int) -> None:
        directory = Path(run_dir) / "steps"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(
                f"the run directory {run_dir} can't be written ({error.strerror}): run the script "
                "in another directory, or name one with ftrain launch --run-dir"
            ) from None
        self._log = EventLog(directory / f"rank{rank}.jsonl", bytes_max)
        self._epoch = epoch
        self._durations_s: list[float] = []

    def step(
        self, step: int, t_ns: int, step_s: float, batch: dict[str, Any], logged: dict[str, Any]
    ) -> None:
        """Write the record of one completed step."""
        self._durations_s = [*self._durations_s[-49:], step_s]
        own = {
            "step": step,
            "epoch": self._epoch,
            "t_ns": t_ns,
            "step_s": step_s,
            "batch": batch,
        }
        logged = {name: plain(value) for name, value in logged.items() if name != "kind"}
        self._log.write("step", **{**logged, **own})

    def note(self, text: str) -> None:
        """Write something a reader of this rank's records should know."""
        self._log.write("note", epoch=self._epoch, text=text, t_ns=time.monotonic_ns())

    @property
    def median_s(self) -> float:
        """Median of the newest fifty steps, the first of the process left out."""
        return median(self._durations_s[1:] or self._durations_s or [0.0])

    def close(self) -> None:
        """Close the file."""
        self._log.close()


def plain(value: Any) -> Any:
    """A JSON value for a logged one; one-element tensors become numbers."""
    if isinstance(value, torch.Tensor):
        return value.detach().item() if value.numel() == 1 else value.detach().tolist()
    return value
