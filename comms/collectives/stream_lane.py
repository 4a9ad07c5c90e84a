"""Lanes over stream sockets: TCP between hosts."""

from __future__ import annotations

import heapq
import socket
import threading
from dataclasses import replace
from itertools import count

import xxhash

from ftrain.comms.collectives.lanes import lost, not_in_children, shut, tcp_bytes
from ftrain.comms.errors import RemoteProtocolError
from ftrain.comms.protocol.chunk_frames import HEADER_BYTES, Head, HeadReceiver, HeadSender, Word
from ftrain.comms.protocol.handshake import Identity

_WORD_FIRST, _CHUNK, _WORD_LAST = range(3)
_LEAVE_S = 1.0


class StreamOut:
    """Sends by a thread of its own, words first; see
    :class:`~ftrain.comms.collectives.lanes.OutLane`.

    Args:
        sock: blocking.
        key: of this direction.
        rooms: buffers of ``nbytes`` for chunks.
    """

    behind = False

    def __init__(
        self, sock: socket.socket, key: bytes, peer: Identity, rooms: int, nbytes: int
    ) -> None:
        self._socket = sock
        self._sender = HeadSender(key)
        self.peer = peer
        self._changed = threading.Condition()
        self._rooms = [memoryview(bytearray(nbytes)) for _ in range(rooms)]
        self._order = count()
        self._queue: list[tuple[int, int, Head, memoryview | None, memoryview | None]] = []
        self._why: str | None = None
        self._leaving = False
        not_in_children(sock)
        self._thread = threading.Thread(target=self._run, name="ftrain-ring-out", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        return self._socket.fileno()

    def traffic(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        return tcp_bytes(self._socket, received=False)

    def catch_up(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""

    def say(self, head: Head) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        urgency = _WORD_LAST if head.word is Word.LEAVE else _WORD_FIRST
        self._put(urgency, head, None, None)

    def room(self) -> memoryview:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        with self._changed:
            while not self._rooms and self._why is None:
                self._changed.wait()
            self._raise_if_lost()
            return self._rooms.pop()

    def send_room(self, head: Head, room: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        self._put(_CHUNK, head, room[: head.nbytes], room)

    def send(self, head: Head, chunk: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        self._put(_CHUNK, head, chunk, None)

    def shut(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        self._lose("it was closed here")

    def close(self, in_order: bool) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        if in_order:
            self._thread.join(_LEAVE_S)
        self.shut()
        self._thread.join()
        self._socket.close()

    def _put(
        self, urgency: int, head: Head, chunk: memoryview | None, room: memoryview | None
    ) -> None:
        with self._changed:
            self._raise_if_lost()
            heapq.heappush(self._queue, (urgency, next(self._order), head, chunk, room))
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._send_next():
                pass
        except OSError as error:
            self._lose(error.strerror or str(error))
        except BaseException as error:  # whatever it is, the ring must hear of it
            self._lose(repr(error))

    def _send_next(self) -> bool:
        with self._changed:
            while not self._queue and self._why is None and not self._leaving:
                self._changed.wait()
            if self._why is not None or not self._queue:
                return False
            _, _, head, chunk, room = heapq.heappop(self._queue)
        self._send(head, chunk)
        if room is not None:
            with self._changed:
                self._rooms.append(room)
                self._changed.notify_all()
        return True

    def _send(self, head: Head, chunk: memoryview | None) -> None:
        parts: list[memoryview] = []
        if chunk is not None and chunk.nbytes:
            if not head.value:
                head = replace(head, value=xxhash.xxh3_64_intdigest(chunk))
            parts = [chunk]
        parts.insert(0, memoryview(self._sender.seal(head)))
        while parts:
            sent = self._socket.sendmsg(parts)
            while parts and sent >= parts[0].nbytes:
                sent -= parts.pop(0).nbytes
            if sent:
                parts[0] = parts[0][sent:]

    def _lose(self, why: str) -> None:
        """The link is over, which the ring sees in the socket."""
        with self._changed:
            self._why = self._why or why
            self._queue.clear()
            self._changed.notify_all()
        shut(self._socket)

    def _raise_if_lost(self) -> None:
        if self._why is not None:
            raise lost(self.peer, self._why)


class StreamIn:
    """Receives whole frames by single calls; ``frames`` have come already."""

    def __init__(
        self, sock: socket.socket, key: bytes, peer: Identity, nbytes: int, frames: int = 0
    ) -> None:
        self._socket = sock
        self._receiver = HeadReceiver(key, frames)
        self.peer = peer
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._scratch = memoryview(bytearray(nbytes))
        self._head = Head(Word.LEAVE)
        not_in_children(sock)

    def fileno(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        return self._socket.fileno()

    def traffic(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        return tcp_bytes(self._socket, received=True)

    def next(self) -> Head:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        self._fill(self._header)
        self._head = self._receiver.open(self._header)
        if self._head.nbytes > self._scratch.nbytes:
            raise RemoteProtocolError(
                f"{self.peer} announces a chunk of {self._head.nbytes} bytes, at most "
                f"{self._scratch.nbytes} are agreed on"
            )
        return self._head

    def take(self, target: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        if not target.nbytes:
            return
        self._fill(target)
        if xxhash.xxh3_64_intdigest(target) != self._head.value:
            raise RemoteProtocolError(f"a chunk from {self.peer} does not match its checksum")

    def borrow(self) -> memoryview:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        room = self._scratch[: self._head.nbytes]
        self.take(room)
        return room

    def give_back(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""

    def shut(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        shut(self._socket)

    def close(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        self._socket.close()

    def _fill(self, target: memoryview) -> None:
        while target.nbytes:
            try:
                count = self._socket.recv_into(target, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise lost(self.peer, error.strerror) from None
            if not count:
                raise lost(self.peer, "it closed the connection")
            target = target[count:]
