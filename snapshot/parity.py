"""The parity that a node keeps of one version, in one slot of memory.

::

    record      whole pages: MAGIC, length, digest, the msgpack of a ParityRecord, zeros
    rows        one behind the other: chunks of parity, all of the same size, whole pages

The record says of which images the parity is, and the digest of every block of it.  It is written
last and taken away first, so that what has a sound record is whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated, Final, Literal

import msgspec

from ftrain.checkpoint.digest import DIGEST_BYTES, digest_of
from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.comms.errors import CorruptionError, MemoryShortError, StateError
from ftrain.comms.protocol.frames import DATA_BYTES_MAX
from ftrain.comms.protocol.messages import VersionId
from ftrain.comms.wire import BAD_INPUT
from ftrain.snapshot.erasure.code import ErasureCode
from ftrain.snapshot.protocol.placement import ParityGroup

FORMAT: Final = 2
MAGIC = b"FTPARTY\x01"
CODE: Final = "reed-solomon-gf256-0x11d"
BLOCK_BYTES = DATA_BYTES_MAX  # encoded, hashed and repaired at once, and one frame when it is sent
RECORD_BYTES_MAX = 64 * 1024 * 1024
_PREFIX = struct.Struct("<8sQ16s")

_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class ImageRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One rank's image that is protected."""

    rank: _Natural
    nbytes: _Natural
    digest: _Digest  # of its header, and through it of everything in it


class NodeRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All images of one node, in rising order of ranks."""

    node: _Natural
    images: tuple[ImageRow, ...]

    @property
    def nbytes(self) -> int:
        """Size of all of them."""
        return sum(image.nbytes for image in self.images)


class ParityRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One chunk of parity: row ``row`` of stripe ``stripe``."""

    stripe: _Natural
    row: _Natural
    blocks: bytes  # a digest of 16 bytes for each block


class ParityRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a slot of parity says about itself."""

    format: Literal[2] = FORMAT
    code: Literal["reed-solomon-gf256-0x11d"] = CODE
    run_id: str
    epoch: _Natural  # of the group that protected it
    round: _Natural
    version: VersionId
    holder: _Natural  # node
    incarnation: _Natural
    parity: Annotated[int, msgspec.Meta(ge=1, le=254)]
    chunk_bytes: Annotated[int, msgspec.Meta(ge=0, multiple_of=PAGE_BYTES, le=1 << 44)]
    nodes: tuple[NodeRow, ...]  # of the whole group, in its order
    rows: tuple[ParityRow, ...] = ()

    @property
    def group(self) -> ParityGroup:
        """The nodes that protect each other."""
        return ParityGroup(tuple(row.node for row in self.nodes), self.parity)

    @property
    def erasure_code(self) -> ErasureCode:
        """The code of its stripes."""
        return ErasureCode(self.group.data, self.parity)

    @property
    def blocks(self) -> int:
        """Blocks of a chunk; the last one may be shorter."""
        return -(-self.chunk_bytes // BLOCK_BYTES)

    @property
    def data_offset(self) -> int:
        """Where the first row begins."""
        return _record_bytes(self)

    @property
    def total_bytes(self) -> int:
        """What the slot needs."""
        return self.data_offset + self.chunk_bytes * len(self.rows)

    def of(self, node: int) -> NodeRow:
        """The images of one node of the group; StateError if it is none."""
        for row in self.nodes:
            if row.node == node:
                return row
        raise StateError(f"node {node} is not of the parity group {self.group.nodes}")

    def without_digests(self) -> ParityRecord:
        """The same for the rows that ``holder`` keeps, before any of them is there."""
        blank = bytes(DIGEST_BYTES * self.blocks)
        held = self.group.held_by(self.holder)
        return msgspec.structs.replace(
            self, rows=tuple(ParityRow(stripe, row, blank) for stripe, row in held)
        )

    def check(self) -> None:
        """StateError unless it can be true."""
        group = self.group
        if len(set(group.nodes)) != len(group.nodes) or group.data < 1:
            raise StateError(f"{len(group.nodes)} nodes can't have {self.parity} of parity")
        if self.holder not in group.nodes:
            raise StateError(f"node {self.holder}, which holds it, is not of the group")
        if [(row.stripe, row.row) for row in self.rows] != list(group.held_by(self.holder)):
            raise StateError(f"these are not the rows that node {self.holder} keeps")
        if any(len(row.blocks) != DIGEST_BYTES * self.blocks for row in self.rows):
            raise StateError("a row has another number of digests than of blocks")
        for node in self.nodes:
            ranks = [image.rank for image in node.images]
            if ranks != sorted(set(ranks)) or node.nbytes > self.chunk_bytes * group.data:
                raise StateError(f"the images of node {node.node} are not those of a stripe")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ParityRecord)


def encode_record(record: ParityRecord) -> bytes:
    """To be sent."""
    return _encoder.encode(record)


def decode_record(data: bytes, where: str = "what was sent") -> ParityRecord:
    """The record in ``data``; CorruptionError unless it is a possible one."""
    try:
        record = _decoder.decode(data)
        record.check()
    except BAD_INPUT as error:
        raise CorruptionError(f"{where} has an impossible record: {error}") from None
    return record


class ParityWriter:
    """Writes a node's parity into ``buffer``: every block of :attr:`rows`, then :meth:`seal`.

    Until then, and from now on, the buffer holds no parity.  Several threads may finish blocks of
    different rows.

    Raises:
        MemoryShortError: the buffer is too small.
    """

    def __init__(self, buffer: memoryview, record: ParityRecord) -> None:
        record = record.without_digests()
        record.check()
        if len(buffer) < record.total_bytes:
            raise MemoryShortError(
                f"the parity of step {record.version.step} needs {record.total_bytes} bytes, its "
                f"slot has {len(buffer)}"
            )
        self.record = record
        self._view = buffer[: record.total_bytes]
        self._view[:PAGE_BYTES] = bytes(PAGE_BYTES)
        size, first = record.chunk_bytes, record.data_offset
        self.rows = [self._view[first + n * size :][:size] for n in range(len(record.rows))]
        self._digests = [bytearray(row.blocks) for row in record.rows]

    def finish_block(self, row: int, block: int) -> None:
        """A block of :attr:`rows` is as it is to stay."""
        start = block * BLOCK_BYTES
        at = block * DIGEST_BYTES
        digest = digest_of(self.rows[row][start : start + BLOCK_BYTES])
        self._digests[row][at : at + DIGEST_BYTES] = digest

    def seal(self) -> ParityRecord:
        """Every block is finished: from now on it counts."""
        rows = tuple(
            msgspec.structs.replace(row, blocks=bytes(digests))
            for row, digests in zip(self.record.rows, self._digests, strict=True)
        )
        self.record = msgspec.structs.replace(self.record, rows=rows)
        body = _encoder.encode(self.record)
        end = _PREFIX.size + len(body)
        self._view[_PREFIX.size : end] = body
        self._view[end : self.record.data_offset] = bytes(self.record.data_offset - end)
        self._view[: _PREFIX.size] = _PREFIX.pack(MAGIC, len(body), digest_of(body))
        return self.record


class ParityReader:
    """Reads a node's parity in place.

    Raises:
        CorruptionError: there is none, or its record is torn.
    """

    def __init__(self, buffer: memoryview, where: str = "the parity") -> None:
        self.where = where
        self.record = _read_record(buffer, where)
        self._view = buffer[: self.record.total_bytes].toreadonly()
        if len(self._view) < self.record.total_bytes:
            raise CorruptionError(f"{where} has {len(buffer)} of {self.record.total_bytes} bytes")

    def row(self, stripe: int, row: int) -> memoryview:
        """A chunk of parity, not verified; StateError if it is not here."""
        for number, held in enumerate(self.record.rows):
            if (held.stripe, held.row) == (stripe, row):
                first = self.record.data_offset + number * self.record.chunk_bytes
                return self._view[first : first + self.record.chunk_bytes]
        raise StateError(f"{self.where} has no row {row} of stripe {stripe}")

    def damaged(self) -> Iterator[tuple[int, int]]:
        """``(number of the row, block)`` of everything that does not match its digest."""
        record = self.record
        for number, held in enumerate(record.rows):
            data = self.row(held.stripe, held.row)
            for block in range(record.blocks):
                at = block * DIGEST_BYTES
                piece = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                if digest_of(piece) != held.blocks[at : at + DIGEST_BYTES]:
                    yield number, block


def _record_bytes(record: ParityRecord) -> int:
    """Whole pages for the record; digests take as much before they are known."""
    size = _PREFIX.size + len(_encoder.encode(record))
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _read_record(buffer: memoryview, where: str) -> ParityRecord:
    if len(buffer) < PAGE_BYTES:
        raise CorruptionError(f"{where} has only {len(buffer)} bytes")
    magic, length, digest = _PREFIX.unpack_from(buffer)
    if magic != MAGIC or length > min(RECORD_BYTES_MAX, len(buffer) - _PREFIX.size):
        raise CorruptionError(f"{where} holds no parity: it is empty or torn")
    body = bytes(buffer[_PREFIX.size : _PREFIX.size + length])
    if digest_of(body) != digest:
        raise CorruptionError(f"{where} has a damaged record")
    return decode_record(body, where)
