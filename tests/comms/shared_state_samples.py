"""Peers that share state: in processes of their own, told what to do, and in threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fleet_samples import SECRET, Coordinator, Peer, until

from ftrain.comms.errors import FtrainError
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.shared_state import Role, Synchronised, synchronise

State = dict[str, torch.Tensor]


class StatePeer(Peer):
    """A peer in a process of its own, which does what it is told."""

    script = Path(__file__).with_name("shared_state_process.py")

    def __init__(self, coordinator: str, number: int, incarnation: int = 1) -> None:
        super().__init__(coordinator, number, incarnation)
        self._asked = 1  # it says when it is in

    def tell(self, name: str, **options: Any) -> None:
        """Have it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, options]) + "\n")
        self.process.stdin.flush()
        self._asked += 1

    def answer(self) -> dict[str, Any]:
        """What came of the last thing it was told."""
        until(lambda: len(self.said) >= self._asked, f"an answer of peer {self.number}", 60)
        answer: dict[str, Any] = self.said[self._asked - 1]
        return answer

    def do(self, name: str, **options: Any) -> dict[str, Any]:
        """Both."""
        self.tell(name, **options)
        return self.answer()


def sync_all(peers: Sequence[StatePeer], **options: Any) -> list[dict[str, Any]]:
    """All of them at once."""
    for peer in peers:
        peer.tell("sync", **options)
    return [peer.answer() for peer in peers]


@contextmanager
def processes(numbers: Sequence[int]) -> Iterator[tuple[Coordinator, list[StatePeer]]]:
    """A coordinator and peers that are in; what is added to the list is ended as well."""
    coordinator = Coordinator(members_expected=len(numbers))
    peers = [StatePeer(coordinator.address, number) for number in numbers]
    try:
        for peer in peers:
            peer.answer()
        yield coordinator, peers
    finally:
        for peer in peers:
            peer.end()
        coordinator.stop()


@contextmanager
def fleets(count: int) -> Iterator[list[Fleet]]:
    """Peers in this process."""
    coordinator = Coordinator(members_expected=count)
    made = [Fleet(coordinator.address, "run", SECRET, peer, 1) for peer in range(count)]
    try:
        for fleet in made:
            fleet.wait_for_view(10)
        yield made
    finally:
        for fleet in made:
            fleet.close()
        coordinator.stop()


def synchronised(
    made: Sequence[Fleet],
    states: Sequence[Mapping[str, torch.Tensor]],
    revisions: Sequence[int] = (),
    roles: Mapping[int, Role] | None = None,
    **options: Any,
) -> list[Synchronised | FtrainError]:
    """What came of it for each, when all do it at once."""

    def one(index: int) -> Synchronised | FtrainError:
        try:
            return synchronise(
                made[index],
                states[index],
                revisions[index] if revisions else 1,
                role=(roles or {}).get(index, Role.ENFORCE_POPULAR),
                **options,
            )
        except FtrainError as error:
            return error

    return together(one, len(made))


def together(one: Callable[[int], Any], count: int) -> list[Any]:
    """Call something with each number, at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def state_of(seed: int, elements: int = 1000) -> State:
    """Tensors of many kinds."""
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(elements, generator=random)
    return {
        "single": values,
        "half": values.half(),
        "brain": values.bfloat16(),
        "whole": (values * 1000).to(torch.int64),
        "flags": values > 0.5,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(float(seed)),
    }


def equal(one: State, other: State) -> bool:
    """Bit by bit."""
    return all(torch.equal(one[key], other[key]) for key in one)


def flip(tensor: torch.Tensor, byte: int) -> None:
    """One bit of it."""
    tensor.view(-1).view(torch.uint8)[byte] ^= 1
