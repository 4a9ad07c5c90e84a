"""A limit on how fast bytes are moved, shared by the threads that move them."""

from __future__ import annotations

import threading
import time

_BURST_S = 0.25  # what may be made up for after a pause


class Pace:
    """At most ``bytes_per_s`` in the long run; 0: no limit."""

    def __init__(self, bytes_per_s: float = 0.0) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._due_s = 0.0  # when all that was asked for so far may have been moved

    def wait(self, nbytes: int) -> None:
        """Return when so many bytes more may be moved."""
        if self._rate <= 0:
            return
        with self._lock:
            now_s = time.monotonic()
            self._due_s = max(self._due_s, now_s - _BURST_S) + nbytes / self._rate
            wait_s = self._due_s - now_s
        if wait_s > 0:
            time.sleep(wait_s)  # the limit itself: nothing else is waited for
