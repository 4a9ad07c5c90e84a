"""Bulk data sent by a thread, on a socket that an event loop also knows."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

from ftrain.comms.protocol.frames import DATA_BYTES_MAX, FrameSender

_LOWER_EFFORT = 1 << 2  # RFC 8622, as a byte of the header
STALLED_S = 10.0  # without the peer taking anything
WINDOW_BYTES = 256 * 1024  # under way on a short line
_SHORT_S = 100e-6  # as many bytes in each of these are 2.6 GB/s
_MIN_RTT_AT = 148  # in Linux's struct tcp_info: u32, in microseconds


def limit_window(sock: socket.socket, option: int) -> None:
    """Let less queue up in ``SO_SNDBUF`` or ``SO_RCVBUF`` of a connection on a short line.

    Linux lets megabytes queue up, which then have left the cores' caches before they are copied
    again: on a loopback device moving them takes up to twice the core time.  A long line needs that
    much to be fast, and is left alone.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT_AT + 4)
    if len(info) == _MIN_RTT_AT + 4:
        (round_trip_us,) = struct.unpack_from("=I", info, _MIN_RTT_AT)
        if round_trip_us <= _SHORT_S * 1e6:
            sock.setsockopt(socket.SOL_SOCKET, option, WINDOW_BYTES)


def send_frames(sock: socket.socket, sender: FrameSender, views: Sequence[memoryview]) -> None:
    """Send everything in ``views``, one behind the other; the socket may be non-blocking.

    Raises OSError, TimeoutError among them when the peer takes nothing for too long.
    """
    limit_window(sock, socket.SO_SNDBUF)
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
