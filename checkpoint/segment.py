"""The format of a durable file: one rank's share of one version, readable without ftrain.

::

    header      4096 bytes, the same in every file: MAGIC, a line for people, zeros
    chunks      each begins at a multiple of 4096 bytes; zeros up to the next one
    footer      JSON, at a multiple of 4096 bytes; zeros up to the trailer
    trailer     64 bytes, at the end of the file: where the footer is, and its digest

The chunks together, decoded and put one behind the other, are the *data* that the footer's tensors
lie in, and behind them the rank's small state (codec.py).  Everything is written in order, so that
a file can be streamed to where nothing can be changed afterwards.  docs/checkpoint_format.md
describes it byte by byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.codecs import RAW
from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.header import DATA_BYTES_MAX, PAGE_BYTES, SMALL_BYTES_MAX, ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Segment
from ftrain.comms.errors import CorruptionError, StateError
from ftrain.comms.protocol.messages import Share, VersionId
from ftrain.comms.wire import BAD_INPUT

FORMAT: Final = 2
MAGIC = b"FTSEGMT\x02"
_HEADER_TEXT = b"\nA segment of an ftrain checkpoint, format 2: the footer at its end is JSON.\n"
HEADER = (MAGIC + _HEADER_TEXT).ljust(PAGE_BYTES, b"\0")
TRAILER_BYTES = 64
FOOTER_BYTES_MAX = 128 * 1024 * 1024
CHUNK_BYTES_MAX = 64 * 1024 * 1024
_TRAILER = struct.Struct("<QQ16s24s8s")  # footer's place, its size, its digest, zeros, MAGIC

_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
_Shape = Annotated[tuple[_Natural, ...], msgspec.Meta(max_length=64)]


class ChunkRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One chunk: where it lies, and what it is once it is decoded."""

    at: _Natural  # in the file, a multiple of 4096
    stored: Annotated[int, msgspec.Meta(ge=1, le=2 * CHUNK_BYTES_MAX)]  # bytes in the file
    raw: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES_MAX)]  # bytes once decoded
    codec: str
    xxh3: _Digest  # xxh3-128 of the decoded bytes


class SliceRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A run of one tensor's bytes: of the box at ``origin``, in row-major order, ``nbytes`` from
    ``start`` on, at ``at`` in the data."""

    origin: _Shape
    shape: _Shape
    start: _Natural
    nbytes: _Natural
    at: _Natural
    share: str  # ranks that hold the same bytes
    owner: str = ""  # not empty: another rank's tensor of this name is another tensor


class TensorRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of one tensor lies in the file."""

    dtype: str
    shape: _Shape  # of the whole tensor, over all ranks
    slices: list[SliceRow]


class Footer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a file says about itself."""

    format: Literal[2] = FORMAT
    run_id: str
    topology: str
    epoch: _Natural
    step: _Natural
    rank: _Natural
    world_size: _Natural
    node: _Natural
    incarnation: Annotated[int, msgspec.Meta(ge=0)]
    collectives: int
    data_bytes: Annotated[int, msgspec.Meta(ge=0, le=DATA_BYTES_MAX)]
    chunk_bytes: Annotated[int, msgspec.Meta(ge=PAGE_BYTES, le=CHUNK_BYTES_MAX)]
    small_bytes: Annotated[int, msgspec.Meta(ge=0, le=SMALL_BYTES_MAX)]
    tensors: dict[str, TensorRow]
    shares: list[tuple[str, _Natural, _Natural, _Natural]]
    chunks: list[ChunkRow]  # of the data, then of the small state

    @property
    def data_chunks(self) -> int:
        """How many of the chunks are the data's."""
        return -(-self.data_bytes // self.chunk_bytes)

    @property
    def identity(self) -> ImageIdentity:
        """Whose state of which version this is; ``StateError`` for nonsense."""
        return ImageIdentity(
            self.run_id,
            self.topology,
            VersionId(self.epoch, self.step),
            self.rank,
            self.world_size,
            self.node,
            self.incarnation,
        )

    def plan(self) -> ImagePlan:
        """Which bytes of which tensor lie where in the data; ``StateError`` for nonsense."""
        segments = [
            Segment(
                name,
                tensor.dtype,
                row.shape,
                row.share,
                row.start,
                row.nbytes,
                Placement(tensor.shape, row.origin, row.owner),
                row.at,
            )
            for name, tensor in self.tensors.items()
            for row in tensor.slices
        ]
        # One without bytes may lie where the next one begins.
        segments.sort(key=lambda segment: (segment.offset, segment.nbytes))
        shares = tuple(Share(*share) for share in self.shares)
        return ImagePlan(tuple(segments), shares, 0, self.chunk_bytes)


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a file: footer, zeros, trailer."""

    content: bytes
    digest: str  # of the footer, and through it of everything in the file


def footer_of(
    identity: ImageIdentity,
    plan: ImagePlan,
    collectives: int,
    small_bytes: int,
    chunks: Iterable[ChunkRow],
) -> Footer:
    """The footer of a file that holds ``plan``'s data and a small state."""
    tensors: dict[str, TensorRow] = {}
    for s in plan.segments:
        row = tensors.get(s.name)
        if row is None:
            row = tensors[s.name] = TensorRow(s.dtype, s.place.shape, [])
        place = (s.place.origin, s.shape, s.start, s.nbytes, s.offset)
        row.slices.append(SliceRow(*place, s.share, s.place.owner))
    return Footer(
        run_id=identity.run_id,
        topology=identity.topology,
        epoch=identity.version.epoch,
        step=identity.version.step,
        rank=identity.rank,
        world_size=identity.world_size,
        node=identity.node,
        incarnation=identity.incarnation,
        collectives=collectives,
        data_bytes=plan.layout.data_bytes,
        chunk_bytes=plan.chunk_bytes,
        small_bytes=small_bytes,
        tensors=tensors,
        shares=[(s.key, s.node, s.part, s.parts) for s in plan.shares],
        chunks=list(chunks),
    )


def tail_of(footer: Footer, at: int) -> Tail:
    """The file's end, for a footer that begins at byte ``at``; makes the file whole pages long."""
    body = msgspec.json.encode(footer)
    if len(body) > FOOTER_BYTES_MAX:
        raise StateError(
            f"the list of tensors takes {len(body)} bytes, at most {FOOTER_BYTES_MAX} fit"
        )
    digest = digest_of(body)
    pad = -(len(body) + TRAILER_BYTES) % PAGE_BYTES
    trailer = _TRAILER.pack(at, len(body), digest, b"", MAGIC)
    return Tail(body + bytes(pad) + trailer, digest.hex())


def place_of_footer(trailer: bytes, file_bytes: int, where: str) -> tuple[int, int, bytes]:
    """Where the footer begins, its size and its digest, by the file's last 64 bytes.

    Raises:
        CorruptionError: these are not the last bytes of a segment file.
        StateError: of one in another format.
    """
    at, size, digest, zeros, magic = _TRAILER.unpack(trailer)
    if magic[:-1] == MAGIC[:-1] and magic[-1] > FORMAT:
        raise StateError(
            f"{where} is in format {magic[-1]}, this ftrain reads up to format {FORMAT}: use the "
            "ftrain that wrote it"
        )
    if magic != MAGIC or any(zeros):
        raise CorruptionError(f"{where} does not end as a segment file does: cut off, or none")
    end = at + size + -(size + TRAILER_BYTES) % PAGE_BYTES + TRAILER_BYTES
    if at % PAGE_BYTES or at < PAGE_BYTES or size > FOOTER_BYTES_MAX or end != file_bytes:
        raise CorruptionError(f"{where} has a trailer that contradicts the file's size")
    return at, size, digest


def decode_footer(body: bytes, at: int, where: str) -> Footer:
    """The footer in ``body``, which begins at byte ``at`` of the file, checked against itself.

    Raises:
        CorruptionError: not a footer, or one that describes an impossible file.
    """
    try:
        footer = msgspec.json.decode(body, type=Footer)
        _check_chunks(footer, at)
    except BAD_INPUT as error:  # StateError is a ValueError
        raise CorruptionError(f"{where} has an impossible footer: {error}") from None
    return footer


def _check_chunks(footer: Footer, end: int) -> None:
    """StateError unless the chunks lie one behind the other and add up to data and small state."""
    if footer.chunk_bytes % PAGE_BYTES or footer.data_bytes % PAGE_BYTES:
        raise StateError("its chunks are not whole pages")
    count = footer.data_chunks + -(-footer.small_bytes // footer.chunk_bytes)
    if len(footer.chunks) != count:  # before a list of so many is made
        raise StateError(f"it has {len(footer.chunks)} chunks, its sizes ask for {count}")
    sizes = cut(footer.data_bytes, footer.chunk_bytes)
    sizes += cut(footer.small_bytes, footer.chunk_bytes)
    if [chunk.raw for chunk in footer.chunks] != sizes:
        raise StateError("its chunks do not add up to its data")
    if any(chunk.codec == RAW and chunk.stored != chunk.raw for chunk in footer.chunks):
        raise StateError("a chunk that is stored as it is has another size there")
    at = PAGE_BYTES
    for chunk in footer.chunks:
        if chunk.at != at:
            raise StateError(f"a chunk lies at {chunk.at}, not at {at}")
        at += padded(chunk.stored)
    if at != end:
        raise StateError(f"the chunks end at {at}, the footer begins at {end}")


def cut(total: int, size: int) -> list[int]:
    """The sizes of the chunks that ``total`` bytes make."""
    full, rest = divmod(total, size)
    return [size] * full + [rest] * bool(rest)


def padded(nbytes: int) -> int:
    """The next multiple of 4096."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
