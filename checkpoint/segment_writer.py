"""Writes segment files: a sealed image straight from memory, or anything chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrain.checkpoint.codecs import RAW, PlaneCodec
from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.files import NewFile, page_buffer
from ftrain.checkpoint.header import PAGE_BYTES, ImageIdentity
from ftrain.checkpoint.image import ImageReader
from ftrain.checkpoint.image_plan import ImagePlan
from ftrain.checkpoint.pace import Pace
from ftrain.checkpoint.segment import HEADER, ChunkRow, Tail, cut, footer_of, padded, tail_of
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.comms.errors import StateError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class RawFile:
    """What the file of a sealed image will be: known before anything is written.

    ``small`` is the image's small state; the data are not looked at.
    """

    reader: ImageReader
    small: bytes
    rows: tuple[ChunkRow, ...]
    tail: Tail

    @property
    def tail_at(self) -> int:
        """Where the footer begins."""
        return self.rows[-1].at + padded(self.rows[-1].stored) if self.rows else PAGE_BYTES

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.tail_at + len(self.tail.content)


def plan_file(reader: ImageReader) -> RawFile:
    """The file of a sealed image, its chunks as they are in memory.

    Raises:
        CorruptionError: the image's small state, index or table does not match its digest.
    """
    reader.verify_sections()
    small, layout = reader.small, reader.header.layout
    digests = [reader.chunk_digest(chunk).hex() for chunk in range(reader.chunks)]
    sizes = cut(layout.data_bytes, layout.chunk_bytes)
    for part in _parts(small, layout.chunk_bytes):
        digests.append(digest_of(part).hex())
        sizes.append(len(part))
    rows, at = [], PAGE_BYTES
    for size, digest in zip(sizes, digests, strict=True):
        rows.append(ChunkRow(at, size, size, RAW, digest))
        at += padded(size)
    footer = footer_of(reader.identity, reader.plan, reader.collectives, len(small), rows)
    return RawFile(reader, small, tuple(rows), tail_of(footer, at))


@dataclass(frozen=True, slots=True)
class RawCopy:
    """The file that has the content of another one, its chunks as they are in memory."""

    rows: tuple[ChunkRow, ...]
    tail: Tail
    tail_at: int

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.tail_at + len(self.tail.content)


def plan_copy(source: SegmentReader) -> RawCopy:
    """What ``copy_segment(source, …, compress=False)`` writes, but for the chunks themselves."""
    rows, at = [], PAGE_BYTES
    for chunk in source.footer.chunks:
        rows.append(ChunkRow(at, chunk.raw, chunk.raw, RAW, chunk.xxh3))
        at += padded(chunk.raw)
    footer = source.footer
    copy = footer_of(source.identity, source.plan, footer.collectives, footer.small_bytes, rows)
    return RawCopy(tuple(rows), tail_of(copy, at), at)


def write_file(planned: RawFile, file: NewFile, workers: Executor, pace: Pace) -> None:
    """Write all of it, from the image's memory; the file is not synced.

    Each chunk is compared with its digest before it is written, so that what went bad in memory
    does not become durable; one thread compares while another one writes.

    Raises:
        CorruptionError: a chunk of the image does not match its digest.
        OSError: as the file raises.
    """
    reader, chunks = planned.reader, planned.reader.chunks

    def write_chunk(chunk: int) -> None:
        reader.verify_chunk(chunk)
        start, stop = reader.header.layout.chunk_range(chunk)
        pace.wait(stop - start)
        file.write_at(planned.rows[chunk].at, reader.data[start:stop])

    file.write_at(0, HEADER)
    written: list[Future[None]] = []
    try:
        written.extend(workers.submit(write_chunk, number) for number in range(chunks))
        for chunk in written:
            chunk.result()
    finally:  # if one failed: nobody writes to the file any more when this is left
        for chunk in written:
            chunk.cancel()
        wait(written)
    parts = _parts(planned.small, reader.header.layout.chunk_bytes)
    for row, part in zip(planned.rows[chunks:], parts, strict=True):
        file.write_at(row.at, bytes(part).ljust(padded(len(part)), b"\0"))
    file.write_at(planned.tail_at, planned.tail.content)


class SegmentStream:
    """Writes a segment file in order, to where nothing can be changed afterwards.

    First the data's chunks by :meth:`add`, each of ``plan.chunk_bytes`` but for the last, then
    :meth:`finish`.  The result does not depend on where it goes.

    Args:
        write: takes the next bytes of the file.
        identity, plan, collectives: what the footer says.
        compress: whether chunks are stored as byte planes where that makes them smaller.
    """

    def __init__(
        self,
        write: Callable[[memoryview | bytes], object],
        identity: ImageIdentity,
        plan: ImagePlan,
        collectives: int = -1,
        *,
        compress: bool = False,
    ) -> None:
        self._write = write
        self._identity = identity
        self._plan = plan
        self._collectives = collectives
        self._compress = compress
        self._rows: list[ChunkRow] = []
        self._at = 0
        self._put(HEADER)

    def add(self, raw: memoryview) -> None:
        """The next chunk of the data."""
        width = _width(self._plan, len(self._rows)) if self._compress else 0
        self._add(raw, width if width and len(raw) % width == 0 else 0)

    def finish(self, small: bytes) -> tuple[str, int]:
        """The small state and the footer; returns the footer's digest and the file's size."""
        for part in _parts(small, self._plan.chunk_bytes):
            self._add(part, 1 if self._compress else 0)
        footer = footer_of(self._identity, self._plan, self._collectives, len(small), self._rows)
        tail = tail_of(footer, self._at)
        self._put(tail.content)
        return tail.digest, self._at

    def _add(self, raw: memoryview, width: int) -> None:
        stored: memoryview | bytes = raw
        name = RAW
        if width:
            codec = PlaneCodec(width)
            packed = codec.encode(raw)
            if len(packed) < len(raw):
                stored, name = packed, codec.name
        self._rows.append(ChunkRow(self._at, len(stored), len(raw), name, digest_of(raw).hex()))
        self._put(stored)
        self._put(bytes(padded(len(stored)) - len(stored)))

    def _put(self, data: memoryview | bytes) -> None:
        if len(data):
            self._write(data)
            self._at += len(data)


def write_parts(
    file: NewFile,
    identity: ImageIdentity,
    plan: ImagePlan,
    parts: Iterable[Buffer],
    small: bytes,
) -> tuple[str, int]:
    """Write a file from the bytes of each of the plan's segments, in order; returns its digest and
    size. No more than a chunk is kept; the file is not synced.

    Raises:
        StateError: a part has another size than its segment.
        OSError: as the file raises.
    """
    end = 0

    def append(data: memoryview | bytes) -> None:
        nonlocal end
        file.write_at(end, data)
        end += len(data)

    stream = SegmentStream(append, identity, plan)
    chunk = page_buffer(plan.chunk_bytes)[: plan.chunk_bytes]
    filled = 0
    for data in _data(plan, parts):
        while len(data):
            room = chunk[filled : filled + len(data)]
            room[:] = data[: len(room)]
            data = data[len(room) :]
            filled += len(room)
            if filled == len(chunk):
                stream.add(chunk)
                filled = 0
    if filled:
        stream.add(chunk[:filled])
    return stream.finish(small)


def _data(plan: ImagePlan, parts: Iterable[Buffer]) -> Iterator[memoryview]:
    """The parts, and the zeros between and behind them."""
    end = 0
    for segment, part in zip(plan.segments, parts, strict=True):
        data = memoryview(part).cast("B")
        if len(data) != segment.nbytes:
            raise StateError(
                f"{segment.name} has {len(data)} bytes, {segment.nbytes} were planned for it"
            )
        yield memoryview(bytes(segment.offset - end))
        yield data
        end = segment.offset + segment.nbytes
    yield memoryview(bytes(plan.layout.data_bytes - end))


def copy_segment(
    source: SegmentReader, write: Callable[[memoryview | bytes], object], *, compress: bool
) -> tuple[str, int]:
    """Write a file's content again, verified on the way; returns digest and size of the new file.

    Raises:
        CorruptionError: the source is damaged; what was written until then is of no use.
    """
    stream = SegmentStream(
        write, source.identity, source.plan, source.footer.collectives, compress=compress
    )
    scratch = Scratch()
    for chunk in range(source.chunks):
        stream.add(source.read(chunk, scratch))
    return stream.finish(source.small)


def _parts(small: bytes, chunk_bytes: int) -> Iterator[memoryview]:
    view = memoryview(small)
    for start in range(0, len(view), chunk_bytes):
        yield view[start : start + chunk_bytes]


def _width(plan: ImagePlan, chunk: int) -> int:
    """Bytes per number of most of a chunk."""
    by_width: dict[int, int] = {}
    for piece in plan.pieces(chunk):
        width = min(8, item_bytes(piece.segment.dtype))
        by_width[width] = by_width.get(width, 0) + piece.nbytes
    return max(by_width, key=lambda width: by_width[width], default=1)
