"""What an image of one rank looks like: which bytes of which tensor lie where in its data."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from operator import attrgetter
from typing import Annotated

import msgspec

from ftrain.checkpoint.boxes import Box, Placement
from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.header import PAGE_BYTES, Layout
from ftrain.comms.errors import StateError
from ftrain.comms.protocol.messages import Share

ALIGNMENT_BYTES = 64
_Natural = Annotated[int, msgspec.Meta(ge=0)]
_Shape = Annotated[tuple[_Natural, ...], msgspec.Meta(max_length=64)]
_SegmentRow = tuple[str, str, _Shape, str, _Natural, _Natural, tuple[_Shape, _Shape, str], _Natural]
_ShareRow = tuple[str, _Natural, _Natural, _Natural]
_SHARE_ROW = attrgetter("key", "node", "part", "parts")
_index_decoder = msgspec.msgpack.Decoder(tuple[list[_SegmentRow], list[_ShareRow]])


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes of one tensor: ``[start, start + nbytes)`` of it, stored at ``offset``."""

    name: str
    dtype: str  # torch's name without the prefix: "float32", "bfloat16"
    shape: tuple[int, ...]  # of the rank's local tensor, C-contiguous
    share: str  # Share.key
    start: int  # first byte within the tensor; whole elements
    nbytes: int
    place: Placement  # of the rank's tensor in the global one
    offset: int = 0  # in the data, a multiple of 64

    @property
    def box(self) -> Box:
        """The part of the global tensor that the rank's tensor is."""
        return Box(self.place.origin, self.shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a segment that lies in one chunk: bytes of the tensor and their place."""

    segment: Segment
    start: int  # first byte within the tensor
    nbytes: int
    offset: int  # in the data


def lay_out(segments: Iterable[Segment], first: int = 0) -> tuple[Segment, ...]:
    """The same segments, one behind the other from ``first`` on: ``offset`` set, in multiples of
    64 bytes."""
    placed = []
    end = first
    for segment in segments:
        offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        placed.append(replace(segment, offset=offset))
        end = offset + segment.nbytes
    return tuple(placed)


@dataclass(frozen=True)
class ImagePlan:
    """What images of one rank look like; made once, used for every version.

    Args:
        segments: ordered by offset without overlap (see :func:`lay_out`).
        shares: every share that a segment names.
        small_bytes_max: room for the small section.
        chunk_bytes: size of the pieces that are hashed apart, whole pages.

    Raises:
        StateError: segments overlap or name an unknown share, or a limit is passed.
    """

    segments: tuple[Segment, ...]
    shares: tuple[Share, ...]
    small_bytes_max: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        """Check the segments against each other and the shares."""
        keys = {share.key for share in self.shares}
        for segment in self.segments:
            if segment.share not in keys:
                raise StateError(
                    f"segment {segment.name!r} is of the unknown share {segment.share!r}"
                )
            if not _is_possible(segment):
                raise StateError(f"segment {segment.name!r} has an impossible place: {segment}")
        for before, after in pairwise(self.segments):
            if before.offset + before.nbytes > after.offset:
                raise StateError(f"segments {before.name!r} and {after.name!r} overlap")

    @cached_property
    def index(self) -> bytes:
        """Segments and shares as msgpack."""
        segments = [_row(segment) for segment in self.segments]
        return msgspec.msgpack.encode((segments, [_SHARE_ROW(share) for share in self.shares]))

    @cached_property
    def layout(self) -> Layout:
        """Where everything lies."""
        end = max((segment.offset + segment.nbytes for segment in self.segments), default=0)
        data_bytes = -(-end // PAGE_BYTES) * PAGE_BYTES
        return Layout(len(self.index), self.small_bytes_max, data_bytes, self.chunk_bytes)

    @property
    def total_bytes(self) -> int:
        """Size of every image of this plan."""
        return self.layout.total_bytes

    @cached_property
    def _offsets(self) -> list[int]:
        return [segment.offset for segment in self.segments]

    def chunks_of(self, segment: Segment) -> range:
        """Numbers of the chunks that hold bytes of ``segment``."""
        if not segment.nbytes:
            return range(0)
        last = (segment.offset + segment.nbytes - 1) // self.chunk_bytes
        return range(segment.offset // self.chunk_bytes, last + 1)

    def pieces(self, chunk: int) -> list[Piece]:
        """What has to be copied into chunk number ``chunk``, in order; padding is left out."""
        start, stop = self.layout.chunk_range(chunk)
        pieces = []
        for segment in self.segments[max(0, bisect_right(self._offsets, start) - 1) :]:
            first, last = max(start, segment.offset), min(stop, segment.offset + segment.nbytes)
            if segment.offset >= stop:
                break
            if first < last:
                within = segment.start + first - segment.offset
                pieces.append(Piece(segment, within, last - first, first))
        return pieces


def decode_index(index: bytes | memoryview, small_bytes_max: int, chunk_bytes: int) -> ImagePlan:
    """The plan whose :attr:`ImagePlan.index` this is.

    Raises:
        msgspec.DecodeError, StateError: it is none.
    """
    segments, shares = _index_decoder.decode(index)
    return ImagePlan(
        tuple(_segment(row) for row in segments),
        tuple(Share(*row) for row in shares),
        small_bytes_max,
        chunk_bytes,
    )


def _is_possible(segment: Segment) -> bool:
    shape, place, item = segment.shape, segment.place, item_bytes(segment.dtype)
    start, nbytes, offset = segment.start, segment.nbytes, segment.offset
    if offset < 0 or offset % ALIGNMENT_BYTES or start % item or nbytes % item:
        return False
    if not 0 <= start <= start + nbytes <= prod(shape) * item:
        return False
    if place.shape == shape and not any(place.origin):  # the common case: all of the tensor
        return len(place.origin) == len(shape) and min(shape, default=0) >= 0
    return len(place.origin) == len(shape) == len(place.shape) and all(
        0 <= at <= at + size <= of
        for at, size, of in zip(place.origin, shape, place.shape, strict=True)
    )


def _row(segment: Segment) -> _SegmentRow:
    place = segment.place
    where = (place.shape, place.origin, place.owner)
    what = (segment.name, segment.dtype, segment.shape, segment.share)
    return (*what, segment.start, segment.nbytes, where, segment.offset)


def _segment(row: _SegmentRow) -> Segment:
    name, dtype, shape, share, start, nbytes, where, offset = row
    return Segment(name, dtype, shape, share, start, nbytes, Placement(*where), offset)
