"""What the user sees of a running job: lines, one progress line, a summary.

Everything goes to standard error, so that standard output carries the ranks' output alone.  On a
terminal the progress line stays in its place below the ranks' output; into a file or a pipe one
plain line is written every now and then.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from ftrain.comms.protocol.messages import Notice

_ERASE = "\r\x1b[K"
_STYLES = {"incident": "33", "warning": "33", "repair": "33", "error": "31"}


class Console:
    """Prints a job's notices; losing the reader (``| head``) is not an error."""

    def __init__(
        self,
        *,
        progress_piped_every_s: float,
        stream: TextIO | None = None,
        in_place: bool | None = None,
    ) -> None:
        """Write to ``stream`` (standard error); ``in_place`` defaults to it being a terminal."""
        self._stream = stream or sys.stderr
        self.in_place = self._stream.isatty() if in_place is None else in_place
        self._every_s = progress_piped_every_s
        self._next_s = 0.0
        self._progress = ""
        self._mid_line = False  # the ranks' output stands in the middle of a line
        self._lost = False
        self._over = False  # the summary was shown

    def notice(self, notice: Notice) -> None:
        """Show one piece of news."""
        if notice.kind == "progress":
            self._show_progress(progress_text(notice.text, notice.data))
        elif notice.kind == "summary":
            self._over = True
            self._erase()
            self._progress = ""
            self.line(summary_text(notice.text, notice.data))
        elif notice.kind != "end":
            self.line(notice.text, notice.kind)

    def line(self, text: str, kind: str = "info") -> None:
        """Print a line (or several) above the progress line."""
        style = _STYLES.get(kind) if self.in_place else None
        shown = f"\x1b[{style}m{text}\x1b[0m" if style else text
        self._erase()
        self._write(f"{shown}\n")
        self._draw()

    def output(self, data: bytes, fd: int) -> None:
        """Pass on what a rank wrote to a terminal, above the progress line."""
        self._erase()
        self._flush()
        try:
            _write_all(fd, data)
        except OSError:
            self._lose()
        self._mid_line = not data.endswith(b"\n")
        self._draw()

    def close(self) -> None:
        """Take the progress line away."""
        self._erase()
        self._progress = ""
        self._flush()

    def _show_progress(self, text: str) -> None:
        if self._over:
            return
        if self.in_place:
            self._erase()
            self._progress = text
            self._draw()
            return
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._write(f"{text}\n")
            self._flush()

    def _erase(self) -> None:
        if self._progress and not self._mid_line:
            self._write(_ERASE)

    def _draw(self) -> None:
        if self._progress and not self._mid_line:
            width = shutil.get_terminal_size().columns - 1
            self._write(self._progress[:width])
        self._flush()

    def _write(self, text: str) -> None:
        if not self._lost:
            try:
                self._stream.write(text)
            except OSError:
                self._lose()

    def _flush(self) -> None:
        if not self._lost:
            try:
                self._stream.flush()
            except OSError:
                self._lose()

    def _lose(self) -> None:
        """Nobody reads any more: what is buffered goes nowhere, now and at exit."""
        self._lost = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def progress_text(text: str, data: Mapping[str, object]) -> str:
    """``step 120/200 · 34.1 steps/s · loss 2.310 · snapshot 119 · 1 incident``."""
    step, total = data.get("step"), data.get("total_steps")
    if not isinstance(step, int):
        return text
    parts = [f"step {step}/{total}" if isinstance(total, int) and total > 0 else f"step {step}"]
    rate, loss = data.get("steps_per_s"), data.get("loss")
    if isinstance(rate, (int, float)) and rate > 0:
        parts.append(f"{rate:.3g} steps/s")
    if isinstance(loss, (int, float)) and loss != 0:
        parts.append(f"loss {loss:.4g}")
    snapshot = data.get("snapshot_step")
    if isinstance(snapshot, int) and snapshot >= 0:
        parity = data.get("protected_step")
        protected = isinstance(parity, int) and parity >= 0
        parts.append(f"snapshot {snapshot}" + (f" (parity {parity})" if protected else ""))
    incidents = data.get("incidents")
    if isinstance(incidents, int) and incidents > 0:
        parts.append(f"{incidents} incident{'s' if incidents > 1 else ''}")
    return " · ".join(parts)


def summary_text(text: str, data: Mapping[str, object]) -> str:
    """The summary as two columns, one line per figure; ``text`` alone when there are none."""
    rows = data.get("rows")
    if not isinstance(rows, Mapping) or not rows:
        return text
    width = max(len(str(name)) for name in rows)
    lines = [f"  {name!s:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([text, *lines] if text else lines)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
