"""What a change of the membership costs the coordinator, as the fleet grows; and that what comes
from one broken member neither stalls it nor uses its numbers up."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator, Phase
from ftrain.comms.fleet.protocol.messages import (
    OPS_MAX,
    Lost,
    OpState,
    PeerStatus,
    Stage,
    Verdict,
)
from ftrain.comms.fleet.protocol.peer import Build, FleetPeer
from ftrain.comms.fleet.protocol.peers import Limits
from ftrain.comms.fleet.protocol.plausible import ahead
from ftrain.comms.fleet.protocol.suspicion import Suspicion
from ftrain.comms.fleet.protocol.verdicts import decide
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId

SIZES = (8, 64, 256)
# Messages of a change are at most so many for each member, and rounds are the same for any size:
# a failure is told (1), halts (1) and answers (1), the new view (1), and that it is used (1).
MESSAGES_MAX = {"failure": 8, "join": 12, "leave": 12, "eviction": 20}
ROUNDS_MAX = {"failure": 5, "join": 8, "leave": 8, "eviction": 18}
# A place, and a few words, whatever the size; and two numbers for each member.
LARGEST = (900, 10)
PLACE_BYTES = 170


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    """The benchmark as a module; it imports its neighbours as a script does."""
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import fleet_scale as found

    yield found
    sys.path.remove(folder)
    del sys.modules["fleet_scale"]


@cache
def cost_of(scale: ModuleType, groups: int, what: str) -> Any:
    return scale.change(groups, what)


@pytest.mark.parametrize("groups", SIZES)
def test_nothing_is_said_while_nothing_changes(scale: ModuleType, groups: int) -> None:
    fleet = scale.IdealFleet(groups)
    assert fleet.steady(300) == 0
    assert fleet.coordinator.hard.view.numbers == tuple(range(groups))


@pytest.mark.parametrize("what", MESSAGES_MAX)
def test_a_change_takes_messages_in_proportion_and_the_same_rounds(
    scale: ModuleType, what: str
) -> None:
    costs = {groups: cost_of(scale, groups, what) for groups in SIZES}
    for groups, cost in costs.items():
        print(what, groups, cost)
        assert groups < cost.messages <= MESSAGES_MAX[what] * groups
        newcomer = PLACE_BYTES * groups if what == "join" else 0  # it is told all places
        largest = LARGEST[0] + LARGEST[1] * groups + newcomer
        assert max(cost.up_bytes_max, cost.down_bytes_max) <= largest
    assert {cost.rounds for cost in costs.values()} == {ROUNDS_MAX[what]}


@pytest.mark.parametrize("what", MESSAGES_MAX)
def test_the_coordinators_time_grows_no_faster_than_the_fleet(scale: ModuleType, what: str) -> None:
    small = min(scale.change(32, what).coordinator_s for _ in range(3))
    large = min(scale.change(256, what).coordinator_s for _ in range(2))
    print(f"{what}: {small * 1e3:.1f} ms for 32 groups, {large * 1e3:.1f} ms for 256")
    assert large < 8 * 2.5 * small  # a look at all for each of them would be 64 times as much


def test_the_change_came_about(scale: ModuleType) -> None:
    fleet = scale.IdealFleet(8)
    fleet.kill(4)
    fleet.measure()
    assert fleet.coordinator.hard.view.numbers == (0, 1, 2, 3, 5, 6, 7)
    fleet.begin(4, 2)
    fleet.measure()
    assert fleet.coordinator.hard.view.numbers == (0, 1, 2, 3, 5, 6, 7, 4)
    fleet.stop(0)
    fleet.measure()
    assert fleet.coordinator.hard.view.numbers == (1, 2, 3, 5, 6, 7, 4)
    assert fleet.steady(200) == 0, "who stands still is not told again and again"


def test_a_joiner_that_nobody_can_connect_to_stops_nobody(scale: ModuleType) -> None:
    class Fleet(scale.IdealFleet):  # type: ignore[misc, name-defined]
        def _perform(self, number: int, peer: FleetPeer, effect: object) -> None:
            if isinstance(effect, Build) and 4 in effect.ring and number != 4:
                peer.lost(effect.view, 4, "can't connect", reached=False)
            else:
                super()._perform(number, peer, effect)

    fleet = Fleet(4)
    fleet.begin(4)
    fleet.measure()
    assert 4 not in fleet.peers, "it was told to leave"
    assert fleet.coordinator.hard.view.number == 1


# ---------------------------------------------------------------- one broken member


def test_a_claimed_number_does_not_become_the_coordinators(scale: ModuleType) -> None:
    for wrong in ({"view": 2**62}, {"number": 2**30}, {"lost": (Lost(0, "", 2**30),)}):
        fleet = scale.IdealFleet(4)
        status = fleet.peers[3].status
        fleet.up.append(replace(status, sequence=status.sequence + 1, **wrong))
        del fleet.peers[3]
        fleet.measure()
        assert fleet.coordinator.hard.view.numbers == (0, 1, 2)
        assert fleet.coordinator.hard.number < 10
        assert fleet.coordinator.phase is Phase.STEADY


def test_a_coordinator_whose_store_was_lost_goes_on_above_what_was() -> None:
    machine = FleetCoordinator(members_expected=2)
    old = PeerStatus(0, 1, 5, _place(0), view=7, number=9)
    machine.connected(0, 1)
    machine.receive(old)
    told = dict(machine.ready().messages)[0]
    assert (told.order.value, told.number) == ("leave", 9)
    for peer in (1, 2):
        machine.connected(peer, 1)
        machine.receive(PeerStatus(peer, 1, 1, _place(peer)))
    ready = machine.ready()
    assert ready.hard_state is not None
    assert ready.hard_state.number == 10


def test_an_impossible_number_leaves_room_for_others() -> None:
    machine = FleetCoordinator()
    machine.connected(0, 1)
    machine.receive(PeerStatus(0, 1, 5, _place(0), number=2**62))
    machine.ready()
    assert machine.hard.number < 2**31


def test_a_peer_that_is_elsewhere_all_at_once_is_gone(scale: ModuleType) -> None:
    fleet = scale.IdealFleet(4)
    status = fleet.peers[3].status
    place = replace(status.place, address="10.9.9.9:1")
    fleet.up.append(replace(status, sequence=status.sequence + 1, place=place))
    del fleet.peers[3]
    fleet.measure()
    assert fleet.coordinator.hard.view.numbers == (0, 1, 2)


def test_thousands_of_operations_are_decided_in_no_time() -> None:
    many = tuple(OpState(OpId(0, number), 1, True) for number in range(OPS_MAX))
    reports = [
        PeerStatus(peer, 1, 1, _place(peer), counts=((0, OPS_MAX),), ops=many) for peer in range(8)
    ]
    began_s = time.process_time()
    decisions = decide(reports, 1, joint=False)
    assert time.process_time() - began_s < 3
    assert [decision.verdict for decision in decisions] == [Verdict.DONE] * OPS_MAX


def test_results_of_unequal_length_are_not_mended() -> None:
    def report(peer: int, held: bytes) -> PeerStatus:
        ops = (OpState(OpId(0, 0), 1, False, held),)
        return PeerStatus(peer, 1, 1, _place(peer), counts=((0, 1),), ops=ops)

    right = [report(0, b"\x0f"), report(1, b"\xf0")]
    assert [one.verdict for one in decide(right, 1, joint=False)] == [Verdict.MEND]
    odd = decide([*right, report(2, b"\xff" * 1000)], 1, joint=False)
    assert [one.verdict for one in odd] == [Verdict.UNDONE]


def test_what_is_held_after_garbage_is_undone_unless_somebody_returned() -> None:
    whole, later = OpState(OpId(0, 0), 1, True, b"\xff"), OpState(OpId(0, 1), 1, True, b"\xff")
    reports = [
        PeerStatus(0, 1, 1, _place(0), counts=((0, 2),), ops=(whole, later)),
        PeerStatus(1, 1, 1, _place(1), counts=((0, 2),), ops=(later,)),
    ]
    assert {one.op.number for one in decide(reports, 1, joint=False)} == {0, 1}
    found = decide(reports, 1, joint=False, trusted=False)
    verdicts = [(0, Verdict.DONE), (1, Verdict.UNDONE)]
    assert [(one.op.number, one.verdict) for one in found] == verdicts


def test_who_is_far_ahead_of_the_middle_is_found() -> None:
    def holder(peer: int, *counts: tuple[int, int]) -> PeerStatus:
        return PeerStatus(peer, 1, 1, _place(peer), stage=Stage.HELD, counts=counts)

    honest = [holder(0, (0, 500_000)), holder(1, (0, 500_003), (1, 2))]
    assert not ahead(honest)
    liar = holder(2, (0, 600_000))
    assert ahead([*honest, liar]) == [liar]
    assert ahead([*honest, holder(2)]) == []  # it says less: the others are not to blame
    tag = holder(2, (0, 500_000), (9, 70_000))
    assert ahead([*honest, tag]) == [tag]


def test_the_one_that_sends_garbage_is_found() -> None:
    suspicion = Suspicion()
    assert suspicion.worst([]) is None
    assert suspicion.worst([(1, 0)]) is None, "once is no time"
    assert suspicion.worst([(3, 2)]) is None, "and elsewhere it is another matter"
    assert suspicion.worst([(1, 0)]) == 0
    assert suspicion.worst([(1, 4)]) == 1, "who complains of everybody is the one"
    odd = Suspicion()  # its right neighbour does not understand it, and it not its left one
    assert odd.worst([(6, 5)]) is None
    assert odd.worst([(5, 4)]) == 5


def test_peers_that_went_for_good_are_forgotten() -> None:
    machine = FleetCoordinator(members_expected=2, limits=Limits(halt_ticks=20))
    for peer in range(1000):
        machine.connected(peer, 1)
        machine.receive(PeerStatus(peer, 1, 1, _place(peer), leaving=True))
        machine.disconnected(peer, 1)
    for _ in range(30):
        machine.tick()
        machine.ready()
    assert not list(machine._peers.statuses())
    assert not machine._since


def _place(peer: int) -> Place:
    return Place(peer, 1, "127.0.0.1:1", "host", "name")
