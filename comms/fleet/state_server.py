"""Where a peer's shared state is to be had: snapshots under names, for whoever knows the secret.

Every connection has a thread, which sends blocking: the memory of the tensors goes to the kernel
uncopied, and the interpreter lock is released meanwhile.
"""

from __future__ import annotations

import threading
from types import TracebackType

from ftrain.comms.channel_blocking import BlockingChannel
from ftrain.comms.errors import RemoteProtocolError
from ftrain.comms.fleet.access import Access
from ftrain.comms.fleet.guests import Guests
from ftrain.comms.fleet.protocol.state_messages import StateAnswer, StateAsk
from ftrain.comms.fleet.state_snapshot import Snapshot


class StateServer:
    """Serves from now on until it is closed; closes itself as a context manager.

    Args:
        patience_s: with a connection on which nothing moves.
    """

    def __init__(self, access: Access, patience_s: float) -> None:
        self._lock = threading.Lock()  # of everything below
        self._offers: dict[str, Snapshot] = {}
        self._sent_bytes = 0
        self._guests = Guests(access, self._serve, patience_s)
        self.address = self._guests.address

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
        self._guests.close()

    def __enter__(self) -> StateServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self, channel: BlockingChannel) -> None:
        while True:
            self._answer(channel)

    def _answer(self, channel: BlockingChannel) -> None:
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
