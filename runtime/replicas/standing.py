"""Where this rank stands, for others that come to the fleet and need its state.

From the boundary of a step until the step's average is over no parameter changes, and the average
needs the newcomer: so what is read from live tensors in between is the state at the boundary.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from ftrain.checkpoint.tensors import StateTensor
from ftrain.comms import wire
from ftrain.comms.addresses import format_address, listen_tcp, tune
from ftrain.comms.channel_blocking import BlockingChannel, shake_hands
from ftrain.comms.errors import FtrainError, PeerLostError, RemoteProtocolError
from ftrain.comms.protocol.handshake import NONCE_BYTES, Identity, ServerHandshake

_GREETING_S = 2.0
_IDLE_S = 30.0
_WAIT_S = 1.0  # for a boundary, before the newcomer is told to ask again


@dataclass(frozen=True, slots=True)
class StateWanted:
    """A newcomer's question; answered by :class:`StateOffer` once the rank has come to ``op``, or
    after a second."""

    op: int  # the first operation that the newcomer takes part in


@dataclass(frozen=True, slots=True)
class StateOffer:
    """Where the rank stands; ``small_bytes`` follow when ``ready``."""

    settled: bool  # its state is the fleet's
    ready: bool  # it stands before the operation that was asked for
    step: int
    small_bytes: int


@dataclass(frozen=True, slots=True)
class TensorsWanted:
    """The bytes of these tensors, one after the other; then :class:`TensorsSent`."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorsSent:
    """Whether nothing of it has changed meanwhile."""

    unchanged: bool


wire.register(StateWanted, StateOffer, TensorsWanted, TensorsSent)


@dataclass(frozen=True, slots=True)
class Standing:
    """One boundary."""

    op: int
    step: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    small: bytes = b""


class StateServer:
    """Gives this rank's state to others of its lane, from threads of its own.

    Args:
        identity: this rank's.
        bind: host to listen on.
        host: under which others reach it; "": as ``bind`` says.
    """

    def __init__(
        self, identity: Identity, secret: bytes, bind: str = "127.0.0.1", host: str = ""
    ) -> None:
        self._identity, self._secret = identity, secret
        self._listener = listen_tcp(format_address(bind, 0))
        self.address = format_address(host or bind, self._listener.getsockname()[1])
        self._changed = threading.Condition()
        self._standing: Standing | None = None
        self._came_at = 0
        self._settled = False
        self._closed = False
        self._open: set[BlockingChannel] = set()
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._accept, name="ftrain-state", daemon=True)
        self._thread.start()

    def came(self, step: int) -> None:
        """This rank is new, with the state of this step."""
        with self._changed:
            self._came_at = step

    def settle(self) -> None:
        """This rank has the fleet's state."""
        with self._changed:
            self._settled = True
            self._changed.notify_all()

    def stand(self, op: int, step: int, tensors: tuple[StateTensor, ...], small: bytes) -> None:
        """This rank has come to a boundary."""
        live = {tensor.name: tensor.tensor for tensor in tensors}
        with self._changed:
            self._standing = Standing(op, step, live, small)
            self._changed.notify_all()

    def move(self) -> None:
        """Parameters are about to change."""
        with self._changed:
            self._standing = None

    def close(self) -> None:
        """Give nothing any more."""
        with self._changed:
            self._closed = True
            channels = list(self._open)
            self._changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for channel in channels:
            channel.interrupt()
        self._thread.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    # ------------------------------------------------------------ inside

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if not self._closed:
                    time.sleep(0.05)  # no descriptors left: the kernel keeps it meanwhile
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads = [old for old in self._threads if old.is_alive()] + [thread]
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            tune(sock)
            nonce = secrets.token_bytes(NONCE_BYTES)
            handshake = ServerHandshake(self._identity, self._secret, nonce)
            agreement = shake_hands(sock, handshake, time.monotonic() + _GREETING_S)
        except (FtrainError, OSError):
            sock.close()
            return
        with BlockingChannel(sock, agreement, _IDLE_S) as channel:
            with self._changed:
                self._open.add(channel)
            try:
                self._answer(channel)
            except FtrainError:
                pass  # the newcomer has gone, or is none
            finally:
                with self._changed:
                    self._open.discard(channel)

    def _answer(self, channel: BlockingChannel) -> None:
        given: Standing | None = None
        while True:
            message = channel.receive()
            if isinstance(message, StateWanted):
                given = self._wait_for(message.op)
                with self._changed:
                    settled, came = self._settled, self._came_at
                small = given.small if given is not None else b""
                step = given.step if given is not None else came
                channel.send(StateOffer(settled, given is not None, step, len(small)))
                if small:
                    channel.send_data(small)
            elif isinstance(message, TensorsWanted) and given is not None:
                for name in message.names:
                    if name not in given.tensors:
                        raise RemoteProtocolError(f"there is no tensor {name[:80]}")
                    channel.send_data(tensor_memory(given.tensors[name]))
                with self._changed:
                    channel.send(TensorsSent(self._standing is given))
            else:
                raise RemoteProtocolError("that is no question about state")

    def _wait_for(self, op: int) -> Standing | None:
        """The boundary before ``op``, if this rank comes there soon."""

        def there() -> bool:
            standing = self._standing
            return self._closed or (standing is not None and standing.op == op)

        with self._changed:
            self._changed.wait_for(lambda: there() or not self._settled, _WAIT_S)
            if self._closed:
                raise PeerLostError("the rank is ending")
            return self._standing if self._settled and there() else None


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order; a copy unless it lies like that on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data.cast("B")
