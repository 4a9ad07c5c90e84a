"""Authenticated message streams over TCP, for asyncio processes.

A connection begins with the challenge of :mod:`ftrain.comms.protocol.handshake` and goes on with
the frames of :mod:`ftrain.comms.protocol.frames`. The blocking twin for ranks is in
:mod:`ftrain.comms.channel_blocking`, and re-exported here.

The sockets are driven directly, not through asyncio's streams: bulk data is received straight
into the caller's buffer, and no byte is lost when a waiting task is cancelled.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Any

import xxhash

from ftrain.comms import wire
from ftrain.comms.addresses import (
    bound_address,
    check_bind,
    listen_tcp,
    parse_address,
    tune,
)
from ftrain.comms.bulk import send_frames
from ftrain.comms.channel_blocking import (
    BlockingChannel,
    connect_blocking,
    unreachable,
)
from ftrain.comms.errors import (
    FtrainError,
    LocalProtocolError,
    PeerLostError,
    ProtocolError,
    RemoteProtocolError,
)
from ftrain.comms.protocol.frames import (
    CONTROL_BYTES_MAX,
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
    ServerHandshake,
)

__all__ = [
    "BlockingChannel",
    "Channel",
    "Identity",
    "Server",
    "check_bind",
    "connect",
    "connect_blocking",
    "serve",
]

HANDSHAKE_S = 2.0  # what an unauthenticated peer may take in all
HANDSHAKES_MAX = 128  # at a time; the oldest is dropped for a newer one
QUEUED_BYTES_HIGH = 256 * 1024  # `send` waits above this
QUEUED_BYTES_MAX = 16 * 1024 * 1024  # `post` gives the peer up above this
BACKLOG_MAX = 1024  # messages that may arrive between the frames of one bulk transfer
_FRAMES_PER_TURN = 16  # then other tasks of the loop get their turn
_ACCEPT_PAUSE_S = 0.1  # when this process has run out of descriptors


class Channel:
    """One authenticated connection. Closes itself as an async context manager.

    Messages arrive whole and in order, or the channel is closed with the reason. Any number of
    tasks may send; one at a time may receive.
    """

    def __init__(
        self, sock: socket.socket, agreement: Agreement, control_bytes_max: int = CONTROL_BYTES_MAX
    ) -> None:
        """Take over a non-blocking socket on which the handshake is done."""
        self.peer = agreement.peer
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._sender = FrameSender(
            agreement.send_key, xxhash.xxh3_64_intdigest, control_bytes_max=control_bytes_max
        )
        self._receiver = FrameReceiver(
            agreement.receive_key, xxhash.xxh3_64_intdigest, control_bytes_max=control_bytes_max
        )
        self._error: FtrainError | None = None
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._sent_bytes = 0  # since the start; together with the queue: positions in the stream
        self._writing = False  # the loop watches for room in the socket
        self._sent: list[tuple[int, asyncio.Future[None]]] = []  # waiters, by position
        self._readable: asyncio.Future[None] | None = None
        self._receiving = False
        self._backlog: deque[Any] = deque()
        self._data_lock = asyncio.Lock()
        self._deferred: list[bytes] | None = None  # messages, while a thread sends
        self._frames_in_turn = 0

    @property
    def closed(self) -> bool:
        """Whether the channel has ended, by whatever side."""
        return self._error is not None

    @property
    def queued_bytes(self) -> int:
        """Bytes that the peer's host has not taken yet."""
        return self._queued_bytes

    def post(self, message: object) -> None:
        """Send without waiting, for callbacks. The message goes out whole unless the channel ends.

        Raises :class:`PeerLostError` when it has ended, or ends it when the peer has left 16 MiB
        unread.
        """
        self._raise_if_closed()
        if self._deferred is not None:
            self._deferred.append(wire.encode(message))
            return
        frame = self._sender.control(wire.encode(message))
        if self._queued_bytes + len(frame) > QUEUED_BYTES_MAX:
            self._end(PeerLostError(f"{self.peer} does not read its messages: connection closed"))
            self._raise_if_closed()
        self._enqueue(memoryview(frame))

    async def send(self, message: object) -> None:
        """Send, and wait while the peer is slow. Cancelling is safe: the message goes out whole.

        Raises :class:`PeerLostError` when the channel has ended,
        :class:`LocalProtocolError` for what can't be a message.
        """
        self._raise_if_closed()
        if self._deferred is not None:
            self._deferred.append(wire.encode(message))
            return
        self._enqueue(memoryview(self._sender.control(wire.encode(message))))
        await self._wait_sent(self._position() - QUEUED_BYTES_HIGH)

    async def send_data(self, buffer: bytes | bytearray | memoryview) -> None:
        """Send bulk data, uncopied: the buffer may change when this returns, not before.

        Cancelling closes the channel, because the peer waits for the rest.
        """
        view = memoryview(buffer).cast("B")
        try:
            async with self._data_lock:
                for start in range(0, view.nbytes, DATA_BYTES_MAX):
                    self._raise_if_closed()
                    chunk = view[start : start + DATA_BYTES_MAX]
                    self._enqueue(memoryview(self._sender.data(chunk)), chunk)
                    # One chunk stays in flight while the next is hashed.
                    await self._wait_sent(self._position() - chunk.nbytes)
                    await asyncio.sleep(0)  # a fast peer must not starve the loop's other tasks
                await self._wait_sent(self._position())
        except asyncio.CancelledError:
            self._end(PeerLostError("the connection was closed: a bulk transfer was cancelled"))
            raise

    async def send_data_by(self, pool: Executor, views: Sequence[memoryview]) -> None:
        """The same for several buffers, by a thread of ``pool``: with its priority, and the loop
        has nothing to do with it.  Messages that are sent meanwhile follow behind.
        """
        async with self._data_lock:
            await self._wait_sent(self._position())
            self._deferred = []
            try:
                with self._socket.dup() as sock:  # this one may be closed under the thread
                    work = self._loop.run_in_executor(pool, send_frames, sock, self._sender, views)
                    await self._wait_for_thread(work)
            except OSError as error:
                self._end(PeerLostError(f"lost {self.peer}: {error.strerror or error}"))
            finally:
                deferred, self._deferred = self._deferred, None
            self._raise_if_closed()
            for payload in deferred:
                self._enqueue(memoryview(self._sender.control(payload)))

    async def _wait_for_thread(self, work: asyncio.Future[None]) -> None:
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # it ends soon
            await asyncio.wait([work])
            self._end(PeerLostError("the connection was closed: a bulk transfer was cancelled"))
            raise

    async def receive(self) -> Any:
        """The next message. Cancelling is safe: no byte is lost.

        Raises :class:`PeerLostError` at the end of the stream and
        :class:`RemoteProtocolError` for garbage; the channel is then closed.
        """
        if self._backlog:
            return self._backlog.popleft()
        frame = await self._next_frame()
        assert isinstance(frame, ControlFrame)  # no data is expected, so the receiver refuses it
        return self._decode(frame)

    async def receive_data_into(self, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` with the peer's bulk data; messages between its frames are kept.

        Raises as :meth:`receive`. Cancelling closes the channel.
        """
        view = memoryview(buffer).cast("B")
        missing = view.nbytes
        self._receiver.expect_data(view)
        try:
            while missing:
                frame = await self._next_frame()
                if isinstance(frame, DataFrame):
                    missing -= frame.count
                elif len(self._backlog) < BACKLOG_MAX:
                    self._backlog.append(self._decode(frame))
                else:
                    self._end(RemoteProtocolError("too many messages inside a bulk transfer"))
        except asyncio.CancelledError:
            self._end(PeerLostError("the connection was closed: a bulk transfer was cancelled"))
            raise
        finally:
            self._receiver.expect_data(None)

    def close(self) -> None:
        """Close at once. What is waiting gets :class:`PeerLostError`; what the socket has no room
        for is lost: see :meth:`finish`."""
        self._end(PeerLostError(f"the connection to {self.peer} was closed here"))

    async def finish(self, timeout_s: float = 1.0) -> None:
        """Let everything that was sent arrive, then close."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_sent(self._position())
                self._socket.shutdown(socket.SHUT_WR)
                while True:  # closing over unread bytes would reset the stream under the peer
                    await self.receive()
        except (TimeoutError, OSError, ProtocolError):
            pass
        finally:
            self.close()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- receiving

    def _decode(self, frame: ControlFrame) -> Any:
        try:
            return wire.decode(frame.payload)
        except RemoteProtocolError as error:
            self._end(error)
            raise

    async def _next_frame(self) -> ControlFrame | DataFrame:
        if self._receiving:
            raise LocalProtocolError("two tasks receive from one channel")
        self._receiving = True
        try:
            self._frames_in_turn += 1
            if self._frames_in_turn > _FRAMES_PER_TURN:
                self._frames_in_turn = 0
                await asyncio.sleep(0)  # a peer that floods must not starve the loop's other tasks
            while True:
                frame = await self._read_some()
                if frame is not None:
                    return frame
        finally:
            self._receiving = False

    async def _read_some(self) -> ControlFrame | DataFrame | None:
        self._raise_if_closed()
        try:
            count = self._socket.recv_into(self._receiver.next_buffer())
            if count == 0:
                raise ConnectionResetError(0, "it closed the connection")
            return self._receiver.advance(count)
        except BlockingIOError:
            await self._wait_readable()
            return None
        except OSError as error:
            self._end(PeerLostError(f"lost {self.peer}: {error.strerror}"))
        except RemoteProtocolError as error:
            self._end(RemoteProtocolError(f"{self.peer} broke the protocol: {error}"))
        self._raise_if_closed()
        return None

    async def _wait_readable(self) -> None:
        self._frames_in_turn = 0
        self._readable = self._loop.create_future()
        self._loop.add_reader(self._socket.fileno(), self._on_readable)
        try:
            await self._readable
        finally:
            self._readable = None
            if not self.closed:
                self._loop.remove_reader(self._socket.fileno())

    def _on_readable(self) -> None:
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)

    # -- sending

    def _position(self) -> int:
        return self._sent_bytes + self._queued_bytes

    def _enqueue(self, *views: memoryview) -> None:
        for view in views:
            self._queue.append(view)
            self._queued_bytes += view.nbytes
        if not self._writing:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._queue:
                self._take_sent(self._socket.sendmsg(list(islice(self._queue, 64))))
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._socket.fileno(), self._flush)
        except OSError as error:
            self._end(PeerLostError(f"lost {self.peer}: {error.strerror}"))
        else:
            self._stop_writing()

    def _take_sent(self, count: int) -> None:
        self._sent_bytes += count
        self._queued_bytes -= count
        while count:
            first = self._queue.popleft()
            if first.nbytes > count:
                self._queue.appendleft(first[count:])
                break
            count -= first.nbytes
        for position, waiter in self._sent:
            if position <= self._sent_bytes and not waiter.done():
                waiter.set_result(None)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._socket.fileno())

    async def _wait_sent(self, position: int) -> None:
        self._raise_if_closed()
        if position <= self._sent_bytes:
            return
        entry = (position, self._loop.create_future())
        self._sent.append(entry)
        try:
            await entry[1]
        finally:
            self._sent.remove(entry)
        self._raise_if_closed()

    # -- the end

    def _end(self, error: FtrainError) -> None:
        """The only place where a channel ends; the first reason stays."""
        if self._error is not None:
            return
        self._error = error
        self._stop_writing()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._queue.clear()
        for waiter in (self._readable, *(waiter for _, waiter in self._sent)):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _raise_if_closed(self) -> None:
        if self._error is not None:
            raise type(self._error)(*self._error.args)


class Server:
    """Accepts connections and runs a handler for each authenticated one, until closed.

    A handler may let PeerLostError and ProtocolError out: they end its connection, nothing else.
    """

    def __init__(
        self,
        listener: socket.socket,
        identity: Identity,
        secret: bytes,
        handler: Callable[[Channel], Awaitable[None]],
    ) -> None:
        """Take over a listening socket; :func:`serve` is the usual way."""
        self.address = bound_address(listener)
        self.refused = 0  # connections that did not authenticate themselves
        self._listener = listener
        self._identity = identity
        self._secret = secret
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}
        self._strangers: dict[asyncio.Task[None], None] = {}  # still in the handshake, by age
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Stop listening, and cancel every handler."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        for task in self._tasks:
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until every handler has ended."""
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def _accept(self) -> None:
        if self._listener.fileno() < 0:
            return
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # Out of descriptors: the connection stays in the kernel's queue; asking for it again
            # at once would burn a core.
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_ACCEPT_PAUSE_S, self._resume)
            return
        sock.setblocking(False)
        while len(self._strangers) >= HANDSHAKES_MAX:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
            self.refused += 1
        task = self._loop.create_task(self._serve(sock))
        self._tasks[task] = sock
        self._strangers[task] = None
        task.add_done_callback(self._ended)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    async def _serve(self, sock: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                nonce = secrets.token_bytes(NONCE_BYTES)
                handshake = ServerHandshake(self._identity, self._secret, nonce)
                agreement = await _shake_hands(sock, handshake)
            tune(sock)
        except (FtrainError, OSError):  # TimeoutError is an OSError
            self.refused += 1
            return
        finally:
            self._strangers.pop(task, None)
        async with Channel(sock, agreement) as channel:
            try:
                await self._handler(channel)
            except (PeerLostError, ProtocolError):
                pass

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task).close()  # also when the task was cancelled before its first line
        self._strangers.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler(
                {"message": "a connection handler failed", "exception": error, "task": task}
            )


async def serve(
    listener: socket.socket | str,
    identity: Identity,
    secret: bytes,
    handler: Callable[[Channel], Awaitable[None]],
) -> Server:
    """Serve on a listening socket (now the server's), or on ``host:port`` (0: any free port).

    Raises :class:`UsageError` when the address can't be listened on.
    """
    if isinstance(listener, str):
        listener = listen_tcp(listener)
    return Server(listener, identity, secret, handler)


async def connect(
    address: str, identity: Identity, secret: bytes, *, timeout_s: float = 5.0
) -> Channel:
    """Connect to ``host:port`` and authenticate, both within ``timeout_s``.

    Raises :class:`PeerLostError` when nobody answers, :class:`AuthenticationError` when
    either side refuses the other, :class:`RemoteProtocolError` for a server that is not ftrain's.
    """
    handshake = ClientHandshake(identity, secret, secrets.token_bytes(NONCE_BYTES))
    host, port = parse_address(address)
    loop = asyncio.get_running_loop()
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            family, target = await _resolve(host, port)
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            await loop.sock_connect(sock, target)
            tune(sock)
            agreement = await _shake_hands(sock, handshake)
            channel, sock = Channel(sock, agreement), None
            return channel
    except (OSError, ProtocolError) as error:
        raise unreachable(address, error, timeout_s) from None
    finally:
        if sock is not None:
            sock.close()


async def _resolve(host: str, port: int) -> tuple[int, Any]:
    """Address family and socket address; only names that need a lookup cost a thread."""
    kind = socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=kind)
    return found[0][0], found[0][4]


async def _shake_hands(sock: socket.socket, handshake: Handshake) -> Agreement:
    loop = asyncio.get_running_loop()
    answer = handshake.start()
    while True:
        if answer:
            await loop.sock_sendall(sock, answer)
        if handshake.error is not None:
            raise handshake.error
        if handshake.agreement is not None:
            return handshake.agreement
        data = await loop.sock_recv(sock, handshake.needed())
        if not data:
            raise PeerLostError("the peer closed the connection before it was authenticated")
        answer = handshake.feed(data)
