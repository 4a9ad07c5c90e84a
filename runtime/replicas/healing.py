"""A newcomer to the fleet gets the state that the others train on, from several of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ftrain.checkpoint.tensors import StateTensor, tensor_bytes
from ftrain.comms.channel_blocking import BlockingChannel, connect_blocking
from ftrain.comms.errors import FtrainError, PeerLostError, RemoteProtocolError
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.place import Place
from ftrain.runtime.replicas.standing import (
    StateOffer,
    StateWanted,
    TensorsSent,
    TensorsWanted,
    tensor_memory,
)

_TIMEOUT_S = 10.0
_PATIENCE_S = 30.0  # with members that do not come to the boundary
_SMALL_BYTES_MAX = 256 * 1024 * 1024


@dataclass(slots=True)
class Donor:
    """A peer that was asked."""

    place: Place
    channel: BlockingChannel
    offer: StateOffer
    small: bytes


def ask(place: Place, op: int, identity: Identity, secret: bytes) -> Donor:
    """Ask a peer where it stands; raises PeerLostError, RemoteProtocolError."""
    channel = connect_blocking(place.state, identity, secret, timeout_s=_TIMEOUT_S)
    try:
        channel.send(StateWanted(op))
        offer = channel.receive()
        if not isinstance(offer, StateOffer) or not 0 <= offer.small_bytes <= _SMALL_BYTES_MAX:
            raise RemoteProtocolError(f"{channel.peer} did not say where it stands")
        small = bytearray(offer.small_bytes)
        channel.receive_into(small)
        return Donor(place, channel, offer, bytes(small))
    except BaseException:  # whatever it is, nobody will use the connection
        channel.close()
        raise


def find_donors(
    places: Sequence[Place],
    own: Place,
    op: int,
    came_at: int,
    identity: Identity,
    secret: bytes,
    *,
    goes_on: Callable[[], bool],
) -> list[Donor]:
    """Those that have the fleet's state at the boundary before ``op``; none: this rank has.

    When all are new, it is the one that came with the newest step, the first of them in the ring.
    ``goes_on``: whether the membership is still that of ``places``; else PeerLostError.
    """
    others = [place for place in places if place.node != own.node]
    end_s = time.monotonic() + _PATIENCE_S
    while goes_on() and time.monotonic() < end_s:
        with ThreadPoolExecutor(max(1, len(others)), "ftrain-heal") as pool:
            found = list(pool.map(lambda place: _try(place, op, identity, secret), others))
        donors = [donor for donor in found if donor is not None]
        ready = [donor for donor in donors if donor.offer.settled and donor.offer.ready]
        new = [donor for donor in donors if not donor.offer.settled]
        if len(new) == len(others):  # nobody has it yet
            best = max(came_at, *(donor.offer.step for donor in new)) if new else came_at
            came = {donor.place.node: donor.offer.step for donor in new} | {own.node: came_at}
            first = next(place for place in places if came[place.node] == best)
            if first.node == own.node:
                _close(donors)
                return []
        _close(donor for donor in donors if donor not in ready)
        if ready:
            return ready
        time.sleep(0.01)  # the others are on their way to that boundary
    raise PeerLostError("the fleet's membership changed while its state was being asked for")


def fetch(tensors: Sequence[StateTensor], donors: Sequence[Donor]) -> int:
    """Fill ``tensors`` with what the donors have, each giving a share; returns the bytes.

    Raises PeerLostError when one of them is lost, or has gone on: then nothing of it counts.
    """
    shares: list[list[StateTensor]] = [[] for _ in donors]
    loads = [0] * len(donors)
    for tensor in sorted(tensors, key=lambda one: -tensor_bytes(one.tensor)):
        least = loads.index(min(loads))
        shares[least].append(tensor)
        loads[least] += tensor_bytes(tensor.tensor)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(donors), "ftrain-heal"))
        for donor in donors:
            stack.callback(donor.channel.interrupt)
        list(pool.map(_fetch_share, shares, donors))
    return sum(loads)


def _fetch_share(tensors: Sequence[StateTensor], donor: Donor) -> None:
    donor.channel.send(TensorsWanted(tuple(tensor.name for tensor in tensors)))
    for tensor in tensors:
        _receive(donor.channel, tensor.tensor)
    if donor.channel.receive() != TensorsSent(True):
        raise PeerLostError(f"{donor.channel.peer} has gone on while it gave its state")


def _receive(channel: BlockingChannel, target: torch.Tensor) -> None:
    if not target.numel():
        return
    if target.device.type == "cpu" and target.is_contiguous():
        channel.receive_into(tensor_memory(target))
        return
    came = torch.empty(target.shape, dtype=target.dtype)
    channel.receive_into(tensor_memory(came))
    with torch.no_grad():
        target.copy_(came)


def _try(place: Place, op: int, identity: Identity, secret: bytes) -> Donor | None:
    try:
        return ask(place, op, identity, secret)
    except FtrainError:
        return None


def _close(donors: object) -> None:
    for donor in donors:  # type: ignore[attr-defined]
        donor.channel.close()
