"""Lanes between ranks of one host: chunks lie in memory that both ends have.

The memory has a few slots, used in turn.  A frame's header says, over a unix socket, that the next
slot is filled; a byte in the other direction, that one is empty again.  The kernel copies nothing,
and what is added up is read where the neighbour wrote it.
"""

from __future__ import annotations

import mmap
import os
import socket
from contextlib import suppress

from ftrain.comms.errors import PeerLostError, RemoteProtocolError
from ftrain.comms.protocol.chunk_frames import HEADER_BYTES, Head, HeadReceiver, HeadSender, Word

_FREED = b"\0"


class SharedOut:
    """Writes into the neighbour's slots; for one thread at a time.

    Args:
        sock: unix stream socket to it, blocking.
        fd: the memory, ``slots`` times ``nbytes``; taken over.
        first: the first frame, which takes the memory along.
    """

    def __init__(
        self,
        sock: socket.socket,
        key: bytes,
        peer: str,
        fd: int,
        slots: int,
        nbytes: int,
        first: Head,
    ) -> None:
        self._socket = sock
        self._sender = HeadSender(key)
        self._peer = peer
        try:
            self._memory = memoryview(mmap.mmap(fd, slots * nbytes))
            socket.send_fds(sock, [self._sender.seal(first)], [fd])
        finally:
            os.close(fd)
        self._slots = [self._memory[n * nbytes : (n + 1) * nbytes] for n in range(slots)]
        self._free = slots
        self._next = 0
        self._freed = bytearray(slots)

    def fileno(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        return self._socket.fileno()

    def say(self, head: Head) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        self._send(head)

    def room(self, nbytes: int) -> memoryview:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        if not self._free:
            try:
                self._free = self._socket.recv_into(self._freed)
            except OSError as error:
                raise PeerLostError(f"lost {self._peer}: {error.strerror}") from None
            if not self._free:
                raise PeerLostError(f"lost {self._peer}: it closed the connection")
        return self._slots[self._next]

    def send_room(self, head: Head, room: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        self._free -= 1
        self._next = (self._next + 1) % len(self._slots)
        self._send(head)

    def send(self, head: Head, chunk: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        if not chunk.nbytes:
            self._send(head)
            return
        room = self.room(chunk.nbytes)
        room[: chunk.nbytes] = chunk
        self.send_room(head, room)

    def close(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, head: Head) -> None:
        try:
            self._socket.sendall(self._sender.seal(head))
        except OSError as error:
            raise PeerLostError(f"lost {self._peer}: {error.strerror}") from None


class SharedIn:
    """Reads the slots; for one thread.

    Args:
        fd: the memory, which can't become smaller; taken over.
        frames: so many have come already.
    """

    def __init__(
        self,
        sock: socket.socket,
        key: bytes,
        peer: str,
        fd: int,
        slots: int,
        nbytes: int,
        frames: int,
    ) -> None:
        self._socket = sock
        self._receiver = HeadReceiver(key, frames)
        self._peer = peer
        self._memory = memoryview(mmap.mmap(fd, slots * nbytes))
        os.close(fd)
        self._slots = [self._memory[n * nbytes : (n + 1) * nbytes] for n in range(slots)]
        self._next = 0
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._head = Head(Word.HALT, 0)

    def fileno(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        return self._socket.fileno()

    def next(self) -> Head:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        try:
            count = self._socket.recv_into(self._header, HEADER_BYTES, socket.MSG_WAITALL)
        except OSError as error:
            raise PeerLostError(f"lost {self._peer}: {error.strerror}") from None
        if count != HEADER_BYTES:
            raise PeerLostError(f"lost {self._peer}: it closed the connection")
        self._head = self._receiver.open(self._header)
        if self._head.nbytes > self._slots[0].nbytes:
            raise RemoteProtocolError(f"{self._peer} announces more than a slot holds")
        return self._head

    def take(self, target: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        if target.nbytes != self._head.nbytes:
            raise RemoteProtocolError(
                f"{self._peer} sends {self._head.nbytes} bytes where {target.nbytes} are expected"
            )
        if target.nbytes:
            target[:] = self.borrow()
            self.give_back()

    def borrow(self) -> memoryview:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        return self._slots[self._next][: self._head.nbytes]

    def give_back(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        if self._head.nbytes:
            self._next = (self._next + 1) % len(self._slots)
            with suppress(OSError):  # the next read says so
                self._socket.send(_FREED)

    def close(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
