"""The first page of an image: who wrote what, where it lies, and the digests of all of it.

The page holds two records.  The *begun* record is written before the data, the *sealed* record
after it, beside the first, so that a process killed while sealing leaves an image that can still be
finished.  Offsets follow from the sizes; they are stated all the same, for other readers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from ftrain.checkpoint.digest import DIGEST_BYTES, NO_DIGEST, digest_of
from ftrain.comms.errors import CorruptionError, StateError
from ftrain.comms.protocol.messages import VersionId

PAGE_BYTES = 4096
RECORD_BYTES = 2048  # half a page each
FORMAT = 2
MAGIC = b"FTRIMAGE"

TABLE_ENTRY_BYTES = DIGEST_BYTES + 1  # per chunk: its digest, and apart from it whether it is there
INDEX_BYTES_MAX = 16 * 1024 * 1024
SMALL_BYTES_MAX = 256 * 1024 * 1024
DATA_BYTES_MAX = 1 << 44
CHUNKS_MAX = 1 << 22

_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1
_INT64_MAX = 2**63 - 1

# magic, format, state, whole, run_id, topology; epoch, step, collectives, incarnation; rank,
# world_size, node; offset and size of index, table, small, data; small_bytes_max, chunk_bytes,
# total_bytes; digests of index, small, table.
_FIELDS = struct.Struct("<8sIII64s32sqqqQIIIQQQQQQQQQQQ16s16s16s")


class ImageState(IntEnum):
    """How far an image is."""

    WRITING = 1  # begun; data chunks may be missing
    SEALED = 2  # complete


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """Whose state of which version an image holds; ``StateError`` for values that do not fit."""

    run_id: str  # at most 64 bytes of UTF-8; "" for a script that runs alone
    topology: str  # hexadecimal digest of the model's and the group's shape, at most 32 characters
    version: VersionId
    rank: int
    world_size: int
    node: int
    incarnation: int  # of the agent whose node wrote it

    def __post_init__(self) -> None:
        """Refuse what the header can't hold."""
        fits = (
            len(self.run_id.encode("utf-8", "replace")) <= 64
            and self.run_id.isprintable()
            and len(self.topology) <= 32
            and all(character in "0123456789abcdef" for character in self.topology)
            and 0 <= self.version.epoch <= _INT64_MAX
            and 0 <= self.version.step <= _INT64_MAX
            and 0 <= self.rank < self.world_size <= _UINT32_MAX
            and 0 <= self.node <= _UINT32_MAX
            and 0 <= self.incarnation <= _UINT64_MAX
        )
        if not fits:
            raise StateError(f"{self} does not fit an image header: check run id, rank and numbers")


def _aligned(number: int, to: int) -> int:
    return -(-number // to) * to


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of an image lie, in bytes; ``StateError`` when beyond the limits.

    ``[header page][index][chunk table][small section, up to its limit][padding][data]``; the data
    begin and end at a page.
    """

    index_bytes: int
    small_bytes_max: int
    data_bytes: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        """Check the limits, so that nothing read from a damaged header grows without bound."""
        if not (
            0 <= self.index_bytes <= INDEX_BYTES_MAX
            and 0 <= self.small_bytes_max <= SMALL_BYTES_MAX
            and 0 <= self.data_bytes <= DATA_BYTES_MAX
            and self.data_bytes % PAGE_BYTES == 0
            and self.chunk_bytes >= PAGE_BYTES
            and self.chunk_bytes % PAGE_BYTES == 0
            and self.chunks <= CHUNKS_MAX
        ):
            raise StateError(
                f"{self} is not a possible image: at most {INDEX_BYTES_MAX} bytes of index, "
                f"{SMALL_BYTES_MAX} of small state, {DATA_BYTES_MAX} of data, chunks of whole pages"
            )

    @property
    def chunks(self) -> int:
        """Number of data chunks; the last one may be shorter."""
        return -(-self.data_bytes // self.chunk_bytes)

    @property
    def index_offset(self) -> int:
        """Where the index begins."""
        return PAGE_BYTES

    @property
    def table_offset(self) -> int:
        """Where the chunk table begins."""
        return _aligned(self.index_offset + self.index_bytes, 64)

    @property
    def table_bytes(self) -> int:
        """Size of the chunk table."""
        return self.chunks * TABLE_ENTRY_BYTES

    @property
    def small_offset(self) -> int:
        """Where the small section begins."""
        return _aligned(self.table_offset + self.table_bytes, 64)

    @property
    def data_offset(self) -> int:
        """Where the data begin."""
        return _aligned(self.small_offset + self.small_bytes_max, PAGE_BYTES)

    @property
    def total_bytes(self) -> int:
        """Size of the whole image."""
        return self.data_offset + self.data_bytes

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First byte of a chunk and the one behind its last, in the data; ``IndexError``."""
        if not 0 <= chunk < self.chunks:
            raise IndexError(f"chunk {chunk} of {self.chunks}")
        start = chunk * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.data_bytes)


@dataclass(frozen=True, slots=True)
class Header:
    """One record of the header page."""

    state: ImageState
    whole: bool  # False: the image holds the small section only
    identity: ImageIdentity
    collectives: int
    layout: Layout
    small_bytes: int
    index_digest: bytes
    small_digest: bytes
    table_digest: bytes = NO_DIGEST  # known once sealed

    def pack(self) -> bytes:
        """The record's bytes, ending in the digest of those before it."""
        who, where = self.identity, self.layout
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT,
            self.state,
            self.whole,
            who.run_id.encode(),
            who.topology.encode(),
            who.version.epoch,
            who.version.step,
            self.collectives,
            who.incarnation,
            who.rank,
            who.world_size,
            who.node,
            where.index_offset,
            where.index_bytes,
            where.table_offset,
            where.table_bytes,
            where.small_offset,
            self.small_bytes,
            where.data_offset,
            where.data_bytes,
            where.small_bytes_max,
            where.chunk_bytes,
            where.total_bytes,
            self.index_digest,
            self.small_digest,
            self.table_digest,
        )
        body = fields.ljust(RECORD_BYTES - DIGEST_BYTES, b"\0")
        return body + digest_of(body)

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the record, and through it of everything in the image."""
        return self.pack()[-DIGEST_BYTES:].hex()


def read_record(record: bytes, where: str) -> Header | None:
    """Header in ``record`` (2048 bytes); None when there is none or it is torn.

    Raises:
        StateError: written in another format than this version of ftrain reads.
    """
    magic, format_ = struct.unpack_from("<8sI", record)
    if magic != MAGIC:
        return None
    body, digest = record[:-DIGEST_BYTES], record[-DIGEST_BYTES:]
    if digest_of(body) != digest:
        if FORMAT < format_ < 256:  # a later format may keep its digest elsewhere
            raise _other_format(where, format_)
        return None
    if format_ != FORMAT:
        raise _other_format(where, format_)
    try:
        header = _unpack(body)
    except (StateError, ValueError) as error:
        raise CorruptionError(f"{where} has an impossible header: {error}") from None
    if header.pack() != record:  # offsets that do not follow from the sizes, bytes that should be 0
        raise CorruptionError(f"{where} has a header that contradicts itself: take another copy")
    return header


def sealed_header(image: memoryview, where: str) -> Header:
    """The header of a whole image, by itself: its index and what follows are not looked at.

    Raises:
        CorruptionError: there is none, or the image is cut off.
        StateError: the image is not sealed, or in another format.
    """
    cut = len(image) < PAGE_BYTES
    header = None if cut else read_record(bytes(image[RECORD_BYTES:PAGE_BYTES]), where)
    if header is None:
        raise CorruptionError(f"{where} has no valid seal: it is torn or not finished")
    if header.state is not ImageState.SEALED:
        raise StateError(f"{where} is not sealed")
    if len(image) < header.layout.total_bytes:
        raise CorruptionError(
            f"{where} has {len(image)} of {header.layout.total_bytes} bytes: it is cut off"
        )
    return header


def _other_format(where: str, format_: int) -> StateError:
    return StateError(
        f"{where} is in format {format_}, this ftrain reads format {FORMAT}: use the ftrain that "
        "wrote it"
    )


def _unpack(body: bytes) -> Header:
    """Fields of a record whose digest is right; ``ValueError`` (``StateError``) for nonsense."""
    field = _FIELDS.unpack_from(body)
    (_, _, state, whole, run_id, topology, epoch, step, collectives, incarnation) = field[:10]
    (rank, world_size, node, _, index_bytes, _, _, _, small_bytes) = field[10:19]
    (_, data_bytes, small_bytes_max, chunk_bytes, _, index_digest, small_digest) = field[19:26]
    if small_bytes > small_bytes_max or whole > 1:
        raise StateError("the small section is larger than its place")
    return Header(
        state=ImageState(state),
        whole=bool(whole),
        identity=ImageIdentity(
            run_id=run_id.rstrip(b"\0").decode(),
            topology=topology.rstrip(b"\0").decode(),
            version=VersionId(epoch, step),
            rank=rank,
            world_size=world_size,
            node=node,
            incarnation=incarnation,
        ),
        collectives=collectives,
        layout=Layout(index_bytes, small_bytes_max, data_bytes, chunk_bytes),
        small_bytes=small_bytes,
        index_digest=index_digest,
        small_digest=small_digest,
        table_digest=field[26],
    )
