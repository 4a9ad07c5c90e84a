"""What a ring needs of the link to each neighbour.

A ring's chunks come in through one lane and leave through another.  A lane raises PeerLostError
when its other end is gone or it was shut here, and RemoteProtocolError for garbage; it is of no
use after that.  One thread uses a lane; any may shut it.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet

from ftrain.comms.errors import PeerGarbledError, PeerLostError
from ftrain.comms.protocol.chunk_frames import Head
from ftrain.comms.protocol.handshake import Identity

_TCP_INFO_BYTES = 232  # of Linux 4.1 and newer: tcpi_bytes_acked at 120, tcpi_bytes_received at 128


class OutLane(Protocol):
    """To the right neighbour."""

    @property
    def peer(self) -> Identity:
        """Whose the other end is."""
        ...

    def traffic(self) -> int:
        """Bytes that the neighbour's kernel has taken; 0 where there is no telling."""
        ...

    @property
    def behind(self) -> bool:
        """There is something to :meth:`catch_up` with once :meth:`fileno` is writable."""
        ...

    def fileno(self) -> int:
        """Hung up when the neighbour is gone."""
        ...

    def catch_up(self) -> None:
        """Send what could not be sent before; does not wait."""

    def say(self, head: Head) -> None:
        """Send a word; does not wait."""

    def room(self) -> memoryview:
        """A buffer to put the next chunk into; waits until there is one."""
        ...

    def send_room(self, head: Head, room: memoryview) -> None:
        """Send what :meth:`room` gave, which is the lane's again."""

    def send(self, head: Head, chunk: memoryview) -> None:
        """Send bytes of somebody else's, who keeps them as they are until the operation is over.

        ``head.value`` is their checksum, or 0: then the lane makes it, if it needs one.
        """

    def shut(self) -> None:
        """Whoever waits for it raises."""

    def close(self, in_order: bool) -> None:
        """End the link; ``in_order`` once all that was said has left, within a second."""


class InLane(Protocol):
    """From the left neighbour."""

    @property
    def peer(self) -> Identity:
        """Whose the other end is."""
        ...

    def traffic(self) -> int:
        """Bytes that have come; 0 where there is no telling."""
        ...

    def fileno(self) -> int:
        """Readable when there is a next frame, or the end."""
        ...

    def next(self) -> Head:
        """The next frame; if it announces a chunk, take that before asking again."""
        ...

    def take(self, target: memoryview) -> None:
        """Put the announced chunk there; the target is as long."""

    def borrow(self) -> memoryview:
        """The announced chunk, until :meth:`give_back`."""
        ...

    def give_back(self) -> None:
        """What was borrowed is needed no more."""

    def shut(self) -> None:
        """Whoever waits for it raises."""

    def close(self) -> None:
        """End the link."""


def lost(peer: Identity, why: str | None) -> PeerLostError:
    """The error that says so."""
    return PeerLostError(f"lost {peer}: {why}", node=peer.node)


def garbled(peer: Identity, why: str) -> PeerGarbledError:
    """The error that says what came from it breaks the protocol."""
    return PeerGarbledError(f"{peer} broke the protocol: {why}", node=peer.node)


def tcp_bytes(sock: socket.socket, *, received: bool) -> int:
    """Bytes that a TCP connection received, or that its peer has acknowledged."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return 0  # it is over
    return int.from_bytes(info[128:136] if received else info[120:128], sys.byteorder)


def shut(sock: socket.socket) -> None:
    """End a connection under whoever waits for it, who still has the descriptor."""
    with suppress(OSError):  # it has ended
        sock.shutdown(socket.SHUT_RDWR)


_open: WeakSet[socket.socket] = WeakSet()


def not_in_children(sock: socket.socket) -> None:
    """A process that is forked from this one (such as a data loader's) must not keep the link open:
    the neighbour would not see it end when this process is killed."""
    _open.add(sock)


def _close_in_child() -> None:
    for sock in list(_open):
        sock.close()


os.register_at_fork(after_in_child=_close_in_child)
