"""Lanes between ranks of one host: chunks lie in memory that both ends have.

The memory has a few slots, used in turn.  A frame's header says, over a unix socket, that the next
slot is filled; a byte in the other direction, that one is empty again.  The kernel copies nothing,
and what is added up is read where the neighbour wrote it.
"""

from __future__ import annotations

import mmap
import select
import socket
from collections import deque
from contextlib import suppress

from ftrain.comms.collectives.lanes import garbled, lost, not_in_children, shut
from ftrain.comms.errors import RemoteProtocolError
from ftrain.comms.protocol.chunk_frames import HEADER_BYTES, Head, HeadReceiver, HeadSender, Word
from ftrain.comms.protocol.handshake import Identity

_FREED = b"\0"
_LEAVE_S = 1.0


class _Slots:
    """Memory that both ends have, used in turn."""

    def __init__(self, fd: int, slots: int, nbytes: int) -> None:
        self._map = mmap.mmap(fd, slots * nbytes)
        memory = memoryview(self._map)
        self._views = [memory[n * nbytes : (n + 1) * nbytes] for n in range(slots)]
        self._next = 0

    @property
    def current(self) -> memoryview:
        return self._views[self._next]

    def advance(self) -> None:
        self._next = (self._next + 1) % len(self._views)

    def close(self) -> None:
        for view in self._views:
            view.release()
        with suppress(BufferError):  # a chunk is still being looked at
            self._map.close()


class SharedOut:
    """Writes into the neighbour's slots; see :class:`~ftrain.comms.collectives.lanes.OutLane`.

    Args:
        sock: unix stream socket to it.
        fd: the memory, ``slots`` times ``nbytes``; stays the caller's.
        first: the first frame, which takes the memory along.
    """

    def __init__(
        self,
        sock: socket.socket,
        key: bytes,
        peer: Identity,
        fd: int,
        slots: int,
        nbytes: int,
        first: Head,
    ) -> None:
        self._socket = sock
        self._sender = HeadSender(key)
        self.peer = peer
        self._slots = _Slots(fd, slots, nbytes)
        self._free = slots
        self._freed = bytearray(slots)
        self._unsent: deque[memoryview] = deque()  # headers, as many as the socket had no room for
        not_in_children(sock)
        socket.send_fds(sock, [self._sender.seal(first)], [fd])
        sock.setblocking(False)

    @property
    def behind(self) -> bool:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        return self._socket.fileno()

    def traffic(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        return 0

    def catch_up(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent[0])
                if sent < self._unsent[0].nbytes:
                    self._unsent[0] = self._unsent[0][sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            raise lost(self.peer, error.strerror) from None

    def say(self, head: Head) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        self._unsent.append(memoryview(self._sender.seal(head)))
        self.catch_up()

    def room(self) -> memoryview:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        poll = select.poll()
        while not self._free:
            self.catch_up()  # the neighbour empties only slots that it has heard of
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            poll.poll()
            with suppress(BlockingIOError):
                self._count_freed()
        return self._slots.current

    def send_room(self, head: Head, room: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        self._free -= 1
        self._slots.advance()
        self.say(head)

    def send(self, head: Head, chunk: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        if not chunk.nbytes:
            self.say(head)
            return
        room = self.room()
        room[: chunk.nbytes] = chunk
        self.send_room(head, room)

    def shut(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        shut(self._socket)

    def close(self, in_order: bool) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.OutLane`."""
        if in_order and self._unsent:
            with suppress(OSError):
                self._socket.settimeout(_LEAVE_S)
                for part in self._unsent:
                    self._socket.sendall(part)
        self._socket.close()
        self._slots.close()

    def _count_freed(self) -> None:
        try:
            count = self._socket.recv_into(self._freed)
        except BlockingIOError:
            raise
        except OSError as error:
            raise lost(self.peer, error.strerror) from None
        if not count:
            raise lost(self.peer, "it closed the connection")
        self._free += count
        if self._free > len(self._freed):
            raise garbled(self.peer, "it has emptied more slots than there are")


class SharedIn:
    """Reads the slots; see :class:`~ftrain.comms.collectives.lanes.InLane`.

    Args:
        fd: the memory, which can't become smaller; stays the caller's.
        frames: so many have come already.
    """

    def __init__(
        self,
        sock: socket.socket,
        key: bytes,
        peer: Identity,
        fd: int,
        slots: int,
        nbytes: int,
        frames: int,
    ) -> None:
        self._socket = sock
        self._receiver = HeadReceiver(key, frames)
        self.peer = peer
        self._slots = _Slots(fd, slots, nbytes)
        self._nbytes = nbytes
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._head = Head(Word.LEAVE)
        not_in_children(sock)

    def fileno(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        return self._socket.fileno()

    def traffic(self) -> int:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        return 0

    def next(self) -> Head:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        try:
            count = self._socket.recv_into(self._header, HEADER_BYTES, socket.MSG_WAITALL)
        except OSError as error:
            raise lost(self.peer, error.strerror) from None
        if count != HEADER_BYTES:
            raise lost(self.peer, "it closed the connection")
        self._head = self._receiver.open(self._header)
        if self._head.nbytes > self._nbytes:
            raise RemoteProtocolError(f"{self.peer} announces more than a slot holds")
        return self._head

    def take(self, target: memoryview) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        if target.nbytes:
            target[:] = self.borrow()
            self.give_back()

    def borrow(self) -> memoryview:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        return self._slots.current[: self._head.nbytes]

    def give_back(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        if self._head.nbytes:
            self._slots.advance()
            with suppress(OSError):  # the next read says so
                self._socket.send(_FREED)

    def shut(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        shut(self._socket)

    def close(self) -> None:
        """See :class:`~ftrain.comms.collectives.lanes.InLane`."""
        self._socket.close()
        self._slots.close()
