"""Which chunk goes where in a ring of ranks, without moving a byte.

A collective cuts its elements into one *segment* for each rank of the ring, and every segment into
the same number of *chunks* (some of which may be empty).  Chunks travel to the right only:

* *reduce*: segment ``s`` starts at rank ``s + 1`` with that rank's own elements; every rank adds
  its own, and rank ``s``, the segment's owner, is the last.  So the order of the sum is fixed by
  the ring alone, whatever arrives when, and all ranks get the same bits.
* *gather*: the owner's chunk goes round until it is everywhere.

``all_reduce`` is both, ``reduce_scatter`` the first, ``all_gather`` the second, ``broadcast`` a
gather of segments that all belong to one rank.

What a rank puts into the ring is limited by what it takes out (:meth:`RingOperation.takes_out`), so
that the ring's buffers can't fill up and wait for each other: with one buffer more on each link
than chunks that a rank may have started, one is always free (bubble flow control, Puente et al.,
ICPP 1999).  Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", JPDC 2009.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class Kind(IntEnum):
    """What a collective does."""

    ALL_REDUCE = 1
    REDUCE_SCATTER = 2
    ALL_GATHER = 3
    BROADCAST = 4


class Phase(IntEnum):
    """What a chunk on its way holds."""

    REDUCE = 1  # a sum of some ranks' elements
    GATHER = 2  # the result
    SPENT = 3  # nothing: it has been everywhere, and its broadcaster may start another one


@dataclass(frozen=True, slots=True, order=True)
class OpId:
    """An operation: its tag, and how many with that tag were before it."""

    tag: int
    number: int


@dataclass(frozen=True, slots=True, order=True)
class ChunkId:
    """One chunk of a part of an operation."""

    segment: int
    index: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How the elements of an operation are cut.

    Args:
        count: elements, of what is reduced or of the whole that is gathered.
        ranks: of the ring.
        chunk_elements: of a chunk at most.
    """

    count: int
    ranks: int
    chunk_elements: int

    @property
    def chunks(self) -> int:
        """Of every segment, empty ones included."""
        longest = -(-self.count // self.ranks)
        return max(1, -(-longest // self.chunk_elements))

    def segment(self, number: int) -> tuple[int, int]:
        """First element of a segment, and the one behind its last; the first ones are longer."""
        size, longer = divmod(self.count, self.ranks)
        start = number * size + min(number, longer)
        return start, start + size + (number < longer)

    def ids(self) -> list[ChunkId]:
        """All chunks, in order."""
        return [
            ChunkId(segment, index) for segment in range(self.ranks) for index in range(self.chunks)
        ]

    def chunk(self, chunk: ChunkId) -> tuple[int, int]:
        """First element of a chunk, and the one behind its last."""
        start, stop = self.segment(chunk.segment)
        first = min(stop, start + chunk.index * self.chunk_elements)
        return first, min(stop, first + self.chunk_elements)


class Do(IntEnum):
    """What a rank does with a chunk that came."""

    ADD_AND_SEND = 1  # add its own elements to what came, send that
    ADD_AND_KEEP = 2  # the same, and that is the result: keep it
    ADD_KEEP_AND_SEND = 3  # the same, and send the result
    KEEP = 4  # the result has arrived
    KEEP_AND_SEND = 5  # the same, and it has further to go
    KEEP_AND_TELL = 6  # the same, and send the root what says that it is spent
    NOTHING = 7


@dataclass(slots=True)
class RingOperation:
    """One rank's part in a collective: what to do with every chunk that comes, and when it is over.

    Raises ValueError for a chunk that can't come now: twice, or never in this ring.
    """

    kind: Kind
    rank: int
    layout: Layout
    root: int = 0  # of a broadcast
    _to_start: deque[ChunkId] = field(init=False)
    _awaited: set[tuple[Phase, ChunkId]] = field(init=False)

    def __post_init__(self) -> None:
        self._to_start = deque(
            ChunkId(segment, index)
            for index in range(self.layout.chunks)
            for segment in self._starts()
        )
        self._awaited = {
            (phase, ChunkId(segment, index))
            for phase in Phase
            for segment in self._arrivals(phase)
            for index in range(self.layout.chunks)
        }

    @property
    def done(self) -> bool:
        """Whether everything was started and has arrived."""
        return not self._to_start and not self._awaited

    def holds(self, chunk: ChunkId) -> bool:
        """Whether a chunk of the whole result is here; never of a result that is only parts."""
        if self.kind is Kind.REDUCE_SCATTER:
            return False
        own = self.rank == self._owner(chunk.segment)
        phase = Phase.REDUCE if own and self.kind is Kind.ALL_REDUCE else Phase.GATHER
        return (phase, chunk) not in self._awaited

    @property
    def left_to_start(self) -> int:
        """Chunks that this rank has yet to put into the ring."""
        return len(self._to_start)

    def start(self) -> tuple[Phase, ChunkId]:
        """Put the next chunk of one's own into the ring."""
        return self._first_phase(), self._to_start.popleft()

    def arrived(self, phase: Phase, chunk: ChunkId) -> Do:
        """A chunk has come from the left, and is here as a whole."""
        do = self.do_with(phase, chunk)
        self._awaited.remove((phase, chunk))
        return do

    def do_with(self, phase: Phase, chunk: ChunkId) -> Do:
        """What to do with a chunk that is coming from the left."""
        if phase is Phase.GATHER and (Phase.REDUCE, chunk) in self._awaited:
            raise ValueError(f"the result of {chunk} is not awaited before its sum came here")
        if (phase, chunk) not in self._awaited:
            raise ValueError(f"chunk {chunk} of phase {phase} is not awaited")
        if phase is Phase.SPENT:
            return Do.NOTHING
        if phase is Phase.GATHER:
            if not self._ends_here(chunk):
                return Do.KEEP_AND_SEND
            return Do.KEEP_AND_TELL if self.kind is Kind.BROADCAST else Do.KEEP
        if chunk.segment != self.rank:
            return Do.ADD_AND_SEND
        return Do.ADD_AND_KEEP if self.takes_out(phase, chunk) else Do.ADD_KEEP_AND_SEND

    def takes_out(self, phase: Phase, chunk: ChunkId) -> bool:
        """Whether a chunk that arrived goes no further: then another one may be started."""
        if phase is Phase.GATHER:
            return self._ends_here(chunk) and self.kind is not Kind.BROADCAST
        if phase is Phase.SPENT:
            return True
        return chunk.segment == self.rank and self.kind is Kind.REDUCE_SCATTER

    @property
    def _is_root(self) -> bool:
        return self.kind is Kind.BROADCAST and self.rank == self.root

    def _ends_here(self, chunk: ChunkId) -> bool:
        """Whether the next rank is the one whose result it is."""
        return (self.rank + 1) % self.layout.ranks == self._owner(chunk.segment)

    def _first_phase(self) -> Phase:
        reduces = self.kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)
        return Phase.REDUCE if reduces else Phase.GATHER

    def _owner(self, segment: int) -> int:
        return self.root if self.kind is Kind.BROADCAST else segment

    def _starts(self) -> tuple[int, ...]:
        """Segments that this rank puts into the ring."""
        ranks = self.layout.ranks
        if ranks == 1:
            return ()
        if self.kind is Kind.BROADCAST:
            return tuple(range(ranks)) if self._is_root else ()
        if self.kind is Kind.ALL_GATHER:
            return (self.rank,)
        return ((self.rank - 1) % ranks,)

    def _arrivals(self, phase: Phase) -> tuple[int, ...]:
        """Segments that come from the left in a phase."""
        ranks = self.layout.ranks
        if ranks == 1:
            return ()
        if phase is Phase.SPENT:
            return tuple(range(ranks)) if self._is_root else ()
        if self._is_root:
            return ()
        if phase is Phase.REDUCE:
            if self._first_phase() is Phase.GATHER:
                return ()
            return tuple(s for s in range(ranks) if s != (self.rank - 1) % ranks)
        if self.kind is Kind.REDUCE_SCATTER:
            return ()
        return tuple(s for s in range(ranks) if self._owner(s) != self.rank)


@dataclass(slots=True)
class MendOperation:
    """One rank's part in passing on a result that the ranks hold between them.

    Args:
        ranks: of the present ring; the result may be one of another.
        sources: the rank that passes a chunk on, for each chunk that somebody lacks, in order.
        lacks: the chunks of those that this rank lacks.
    """

    rank: int
    ranks: int
    sources: Mapping[ChunkId, int]
    lacks: set[ChunkId]
    _to_start: deque[ChunkId] = field(init=False)
    _awaited: set[tuple[Phase, ChunkId]] = field(init=False)

    def __post_init__(self) -> None:
        own = [chunk for chunk, source in self.sources.items() if source == self.rank]
        self._to_start = deque(own)
        self._awaited = {
            (Phase.SPENT if source == self.rank else Phase.GATHER, chunk)
            for chunk, source in self.sources.items()
        }

    @property
    def done(self) -> bool:
        """Whether everything was started and has arrived."""
        return not self._to_start and not self._awaited

    def holds(self, chunk: ChunkId) -> bool:
        """Whether the chunk is here."""
        return chunk not in self.lacks

    @property
    def left_to_start(self) -> int:
        """Chunks that this rank has yet to put into the ring."""
        return len(self._to_start)

    def start(self) -> tuple[Phase, ChunkId]:
        """Put the next chunk into the ring."""
        return Phase.GATHER, self._to_start.popleft()

    def arrived(self, phase: Phase, chunk: ChunkId) -> Do:
        """A chunk has come from the left, and is here as a whole."""
        do = self.do_with(phase, chunk)
        self._awaited.remove((phase, chunk))
        self.lacks.discard(chunk)
        return do

    def do_with(self, phase: Phase, chunk: ChunkId) -> Do:
        """What to do with a chunk that is coming; ValueError for one that can't come now."""
        if (phase, chunk) not in self._awaited:
            raise ValueError(f"chunk {chunk} of phase {phase} is not awaited")
        if phase is Phase.SPENT:
            return Do.NOTHING
        last = (self.rank + 1) % self.ranks == self.sources[chunk]
        return Do.KEEP_AND_TELL if last else Do.KEEP_AND_SEND

    def takes_out(self, phase: Phase, chunk: ChunkId) -> bool:
        """Whether a chunk that arrived goes no further: then another one may be started."""
        return phase is Phase.SPENT
