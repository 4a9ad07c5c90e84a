"""What a rank brings into a collective, and which of its bytes a chunk is."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ftrain.comms.collectives.arithmetic import Arithmetic
from ftrain.comms.collectives.quantise import Quantisation
from ftrain.comms.errors import FtrainError, UsageError
from ftrain.comms.protocol.ring import ChunkId, Kind, Layout


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank brings into a collective.

    ``source`` and ``target`` are bytes: of all elements, or of the rank's own segment where a
    collective takes or leaves only that.  They may be the same memory; what an all-reduce
    overwrites then is first copied to ``backup``, if that is given (as long as the target), so that
    it can be put back.  The root of a broadcast gives a source only, the others a target.
    """

    kind: Kind
    count: int  # elements of the whole
    itemsize: int
    source: memoryview
    target: memoryview
    arithmetic: Arithmetic | None = None
    root: int = 0
    quantise: Quantisation | None = None  # of an all-reduce that is a sum or an average
    priority: int = 0  # chunks of what has a higher one are put into the ring first
    backup: memoryview | None = None

    @property
    def in_place(self) -> bool:
        """Whether the result takes the inputs' place."""
        return self.backup is not None and self.kind is Kind.ALL_REDUCE

    def meaning(self) -> str:
        """What has to be equal on all ranks, in words."""
        same = (self.kind, self.count, self.itemsize, self.root, self.arithmetic, self.quantise)
        return repr(same)

    def check(self, rank: int, layout: Layout, chunk_bytes: int) -> None:
        """Raises UsageError for what can't be a collective."""
        reduces = self.kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)
        if reduces and self.arithmetic is None:
            raise UsageError("a reduction needs to know how chunks are combined")
        if not 0 <= self.root < layout.ranks:
            raise UsageError(f"there is no rank {self.root} in a ring of {layout.ranks}")
        if self.itemsize > chunk_bytes:
            raise UsageError(f"an element of {self.itemsize} bytes is larger than a chunk")
        start, stop = layout.segment(rank)
        takes = stop - start if self.kind is Kind.ALL_GATHER else self.count
        leaves = stop - start if self.kind is Kind.REDUCE_SCATTER else self.count
        gives_only = self.kind is Kind.BROADCAST and rank == self.root
        takes_only = self.kind is Kind.BROADCAST and rank != self.root
        if not takes_only and self.source.nbytes != takes * self.itemsize:
            raise UsageError(f"the source has {self.source.nbytes} bytes, not {takes} elements")
        if not gives_only and (
            self.target.nbytes != leaves * self.itemsize or self.target.readonly
        ):
            raise UsageError(
                f"the target has to be writable and to have {leaves} elements: it has "
                f"{self.target.nbytes} bytes"
            )

    def keep_own(self, rank: int, layout: Layout) -> None:
        """Put into the target what no chunk brings."""
        if self.kind is Kind.ALL_GATHER:
            start, stop = layout.segment(rank)
            self.target[start * self.itemsize : stop * self.itemsize] = self.source
        elif layout.ranks == 1 and self.kind is not Kind.BROADCAST:
            self.target[:] = self.source

    def source_of(self, rank: int, layout: Layout, chunk: ChunkId) -> memoryview:
        """The rank's own elements of a chunk; what it has of a result, if it broadcasts that."""
        only_own = self.kind is Kind.ALL_GATHER
        start, stop = self._range(rank, layout, chunk, only_own)
        return self.source[start:stop]

    def target_of(self, rank: int, layout: Layout, chunk: ChunkId) -> memoryview:
        """Where the result of a chunk goes."""
        start, stop = self.target_range(rank, layout, chunk)
        return self.target[start:stop]

    def target_range(self, rank: int, layout: Layout, chunk: ChunkId) -> tuple[int, int]:
        """The bytes of the target that are a chunk's."""
        return self._range(rank, layout, chunk, self.kind is Kind.REDUCE_SCATTER)

    def held_of(self, rank: int, layout: Layout, chunk: ChunkId) -> memoryview:
        """A chunk of the result that is here: the root of a broadcast has it in its source."""
        if self.kind is Kind.BROADCAST and not self.target.nbytes:
            return self.source_of(rank, layout, chunk)
        return self.target_of(rank, layout, chunk)

    def _range(self, rank: int, layout: Layout, chunk: ChunkId, only_own: bool) -> tuple[int, int]:
        start, stop = layout.chunk(chunk)
        first = layout.segment(rank)[0] if only_own else 0
        return (start - first) * self.itemsize, (stop - first) * self.itemsize


class Handle:
    """A collective that is under way."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.error: FtrainError | None = None  # that :meth:`wait` raises

    @property
    def over(self) -> bool:
        """Whether :meth:`wait` would return or raise at once."""
        return self._over.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return once every rank has the result.

        Raises what ended the collective, or TimeoutError, after which one may wait again.
        """
        if not self._over.wait(timeout_s):
            raise TimeoutError(f"the collective is not over after {timeout_s} s")
        if self.error is not None:
            raise type(self.error)(*self.error.args)

    def end(self, error: FtrainError | None = None) -> None:
        """The collective is over."""
        self.error = error
        self._over.set()
