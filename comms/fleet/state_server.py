"""Where a peer's shared state is to be had: snapshots under names, for whoever knows the secret.

Every connection has a thread, which sends blocking: the memory of the tensors goes to the kernel
uncopied, and the interpreter lock is released meanwhile.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

from ftrain.comms.addresses import format_address, listen_tcp, tune
from ftrain.comms.bulk import limit_window
from ftrain.comms.channel_blocking import BlockingChannel, shake_hands
from ftrain.comms.errors import FtrainError, RemoteProtocolError
from ftrain.comms.fleet.access import Access
from ftrain.comms.fleet.protocol.state_messages import StateAnswer, StateAsk
from ftrain.comms.fleet.state_snapshot import Snapshot
from ftrain.comms.protocol.handshake import NONCE_BYTES, ServerHandshake

_GREETING_S = 2.0  # for a stranger
_STRANGERS_MAX = 64  # that have not proved themselves; the oldest is dropped for a newer one
_PAUSE_S = 0.02


class StateServer:
    """Serves from now on until it is closed; closes itself as a context manager.

    Args:
        patience_s: with a connection on which nothing moves.
    """

    def __init__(self, access: Access, patience_s: float) -> None:
        self._access = access
        self._patience_s = patience_s
        self._listener = listen_tcp(format_address(access.bind, 0))
        self.address = access.address(self._listener.getsockname()[1])
        self._lock = threading.Lock()  # of everything below
        self._offers: dict[str, Snapshot] = {}
        self._guests: dict[socket.socket, threading.Thread] = {}
        self._strangers: dict[socket.socket, None] = {}  # those among them, oldest first
        self._sent_bytes = 0
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="ftrain-state", daemon=True)
        self._thread.start()

    @property
    def sent_bytes(self) -> int:
        """Of tensors, so far."""
        with self._lock:
            return self._sent_bytes

    def offer(self, name: str, snapshot: Snapshot) -> None:
        """Offer this, and nothing else, under a name."""
        with self._lock:
            self._offers = {name: snapshot}

    def close(self) -> None:
        """Serve no more; whoever is being served is cut off."""
        with self._lock:
            self._closed = True
            guests = dict(self._guests)
        for sock in (self._listener, *guests):
            _hang_up(sock)
        for thread in (self._thread, *guests.values()):
            thread.join()
        self._listener.close()

    def __enter__(self) -> StateServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
            while True:
                self._serve(channel)
        except (FtrainError, OSError):  # it has gone, or is none of ours
            pass
        finally:
            with self._lock:  # before the descriptor may be another one's
                self._guests.pop(sock, None)
                self._strangers.pop(sock, None)
            sock.close()

    def _serve(self, channel: BlockingChannel) -> None:
        ask = channel.receive()
        if not isinstance(ask, StateAsk):
            raise RemoteProtocolError(f"{channel.peer} sent what it may not say")
        with self._lock:
            snapshot = self._offers.get(ask.name)
        blocks = snapshot.blocks(ask.blocks) if snapshot is not None else None
        if snapshot is None or blocks is None:
            channel.send(StateAnswer(found=False))
        elif not ask.blocks:
            channel.send(StateAnswer(True, snapshot.revision, len(snapshot.encoded)))
            channel.send_data(snapshot.encoded)
        else:
            channel.send(StateAnswer(True, snapshot.revision))
            for block in blocks:
                channel.send_data(block)
                with self._lock:
                    self._sent_bytes += block.nbytes


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # it was closed, or the peer has gone
        sock.shutdown(socket.SHUT_RDWR)
