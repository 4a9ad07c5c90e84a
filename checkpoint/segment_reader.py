"""Reads a segment file chunk by chunk; nothing is handed out that does not match its digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import xxhash

from ftrain.checkpoint.codecs import codec_of
from ftrain.checkpoint.files import ReadableFile, page_buffer
from ftrain.checkpoint.header import PAGE_BYTES, ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Segment
from ftrain.checkpoint.scatter import Home, bring_home, interleaved
from ftrain.checkpoint.segment import (
    HEADER,
    TRAILER_BYTES,
    Footer,
    decode_footer,
    padded,
    place_of_footer,
)
from ftrain.comms.errors import CorruptionError, StateError
from ftrain.comms.protocol.messages import Share

_STRAIGHT_BYTES_MIN = 64 * 1024  # shorter runs are copied: a part of a read costs more than that


class Scratch:
    """Memory that one thread reads chunks into, used again and again: a chunk as it is stored,
    and one as it is decoded if that is something else."""

    def __init__(self) -> None:
        self._stored = memoryview(b"")
        self._raw = memoryview(b"")

    def stored(self, nbytes: int) -> memoryview:
        """Room for so many bytes, from the beginning of a page on."""
        if len(self._stored) < nbytes:
            self._stored = page_buffer(nbytes)
        return self._stored[:nbytes]

    def raw(self, nbytes: int) -> memoryview:
        """More room, apart from that."""
        if len(self._raw) < nbytes:
            self._raw = page_buffer(nbytes)
        return self._raw[:nbytes]


class SegmentReader:
    """One rank's share of one version in a file; thread-safe as long as each has its own scratch.

    Args:
        file: closed by :meth:`close`.
        digest: what the footer's digest has to be; None: whatever it is.

    Raises:
        CorruptionError: no segment file, cut off, or not the one that ``digest`` names.
        StateError: one in another format.
    """

    whole = True

    def __init__(self, file: ReadableFile, digest: str | None = None) -> None:
        self.where = file.where
        self._file = file
        try:
            self.footer, self.digest = _read_footer(file)
        except StateError as error:
            if digest is None:
                raise
            raise CorruptionError(f"not the file that its manifest names: {error}") from None
        if digest is not None and digest != self.digest:
            raise CorruptionError(f"{self.where} is not the file that its manifest names")
        try:
            self.plan: ImagePlan = self.footer.plan()
            self.identity: ImageIdentity = self.footer.identity
            if self.plan.layout.data_bytes != self.footer.data_bytes:
                raise StateError("its tensors do not end where its data do")
            self._codecs = [codec_of(chunk.codec) for chunk in self.footer.chunks]
        except StateError as error:
            raise CorruptionError(f"{self.where} has an impossible footer: {error}") from None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What lies in the data."""
        return self.plan.segments

    @property
    def shares(self) -> tuple[Share, ...]:
        """The rank's parts of the state that it holds in common with others."""
        return self.plan.shares

    @property
    def chunk_bytes(self) -> int:
        """Size of the data's chunks, but for the last."""
        return self.footer.chunk_bytes

    @property
    def chunks(self) -> int:
        """Number of the data's chunks."""
        return self.footer.data_chunks

    @property
    def packed(self) -> bool:
        """Whether chunks have to be decoded."""
        return any(codec is not None for codec in self._codecs)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._file.nbytes

    @property
    def small(self) -> bytes:
        """The rank's small state, verified; ``CorruptionError``."""
        scratch = Scratch()
        numbers = range(self.chunks, len(self.footer.chunks))
        return b"".join(bytes(self.read(number, scratch)) for number in numbers)

    def read(self, chunk: int, scratch: Scratch, *, verify: bool = True) -> memoryview:
        """The decoded bytes of a chunk; they stay until ``scratch`` is used again.

        Raises:
            CorruptionError: it can't be read or decoded, or (``verify``) its digest differs.
        """
        row = self.footer.chunks[chunk]
        codec = self._codecs[chunk]
        stored = scratch.stored(row.stored)
        if codec is None:
            self._read_plain(chunk, [stored], verify=verify)
            return stored
        self._file.read_into(row.at, [stored])
        raw = scratch.raw(row.raw)
        try:
            codec.decode(stored, raw)
        except CorruptionError as error:
            raise CorruptionError(f"{self._chunk(chunk)}: {error}") from None
        if verify:
            self._require(chunk, xxhash.xxh3_128_hexdigest(raw))
        return raw

    def read_into(
        self, chunk: int, homes: Sequence[Home], scratch: Scratch, *, verify: bool = True
    ) -> memoryview:
        """Have the bytes of a chunk that have a home there; what it returns is the chunk, of which
        only what has none counts.

        Long runs are read straight to their homes, and compared with the digest there: once this
        raises, nobody knows what the homes hold.  Nothing but the homes is written to.

        Raises:
            CorruptionError: as :meth:`read` raises.
        """
        row = self.footer.chunks[chunk]
        if self._codecs[chunk] is not None:
            data = self.read(chunk, scratch, verify=verify)
            bring_home(data, homes)
            return data
        data = scratch.stored(row.stored)
        straight = [home for home in homes if len(home.memory) >= _STRAIGHT_BYTES_MIN]
        self._read_plain(chunk, interleaved(straight, data), verify=verify)
        bring_home(data, [home for home in homes if len(home.memory) < _STRAIGHT_BYTES_MIN])
        return data

    def verify(self, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Compare every byte of the file; ``CorruptionError`` says what differs first.

        ``progress`` is told how many bytes more were read.
        """
        for error in self.damage(progress):
            raise error

    def damage(self, progress: Callable[[int], None]) -> Iterator[CorruptionError]:
        """Everything in the file that differs from what its footer says."""
        scratch = Scratch()
        header = scratch.stored(PAGE_BYTES)
        try:
            self._file.read_into(0, [header])
            if header != HEADER:
                yield CorruptionError(f"{self.where} has a damaged header: take another copy")
        except CorruptionError as error:
            yield error
        for number, row in enumerate(self.footer.chunks):
            try:
                self.read(number, scratch)
                pad = scratch.stored(padded(row.stored) - row.stored)
                self._file.read_into(row.at + row.stored, [pad])
                if any(pad):
                    yield CorruptionError(f"{self._chunk(number)} is followed by stray bytes")
            except CorruptionError as error:
                yield error
            progress(padded(row.stored))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _require(self, chunk: int, digest: str) -> None:
        if digest != self.footer.chunks[chunk].xxh3:
            raise CorruptionError(
                f"{self._chunk(chunk)} does not match its digest: take another copy"
            )

    def _read_plain(self, chunk: int, parts: Sequence[memoryview], *, verify: bool) -> None:
        """Fill ``parts`` with a chunk that is stored as it is."""
        at = self.footer.chunks[chunk].at
        if not verify:
            self._file.read_into(at, parts)
            return
        hasher = xxhash.xxh3_128()
        self._file.read_into(at, parts, hasher.update)
        self._require(chunk, hasher.hexdigest())

    def _chunk(self, number: int) -> str:
        what = f"chunk {number}" if number < self.chunks else "the small state"
        return f"{self.where}: {what}"


def _read_footer(file: ReadableFile) -> tuple[Footer, str]:
    """The footer and its digest, everything behind the chunks verified."""
    where = file.where
    if file.nbytes < PAGE_BYTES + TRAILER_BYTES or file.nbytes % PAGE_BYTES:
        raise CorruptionError(f"{where} has {file.nbytes} bytes: cut off, or no segment file")
    trailer = memoryview(bytearray(TRAILER_BYTES))
    file.read_into(file.nbytes - TRAILER_BYTES, [trailer])
    at, size, digest = place_of_footer(bytes(trailer), file.nbytes, where)
    rest = memoryview(bytearray(file.nbytes - TRAILER_BYTES - at))
    file.read_into(at, [rest])
    if xxhash.xxh3_128_digest(rest[:size]) != digest or any(rest[size:]):
        raise CorruptionError(f"{where} has a damaged footer: take another copy")
    return decode_footer(bytes(rest[:size]), at, where), digest.hex()
