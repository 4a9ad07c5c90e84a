"""A listener for other peers, each served by a thread of its own once it has proved who it is."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ftrain.comms.addresses import format_address, listen_tcp, tune
from ftrain.comms.bulk import limit_window
from ftrain.comms.channel_blocking import BlockingChannel, shake_hands
from ftrain.comms.errors import FtrainError
from ftrain.comms.fleet.access import Access
from ftrain.comms.protocol.handshake import NONCE_BYTES, ServerHandshake

_GREETING_S = 2.0
_STRANGERS_MAX = 64  # the oldest is dropped for a newer one
_PAUSE_S = 0.02


class Guests:
    """Listens from now on until it is closed.

    Args:
        serve: answers one peer until it raises FtrainError or OSError.
        patience_s: with a connection on which nothing moves.
    """

    def __init__(
        self, access: Access, serve: Callable[[BlockingChannel], None], patience_s: float
    ) -> None:
        self._access, self._serve, self._patience_s = access, serve, patience_s
        self._listener = listen_tcp(format_address(access.bind, 0))
        self.address = access.address(self._listener.getsockname()[1])
        self._lock = threading.Lock()  # of everything below
        self._guests: dict[socket.socket, threading.Thread] = {}
        self._strangers: dict[socket.socket, None] = {}  # those among them, oldest first
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="ftrain-state", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more; whoever is being served is cut off."""
        with self._lock:
            self._closed = True
            guests = dict(self._guests)
        for sock in (self._listener, *guests):
            _hang_up(sock)
        for thread in (self._thread, *guests.values()):
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_PAUSE_S)  # no descriptors left: the kernel keeps it meanwhile
                continue
            with self._lock:
                taken = not self._closed and self._take(sock)
            if not taken:
                sock.close()

    def _take(self, sock: socket.socket) -> bool:
        """Give a connection a thread; the lock is held, so that whoever closes can join it."""
        thread = threading.Thread(target=self._welcome, args=(sock,), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread to be had
            return False
        if len(self._strangers) >= _STRANGERS_MAX:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            _hang_up(oldest)
        self._guests[sock], self._strangers[sock] = thread, None
        return True

    def _welcome(self, sock: socket.socket) -> None:
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            handshake = ServerHandshake(self._access.identity, self._access.secret, nonce)
            agreement = shake_hands(sock, handshake, time.monotonic() + _GREETING_S)
            with self._lock:
                self._strangers.pop(sock, None)
            tune(sock)
            limit_window(sock, socket.SO_SNDBUF)
            channel = BlockingChannel(sock, agreement, self._patience_s)
            self._serve(channel)
        except (FtrainError, OSError):  # it has gone, or is none of ours
            pass
        finally:
            with self._lock:  # before the descriptor may be another one's
                self._guests.pop(sock, None)
                self._strangers.pop(sock, None)
            sock.close()


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # it was closed, or the peer has gone
        sock.shutdown(socket.SHUT_RDWR)
