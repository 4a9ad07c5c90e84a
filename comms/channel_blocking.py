"""The blocking twin of :class:`ftrain.comms.channel.Channel`, for ranks and tools."""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any

import xxhash

from ftrain.comms import wire
from ftrain.comms.addresses import parse_address, tune
from ftrain.comms.bulk import limit_window
from ftrain.comms.errors import FtrainError, PeerLostError, ProtocolError, RemoteProtocolError
from ftrain.comms.protocol.frames import (
    DATA_BYTES_MAX,
    ControlFrame,
    DataFrame,
    FrameReceiver,
    FrameSender,
)
from ftrain.comms.protocol.handshake import (
    NONCE_BYTES,
    Agreement,
    ClientHandshake,
    Handshake,
    Identity,
)


class BlockingChannel:
    """One authenticated connection, for one thread. Closes itself as a context manager.

    Every call raises :class:`PeerLostError` when the peer is gone or nothing moved for the
    timeout (in the middle of a frame for up to twice as long), :class:`RemoteProtocolError` for
    garbage; the channel is then closed.
    """

    def __init__(self, sock: socket.socket, agreement: Agreement, timeout_s: float) -> None:
        """Take over a socket on which the handshake is done."""
        self.peer = agreement.peer
        self._socket = sock
        # The kernel waits, not Python, which would poll before every call and take what is there:
        # so a frame is one call, with one release of the interpreter lock.
        sock.setblocking(True)
        limit_window(sock, socket.SO_RCVBUF)
        self.settimeout(timeout_s)
        self._sender = FrameSender(agreement.send_key, xxhash.xxh3_64_intdigest)
        self._receiver = FrameReceiver(agreement.receive_key, xxhash.xxh3_64_intdigest)
        self._backlog: deque[Any] = deque()

    def send(self, message: object) -> None:
        """Send one message."""
        self._send(memoryview(self._sender.control(wire.encode(message))))

    def receive(self) -> Any:
        """The next message."""
        if self._backlog:
            return self._backlog.popleft()
        frame = self._next_frame()
        assert isinstance(frame, ControlFrame)  # no data is expected, so the receiver refuses it
        return self._decode(frame)

    def send_data(self, buffer: bytes | bytearray | memoryview) -> None:
        """Send bulk data, uncopied."""
        view = memoryview(buffer).cast("B")
        for start in range(0, view.nbytes, DATA_BYTES_MAX):
            chunk = view[start : start + DATA_BYTES_MAX]
            self._send(memoryview(self._sender.data(chunk)), chunk)

    def receive_into(self, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` with the peer's bulk data; messages between its frames are kept."""
        view = memoryview(buffer).cast("B")
        missing = view.nbytes
        self._receiver.expect_data(view)
        while missing:
            frame = self._next_frame()
            if isinstance(frame, DataFrame):
                missing -= frame.count
            else:
                self._backlog.append(self._decode(frame))
        self._receiver.expect_data(None)

    def settimeout(self, timeout_s: float) -> None:
        """How long a call may wait without anything moving."""
        self._timeout_s = timeout_s
        try:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, _timeval(timeout_s))
        except OSError as error:
            self._lose(error)

    def fileno(self) -> int:
        """The descriptor, for select; -1 once closed."""
        return self._socket.fileno()

    def interrupt(self) -> None:
        """End the connection under another thread's call, which raises :class:`PeerLostError`."""
        with suppress(OSError):  # it is closed, or the peer has gone
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> BlockingChannel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, *views: memoryview) -> None:
        queue = deque(views)
        try:
            while queue:
                count = self._socket.sendmsg(queue)
                while queue and count >= queue[0].nbytes:
                    count -= queue.popleft().nbytes
                if count:
                    queue[0] = queue[0][count:]
        except OSError as error:
            self._lose(error)

    def _next_frame(self) -> ControlFrame | DataFrame:
        frame = None
        while frame is None:
            try:
                count = self._socket.recv_into(self._receiver.next_buffer(), 0, socket.MSG_WAITALL)
                if count == 0:
                    raise ConnectionResetError(0, "it closed the connection")
                frame = self._receiver.advance(count)
            except OSError as error:
                self._lose(error)
            except RemoteProtocolError as error:
                self.close()
                raise RemoteProtocolError(f"{self.peer} broke the protocol: {error}") from None
        return frame

    def _decode(self, frame: ControlFrame) -> Any:
        try:
            return wire.decode(frame.payload)
        except RemoteProtocolError:
            self.close()
            raise

    def _lose(self, error: OSError) -> None:
        self.close()
        silent = isinstance(error, BlockingIOError)
        why = f"nothing moved for {self._timeout_s:g} s" if silent else error.strerror
        raise PeerLostError(f"lost {self.peer}: {why}") from None


def connect_blocking(
    address: str, identity: Identity, secret: bytes, *, timeout_s: float = 5.0
) -> BlockingChannel:
    """Connect to ``host:port`` and authenticate, both within ``timeout_s``.

    Later calls may each wait as long without anything moving. Raises as
    :func:`ftrain.comms.channel.connect`.
    """
    handshake = ClientHandshake(identity, secret, secrets.token_bytes(NONCE_BYTES))
    host, port = parse_address(address)
    deadline_s = time.monotonic() + timeout_s
    sock: socket.socket | None = None
    try:
        sock = socket.create_connection((host, port), timeout_s)
        tune(sock)
        agreement = shake_hands(sock, handshake, deadline_s)
        channel, sock = BlockingChannel(sock, agreement, timeout_s), None
        return channel
    except (OSError, ProtocolError) as error:
        raise unreachable(address, error, timeout_s) from None
    finally:
        if sock is not None:
            sock.close()


def unreachable(address: str, error: OSError | ProtocolError, timeout_s: float) -> FtrainError:
    """The error to raise when connecting to ``address`` ended in ``error``."""
    if isinstance(error, FtrainError):
        return type(error)(f"{address}: {error}")
    why = error.strerror or f"no answer within {timeout_s:g} s"
    return PeerLostError(f"{address}: can't connect: {why}")


def _timeval(timeout_s: float) -> bytes:
    microseconds = max(1, round(timeout_s * 1e6))  # 0 would be for ever
    return struct.pack("@ll", *divmod(microseconds, 1_000_000))


def shake_hands(sock: socket.socket, handshake: Handshake, deadline_s: float) -> Agreement:
    """Either side of the challenge that begins a connection; raises as it does, and OSError."""
    sock.sendall(handshake.start())
    while True:
        sock.settimeout(max(0.001, deadline_s - time.monotonic()))
        data = sock.recv(handshake.needed())
        if not data:
            raise PeerLostError("the peer closed the connection before it was authenticated")
        if answer := handshake.feed(data):
            sock.sendall(answer)
        if handshake.error is not None:
            raise handshake.error
        if handshake.agreement is not None:
            return handshake.agreement
