"""A local socket in an asyncio loop: messages in by callback, messages out without waiting."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ftrain.comms.errors import PeerLostError, RemoteProtocolError
from ftrain.comms.local import LocalSocket, close_all

_QUEUED_MAX = 4096  # a slot of each rank of a large node is told in one message


class LocalLink:
    """Owns a :class:`LocalSocket`. Ends when the peer is gone, sends garbage or never reads.

    Args:
        on_message: called with each message and its descriptors, which it has to close.
        on_end: called once with the reason, unless :meth:`close` came first.
    """

    def __init__(
        self,
        sock: LocalSocket,
        on_message: Callable[[Any, list[int]], None],
        on_end: Callable[[str], None],
    ) -> None:
        sock.settimeout(0)
        self._socket = sock
        self._on_message = on_message
        self._on_end = on_end
        self._queue: deque[tuple[object, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._fd = sock.fileno()
        self._open = True
        self._loop.add_reader(self._fd, self._readable)

    def post(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send now or as soon as the peer reads; copies of ``fds`` go along."""
        if not self._open:
            return
        if self._queue:
            self._enqueue(message, fds)
            return
        try:
            self._socket.send(message, fds)
        except TimeoutError:
            self._enqueue(message, fds)
        except PeerLostError as error:  # in the next turn: who posts does not expect messages now
            self._loop.call_soon(self._lost, str(error))

    def drain(self) -> None:
        """Take in at once what the peer has said so far, its last words if it is gone."""
        if self._open:
            self._readable()

    def close(self) -> None:
        """Close the connection; ``on_end`` is not called."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._socket.close()
            while self._queue:
                close_all(self._queue.popleft()[1])

    def _enqueue(self, message: object, fds: Sequence[int]) -> None:
        if len(self._queue) >= _QUEUED_MAX:
            self._end("it does not read its messages")
            return
        self._queue.append((message, [os.dup(fd) for fd in fds]))
        self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        while self._open and self._queue:
            message, fds = self._queue[0]
            try:
                self._socket.send(message, fds)
            except TimeoutError:
                return
            except PeerLostError as error:
                self._lost(str(error))
                return
            self._queue.popleft()
            close_all(fds)
        if self._open:
            self._loop.remove_writer(self._fd)

    def _readable(self) -> None:
        try:
            while self._open:
                message, fds = self._socket.receive()
                self._on_message(message, fds)
        except TimeoutError:
            return
        except (PeerLostError, RemoteProtocolError) as error:
            self._end(str(error))

    def _lost(self, reason: str) -> None:
        """The peer can't be written to any more; what it said before still counts."""
        self.drain()
        self._end(reason)

    def _end(self, reason: str) -> None:
        if self._open:
            self.close()
            self._on_end(reason)
