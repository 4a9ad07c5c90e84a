"""Whether a child of the front still answers: it may be stopped, or caught in something.

Front and child share a socket: each byte that the front sends comes back from the child's event
loop.  What is counted are the front's own looks, one every ``PERIOD_S``, so that a time in which
the machine was suspended, or the front itself stopped, counts for nothing.
"""

from __future__ import annotations

import asyncio
import math
import socket
from contextlib import suppress
from pathlib import Path

PERIOD_S = 0.5
_READ_BYTES = 4096
_STOPPED = "T"


class Pulse:
    """The front's side, for one child."""

    def __init__(self, lease_s: float, silent_leases: int) -> None:
        """A child that is seen stopped for ``lease_s`` is lost, one that only does not answer
        after ``silent_leases`` of that: it may wait for a disk."""
        self._socket, self._child_end = socket.socketpair()
        self._socket.setblocking(False)
        self._lease_looks = max(2, math.ceil(lease_s / PERIOD_S))
        self._silent_looks_max = silent_leases * self._lease_looks
        self._began = False  # it has answered once: before, it is busy with its start
        self._silent_looks = 0
        self._stopped_looks = 0

    @property
    def child_fd(self) -> int:
        """The descriptor that the child answers on, to be inherited."""
        return self._child_end.fileno()

    def started(self) -> None:
        """The child has its end."""
        self._child_end.close()

    def look(self, pid: int) -> str:
        """Ask again; what is wrong with the child, in words, once it has been so for too long."""
        with suppress(OSError):  # nothing came, or the child has ended
            while self._socket.recv(_READ_BYTES):
                self._began, self._silent_looks = True, 0
        stopped = _state(pid) == _STOPPED
        self._stopped_looks = self._stopped_looks + 1 if stopped else 0
        self._silent_looks += self._began
        with suppress(OSError):  # full: it has been asked often enough
            self._socket.send(b"?")
        if self._stopped_looks > self._lease_looks:
            return f"was stopped for {self._stopped_looks * PERIOD_S:g} s"
        if self._silent_looks > self._silent_looks_max:
            return f"did not answer for {self._silent_looks * PERIOD_S:g} s"
        return ""

    def close(self) -> None:
        """The child is gone."""
        self._socket.close()
        self._child_end.close()


def answer_pulse(fd: int) -> None:
    """The child's side: answer on ``fd`` for as long as the running event loop turns."""
    end = socket.socket(fileno=fd)
    end.set_inheritable(False)
    end.setblocking(False)
    loop = asyncio.get_running_loop()

    def answer() -> None:
        asked = b""
        with suppress(ConnectionError):
            try:
                asked = end.recv(_READ_BYTES)
                end.send(asked)
            except BlockingIOError:
                return
        if not asked:  # the front has ended, and so will we
            loop.remove_reader(end)
            end.close()

    loop.add_reader(end, answer)


def _state(pid: int) -> str:
    """The letter of ``/proc/<pid>/stat``; empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]
