"""An object as a file to read anywhere in, as segment files are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ftrain.checkpoint.files import Seen, unseen
from ftrain.checkpoint.remote.place import Place
from ftrain.comms.errors import CorruptionError

_RANGE_BYTES = 4 * 1024 * 1024  # of one request: each is a copy in pyarrow's memory


class RemoteFile:
    """A :class:`~ftrain.checkpoint.files.ReadableFile` over ranged reads; thread-safe.

    Raises CorruptionError when there is no such object, ObjectStoreError for all that is the
    store's fault, both here and when it is read.
    """

    def __init__(self, place: Place, name: str) -> None:
        self.where = place.where(name)
        self._place = place
        self._name = name
        self._file = place.again(f"reading {self.where}", self._open)
        self.nbytes = int(self._file.size())

    def read_into(self, offset: int, parts: Sequence[memoryview], seen: Seen = unseen) -> None:
        """See :class:`~ftrain.checkpoint.files.ReadableFile`."""
        if offset + sum(map(len, parts)) > self.nbytes:
            raise CorruptionError(f"{self.where} ends too early: it is cut off")
        for whole in parts:
            for start in range(0, len(whole), _RANGE_BYTES):
                part = whole[start : start + _RANGE_BYTES]
                self._place.again(f"reading {self.where}", partial(self._read, offset, part))
                seen(part)
                offset += len(part)

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def _open(self) -> Any:
        try:
            return self._place.open_reading(self._name)
        except FileNotFoundError:
            raise CorruptionError(f"{self.where} is missing: take another copy") from None

    def _read(self, offset: int, buffer: memoryview) -> None:
        try:
            content = self._file.read_at(len(buffer), offset)
        except FileNotFoundError:
            raise CorruptionError(f"{self.where} is missing: take another copy") from None
        if len(content) != len(buffer):
            raise CorruptionError(f"{self.where} ends too early: it is cut off")
        buffer[:] = content
