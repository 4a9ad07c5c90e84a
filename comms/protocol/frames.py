"""Frames of one authenticated byte stream, without I/O: bytes in, frames out.

Layout, little endian::

    0   u32  payload bytes
    4   u8   kind: 1 control, 2 data
    8   u64  sequence, counted per direction from 0
    16  u64  checksum of the payload (data), 0 (control)
    24  16 B tag: keyed BLAKE2b of bytes 0..24 and, for control, of the payload
    40       payload

A control frame is authenticated whole. A data frame's header is authenticated, its payload is only
checked against corruption: a MAC over bulk data would cost more CPU time than moving it does.
The checksum function is handed in, because xxh3 is not in the standard library.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ftrain.comms.errors import LocalProtocolError, RemoteProtocolError

CONTROL_BYTES_MAX = 8 * 1024 * 1024
DATA_BYTES_MAX = 2 * 1024 * 1024  # per frame; larger buffers travel as several
HEADER_BYTES = 40

_HEAD = struct.Struct("<IB3xQQ")
_TAG_BYTES = HEADER_BYTES - _HEAD.size
_CONTROL = 1
_DATA = 2

Checksum = Callable[[memoryview], int]


@dataclass(frozen=True, slots=True)
class ControlFrame:
    """One message's bytes."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class DataFrame:
    """``count`` bytes of bulk data now lie in the buffer that was expected."""

    count: int


class FrameSender:
    """Seals the frames of one direction."""

    def __init__(
        self, key: bytes, checksum: Checksum, *, control_bytes_max: int = CONTROL_BYTES_MAX
    ) -> None:
        self._key = key
        self._checksum = checksum
        self._control_bytes_max = control_bytes_max
        self._sequence = 0

    def control(self, payload: bytes) -> bytes:
        """Header and payload of a control frame; LocalProtocolError when it is too large."""
        if len(payload) > self._control_bytes_max:
            raise LocalProtocolError(
                f"a message of {len(payload)} bytes is over the limit of {self._control_bytes_max}"
                " bytes: send large things as data"
            )
        head = _HEAD.pack(len(payload), _CONTROL, self._next(), 0)
        return head + _tag(self._key, head, payload) + payload

    def data(self, payload: memoryview) -> bytes:
        """Header of a data frame; the caller sends ``payload`` right behind it, uncopied."""
        if not 0 < payload.nbytes <= DATA_BYTES_MAX:
            raise LocalProtocolError(
                f"a data frame carries 1 to {DATA_BYTES_MAX} bytes, not {payload.nbytes}"
            )
        head = _HEAD.pack(payload.nbytes, _DATA, self._next(), self._checksum(payload))
        return head + _tag(self._key, head)

    def _next(self) -> int:
        sequence = self._sequence
        self._sequence += 1
        return sequence


class FrameReceiver:
    """Opens the frames of one direction.

    The caller fills :meth:`next_buffer` (as much or as little as arrives) and reports the count
    to :meth:`advance`. Payloads of data frames go straight into the buffer of
    :meth:`expect_data`. After an error the stream has no meaning any more: close it.
    """

    def __init__(
        self, key: bytes, checksum: Checksum, *, control_bytes_max: int = CONTROL_BYTES_MAX
    ) -> None:
        self._key = key
        self._checksum = checksum
        self._control_bytes_max = control_bytes_max
        self._sequence = 0
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._payload: memoryview | None = None  # None: the header is being read
        self._wanted = self._header  # what is left to fill
        self._target: memoryview | None = None
        self._broken = False

    def expect_data(self, target: memoryview | None) -> None:
        """Data frames fill ``target`` (writable bytes) from its start; None forbids them."""
        self._target = target

    def next_buffer(self) -> memoryview:
        """Where the next bytes of the stream belong; never empty."""
        return self._wanted

    def advance(self, count: int) -> ControlFrame | DataFrame | None:
        """``count`` bytes were put into :meth:`next_buffer`; the frame that they complete.

        Raises :class:`RemoteProtocolError` for anything but the peer's next frame.
        """
        if self._broken or not 0 < count <= len(self._wanted):
            raise LocalProtocolError(f"{count} bytes can't be taken by this frame receiver")
        self._wanted = self._wanted[count:]
        if len(self._wanted):
            return None
        try:
            return self._open_header() if self._payload is None else self._open_payload()
        except RemoteProtocolError:
            self._broken = True
            raise

    def _open_header(self) -> ControlFrame | None:
        head = self._header[: _HEAD.size]
        length, kind, sequence, checksum = _HEAD.unpack(head)
        if kind == _CONTROL:
            if length > self._control_bytes_max:
                raise RemoteProtocolError(
                    f"a message of {length} bytes is over the limit of {self._control_bytes_max}"
                )
            self._payload = memoryview(bytearray(length))
        elif kind == _DATA:
            self._check_data(length, head)
            assert self._target is not None
            self._payload, self._target = self._target[:length], self._target[length:]
        else:
            raise RemoteProtocolError(f"unknown frame kind {kind}")
        if sequence != self._sequence:
            raise RemoteProtocolError(f"frame {sequence} came in place of {self._sequence}")
        if kind == _CONTROL and checksum != 0:
            raise RemoteProtocolError("a control frame carries a checksum")
        self._wanted = self._payload
        if length == 0:  # an empty control frame is complete already
            return self._open_control(head)
        return None

    def _check_data(self, length: int, head: memoryview) -> None:
        if self._target is None:
            raise RemoteProtocolError("bulk data came where a message was expected")
        if not 0 < length <= min(DATA_BYTES_MAX, self._target.nbytes):
            raise RemoteProtocolError(
                f"a data frame of {length} bytes came where {self._target.nbytes} are missing"
            )
        self._check_tag(head)

    def _open_payload(self) -> ControlFrame | DataFrame:
        assert self._payload is not None
        head = self._header[: _HEAD.size]
        length, kind, _, checksum = _HEAD.unpack(head)
        if kind == _CONTROL:
            return self._open_control(head)
        if self._checksum(self._payload) != checksum:
            raise RemoteProtocolError(f"{length} bytes of bulk data do not match their checksum")
        self._restart()
        return DataFrame(length)

    def _open_control(self, head: memoryview) -> ControlFrame:
        assert self._payload is not None
        self._check_tag(head, self._payload)
        frame = ControlFrame(bytes(self._payload))
        self._restart()
        return frame

    def _check_tag(self, head: memoryview, payload: memoryview | bytes = b"") -> None:
        if not hmac.compare_digest(_tag(self._key, head, payload), self._header[_HEAD.size :]):
            raise RemoteProtocolError("a frame's authentication tag is wrong")

    def _restart(self) -> None:
        self._sequence += 1
        self._payload = None
        self._wanted = self._header


def _tag(key: bytes, head: bytes | memoryview, payload: bytes | memoryview = b"") -> bytes:
    digest = hashlib.blake2b(head, key=key, digest_size=_TAG_BYTES)
    digest.update(payload)
    return digest.digest()
