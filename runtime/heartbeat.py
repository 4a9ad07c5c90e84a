"""The rank's thread for telemetry: proves that the GIL moves, samples where the script stands."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType
from typing import Any

import torch.distributed as dist

from ftrain.comms.telemetry import TelemetryPage, Where, Word

_BEAT_S = 0.05
_SAMPLE_AFTER_NS = 500_000_000  # a step younger than this is nobody's concern
_FRAMES_MAX = 60
_TORCH = "/torch/"  # in the path of every module of torch


def collectives_enqueued() -> int:
    """Collectives that this rank enqueued so far in the default group; -1 without a group."""
    if not dist.is_available() or not dist.is_initialized():
        return -1
    try:
        group: Any = dist.distributed_c10d._get_default_group()
        return int(group._get_sequence_number_for_group())
    except (RuntimeError, AttributeError, ValueError):
        return -1


def place_of(frame: FrameType | None) -> Where:
    """Where a thread stands, by its Python frames (innermost first)."""
    for _ in range(_FRAMES_MAX):
        if frame is None or _TORCH not in frame.f_code.co_filename:
            break  # user code, also when torch called it (a hook inside backward)
        if frame.f_code.co_name == "_engine_run_backward":
            return Where.BACKWARD
        if "torch/distributed/" in frame.f_code.co_filename:
            return Where.COLLECTIVE
        frame = frame.f_back
    return Where.USER


class Heartbeat:
    """Counts up a word of the telemetry page every 50 ms, as long as the GIL can be had."""

    def __init__(self, page: TelemetryPage) -> None:
        self._page = page
        self._main = threading.main_thread().ident or 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ftrain-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        page = self._page
        while not self._stop.wait(_BEAT_S):
            now = time.monotonic_ns()
            page[Word.COLLECTIVES] = collectives_enqueued()
            if now - page[Word.STEP_BEGAN_NS] > _SAMPLE_AFTER_NS:
                page[Word.WHERE] = place_of(sys._current_frames().get(self._main))
            page[Word.GIL_BEAT_NS] = now
            page[Word.GIL_BEAT] += 1
