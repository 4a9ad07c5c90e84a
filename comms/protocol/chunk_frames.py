"""Frames between neighbours of a ring, without I/O: a header of 48 bytes, and perhaps a chunk.

::

    0   u32  bytes of the chunk that follows
    4   u8   what it is (Word)
    5   u8   phase of the chunk
    6   u16  segment
    8   u16  tag of the operation
    10  u16  part of the operation
    12  u32  number of the operation
    16  u32  index of the chunk in its segment, or the word's number
    20  u64  sequence, counted per direction from 0
    28  u64  checksum of the chunk, or the word's value
    36  12 B tag: keyed BLAKE2b of bytes 0..36

As in :mod:`ftrain.comms.protocol.frames` the header is authenticated, the chunk is only checked
against corruption.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum

from ftrain.comms.errors import LocalProtocolError, RemoteProtocolError
from ftrain.comms.protocol.ring import OpId

HEADER_BYTES = 48
CHUNK_BYTES_MAX = 16 * 1024 * 1024

_HEAD = struct.Struct("<IBBHHHIIQQ")
_TAG_BYTES = HEADER_BYTES - _HEAD.size


_NONE = OpId(0, 0)


class Word(IntEnum):
    """What a frame is."""

    CHUNK = 1
    BEGUN = 2  # so many ranks to the left have begun the part
    DONE = 3  # so many ranks to the left have the whole result of the operation
    HALT = 4  # the ranks do not mean the same: nothing follows
    JOIN = 5  # the first on a lane: whose it is, and of which ring
    LEAVE = 6  # the last one of a rank that leaves in order


@dataclass(frozen=True, slots=True)
class Head:
    """A frame's header."""

    word: Word
    op: OpId = _NONE
    part: int = 0
    number: int = 0  # index of the chunk, or ranks
    phase: int = 0
    segment: int = 0
    value: int = 0  # checksum of the chunk, or a word's value
    nbytes: int = 0


class HeadSender:
    """Seals the headers of one direction."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sequence = 0

    def seal(self, head: Head) -> bytes:
        """The header's bytes; LocalProtocolError for what can't be one."""
        try:
            packed = _HEAD.pack(
                head.nbytes,
                head.word,
                head.phase,
                head.segment,
                head.op.tag,
                head.part,
                head.op.number,
                head.number,
                self._sequence,
                head.value,
            )
        except struct.error as error:
            raise LocalProtocolError(f"{head} can't be sent: {error}") from None
        self._sequence += 1
        return packed + _tag(self._key, packed)


class HeadReceiver:
    """Opens the headers of one direction, of which ``frames`` were opened before."""

    def __init__(self, key: bytes, frames: int = 0) -> None:
        self._key = key
        self._sequence = frames

    def open(self, header: bytes | bytearray | memoryview) -> Head:
        """The peer's next header; RemoteProtocolError for anything else."""
        packed = bytes(header[: _HEAD.size])
        if not hmac.compare_digest(_tag(self._key, packed), header[_HEAD.size :]):
            raise RemoteProtocolError("a frame's authentication tag is wrong")
        fields = _HEAD.unpack(packed)
        nbytes, word, phase, segment, tag, part, number, index, sequence, value = fields
        if sequence != self._sequence:
            raise RemoteProtocolError(f"frame {sequence} came in place of {self._sequence}")
        if nbytes > CHUNK_BYTES_MAX or (nbytes and word != Word.CHUNK):
            raise RemoteProtocolError(f"a frame of kind {word} announces {nbytes} bytes")
        self._sequence += 1
        try:
            op = OpId(tag, number)
            return Head(Word(word), op, part, index, phase, segment, value, nbytes)
        except ValueError as error:
            raise RemoteProtocolError(f"unknown frame: {error}") from None


def _tag(key: bytes, packed: bytes) -> bytes:
    return hashlib.blake2b(packed, key=key, digest_size=_TAG_BYTES).digest()
