"""What happened in a run, as JSON lines within a disk budget."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ftrain.comms.clock import Clock, SystemClock


class EventLog:
    """Appends events to one file; one writer process per file, any thread.

    Each event is one line, written by one ``write`` on an append-only descriptor, so a crash can
    tear the last line only. When the budget is reached the oldest half is dropped, and an event
    of kind ``dropped`` says how many went. A full disk loses events (:attr:`lost` counts them),
    never more than that: nothing here raises after the file was opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], bytes_max: int, clock: Clock | None = None
    ) -> None:
        """Open or continue the log. Raises OSError when the file can't be made."""
        self.lost = 0
        self._path = Path(path)
        # While the younger half is copied both files exist: half + two thirds stay in the budget.
        self._bytes_full = bytes_max * 2 // 3
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._fd = _open(self._path)
        self._torn = _ends_torn(self._path)
        self._bytes = os.fstat(self._fd).st_size

    def write(self, kind: str, **fields: object) -> None:
        """Append one event: the time by both clocks, ``kind``, then ``fields`` (JSON values,
        dataclasses, paths)."""
        stamp = {
            "wall_s": self._clock.wall_s(),
            "monotonic_ns": self._clock.monotonic_ns(),
            "kind": kind,
        }
        line = msgspec.json.encode(stamp | fields | stamp, enc_hook=str) + b"\n"
        with self._lock:
            if self._fd < 0 or len(line) > self._bytes_full // 2:
                self.lost += 1
            elif self._bytes + len(line) <= self._bytes_full or self._drop_oldest():
                self._append(line)
            else:
                self.lost += 1

    def close(self) -> None:
        """Close the file; later events are counted as lost."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _append(self, line: bytes) -> None:
        if self._torn:
            line = b"\n" + line  # leave the torn line alone on its own line
        try:
            written = os.write(self._fd, line)
        except OSError:
            self.lost += 1
            return
        self._bytes += written
        self._torn = written < len(line)
        if self._torn:
            self.lost += 1

    def _drop_oldest(self) -> bool:
        """Whether there is room again; a crash within leaves the old file or the new one."""
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            content = self._path.read_bytes()
            cut = content.find(b"\n", len(content) // 2) + 1 or len(content)
            dropped = content.count(b"\n", 0, cut) + _dropped_before(content)
            note = {
                "wall_s": self._clock.wall_s(),
                "monotonic_ns": self._clock.monotonic_ns(),
                "kind": "dropped",
                "events": dropped,
            }
            fresh.write_bytes(msgspec.json.encode(note) + b"\n" + content[cut:])
            fresh.replace(self._path)
            fd = _open(self._path)
        except OSError:
            fresh.unlink(missing_ok=True)
            return False
        os.close(self._fd)
        self._fd = fd
        self._bytes = os.fstat(fd).st_size
        return True


def read_events(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The events of a file, oldest first; torn lines are passed over, a missing file is empty."""
    if not Path(path).exists():
        return
    with Path(path).open("rb") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "kind" in event:
                yield event


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _dropped_before(content: bytes) -> int:
    """Events that an earlier drop counted, less the line that says so."""
    first = content.split(b"\n", 1)[0]
    try:
        event = json.loads(first)
    except ValueError:
        return 0
    if isinstance(event, dict) and event.get("kind") == "dropped":
        return int(event["events"]) - 1
    return 0
