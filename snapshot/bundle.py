"""All that a node holds of a version as one run of bytes, cut into the chunks of its stripes.

The images of the node's ranks follow each other in rising order of ranks; they are whole pages.
What a chunk lacks behind the last image counts as zeros and lies nowhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate

from ftrain.comms.errors import StateError


class Bundle:
    """The images of one node by rank, read or written by place.

    Args:
        images: the ranks' images, of the same node and version.
        chunk_bytes: of the group's stripes (``placement.chunk_bytes``).
    """

    def __init__(self, images: Mapping[int, memoryview], chunk_bytes: int) -> None:
        self._views = [images[rank] for rank in sorted(images)]
        self._ends = list(accumulate(view.nbytes for view in self._views))
        self._chunk_bytes = chunk_bytes

    @property
    def nbytes(self) -> int:
        """Size of all images."""
        return self._ends[-1] if self._ends else 0

    def present(self, chunk: int) -> int:
        """How many of a chunk's bytes lie somewhere; the rest are zeros."""
        return min(max(self.nbytes - chunk * self._chunk_bytes, 0), self._chunk_bytes)

    def pieces(self, chunk: int, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes ``[start, stop)`` of a chunk, in order, in place.

        Raises StateError beyond what is present.
        """
        if not 0 <= start <= stop <= self.present(chunk):
            raise StateError(
                f"chunk {chunk} has {self.present(chunk)} bytes, not those from {start} to {stop}"
            )
        at, end = chunk * self._chunk_bytes + start, chunk * self._chunk_bytes + stop
        number = bisect_right(self._ends, at)
        while at < end:
            begins = self._ends[number] - self._views[number].nbytes
            piece = self._views[number][at - begins : end - begins]
            yield piece
            at += piece.nbytes
            number += 1
