"""Getting blocks of shared state from several donors at once.

Every donor has a connection and a thread, which waits in the kernel.  A block is checked against
its digest when it has come; what a donor does not send, or sends wrong, is asked for elsewhere.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from ftrain.comms import wire
from ftrain.comms.channel_blocking import BlockingChannel, connect_blocking
from ftrain.comms.errors import CorruptionError, FtrainError, PeerLostError, RemoteProtocolError
from ftrain.comms.fleet.access import Access
from ftrain.comms.fleet.protocol.shared_state import BlockId, Content, Plan
from ftrain.comms.fleet.protocol.state_messages import StateAnswer, StateAsk, StateContent
from ftrain.comms.fleet.state_snapshot import CONTENT_BYTES_MAX, Landing

_DONORS_MAX = 16  # at a time


@dataclass(frozen=True, slots=True)
class Donor:
    """Where somebody's state is to be had, and under which name."""

    member: int
    peer: int
    address: str
    name: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a donor offers."""

    peer: int
    revision: int
    content: Content
    digest: bytes


class Fetcher:
    """One peer's fetching, and what there is to tell about it.

    ``received``: bytes of tensors that came, right or wrong, from each member.  ``faults``: a
    sentence for everything that had to be got elsewhere.
    """

    def __init__(self, access: Access, patience_s: float) -> None:
        self._access = access
        self._patience_s = patience_s
        self._lock = threading.Lock()  # of what follows
        self.received: dict[int, int] = {}
        self.faults: list[str] = []
        self._lost: set[int] = set()  # members whose connection ended, in this attempt

    def tell(self, fault: str) -> None:
        """Something went wrong that may be mended."""
        with self._lock:
            self.faults.append(fault)

    def content(self, address: str, name: str) -> Found:
        """What is offered under a name. Raises PeerLostError and what connecting raises."""
        with connect_blocking(
            address, self._access.identity, self._access.secret, timeout_s=self._patience_s
        ) as channel:
            answer = _ask(channel, StateAsk(name))
            if not 0 < answer.nbytes <= CONTENT_BYTES_MAX:
                raise RemoteProtocolError(f"{channel.peer} offers a list of {answer.nbytes} bytes")
            encoded = bytearray(answer.nbytes)
            channel.receive_into(encoded)
            message = wire.decode(memoryview(encoded))
            if not isinstance(message, StateContent):
                raise RemoteProtocolError(f"{channel.peer} sent what it may not say")
            digest = xxhash.xxh3_128_digest(encoded)
            return Found(channel.peer.node, answer.revision, message.content, digest)

    def blocks(
        self, plan: Plan, member: int, donors: Mapping[int, Donor], landing: Landing
    ) -> None:
        """Get everything that ``member`` lacks; raises PeerLostError if that is not to be had."""
        self._lost.clear()
        wanted = {
            donor: [block for block in blocks if not landing.has(block, plan.digest(block))]
            for donor, blocks in plan.fetches.get(member, {}).items()
        }
        tried: dict[BlockId, set[int]] = defaultdict(set)
        while wanted := {donor: blocks for donor, blocks in wanted.items() if blocks}:
            with ThreadPoolExecutor(min(len(wanted), _DONORS_MAX), "ftrain-fetch") as pool:
                parts = pool.map(
                    lambda part: self._from(donors[part[0]], part[1], plan, landing),
                    wanted.items(),
                )
                left = list(zip(wanted, parts, strict=True))
            for donor, blocks in left:
                for block in blocks:
                    tried[block].add(donor)
            wanted = self._elsewhere(plan, [b for _, blocks in left for b in blocks], tried)

    def _elsewhere(
        self, plan: Plan, blocks: Iterable[BlockId], tried: Mapping[BlockId, set[int]]
    ) -> dict[int, list[BlockId]]:
        wanted: dict[int, list[BlockId]] = {}
        for block in blocks:
            out = tried[block] | self._lost
            donors = [member for member in plan.holders(block) if member not in out]
            if not donors:
                key = plan.content[block[0]].key
                raise PeerLostError(
                    f"a part of tensor {key!r} is not to be had any more: {self.faults[-1]}"
                )
            donor = min(donors, key=lambda member: len(wanted.get(member, ())))
            wanted.setdefault(donor, []).append(block)
        return wanted

    def _from(
        self, donor: Donor, blocks: list[BlockId], plan: Plan, landing: Landing
    ) -> list[BlockId]:
        """Get blocks from one donor; those that did not come, or came wrong."""
        missing = dict.fromkeys(blocks)
        try:
            with connect_blocking(
                donor.address,
                self._access.identity,
                self._access.secret,
                timeout_s=self._patience_s,
            ) as channel:
                if channel.peer.node != donor.peer:
                    raise PeerLostError(f"{channel.peer} answers in its place")
                _ask(channel, StateAsk(donor.name, tuple(blocks)))
                for block in blocks:
                    try:
                        self._receive(channel, donor, block, plan, landing)
                        del missing[block]
                    except CorruptionError as error:
                        self.tell(str(error))
        except (FtrainError, OSError) as error:
            with self._lock:
                self._lost.add(donor.member)
            self.tell(f"member {donor.member} sent {len(missing)} blocks less than asked: {error}")
        return list(missing)

    def _receive(
        self, channel: BlockingChannel, donor: Donor, block: BlockId, plan: Plan, landing: Landing
    ) -> None:
        room = landing.room(plan, block)
        channel.receive_into(room)
        with self._lock:
            count = self.received.get(donor.member, 0)
            self.received[donor.member] = count + room.nbytes
        digest = plan.digest(block)
        if xxhash.xxh3_128_digest(room) != digest:
            key = plan.content[block[0]].key
            raise CorruptionError(f"member {donor.member} sent wrong bytes of tensor {key!r}")
        landing.arrived(block, digest, room)


def _ask(channel: BlockingChannel, ask: StateAsk) -> StateAnswer:
    channel.send(ask)
    answer = channel.receive()
    if not isinstance(answer, StateAnswer):
        raise RemoteProtocolError(f"{channel.peer} sent what it may not say")
    if not answer.found:
        raise PeerLostError(f"{channel.peer} does not offer that state any more")
    return answer
