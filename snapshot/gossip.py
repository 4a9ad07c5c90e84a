"""Group commit without a central message: each node tells the others what it has sealed.

Every node decides for itself; :class:`VersionCommit` makes sure that all decide the same.  Each
pair of nodes has two connections, each used in one direction.  What has not been sent yet may be
replaced by something newer, so a slow or dead peer costs a few messages of memory and no time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

from ftrain.checkpoint.protocol.agreement import collectives_agree, whole_keys
from ftrain.checkpoint.protocol.commit import Committed, VersionCommit
from ftrain.comms.channel import Identity, connect
from ftrain.comms.driver import Driver
from ftrain.comms.errors import AuthenticationError, FtrainError, RemoteProtocolError
from ftrain.comms.protocol.messages import Held, Sealed, SealedSeen, VersionId
from ftrain.comms.protocol.ready import Address
from ftrain.snapshot.protocol import protection
from ftrain.snapshot.protocol.messages import Peer, SetGroup, Standing, Whereabouts
from ftrain.snapshot.store import SlotStore

TICK_S = 0.05
_QUEUED_VERSIONS_MAX = 8
_HEARD_MAX = 8  # versions whose records from other nodes are kept for comparison
_RETRY_S_MIN = 0.02
_RETRY_S_MAX = 1.0
_CONNECT_S_MAX = 5.0


class Gossip:
    """This node's part in the group's commit.

    Args:
        store: whose sealed versions are announced, and which keeps the others' small images.
        identity: of this manager (role ``smp``).
        address: where it listens.
        on_committed: every node of the group holds this version.
        on_heard: a node of the group announced a version of its present epoch.
        on_parity: a message of the rounds of parity came from a node of the group.
        on_trouble: one sentence for the user.
    """

    def __init__(
        self,
        store: SlotStore,
        identity: Identity,
        secret: bytes,
        *,
        address: str,
        on_committed: Callable[[VersionId], None],
        on_heard: Callable[[Sealed], None],
        on_parity: Callable[[object], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._store = store
        self._identity = identity
        self._secret = secret
        self._on_committed = on_committed
        self._on_heard = on_heard
        self._on_parity = on_parity
        self._on_trouble = on_trouble
        self._commit = VersionCommit(me=identity.node)
        self._driver: Driver[None] = Driver(
            self._commit, persist=lambda _: None, send=self._send, perform=self._perform
        )
        self._peers: dict[int, PeerLink] = {}
        self._hail = Whereabouts(identity.node, identity.incarnation, address)
        self._addresses: dict[tuple[int, int], str] = {}  # (node, incarnation): as it says itself
        self._announced: set[VersionId] = set()
        self._heard: dict[VersionId, dict[int, tuple[Held, ...]]] = {}  # by node
        self._ticking: asyncio.Task[None] | None = None

    def set_group(self, group: SetGroup) -> None:
        """Another membership, or a peer's new address."""
        members = sorted([self._identity.node, *(peer.node for peer in group.peers)])
        self._commit.new_group(group.epoch, members, members)
        self._announced = {v for v in self._announced if v.epoch >= group.epoch}
        wanted = {peer.node: self._located(peer) for peer in group.peers}
        for node in [node for node, link in self._peers.items() if wanted.get(node) != link.peer]:
            self._peers.pop(node).close()
        for node, peer in wanted.items():
            if node not in self._peers:
                self._peers[node] = self._link(peer)
        if self._peers and self._ticking is None:
            self._ticking = asyncio.get_running_loop().create_task(self._tick())
        self._driver.pump()

    def sealed(self, version: VersionId) -> None:
        """``version`` is complete on this node."""
        if version in self._announced:
            return
        self._announced.add(version)
        who = self._identity
        payload = (
            self._store.announcement(version, who.node, who.incarnation)
            if self._peers
            else Sealed(version, who.node, who.incarnation, (), ())
        )
        if self._agrees(version):
            self._commit.sealed_here(version, payload)
            self._driver.pump()
            return
        # It will not be committed, but the others have to learn which rank it is that differs.
        payload = replace(payload, smalls=(b"",) * len(payload.held))
        for link in self._peers.values():
            link.post(payload)

    def withdrawn(self, version: VersionId) -> None:
        """``version`` is not complete on this node any more, and never will be."""
        self._commit.dropped_here(version)
        self._driver.pump()
        self.tell_standing()

    def _agrees(self, version: VersionId) -> bool:
        """Whether this node's ranks and those heard of belong to one state at ``version``."""
        heard = self._heard.get(version, {}).values()
        return collectives_agree(chain(self._store.records(version), *heard))

    def tell_standing(self) -> None:
        """Let the others know which versions this node has passed over."""
        standing = self._store.custody.standing() if self._peers else None
        if standing is not None:
            floor, possible = standing
            who = self._identity
            for link in self._peers.values():
                link.post(Standing(who.node, who.incarnation, floor, possible))

    def receive(self, message: object, peer: Identity) -> None:
        """A message of another node; what is not of this group's members is dropped here.

        RemoteProtocolError for what a manager never says.
        """
        link = self._peers.get(peer.node)
        if link is None or link.peer.incarnation != peer.incarnation:
            return
        if isinstance(message, Sealed):
            if (message.node, message.incarnation) != (peer.node, peer.incarnation):
                raise RemoteProtocolError(f"{peer} speaks for node {message.node}")
            if message.version.epoch == self._store.custody.epoch:
                self._store.keep_smalls(message)
                self._on_heard(message)
                self._heard.setdefault(message.version, {})[message.node] = message.held
                while len(self._heard) > _HEARD_MAX:
                    del self._heard[min(self._heard)]
            if self._agrees(message.version):
                self._driver.receive(message)
        elif isinstance(message, SealedSeen):
            self._driver.receive(message)
        elif isinstance(message, protection.MESSAGES):
            if isinstance(message, protection.ParityMade) and message.message.node != peer.node:
                raise RemoteProtocolError(f"{peer} speaks for node {message.message.node}")
            self._on_parity(message)
        elif isinstance(message, Standing):
            self._store.custody.hear(peer.node, message.floor, message.possible)
        elif isinstance(message, Whereabouts):
            self._addresses[peer.node, peer.incarnation] = message.address
            if link.peer.address != message.address:
                link.close()
                self._peers[peer.node] = self._link(self._located(link.peer))
        else:
            raise RemoteProtocolError(f"{peer} sent a {type(message).__name__}")

    def post(self, node: int, message: object) -> None:
        """Send to another node of the group soon."""
        self._send(node, message)

    def address_of(self, node: int) -> str:
        """Where a node of the group's manager listens; "" while that is unknown."""
        link = self._peers.get(node)
        return link.peer.address if link is not None else ""

    def replicated(self, version: VersionId, losses: int) -> bool:
        """Whether so many nodes may be lost and every byte of ``version`` is still on another one.

        False also when that is not known here.
        """
        nodes = {**self._heard.get(version, {}), self._identity.node: self._store.records(version)}
        if len(nodes) != len(self._peers) + 1:
            return False
        keys = {share.key for held in nodes.values() for h in held for share in h.shares}
        whole = [whole_keys(held) for held in nodes.values()]
        return all(sum(key in of_node for of_node in whole) > losses for key in keys)

    def close(self) -> None:
        """End every connection."""
        if self._ticking is not None:
            self._ticking.cancel()
        for link in self._peers.values():
            link.close()

    def _located(self, peer: Peer) -> Peer:
        """The peer at the address that it gave itself, which is newer than its agent's word."""
        address = self._addresses.get((peer.node, peer.incarnation), peer.address)
        return replace(peer, address=address)

    def _link(self, peer: Peer) -> PeerLink:
        return PeerLink(peer, self._identity, self._secret, self._hail, self._on_trouble)

    def _send(self, address: Address, message: object) -> None:
        link = self._peers.get(address) if isinstance(address, int) else None
        if link is not None:
            link.post(message)

    def _perform(self, effect: object) -> None:
        # What was given up here meanwhile does not count, however complete it is elsewhere.
        if isinstance(effect, Committed) and self._store.custody.complete(effect.version):
            self._announced = {v for v in self._announced if v >= effect.version}
            self._on_committed(effect.version)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self._peers:
                self._driver.tick()
                if self._behind():
                    self.tell_standing()

    def _behind(self) -> bool:
        """Whether something sealed here still waits for the others."""
        custody = self._store.custody
        newest = custody.committed
        return any(
            version.epoch == custody.epoch and (newest is None or version > newest)
            for version in custody.sealed_versions()
        )


class PeerLink:
    """Sends to one peer, reconnecting for ever; holds the newest few messages meanwhile."""

    def __init__(
        self,
        peer: Peer,
        identity: Identity,
        secret: bytes,
        hail: Whereabouts,
        on_trouble: Callable[[str], None],
    ) -> None:
        self.peer = peer
        self._identity = identity
        self._secret = secret
        self._hail = hail
        self._on_trouble = on_trouble
        self._queue: dict[object, object] = {}  # what it is about -> message, oldest first
        self._news = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def post(self, message: object) -> None:
        """Send soon; replaces an unsent message about the same."""
        key: object = message.version if isinstance(message, Sealed) else type(message)
        self._queue.pop(key, None)
        self._queue[key] = message
        versions = [key for key in self._queue if isinstance(key, VersionId)]
        if len(versions) > _QUEUED_VERSIONS_MAX:
            del self._queue[min(versions)]
        self._news.set()

    def close(self) -> None:
        """Stop."""
        self._task.cancel()

    async def _run(self) -> None:
        if not self.peer.address:
            return  # its own word or a new SetGroup will bring it
        retry_s, warned = _RETRY_S_MIN, False
        while True:
            try:
                channel = await connect(
                    self.peer.address, self._identity, self._secret, timeout_s=_CONNECT_S_MAX
                )
                retry_s = _RETRY_S_MIN
                async with channel:
                    await channel.send(self._hail)
                    while True:
                        await self._news.wait()
                        while self._queue:
                            message = self._queue.pop(next(iter(self._queue)))
                            await channel.send(message)
                        self._news.clear()
            except AuthenticationError as error:
                if not warned:
                    self._on_trouble(f"node {self.peer.node} refuses this node's versions: {error}")
                warned, retry_s = True, _RETRY_S_MAX
            except (FtrainError, OSError):
                pass  # it will be back, or a new group comes without it
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _RETRY_S_MAX)
