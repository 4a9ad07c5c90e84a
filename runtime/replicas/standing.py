"""Where this rank stands, for others that come to the fleet and need its state.

From the boundary of a step until the step's average is over no parameter changes, and the average
needs the newcomer: so what is read from live tensors in between is the state at the boundary.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from ftrain.checkpoint.tensors import StateTensor
from ftrain.comms import wire
from ftrain.comms.channel_blocking import BlockingChannel
from ftrain.comms.errors import PeerLostError, RemoteProtocolError
from ftrain.comms.fleet.access import Access
from ftrain.comms.fleet.guests import Guests

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
    """Gives this rank's state to others of its lane, from threads of its own."""

    def __init__(self, access: Access) -> None:
        self._changed = threading.Condition()
        self._standing: Standing | None = None
        self._came_at = 0
        self._settled = False
        self._closed = False
        self._guests = Guests(access, self._answer, _IDLE_S)
        self.address = self._guests.address

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
            self._changed.notify_all()
        self._guests.close()

    # ------------------------------------------------------------ inside

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
