"""Peers that make their states equal: in threads, and in processes that are killed."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from fleet_samples import SECRET, Coordinator
from shared_state_samples import (
    State,
    StatePeer,
    equal,
    fleets,
    flip,
    processes,
    state_of,
    sync_all,
    synchronised,
    together,
)

from ftrain.comms.errors import (
    FtrainError,
    PeerLostError,
    StateError,
    UsageError,
)
from ftrain.comms.fleet import shared_state
from ftrain.comms.fleet.access import Access
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.protocol.shared_state import BLOCK_BYTES, Role
from ftrain.comms.fleet.shared_state import Synchronised, fetch, serve
from ftrain.comms.fleet.state_fetch import Fetcher
from ftrain.comms.fleet.state_snapshot import Snapshot
from ftrain.comms.protocol.handshake import Identity

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def three() -> Iterator[list[Fleet]]:
    """Three peers in this process, for all tests that lose none."""
    with fleets(3) as made:
        yield made


def access(peer: int, secret: bytes = SECRET) -> Access:
    return Access(Identity("run", "rank", peer, 1), secret)


def good(results: list[Any]) -> list[Synchronised]:
    for result in results:
        if isinstance(result, FtrainError):
            raise result
    return results


# ------------------------------------------------------------------ in threads


def test_tensors_of_every_kind_become_the_same_bits(three: list[Fleet]) -> None:
    states = [state_of(1), state_of(2), state_of(1)]
    states[0]["single"][:2] = torch.tensor([float("nan"), -0.0])
    states[2]["single"][:2] = torch.tensor([float("nan"), -0.0])
    results = good(synchronised(three, states))
    assert Snapshot(states[1], 1).digest == Snapshot(states[0], 1).digest
    nbytes = sum(one.nbytes for one in states[0].values())
    assert [one.bytes_received for one in results] == [0, nbytes, 0]
    assert results[0].bytes_sent + results[2].bytes_sent == nbytes
    assert set(results[1].donors) == {0, 2}
    assert results[1].members == (0, 1, 2)
    again = good(synchronised(three, states, expect_unchanged=True))
    assert [(one.bytes_received, one.bytes_sent, one.rounds) for one in again] == [(0, 0, 1)] * 3


def test_a_flipped_bit_is_outvoted_and_only_its_block_travels(three: list[Fleet]) -> None:
    states: list[State] = [{"w": torch.arange(3.0 * BLOCK_BYTES / 4), "b": torch.ones(3)}] * 1
    states = [{key: one.clone() for key, one in states[0].items()} for _ in range(3)]
    flip(states[0]["w"], BLOCK_BYTES + 17)
    results = good(synchronised(three, states))
    assert [one.bytes_received for one in results] == [BLOCK_BYTES, 0, 0]
    assert equal(states[0], states[1])


def test_drift_is_told_by_tensor_and_member_and_nothing_changes(three: list[Fleet]) -> None:
    states = [state_of(1) for _ in range(3)]
    flip(states[2]["brain"], 5)
    before = states[2]["brain"].clone()
    results = synchronised(three, states, expect_unchanged=True)
    assert {type(one) for one in results} == {StateError}
    assert len({*map(str, results)}) == 1
    assert "'brain' on member 2" in str(results[0])
    assert torch.equal(states[2]["brain"], before)
    assert good(synchronised(three, states))[2].bytes_received == before.nbytes
    good(synchronised(three, states, expect_unchanged=True))


def test_one_that_lags_gets_the_newest_revision(three: list[Fleet]) -> None:
    states = [state_of(1), state_of(1), state_of(2)]  # two agree, and lag behind
    results = good(synchronised(three, states, revisions=[4, 4, 5]))
    assert [one.revision for one in results] == [5, 5, 5]
    assert all(equal(one, state_of(2)) for one in states)
    assert results[2].bytes_sent == 2 * results[0].bytes_received > 0


def test_one_that_only_receives_does_not_count(three: list[Fleet]) -> None:
    states = [state_of(1), state_of(2), state_of(2)]
    roles = {1: Role.RECEIVE_ONLY, 2: Role.RECEIVE_ONLY}
    results = good(synchronised(three, states, [1, 9, 9], roles))
    assert all(equal(one, state_of(1)) for one in states)
    assert results[1].donors.keys() == results[2].donors.keys() == {0}
    assert results[0].revision == 1


def test_one_that_only_sends_is_the_truth(three: list[Fleet]) -> None:
    states = [state_of(1), state_of(1), state_of(2)]
    results = good(synchronised(three, states, [9, 9, 1], {2: Role.SEND_ONLY}))
    assert all(equal(one, state_of(2)) for one in states)
    assert [one.revision for one in results] == [1, 1, 1]
    assert results[2].bytes_received == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, "members 0 and 2 both say that theirs is the truth, and differ in 'brain'"),
        ({"more": torch.ones(1)}, "member 2 .*: only it has 'more'"),
        ({"half": torch.ones(2).half()}, r"member 2 .*: 'half' is float16 of shape \(2,\) there"),
        ({"whole": torch.ones(1000)}, "member 2 .*: 'whole' is float32 of shape"),
    ],
)
def test_what_does_not_fit_is_told_to_all(three: list[Fleet], change: State, why: str) -> None:
    states = [state_of(1), state_of(1), state_of(2) | change]
    roles = {} if change else {0: Role.SEND_ONLY, 2: Role.SEND_ONLY}
    results = synchronised(three, states, roles=roles)
    assert {type(one) for one in results} == {StateError}
    assert len({*map(str, results)}) == 1
    with pytest.raises(StateError, match=why):
        good(results)
    assert equal(states[1], state_of(1))
    good(synchronised(three, [state_of(1)] * 3))  # the fleet is none the worse


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.ones(4, 4).t(), "'w' is not contiguous"),
        (torch.ones(3, device="meta"), "'w' is on meta: shared state is on the CPU"),
        (torch.ones(2).to_sparse(), "'w' is not contiguous"),
    ],
)
def test_what_can_not_be_shared_is_refused(
    three: list[Fleet], tensor: torch.Tensor, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        shared_state.synchronise(three[0], {"w": tensor}, 1)


class FlippedBehind(Snapshot):
    """A bit of the tensor ``bad`` flips in memory after it was read, once."""

    bad: torch.Tensor | None = None

    def __init__(self, tensors: Mapping[str, torch.Tensor], revision: int) -> None:
        super().__init__(tensors, revision)
        if tensors["w"] is FlippedBehind.bad:
            FlippedBehind.bad = None
            flip(tensors["w"], 3 * BLOCK_BYTES + 1)


def test_wrong_bytes_are_got_from_another_donor(
    three: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_state, "Snapshot", FlippedBehind)
    right = torch.rand(8 * BLOCK_BYTES // 4)
    states = [{"w": right.clone()}, {"w": right.clone()}, {"w": torch.zeros_like(right)}]
    FlippedBehind.bad = states[1]["w"]
    results = good(synchronised(three, states))
    assert FlippedBehind.bad is None
    assert torch.equal(states[2]["w"], right)
    assert results[2].faults == ("member 1 sent wrong bytes of tensor 'w'",)
    assert results[2].donors == {0: 5 * BLOCK_BYTES, 1: 4 * BLOCK_BYTES}  # one of them twice
    drift = synchronised(three, states, expect_unchanged=True)
    assert "'w' on member 1" in str(drift[0])


def test_wrong_bytes_of_the_only_donor_begin_it_again(
    three: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_state, "Snapshot", FlippedBehind)
    states = [{"w": torch.rand(8 * BLOCK_BYTES // 4)} for _ in range(3)]
    FlippedBehind.bad = states[1]["w"]
    roles = {0: Role.RECEIVE_ONLY}
    results = good(synchronised(three, states, [1, 2, 1], roles))
    assert [one.rounds for one in results] == [2, 2, 2]
    assert torch.equal(states[0]["w"], states[1]["w"])
    assert torch.equal(states[2]["w"], states[1]["w"])
    assert results[2].bytes_received == 9 * BLOCK_BYTES  # what had come before is not got again


def test_nobody_goes_on_before_all_have_everything(
    three: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching, go = threading.Event(), threading.Event()
    fetch_blocks = Fetcher.blocks

    def waiting(self: Fetcher, plan: Any, member: int, *args: Any) -> None:
        if member == 2:
            fetching.set()
            assert go.wait(20)
        fetch_blocks(self, plan, member, *args)

    monkeypatch.setattr(Fetcher, "blocks", waiting)
    states = [state_of(1), state_of(1), state_of(2)]
    with ThreadPoolExecutor(3) as pool:
        begun = [pool.submit(shared_state.synchronise, three[n], states[n], 1) for n in range(3)]
        assert fetching.wait(20)
        assert wait(begun, timeout=0.3).done == set()
        assert equal(states[2], state_of(2))
        go.set()
        assert wait(begun, timeout=20).not_done == set()
    assert equal(states[2], state_of(1))


def test_whatever_members_bring_they_end_with_what_was_elected(three: list[Fleet]) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        kinds = [rng.randint(1, 2) for _ in three]
        revisions = [rng.randint(1, 2) for _ in three]
        roles = {n: Role.RECEIVE_ONLY for n in range(3) if rng.random() < 0.3}
        states = [state_of(kind) for kind in kinds]
        for state in states:
            if rng.random() < 0.3:
                flip(state[rng.choice(["single", "half", "whole"])], rng.randrange(1000))
        before = [{key: one.clone() for key, one in state.items()} for state in states]
        results = synchronised(three, states, revisions, roles)
        voters = [n for n in range(3) if n not in roles]
        if not voters:
            assert {type(one) for one in results} == {StateError}
            continue
        newest = max(revisions[n] for n in voters)
        eligible = [n for n in voters if revisions[n] == newest]
        votes = [sum(equal(before[n], before[m]) for m in eligible) for n in eligible]
        elected = before[eligible[votes.index(max(votes))]]
        assert all(equal(state, elected) for state in states), seed
        for one, had in zip(good(results), before, strict=True):
            differing = [key for key in elected if not torch.equal(had[key], elected[key])]
            assert one.bytes_received == sum(elected[key].nbytes for key in differing)
            assert one.revision == newest


# ------------------------------------------------------------------ beside the fleet


def test_who_joins_gets_a_frozen_snapshot_while_training_goes_on() -> None:
    state, mine = state_of(1, 3_000_000), state_of(2, 3_000_000)
    with (
        serve(access(0), state, 7, name="outer") as first,
        serve(access(1), state, 7, name="outer") as second,
        serve(access(2), state_of(3, 3_000_000), 6, name="outer") as old,
        serve(access(3), state, 8, name="other") as other,
    ):
        for tensor in state.values():
            tensor.zero_()
        addresses = [one.address for one in (first, second, old, other)] + ["127.0.0.1:1"]
        result = fetch(access(9), addresses, mine, name="outer")
        sent = [first.bytes_sent, second.bytes_sent, old.bytes_sent, other.bytes_sent]
    assert equal(mine, state_of(1, 3_000_000))
    assert result.revision == 7
    nbytes = sum(one.nbytes for one in mine.values())
    assert result.bytes_received == sum(sent) == nbytes
    assert sent[2:] == [0, 0]
    assert abs(sent[0] - sent[1]) <= BLOCK_BYTES
    assert result.donors == {0: sent[0], 1: sent[1]}
    assert len(result.faults) == 2  # one has no such name, one is not there


def test_a_snapshot_that_was_changed_is_noticed() -> None:
    state, mine = state_of(1), state_of(2)
    copies = [{key: one.clone() for key, one in state.items()} for _ in range(2)]
    with (
        serve(access(0), copies[0], 1, copy=False) as bad,
        serve(access(1), copies[1], 1, copy=False) as fine,
    ):
        for tensor in copies[0].values():
            tensor.zero_()
        result = fetch(access(9), [bad.address, fine.address], mine)
        assert equal(mine, state)
        assert any("member 0 sent wrong" in text for text in result.faults)
        with pytest.raises(PeerLostError, match="is not to be had any more: member 0 sent wrong"):
            fetch(access(9), [bad.address], state_of(3))


def test_nobody_without_the_secret_gets_anything() -> None:
    with (
        serve(access(0), state_of(1), 1) as serving,
        pytest.raises(PeerLostError, match="secret"),
    ):
        fetch(access(9, b"x" * 32), [serving.address], state_of(2))
    with pytest.raises(PeerLostError, match="no address was given"):
        fetch(access(9), [], state_of(2))


# ------------------------------------------------------------------ one goes, one comes


def test_one_that_comes_in_the_middle_is_taken_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new member is let in after the others have said what they have, and before they have
    everything."""
    coordinator = Coordinator(members_expected=2)
    made = [Fleet(coordinator.address, "run", SECRET, peer, 1) for peer in range(2)]
    both, joined = threading.Barrier(3, timeout=20), threading.Event()
    fetch_blocks = Fetcher.blocks

    def waiting(self: Fetcher, plan: Any, member: int, *args: Any) -> None:
        if not joined.is_set():
            both.wait()
            assert joined.wait(20)
        fetch_blocks(self, plan, member, *args)

    monkeypatch.setattr(Fetcher, "blocks", waiting)
    states = [state_of(1), state_of(2), state_of(3)]

    def one(index: int) -> Synchronised:
        if index == 2:
            both.wait()
            made.append(Fleet(coordinator.address, "run", SECRET, 2, 1))
            made[2].wait_for_view(10)
            joined.set()
        return shared_state.synchronise(made[index], states[index], 1)

    try:
        for fleet in made:
            fleet.wait_for_view(10)
        results = together(one, 3)
        assert {one.members for one in results} == {(0, 1, 2)}
        assert [one.rounds for one in results] == [2, 2, 2]
        assert all(equal(state, state_of(1)) for state in states)
    finally:
        for fleet in made:
            fleet.close()
        coordinator.stop()


def test_all_give_up_when_one_can_not_reach_the_only_donor() -> None:
    coordinator = Coordinator(members_expected=2)
    hosts = ["127.0.0.2", ""]  # nobody listens there; the ring goes through shared memory
    made = [
        Fleet(coordinator.address, "run", SECRET, peer, 1, host=host)
        for peer, host in enumerate(hosts)
    ]
    try:
        for fleet in made:
            fleet.wait_for_view(10)
        states = [state_of(1), state_of(2)]
        results = synchronised(made, states, revisions=[2, 1])
        assert {type(one) for one in results} == {PeerLostError}
        assert len({*map(str, results)}) == 1
        assert "member 1 could not get the state in 3 attempts: member 0 " in str(results[0])
        assert equal(states[1], state_of(2))
    finally:
        for fleet in made:
            fleet.close()
        coordinator.stop()


@pytest.fixture(scope="module")
def lane() -> Iterator[list[StatePeer]]:
    """Three processes with the same 64 MiB, and one that joins later and has others."""
    with processes(range(3)) as (coordinator, peers):
        peers.append(StatePeer(coordinator.address, 5))
        for peer in peers:
            peer.tell("fill", mib=64, seed=1 if peer.number < 3 else 2)
        assert [peer.answer()["digest"] for peer in peers].count(peers[0].answer()["digest"]) == 3
        yield peers


def test_a_newcomer_gets_everything_from_all_at_once(lane: list[StatePeer]) -> None:
    came = lane[3]
    assert came.said[0]["members"] == [0, 1, 2, 5]
    mine = came.answer()["digest"]
    came.tell("sync", revision=0, role="receive_only")
    first = sync_all(lane[:3], revision=3)
    new = came.answer()
    assert new["digest"] == first[0]["digest"] != mine
    assert new["revision"] == 3
    assert new["bytes_received"] == 64 * MIB + 8
    assert set(new["donors"]) == {"0", "1", "2"}
    assert max(new["donors"].values()) - min(new["donors"].values()) <= BLOCK_BYTES
    assert [one["bytes_sent"] for one in first] == list(new["donors"].values())
    again = sync_all(lane, revision=3, expect_unchanged=True)
    assert [one["bytes_received"] for one in again] == [0] * 4


def test_of_four_one_with_a_flipped_bit_is_healed(lane: list[StatePeer]) -> None:
    peers = lane
    peers[0].do("flip", key="half", at=12345)
    drift = sync_all(peers, revision=4, expect_unchanged=True)
    assert all("'half' on member 0" in one["error"] for one in drift)
    healed = sync_all(peers, revision=4)
    assert [one["bytes_received"] for one in healed] == [BLOCK_BYTES, 0, 0, 0]
    assert len({one["digest"] for one in healed}) == 1


def test_a_donor_that_is_killed_in_the_middle_is_replaced(lane: list[StatePeer]) -> None:
    peers = lane
    peers[2].do("halt_sending", blocks=5)
    late = peers[3]
    before = late.do("fill", mib=64, seed=9)["digest"]
    late.tell("sync", revision=1)
    for peer in peers[:3]:
        peer.tell("sync", revision=5)
    rest = [peers[0].answer(), peers[1].answer(), late.answer()]
    assert peers[2].process.wait() == -signal.SIGKILL
    assert len({one["digest"] for one in rest}) == 1
    assert rest[2]["digest"] != before
    assert [one["members"] for one in rest] == [[0, 1, 5]] * 3
    assert rest[2]["faults"]
    assert "member 2 sent 1" in rest[2]["faults"][0]
    assert rest[2]["donors"]["2"] == 5 * MIB
    assert rest[2]["bytes_received"] == 64 * MIB + 8
    peers.pop(2).end()


def test_when_the_only_donor_is_killed_the_rest_keeps_what_it_had(lane: list[StatePeer]) -> None:
    peers = lane
    newest = peers[0]
    newest.do("fill", mib=64, seed=7)
    newest.do("halt_sending", blocks=30)
    before = peers[1].do("digest")
    newest.tell("sync", revision=8)
    rest = sync_all(peers[1:], revision=6)
    assert newest.process.wait() == -signal.SIGKILL
    assert [one["members"] for one in rest] == [[1, 5]] * 2
    assert [one["digest"] for one in rest] == [before["digest"]] * 2
    assert [one["revision"] for one in rest] == [6, 6]
    assert all(one["rounds"] > 1 and one["faults"] for one in rest)
    peers.pop(0).end()


def test_a_donor_that_stands_still_is_given_up(lane: list[StatePeer]) -> None:
    donor, other = lane
    before = other.do("digest")
    donor.do("fill", mib=64, seed=11)
    donor.do("halt_sending", blocks=20, how="SIGSTOP")
    donor.tell("sync", revision=9)
    other.tell("sync", revision=8, patience_s=1.0)
    alone = other.answer()
    assert (alone["members"], alone["revision"]) == ([5], 8)
    assert alone["digest"] == before["digest"]
    assert "nothing moved for 1 s" in alone["faults"][0]
    donor.signal(signal.SIGCONT)
    assert donor.answer()["error"].startswith("FleetLeftError: ")
