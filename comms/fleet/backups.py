"""Memory for inputs that results overwrite, used again and again."""

from __future__ import annotations

import threading

import numpy as np

_SPARE_MAX = 8


class Backups:
    """Buffers that are not in use; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: list[memoryview] = []  # largest last

    def take(self, nbytes: int) -> memoryview:
        """A buffer of so many bytes, whatever is in it."""
        with self._lock:
            for index, spare in enumerate(self._spare):
                if nbytes <= spare.nbytes <= 2 * nbytes:
                    return self._spare.pop(index)[:nbytes]
        return np.empty(nbytes, np.uint8).data  # not filled, as a bytearray would be

    def give(self, buffer: memoryview) -> None:
        """It is needed no more."""
        whole = memoryview(buffer.obj)
        with self._lock:
            self._spare = sorted([*self._spare, whole], key=lambda one: one.nbytes)[-_SPARE_MAX:]
