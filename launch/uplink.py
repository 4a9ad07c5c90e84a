"""An agent's connection to the coordinator, whichever process that is at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from ftrain.comms.channel import Channel, Identity, connect
from ftrain.comms.errors import AuthenticationError, FtrainError, PeerLostError
from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import Directive, NodeReport, Notice, OpenStore

_RECONNECT_S_MIN, _RECONNECT_S_MAX = 0.02, 0.5
_NOTICES_MAX = 100  # kept while there is no coordinator


class Uplink:
    """Connects again for as long as it takes; what matters is said again on each connection.

    Args:
        report: the node's report as of now, the first thing that a coordinator hears.
        on_directive: called with each directive.
        on_store: called with each order of a store.
    """

    def __init__(
        self,
        job: JobSpec,
        node: int,
        incarnation: int,
        *,
        report: Callable[[], NodeReport],
        on_directive: Callable[[Directive], None],
        on_store: Callable[[OpenStore], None],
    ) -> None:
        self._address = job.coordinator
        self._identity = Identity(job.run_id, "agent", node, incarnation)
        self._secret = bytes.fromhex(job.secret)
        self._report = report
        self._on_directive = on_directive
        self._on_store = on_store
        self._channel: Channel | None = None
        self._notices: list[Notice] = []

    def send(self, message: object) -> None:
        """Send to the coordinator; lost when there is none."""
        if self._channel is not None:
            with suppress(PeerLostError):
                self._channel.post(message)

    def say(self, kind: str, text: str, **data: object) -> None:
        """News for whoever watches the job; kept until there is a coordinator."""
        self._notices = [*self._notices, Notice(kind, text, data)][-_NOTICES_MAX:]
        self._send_notices()

    async def run(self) -> None:
        """Stay connected. Raises :class:`AuthenticationError` when the coordinator refuses us."""
        pause_s = _RECONNECT_S_MIN
        while True:
            try:
                async with await connect(self._address, self._identity, self._secret) as channel:
                    self._channel, pause_s = channel, _RECONNECT_S_MIN
                    self._send_notices()
                    channel.post(self._report())
                    while True:
                        message = await channel.receive()
                        if isinstance(message, Directive):
                            self._on_directive(message)
                        elif isinstance(message, OpenStore):
                            self._on_store(message)
            except AuthenticationError:
                raise
            except FtrainError:
                pass  # it is being restarted
            finally:
                self._channel = None
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RECONNECT_S_MAX)

    def _send_notices(self) -> None:
        while self._notices and self._channel is not None and not self._channel.closed:
            self.send(self._notices.pop(0))
