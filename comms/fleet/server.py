"""A fleet's coordinator as a server: :class:`FleetCoordinator` over connections and a store."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

import msgspec

from ftrain.comms.channel import Channel, Identity, Server, serve
from ftrain.comms.errors import FtrainError, PeerLostError, RemoteProtocolError, RunDirectoryError
from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator
from ftrain.comms.fleet.protocol.messages import FleetHard, PeerGone, PeerStatus
from ftrain.comms.fleet.protocol.plausible import fault_of_status
from ftrain.comms.protocol.effects import Announce
from ftrain.comms.protocol.messages import Notice
from ftrain.comms.wire import BAD_INPUT

TICK_S = 0.05
_STORE_PAUSE_S = 0.2  # before what could not be stored is stored again


def encode_hard(hard: FleetHard) -> bytes:
    """As it is stored."""
    return msgspec.json.encode(hard)


def decode_hard(state: bytes | None) -> FleetHard | None:
    """What :func:`encode_hard` made; RunDirectoryError for anything else."""
    if state is None:
        return None
    try:
        return msgspec.json.decode(state, type=FleetHard)
    except BAD_INPUT as error:
        raise RunDirectoryError(
            f"what is stored of the fleet's coordinator can't be read ({error}): begin a new run"
        ) from None


class FleetServer:
    """Runs until it is cancelled.

    Args:
        machine: made from what the store held.
        save: stores durably before it returns, from a thread; what it raises is told, and it is
            tried again, while nothing that depends on it is said.
        announce: news, for whoever watches.
    """

    def __init__(
        self,
        machine: FleetCoordinator,
        run_id: str,
        secret: bytes,
        *,
        save: Callable[[bytes], None],
        announce: Callable[[Notice], None],
    ) -> None:
        self._machine = machine
        self._identity = Identity(run_id, "fleet", -1, 0)
        self._secret = secret
        self._save, self._announce = save, announce
        self._channels: dict[int, Channel] = {}
        self._dirty = asyncio.Event()
        self._server: Server | None = None
        self._storing = False

    async def run(
        self, listener: socket.socket | str, ready: Callable[[str], None] | None = None
    ) -> None:
        """Serve; ``ready`` is told the address once peers can connect."""
        self._server = await serve(listener, self._identity, self._secret, self._serve)
        pump = asyncio.get_running_loop().create_task(self._pump())
        try:
            if ready is not None:
                ready(self._server.address)
            while not pump.done():
                await asyncio.sleep(TICK_S)
                if not self._storing:  # nobody could hear, and so answer, what is not stored yet
                    self._machine.tick()
                self._dirty.set()
            await pump
        finally:
            pump.cancel()
            self._server.close()
            await self._server.wait_closed()
            with suppress(asyncio.CancelledError):
                await pump

    async def _serve(self, channel: Channel) -> None:
        peer = channel.peer
        old = self._channels.get(peer.node)
        if peer.role != "rank" or peer.node < 0:
            if peer.role in ("front", "agent"):
                await self._hear_of_ends(channel)
            return
        self._channels[peer.node] = channel
        if old is not None:
            old.close()
        self._machine.connected(peer.node, peer.incarnation)
        self._dirty.set()
        try:
            while True:
                message = await channel.receive()
                if not isinstance(message, PeerStatus) or (
                    (message.peer, message.incarnation) != (peer.node, peer.incarnation)
                ):
                    raise RemoteProtocolError(f"{peer} sent what it may not say")
                if why := fault_of_status(message):
                    self._machine.refuse(peer.node, peer.incarnation, why)
                    raise RemoteProtocolError(f"{peer} sent what can't be: {why}")
                self._machine.receive(message)
                self._dirty.set()
        finally:
            if self._channels.get(peer.node) is channel:
                del self._channels[peer.node]
                self._machine.disconnected(peer.node, peer.incarnation)
                self._dirty.set()

    async def _hear_of_ends(self, channel: Channel) -> None:
        """A launcher tells of processes that ended."""
        while True:
            message = await channel.receive()
            if not isinstance(message, PeerGone):
                raise RemoteProtocolError(f"{channel.peer} sent what it may not say")
            self._machine.receive(message)
            self._dirty.set()

    async def _pump(self) -> None:
        """Store, then send: one after the other, whatever comes in meanwhile."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            while ready := self._machine.ready():
                if ready.hard_state is not None:
                    await self._store(encode_hard(ready.hard_state))
                for address, message in ready.messages:
                    channel = self._channels.get(address)  # type: ignore[call-overload]
                    if channel is not None:
                        with suppress(PeerLostError):
                            channel.post(message)
                for effect in ready.effects:
                    if isinstance(effect, Announce):
                        self._announce(effect.notice)

    async def _store(self, state: bytes) -> None:
        told, self._storing = "", True
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(None, self._save, state)
                self._storing = False
                return
            except FtrainError as error:
                if str(error) != told:
                    told = str(error)
                    text = f"the fleet's membership can't change for now: {told}"
                    self._announce(Notice("warning", text, {}))
            await asyncio.sleep(_STORE_PAUSE_S)
