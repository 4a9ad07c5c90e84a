"""A fleet of real processes: members are killed, stopped and cut off, come and go, in the middle of
sums; the coordinator dies."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fleet_samples import SECRET, Coordinator, Peer, fleet_of, until

from ftrain.comms.errors import FtrainError, StoreUnreachableError
from ftrain.comms.fleet.collectives import all_reduce
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.protocol.peers import Limits
from ftrain.comms.fleet.server import TICK_S

LINKS = ("memory", "tcp")


def agree(peers: Sequence[Peer]) -> None:
    """All sums were right, and everybody got the same of each."""
    outcomes: dict[int, Any] = {}
    for peer in peers:
        sums = peer.sums()
        numbers = [one["op"] for one in sums]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # each just once
        for one in sums:
            assert one["right"], one
            outcome = (one["view"], one["members"], one["value"])
            assert outcomes.setdefault(one["op"], outcome) == outcome


def last_members(peer: Peer) -> list[int]:
    return peer.sums()[-1]["members"]


@pytest.mark.parametrize(("links", "where"), [("memory", "inplace"), ("tcp", "apart")])
def test_the_rest_goes_on_when_one_is_killed(links: str, where: str) -> None:
    with fleet_of(range(4), 3_000_000, links, where) as (_, peers):
        for left in ([0, 1, 3], [0, 3], [3]):
            victim = next(
                peer for peer in peers if peer.process.poll() is None and peer.number not in left
            )
            victim.signal(signal.SIGKILL)
            victim.process.wait()
            rest = [peer for peer in peers if peer.number in left]
            until(lambda: all(last_members(peer) == left for peer in rest), f"a sum of {left}")  # noqa: B023
        agree(peers)


@pytest.mark.parametrize("links", LINKS)
def test_one_that_stands_still_is_left_behind_and_does_not_come_back(links: str) -> None:
    with fleet_of(range(3), 300_000, links) as (_, peers):
        peers[1].signal(signal.SIGSTOP)
        rest = [peers[0], peers[2]]
        until(lambda: all(last_members(peer) == [0, 2] for peer in rest), "a sum without it")
        peers[1].signal(signal.SIGCONT)
        until(peers[1].error, "being told")
        assert peers[1].error().startswith("FleetLeftError: ")
        more = peers[0].sums()[-1]["op"]
        until(lambda: peers[0].sums()[-1]["op"] > more + 3, "further sums")
        assert last_members(peers[0]) == [0, 2]
        agree(peers)


def test_one_that_stands_still_for_a_moment_stays() -> None:
    with fleet_of(range(3), 300_000, "memory") as (coordinator, peers):
        for _ in range(4):
            peers[1].signal(signal.SIGSTOP)
            time.sleep(0.4)
            peers[1].signal(signal.SIGCONT)
            before = peers[0].sums()[-1]["op"]
            until(lambda: peers[0].sums()[-1]["op"] > before + 3, "further sums")  # noqa: B023
        assert last_members(peers[0]) == [0, 1, 2]
        assert coordinator.machine.hard.view.number == 1
        agree(peers)


def test_members_come_and_go_while_the_others_go_on() -> None:
    with fleet_of([0, 1], 300_000, "memory") as (coordinator, peers):
        came = Peer(coordinator.address, 5, 1, 300_000, "memory")
        peers.append(came)
        until(lambda: came.sums() and last_members(peers[0]) == [0, 1, 5], "its first sum", 30)
        assert peers[1].process.stdin is not None
        peers[1].process.stdin.close()
        until(lambda: peers[1].process.poll() is not None, "the end of who left")
        assert peers[1].said[-1] == {"left": True}
        until(lambda: last_members(came) == [0, 5], "a sum without it")
        again = Peer(coordinator.address, 1, 2, 300_000, "memory")
        peers.append(again)
        until(lambda: again.sums() and last_members(came) == [0, 5, 1], "its return", 30)
        agree(peers)
        undone = [n for n in coordinator.notices if "lost" in n.text or "gone" in n.text]
        assert not undone, "nobody had to stop for that"


def test_operations_wait_for_enough_members() -> None:
    with fleet_of([0, 1], 300_000, "memory", members_min=2) as (coordinator, peers):
        peers[1].signal(signal.SIGKILL)
        until(lambda: coordinator.machine.hard.view.numbers == (0,), "the loss")
        time.sleep(0.3)  # what was whole when the other died is done, and may still be told
        number = peers[0].sums()[-1]["op"]
        time.sleep(0.3)
        assert peers[0].sums()[-1]["op"] == number
        peers.append(Peer(coordinator.address, 1, 2, 300_000, "memory"))
        until(lambda: last_members(peers[0]) == [0, 1] and len(peers[2].sums()) > 2, "more", 30)
        assert peers[2].sums()[0]["op"] == number + 1
        agree(peers)


def test_sums_go_on_without_a_coordinator_and_changes_wait_for_it() -> None:
    with fleet_of([0, 1, 2], 300_000, "tcp") as (coordinator, peers):
        coordinator.stop()
        before = peers[0].sums()[-1]["op"]
        until(lambda: peers[0].sums()[-1]["op"] > before + 20, "sums without a coordinator")
        peers[1].signal(signal.SIGKILL)
        time.sleep(0.3)
        assert peers[0].process.poll() is None
        coordinator.start()
        began_s = time.monotonic()
        until(lambda: last_members(peers[0]) == last_members(peers[2]) == [0, 2], "the change")
        assert time.monotonic() - began_s < 5
        agree(peers)


def test_a_store_that_fails_puts_off_changes_only() -> None:
    with fleet_of([0, 1, 2], 300_000, "memory") as (coordinator, peers):
        coordinator.broken = StoreUnreachableError("nobody answers at 127.0.0.1:2379")
        before = peers[0].sums()[-1]["op"]
        until(lambda: peers[0].sums()[-1]["op"] > before + 20, "sums")
        peers[1].signal(signal.SIGKILL)
        until(lambda: any("can't change for now" in n.text for n in coordinator.notices), "a word")
        coordinator.broken = None
        until(lambda: last_members(peers[0]) == last_members(peers[2]) == [0, 2], "the change")
        agree(peers)


def test_nobody_is_given_up_while_the_store_does_not_answer() -> None:
    """Nobody hears the order to halt meanwhile, and so can't follow it."""
    limits = Limits(silence_ticks=4, halt_ticks=4)
    with fleet_of([0, 1, 2], 300_000, "memory", limits=limits) as (coordinator, peers):
        coordinator.broken = StoreUnreachableError("nobody answers at 127.0.0.1:2379")
        peers[1].signal(signal.SIGKILL)
        until(lambda: any("can't change for now" in n.text for n in coordinator.notices), "a word")
        time.sleep(4 * TICK_S * 4)
        coordinator.broken = None
        until(lambda: last_members(peers[0]) == last_members(peers[2]) == [0, 2], "the change")
        agree(peers)


def test_memory_for_inputs_is_used_again() -> None:
    coordinator = Coordinator()
    fleet = Fleet(coordinator.address, "run", SECRET, 0, 1)
    try:
        fleet.wait_for_view(10)
        for _ in range(3):
            all_reduce(fleet, torch.ones(1000)).wait(10)
        assert [spare.nbytes for spare in fleet.backups._spare] == [4000]
    finally:
        fleet.close()
        coordinator.stop()


def test_one_with_another_secret_is_not_let_in() -> None:
    coordinator = Coordinator()
    try:
        fleet = Fleet(coordinator.address, "run", b"x" * 32, 0, 1)
        with pytest.raises(FtrainError, match="secret"):
            fleet.wait_for_view(5)
        fleet.close()
    finally:
        coordinator.stop()
