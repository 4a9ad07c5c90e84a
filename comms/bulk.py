"""Bulk data sent by a thread, on a socket that an event loop also knows."""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from contextlib import suppress

from ftrain.comms.protocol.frames import DATA_BYTES_MAX, FrameSender

_LOWER_EFFORT = 1 << 2  # RFC 8622, as a byte of the header
STALLED_S = 10.0  # without the peer taking anything


def send_frames(sock: socket.socket, sender: FrameSender, views: Sequence[memoryview]) -> None:
    """Send everything in ``views``, one behind the other; the socket may be non-blocking.

    Raises OSError, TimeoutError among them when the peer takes nothing for too long.
    """
    if sock.family == socket.AF_INET:
        with suppress(OSError):  # a network that heeds it lets training's packets go first
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _LOWER_EFFORT)
    room = select.poll()
    room.register(sock, select.POLLOUT)
    for view in views:
        for start in range(0, view.nbytes, DATA_BYTES_MAX):
            chunk = view[start : start + DATA_BYTES_MAX]
            head = memoryview(sender.data(chunk))
            _send(sock, room, [head, chunk])


def _send(sock: socket.socket, room: select.poll, parts: list[memoryview]) -> None:
    while parts:
        try:
            count = sock.sendmsg(parts)
        except BlockingIOError:
            if not room.poll(STALLED_S * 1000):
                raise TimeoutError(f"it took nothing for {STALLED_S:g} s") from None
            continue
        while parts and count >= parts[0].nbytes:
            count -= parts.pop(0).nbytes
        if count:
            parts[0] = parts[0][count:]
