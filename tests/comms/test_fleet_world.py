"""The fleet's machines in simulated schedules of faults; broken variants must be caught."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from fleet_engine import SimOp, SimPeer
from fleet_world import Options, World, WrongError

from ftrain.comms.fleet.protocol import coordinator, verdicts
from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator, Phase
from ftrain.comms.fleet.protocol.messages import (
    Counts,
    Decision,
    FleetDirective,
    Member,
    Order,
    PeerStatus,
    Stage,
    Verdict,
    View,
)
from ftrain.comms.fleet.protocol.peer import FleetPeer, Halt, Switch
from ftrain.comms.fleet.protocol.peers import Limits, Peers
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId
from ftrain.comms.protocol.ring_barrier import RingBarrier

SEEDS = 80
FRESH = 1500
RARE_MAX = 700


def test_every_schedule_ends_well() -> None:
    faults: Counter[str] = Counter()
    phases: set[Phase] = set()
    undone = 0
    for seed in range(SEEDS):
        world = World(seed)
        world.run()
        faults += world.faults
        phases |= world.phases
        undone += world.ends_undone
    print(faults)
    assert sum(faults.values()) > 5 * SEEDS
    assert min(faults.values()) > SEEDS / 5, faults
    assert phases == set(Phase)
    assert undone > SEEDS


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fresh_schedules() -> None:
    begin = int(os.environ.get("FTRAIN_TEST_SEED", random.SystemRandom().randrange(10**9)))
    for seed in range(begin, begin + FRESH):
        try:
            World(seed).run()
        except WrongError as error:
            raise WrongError(f"seed {seed}: {error}") from None


def test_who_stands_still_for_a_moment_stays() -> None:
    """Short stops and nothing else: the first view is the last one."""
    for seed in range(20):
        quiet = Options(ticks=300, stop=0.0, kill=0, isolate=0, unreachable=0, cut=0)
        quiet = replace(quiet, kill_coordinator=0, uplink_cut=0, replay=0, join=0, leave=0)
        world = World(seed, quiet)
        for _ in range(400):
            world._tick()
            peer = world.rng.choice(list(world.peers.values()))
            if world.rng.random() < 0.05 and peer.stopped_until < world.now - 40:
                peer.stopped_until = world.now + 20
        assert len(world.views) == 1
        assert not any(peer.left for peer in world.all_peers)


def test_what_is_stale_changes_nothing() -> None:
    place = Place(3, 1, "", "", "")
    peer = FleetPeer(place)
    peer.receive(FleetDirective(3, 1, Order.HALT, number=5))
    assert peer.ready().effects == (Halt(5),)
    for order in Order:
        for stale in (
            FleetDirective(3, 1, order, number=4, view=4, places=(place,), halted=True),
            FleetDirective(3, 0, order, number=9, view=9),
            FleetDirective(2, 1, order, number=9, view=9),
        ):
            peer.receive(stale)
            assert not peer.ready().effects
    assert not peer.over


def test_who_does_not_answer_is_silent_only_if_others_answer() -> None:
    peers = Peers(1, Limits(silence_ticks=4))
    members = [Member(peer, 1) for peer in range(3)]
    statuses = [PeerStatus(peer, 1, 1, Place(peer, 1, "", "", "")) for peer in range(3)]
    for status in statuses:
        peers.connected(status.peer, 1)
        peers.accept(status)
    for _ in range(20):
        peers.ask()
        peers.tick()
    assert not any(map(peers.why_gone, members))
    for number in range(6):
        peers.ask()
        peers.accept(replace(statuses[0], sequence=2 + number, pong=peers.ping))
        peers.accept(replace(statuses[2], sequence=2 + number, pong=peers.ping))
        peers.tick()
    assert [bool(peers.why_gone(member)) for member in members] == [False, True, False]


# ---------------------------------------------------------------- broken variants


class Majority(FleetCoordinator):
    """Grants a view when most have halted."""

    def _all_at(self, members: Sequence[Member], *stages: Stage) -> bool:
        if Stage.HALTED not in stages:
            return super()._all_at(members, *stages)
        return sum(super(Majority, self)._all_at((m,), *stages) for m in members) * 2 > len(members)


class LetsTheOldBackIn(FleetCoordinator):
    """A member comes back in the life in which it was removed."""

    def _joiners(self) -> tuple[Member, ...]:
        return tuple(m for m in self._peers.complete() if m not in self._hard.view)


class ForgetsTheOldView(FleetCoordinator):
    """Goes on from a view that not all use yet."""

    def _base(self) -> View:
        return self._hard.view


class HoldsNobody(FleetCoordinator):
    """Switches without knowing what was begun."""

    def _holding(self) -> None:
        if not self._put_off():
            first = verdicts.first_of(self._peers.of(self._hard.view.members))
            self._grant(replace(self._next, first=first), before=self._hard.view)


class RecoversBlindly(FleetCoordinator):
    """A new coordinator goes on without asking where the peers stand."""

    def _recovering(self) -> None:
        self._enter(Phase.STEADY)


class SaysItOnce(FleetCoordinator):
    """Never repeats itself, not even on a new connection."""

    def connected(self, peer: int, incarnation: int) -> None:
        self._peers.connected(peer, incarnation)

    def tick(self) -> None:
        super().tick()
        self._since = dict.fromkeys(self._since, 0)


class SaysNothingTwice(FleetPeer):
    """Says nothing again, not even on a new connection."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, resend_ticks=10**9)

    def connected(self) -> None:
        pass


class ReturnsAlone(SimPeer):
    """Returns when it has the whole result itself."""

    def is_over(self, op: SimOp, done: RingBarrier) -> bool:
        return op.plan is not None and op.plan.done


class SwitchesUnfinished(SimPeer):
    """Uses the next ring while operations are under way in the old one."""

    def _drained(self, first: Counts) -> bool:
        return True


class SwitchesAnyhow(SimPeer):
    """Obeys a switch to before something that is whole here."""

    def _switch(self, effect: Switch) -> None:
        first = dict(effect.first)
        for op in self.ops.values():
            if op.op.number >= first.get(op.op.tag, 0):
                op.attempt, op.plan, op.values = 0, None, {}
        self.switching, self.holding = effect, False
        self.go_on_switching()


class LeavesOutWhatWaits(SimPeer):
    """Says nothing of operations that are on no ring."""

    def _halt(self, effect: Halt) -> None:
        waiting = {op: state for op, state in self.ops.items() if not state.attempt}
        for op in waiting:
            del self.ops[op]
        super()._halt(effect)
        self.ops |= waiting


class TriesAlone(SimPeer):
    """Tries what others were told is undone, because it had not begun it then."""

    def open(self, tag: int) -> None:
        self.undone.pop(OpId(tag, self.counts[tag]), None)
        super().open(tag)


class SeemsToHaveReturned(SimPeer):
    """Says no more of what ended undone."""

    def ended_undone(self) -> list[OpId]:
        return []


Decide = Callable[[OpId, int, Sequence[PeerStatus]], Decision | None]
right: Decide = verdicts._decide


def any_whole(op: OpId, lane: int, reports: Sequence[PeerStatus]) -> Decision | None:
    states = [verdicts._state(op, report) for report in reports]
    whole = any(state is not None and state.whole for state in states)
    return Decision(op, lane, Verdict.DONE) if whole else right(op, lane, reports)


def never_done(op: OpId, lane: int, reports: Sequence[PeerStatus]) -> Decision | None:
    return None


def with_holes(op: OpId, lane: int, reports: Sequence[PeerStatus]) -> Decision | None:
    states = [verdicts._state(op, report) for report in reports]
    if all(state is not None and state.held for state in states):
        return right(op, lane, reports) or Decision(op, lane, Verdict.DONE)
    return right(op, lane, reports)


VARIANTS: dict[str, dict[str, Any]] = {
    "majority": {"make_coordinator": Majority},
    "old life let back in": {"make_coordinator": LetsTheOldBackIn},
    "old view forgotten": {"make_coordinator": ForgetsTheOldView},
    "nobody held": {"make_coordinator": HoldsNobody},
    "recovers blindly": {"make_coordinator": RecoversBlindly},
    "never says it again": {"make_coordinator": SaysItOnce},
    "says before it stores": {"store_first": False},
    "peer says it once": {"make_peer": lambda place, **_: SaysNothingTwice(place)},
    "returns alone": {"make_engine": ReturnsAlone},
    "switches unfinished": {"make_engine": SwitchesUnfinished},
    "switches anyhow": {"make_engine": SwitchesAnyhow},
    "leaves out what waits": {"make_engine": LeavesOutWhatWaits},
    "tries alone": {"make_engine": TriesAlone},
    "seems to have returned": {"make_engine": SeemsToHaveReturned},
    "one whole is enough": {"decide": any_whole},
    "undone though somebody returned": {"decide": never_done},
    "done with holes": {"decide": with_holes},
    "lanes decided apart": {"joint": False},
}


RARE = ("switches anyhow", "never says it again", "old life let back in")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.soak] if n in RARE else []) for n in VARIANTS],
)
def test_a_broken_variant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = dict(VARIANTS[name])
    if decide := variant.pop("decide", None):
        monkeypatch.setattr(verdicts, "_decide", decide)
    if "joint" in variant:
        joint = variant.pop("joint")
        monkeypatch.setattr(coordinator, "decide", partial(_decide_apart, joint))
    for seed in range(RARE_MAX):
        try:
            World(seed, **variant).run()
        except (AssertionError, ValueError, KeyError, StopIteration) as error:
            print(f"{name}: seed {seed}: {str(error)[:300]}")
            return
    pytest.fail(f"{name} was not caught in {RARE_MAX} schedules")


def _decide_apart(
    apart: bool, reports: Sequence[PeerStatus], width: int, *, joint: bool, trusted: bool
) -> tuple[Decision, ...]:
    return verdicts.decide(reports, width, joint=apart, trusted=trusted)
