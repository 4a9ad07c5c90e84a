"""One rank's share of one version, the same bytes in memory and on disk.

An image is ``[header page][index][chunk table][small section][padding][data]``.  The index says
which bytes of which tensor lie where in the data; the small section is an opaque blob (RNG,
counters, user objects; see codec.py); the data are hashed in chunks.  The writer marks each chunk
when it is complete, so that another process can finish the image of a killed one.  Nothing here
imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ftrain.checkpoint.digest import DIGEST_BYTES, digest_of
from ftrain.checkpoint.header import (
    PAGE_BYTES,
    RECORD_BYTES,
    Header,
    ImageIdentity,
    ImageState,
    Layout,
    read_record,
)
from ftrain.checkpoint.image_plan import ImagePlan, Segment, decode_index
from ftrain.checkpoint.scatter import Home, bring_home
from ftrain.comms.errors import CorruptionError, StateError
from ftrain.comms.protocol.messages import Held, Share
from ftrain.comms.wire import BAD_INPUT

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ImageWriter:
    """Writes one image into ``buffer``: :meth:`begin`, each chunk, :meth:`seal`.

    Chunks may be written and finished in any order and by several threads.

    Args:
        buffer: writable, at least ``plan.total_bytes``.
        plan: what the image looks like.
        identity: whose it is.
        collectives: collectives the rank had enqueued at this boundary; -1 unknown.
        whole: False for an image that holds the small section only.

    Raises:
        StateError: the buffer is too small or read-only.
    """

    def __init__(
        self,
        buffer: Buffer,
        plan: ImagePlan,
        identity: ImageIdentity,
        collectives: int = -1,
        *,
        whole: bool = True,
    ) -> None:
        view = memoryview(buffer).cast("B")
        if view.readonly or len(view) < plan.total_bytes:
            raise StateError(
                f"the slot of rank {identity.rank} has {len(view)} writable bytes, its image needs "
                f"{plan.total_bytes}: reserve memory for it first"
            )
        self.plan = plan
        self.identity = identity
        self.collectives = collectives
        self.whole = whole
        self._layout = plan.layout
        self._view = view[: plan.total_bytes]
        self._prepared: Header | None = None
        self._header: Header | None = None  # the one in the buffer

    @property
    def data(self) -> memoryview:
        """The data region; segments lie in it at their offsets."""
        return self._view[self._layout.data_offset :]

    @property
    def chunks(self) -> int:
        """Number of data chunks."""
        return self._layout.chunks

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First byte of a chunk and the one behind its last, in :attr:`data`."""
        return self._layout.chunk_range(chunk)

    def begin(self, small: Buffer) -> None:
        """:meth:`prepare` and :meth:`declare`."""
        self.prepare(small)
        self.declare()

    def prepare(self, small: Buffer) -> None:
        """Invalidate what the buffer held, then write all but the header and the data.

        What is written into the data, and expected of chunks, before :meth:`declare` is in every
        image that anybody can take for begun.

        Raises:
            StateError: ``small`` is larger than planned; nothing was written.
        """
        small_view = memoryview(small).cast("B")
        layout, view = self._layout, self._view
        if len(small_view) > layout.small_bytes_max:
            raise StateError(
                f"the small state of rank {self.identity.rank} has {len(small_view)} bytes, "
                f"{layout.small_bytes_max} were planned: plan a larger image"
            )
        self.abandon()
        index_end = layout.index_offset + layout.index_bytes
        view[layout.index_offset : index_end] = self.plan.index
        view[index_end : layout.small_offset] = bytes(layout.small_offset - index_end)
        small_end = layout.small_offset + len(small_view)
        view[layout.small_offset : small_end] = small_view
        view[small_end : layout.data_offset] = bytes(layout.data_offset - small_end)
        self._prepared = Header(
            state=ImageState.WRITING,
            whole=self.whole,
            identity=self.identity,
            collectives=self.collectives,
            layout=layout,
            small_bytes=len(small_view),
            index_digest=digest_of(self.plan.index),
            small_digest=digest_of(small_view),
        )

    def declare(self) -> None:
        """Say whose image this is: from now on another process can finish it.

        Raises:
            StateError: it was not prepared, or given up.
        """
        if self._prepared is None:
            raise StateError(f"the image of rank {self.identity.rank} is not prepared")
        self._view[:RECORD_BYTES] = self._prepared.pack()
        self._header = self._prepared

    @property
    def declared(self) -> bool:
        """Whether the buffer says whose image is in it."""
        return self._header is not None

    def abandon(self) -> None:
        """Make the buffer hold no image."""
        self._prepared = self._header = None
        self._view[:PAGE_BYTES] = bytes(PAGE_BYTES)

    def finish_chunk(self, chunk: int, digest: bytes | None = None) -> None:
        """Say that a chunk is complete; without ``digest`` its bytes are hashed in place."""
        start, stop = self._layout.chunk_range(chunk)
        digest = digest_of(self.data[start:stop]) if digest is None else digest
        at, flag = _entry(self._layout, chunk)
        self._view[at : at + DIGEST_BYTES] = digest
        self._view[flag] = 1  # apart and last: who is killed before it has not finished the chunk

    def digest(self, chunk: int) -> bytes:
        """A chunk's digest: of a finished one its own, else what is expected or zeros."""
        at, _ = _entry(self._layout, chunk)
        return bytes(self._view[at : at + DIGEST_BYTES])

    def expect(self, chunk: int, digest: bytes) -> None:
        """Say which digest a chunk is to have once it is finished, whoever finishes it."""
        at, _ = _entry(self._layout, chunk)
        self._view[at : at + DIGEST_BYTES] = digest

    def missing_chunks(self) -> list[int]:
        """Chunks that are not finished."""
        return _missing_chunks(self._view, self._layout)

    def seal(self) -> str:
        """Declare the image complete; returns the digest of its header.

        Raises:
            StateError: not begun, or chunks are missing.
        """
        missing = self.missing_chunks()
        if self._header is None or missing:
            what = (
                f"{len(missing)} of {self.chunks} chunks missing" if self._header else "not begun"
            )
            raise StateError(f"the image of rank {self.identity.rank} can't be sealed: {what}")
        table = self._view[self._layout.table_offset :][: self._layout.table_bytes]
        self._header = replace(self._header, state=ImageState.SEALED, table_digest=digest_of(table))
        sealed = self._header.pack()
        self._view[RECORD_BYTES:PAGE_BYTES] = sealed
        return sealed[-DIGEST_BYTES:].hex()

    def held(self) -> Held:
        """The inventory record of the image; ``StateError`` when it is not sealed."""
        if self._header is None or self._header.state is not ImageState.SEALED:
            raise StateError(f"the image of rank {self.identity.rank} is not sealed")
        return _held(self._header, self.plan.shares)


class ImageReader:
    """Reads an image in place; what it hands out is verified or says so.

    The header, the index and the chunk table are verified at once, the small section when it is
    asked for, the data by :meth:`verify` or :meth:`verify_chunk`.

    Args:
        buffer: the image, with or without unused bytes behind it; must outlive the reader.
        where: what the errors call it, such as a path.

    Raises:
        CorruptionError: no image, a torn header, or a digest that does not match.
        StateError: an image in another format.
    """

    def __init__(self, buffer: Buffer, *, where: str = "the image") -> None:
        view = memoryview(buffer).cast("B").toreadonly()
        if len(view) < PAGE_BYTES:
            raise CorruptionError(f"{where} has only {len(view)} bytes: it is cut off")
        begun = read_record(bytes(view[:RECORD_BYTES]), where)
        header = read_record(bytes(view[RECORD_BYTES:PAGE_BYTES]), where) or begun
        if header is None:
            raise CorruptionError(f"{where} has no valid header: it is empty, torn or no image")
        layout = header.layout
        if len(view) < layout.total_bytes:
            raise CorruptionError(
                f"{where} has {len(view)} of {layout.total_bytes} bytes: it is cut off"
            )
        self.where = where
        self.header = header
        self._view = view[: layout.total_bytes]
        self.plan = self._read_index()
        if self.state is ImageState.SEALED:
            self._check("chunk table", layout.table_offset, layout.table_bytes, header.table_digest)
            if self.missing_chunks():
                raise CorruptionError(f"{where} is sealed but lacks chunks: take another copy")

    @property
    def state(self) -> ImageState:
        """Whether the image is complete."""
        return self.header.state

    @property
    def identity(self) -> ImageIdentity:
        """Whose state of which version this is."""
        return self.header.identity

    @property
    def collectives(self) -> int:
        """Collectives the rank had enqueued at this boundary; -1 unknown."""
        return self.header.collectives

    @property
    def whole(self) -> bool:
        """False when the image holds the small section only."""
        return self.header.whole

    @property
    def packed(self) -> bool:
        """Whether chunks have to be decoded: never."""
        return False

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What lies in the data."""
        return self.plan.segments

    @property
    def shares(self) -> tuple[Share, ...]:
        """The rank's parts of the state that it holds in common with others."""
        return self.plan.shares

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the header, and through it of everything in the image."""
        return self.header.digest

    @property
    def total_bytes(self) -> int:
        """Size of the image."""
        return self.header.layout.total_bytes

    @property
    def chunks(self) -> int:
        """Number of data chunks."""
        return self.header.layout.chunks

    @property
    def raw(self) -> memoryview:
        """The whole image, read-only."""
        return self._view

    @property
    def data(self) -> memoryview:
        """The data region, read-only, not verified by itself."""
        return self._view[self.header.layout.data_offset :]

    @property
    def small(self) -> bytes:
        """The small section, verified; ``CorruptionError``."""
        offset, size = self.header.layout.small_offset, self.header.small_bytes
        return bytes(self._check("small section", offset, size, self.header.small_digest))

    def require(
        self,
        *,
        run_id: str | None = None,
        topology: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        state: ImageState | None = None,
    ) -> None:
        """Refuse an image that is not the expected one; None accepts anything.

        Raises:
            StateError: another run's, model's or rank's, or not in that state.
        """
        identity = self.identity
        for what, expected, found in (
            ("run", run_id, identity.run_id),
            ("model and group topology", topology, identity.topology),
            ("rank", rank, identity.rank),
            ("world size", world_size, identity.world_size),
            ("state", state and state.name, self.state.name),
        ):
            if expected is not None and expected != found:
                raise StateError(f"{self.where} is of {what} {found!r}, expected {expected!r}")

    def missing_chunks(self) -> list[int]:
        """Chunks that the writer did not finish."""
        return _missing_chunks(self._view, self.header.layout)

    def chunk_digest(self, chunk: int) -> bytes:
        """What the chunk table says about a chunk."""
        at, _ = _entry(self.header.layout, chunk)
        return bytes(self._view[at : at + DIGEST_BYTES])

    def segment_bytes(self, segment: Segment) -> memoryview:
        """The segment's bytes in place, read-only, not verified by itself."""
        layout = self.header.layout
        if segment.offset < 0 or segment.offset + segment.nbytes > layout.data_bytes:
            raise StateError(f"segment {segment.name!r} is not of {self.where}")
        return self.data[segment.offset : segment.offset + segment.nbytes]

    def verify_chunk(self, chunk: int) -> None:
        """Compare one chunk with its digest; ``CorruptionError`` names it."""
        layout = self.header.layout
        start, stop = layout.chunk_range(chunk)
        _, flag = _entry(layout, chunk)
        if self._view[flag] != 1:
            raise CorruptionError(f"{self.where} lacks chunk {chunk}: its writer was stopped")
        expected = self.chunk_digest(chunk)
        self._check(f"chunk {chunk}", layout.data_offset + start, stop - start, expected)

    def read(self, chunk: int, scratch: object = None, *, verify: bool = True) -> memoryview:
        """A chunk in place; ``CorruptionError`` if (``verify``) it does not match its digest."""
        if verify:
            self.verify_chunk(chunk)
        start, stop = self.header.layout.chunk_range(chunk)
        return self.data[start:stop]

    def read_into(
        self, chunk: int, homes: Sequence[Home], scratch: object = None, *, verify: bool = True
    ) -> memoryview:
        """Copy what has a home there, once it is verified; returns the chunk as :meth:`read`."""
        data = self.read(chunk, verify=verify)
        bring_home(data, homes)
        return data

    def verify(self) -> None:
        """Compare every byte with the digests; ``CorruptionError`` says what differs."""
        self.verify_sections()
        for chunk in range(self.chunks):
            self.verify_chunk(chunk)

    def verify_sections(self) -> None:
        """Compare everything but the data, which can follow chunk by chunk."""
        layout = self.header.layout
        begun = replace(self.header, state=ImageState.WRITING, table_digest=bytes(DIGEST_BYTES))
        if self._view[:RECORD_BYTES] != begun.pack():
            raise CorruptionError(f"{self.where} has a damaged header: take another copy")
        small_end = layout.small_offset + len(self.small)
        gaps = (
            (layout.index_offset + layout.index_bytes, layout.table_offset),
            (layout.table_offset + layout.table_bytes, layout.small_offset),
            (small_end, layout.data_offset),
        )
        for start, stop in gaps:
            if self._view[start:stop] != bytes(stop - start):
                raise CorruptionError(f"{self.where} has stray bytes between its sections")

    def _check(self, what: str, offset: int, size: int, digest: bytes) -> memoryview:
        part = self._view[offset : offset + size]
        if digest_of(part) != digest:
            raise CorruptionError(
                f"{self.where}: {what} does not match its digest: take another copy"
            )
        return part

    def _read_index(self) -> ImagePlan:
        layout = self.header.layout
        index = self._check(
            "index", layout.index_offset, layout.index_bytes, self.header.index_digest
        )
        try:
            plan = decode_index(index, layout.small_bytes_max, layout.chunk_bytes)
            contradicts = plan.layout != layout
        except BAD_INPUT as error:  # StateError is a ValueError
            raise CorruptionError(f"{self.where} has an impossible index: {error}") from None
        if contradicts:
            raise CorruptionError(f"{self.where} has an index that contradicts its header")
        return plan


def resume_writer(buffer: Buffer, *, where: str = "the image") -> ImageWriter:
    """A writer for the image that a killed process left unfinished in ``buffer``.

    Fill :meth:`ImageWriter.missing_chunks`, then seal.

    Raises:
        CorruptionError: no image was begun, or it is torn.
        StateError: it is sealed already.
    """
    reader = ImageReader(buffer, where=where)
    reader.require(state=ImageState.WRITING)
    writer = ImageWriter(
        buffer, reader.plan, reader.identity, reader.collectives, whole=reader.whole
    )
    writer._header = reader.header
    return writer


def small_image(reader: ImageReader) -> bytes:
    """A sealed image with the same identity and shares that holds the small section only.

    The shares stay, so that whoever plans a restore knows which tensors the rank needs.
    """
    small = reader.small
    plan = ImagePlan((), reader.shares, small_bytes_max=len(small), chunk_bytes=PAGE_BYTES)
    buffer = bytearray(plan.total_bytes)
    writer = ImageWriter(buffer, plan, reader.identity, reader.collectives, whole=False)
    writer.begin(small)
    writer.seal()
    return bytes(buffer)


def held_of(reader: ImageReader) -> Held:
    """The inventory record of a sealed image; ``StateError`` when it is not sealed."""
    reader.require(state=ImageState.SEALED)
    return _held(reader.header, reader.shares)


def _held(header: Header, shares: tuple[Share, ...]) -> Held:
    return Held(
        version=header.identity.version,
        rank=header.identity.rank,
        digest=header.digest if header.whole else header.small_digest.hex(),
        shares=shares,
        whole=header.whole,
        collectives=header.collectives,
    )


def _entry(layout: Layout, chunk: int) -> tuple[int, int]:
    """Offsets of a chunk's digest and of its flag; all digests come first, then all flags."""
    at = layout.table_offset + chunk * DIGEST_BYTES
    return at, layout.table_offset + layout.chunks * DIGEST_BYTES + chunk


def _missing_chunks(view: memoryview, layout: Layout) -> list[int]:
    flags = layout.table_offset + layout.chunks * DIGEST_BYTES
    return [i for i, flag in enumerate(view[flags : flags + layout.chunks]) if flag != 1]
