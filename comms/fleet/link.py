"""A peer's machine and its connection to the coordinator, in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ftrain.comms.channel import Channel, Identity, connect
from ftrain.comms.driver import Driver
from ftrain.comms.errors import (
    AuthenticationError,
    FtrainError,
    PeerLostError,
    RemoteProtocolError,
)
from ftrain.comms.fleet.protocol.messages import FleetDirective
from ftrain.comms.fleet.protocol.peer import FleetPeer
from ftrain.comms.fleet.protocol.plausible import fault_of_directive

_RECONNECT_S_MIN, _RECONNECT_S_MAX = 0.02, 0.3
_CONNECT_S = 2.0


class FleetLink:
    """Runs a :class:`FleetPeer`; what it wants done is done by ``perform``, in the same thread.

    Args:
        find: where the coordinator listens at the moment.
        on_tick: called in every tick, in the same thread.
        refused: called when the coordinator does not let this process in at all.
    """

    def __init__(
        self,
        machine: FleetPeer,
        identity: Identity,
        secret: bytes,
        *,
        find: Callable[[], Awaitable[str]],
        perform: Callable[[object], None],
        on_tick: Callable[[], None],
        refused: Callable[[FtrainError], None],
        tick_s: float,
    ) -> None:
        self.machine = machine
        self._identity, self._secret = identity, secret
        self._find, self._on_tick, self._refused = find, on_tick, refused
        self._tick_s = tick_s
        self._channel: Channel | None = None
        self._loop = asyncio.new_event_loop()
        self._driver: Driver[None] = Driver(machine, lambda _: None, self._send, perform)
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="ftrain-fleet", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def call(self, what: Callable[[], None]) -> None:
        """Call something in the thread, and do what the machine wants after it."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._call, what)

    def stop(self) -> None:
        """End the thread, from any other."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()

    def _call(self, what: Callable[[], None]) -> None:
        what()
        self._driver.pump()

    def _cancel(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _run(self) -> None:
        try:
            self._main = self._loop.create_task(self._serve())
            with suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._main)
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        ticks = self._loop.create_task(self._tick())
        try:
            await self._stay_connected()
        finally:
            ticks.cancel()
            with suppress(asyncio.CancelledError):
                await ticks
            if self._channel is not None:
                self._channel.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            self._on_tick()
            self._driver.tick()

    async def _stay_connected(self) -> None:
        pause_s = _RECONNECT_S_MIN
        while True:
            try:
                address = await self._find()
                async with await connect(
                    address, self._identity, self._secret, timeout_s=_CONNECT_S
                ) as channel:
                    self._channel, pause_s = channel, _RECONNECT_S_MIN
                    self.machine.connected()
                    self._driver.pump()
                    while True:
                        message = await channel.receive()
                        if not isinstance(message, FleetDirective) or fault_of_directive(message):
                            raise RemoteProtocolError("the coordinator said what it can't")
                        self._driver.receive(message)
            except AuthenticationError as error:
                self._refused(error)
                return
            except FtrainError:
                pass  # it is being started again
            finally:
                self._channel = None
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RECONNECT_S_MAX)

    def _send(self, _: object, message: object) -> None:
        if self._channel is not None:
            with suppress(PeerLostError):
                self._channel.post(message)
