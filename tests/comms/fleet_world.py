"""A simulated fleet: the real machines over a fake network and clock, with faults as data.

Faults: a peer is killed, stopped for a while, cut off from the others and the coordinator; one
connection breaks or two peers can't reach each other; the coordinator is killed before or after it
stored something; connections to it break; old messages come again.  Members join (again) and leave.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fleet_engine import TAGS, SimOp, SimPeer, Value

from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator, Phase
from ftrain.comms.fleet.protocol.messages import FleetHard, PeerGone, Stall, View
from ftrain.comms.fleet.protocol.peer import FleetPeer
from ftrain.comms.fleet.protocol.peers import Limits
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId

LIMITS = Limits(
    reconnect_ticks=4,
    silence_ticks=16,
    patient_ticks=40,
    halt_ticks=60,
    link_ticks=40,
    change_ticks=80,
    recover_ticks=30,
)
BUILD_TICKS = 30  # in which a ring has to be connected
RECONNECT_TICKS = 2
LATE_TICKS = 60


class WrongError(AssertionError):
    """An invariant does not hold."""


@dataclass
class Options:
    """What may happen in a run. Chances are per tick."""

    members: int = 4
    width: int = 1
    members_min: int = 1
    ticks: int = 300
    kill: float = 0.006
    kill_told: float = 0.5  # of kills, whether a launcher tells of it
    stop: float = 0.004
    isolate: float = 0.003
    unreachable: float = 0.002
    cut: float = 0.006
    kill_coordinator: float = 0.004
    uplink_cut: float = 0.01
    replay: float = 0.02
    join: float = 0.02
    leave: float = 0.004

    @classmethod
    def drawn(cls, rng: random.Random) -> Options:
        options = cls(
            members=rng.randint(1, 6),
            width=rng.choice((1, 1, 1, 2)),
            members_min=rng.choice((1, 1, 2, 3)),
        )
        for name in ("kill", "stop", "isolate", "unreachable", "cut", "kill_coordinator"):
            setattr(options, name, getattr(options, name) * rng.choice((0, 1, 1, 4)))
        for name in ("uplink_cut", "replay", "join", "leave"):
            setattr(options, name, getattr(options, name) * rng.choice((0, 1, 1, 3)))
        return options


@dataclass
class Uplink:
    """The connection between one peer and the coordinator."""

    peer: SimPeer
    up: deque[Any] = field(default_factory=deque)  # (tick, message)
    down: deque[Any] = field(default_factory=deque)
    open: bool = False
    retry_at: int = 0


class World:
    """One run."""

    def __init__(
        self,
        seed: int,
        options: Options | None = None,
        *,
        make_coordinator: Callable[..., FleetCoordinator] = FleetCoordinator,
        make_peer: Callable[..., FleetPeer] = FleetPeer,
        make_engine: Callable[..., SimPeer] = SimPeer,
        store_first: bool = True,
    ) -> None:
        self.rng = random.Random(seed)
        self.options = options or Options.drawn(self.rng)
        self._make_coordinator, self._make_peer = make_coordinator, make_peer
        self._make_engine, self._store_first = make_engine, store_first
        self.now = 0
        self.disk: FleetHard | None = None
        self.coordinator: FleetCoordinator | None = None
        self.restart_at = 0
        self.peers: dict[int, SimPeer] = {}
        self.all_peers: list[SimPeer] = []
        self.uplinks: dict[int, Uplink] = {}
        self.lanes: dict[tuple[int, int, int], deque[Any]] = {}
        self.isolated: dict[int, int] = {}  # member: until
        self.apart: dict[tuple[int, int], int] = {}  # peers: until
        self.lives: Counter[int] = Counter()
        self.outcomes: dict[tuple[int, int, OpId], tuple[int, Value]] = {}
        self.views: dict[int, View] = {}
        self.histories: dict[int, int] = {}  # view: which of the fleet's lives it belongs to
        self.replays: list[tuple[int, int, str, object]] = []  # when, peer, which way, message
        self.faults: Counter[str] = Counter()
        self.phases: set[Phase] = set()
        self.calm = False
        self.ends_undone = 0
        self._crash: str | None = None  # the coordinator's next write is its last
        self._begin_coordinator()
        for member in range(self.options.members):
            self._begin_member(member)

    # ---------------------------------------------------------------- running

    def run(self) -> None:
        """Faults, then calm until everybody got further; WrongError."""
        for _ in range(self.options.ticks):
            self._misfortune()
            self._tick()
        self.calm = True
        self.isolated.clear()
        self.apart.clear()
        for peer in self.peers.values():
            peer.stopped_until = 0
        self._bring_back()
        goal = {tag: max((p.counts[tag] for p in self.all_peers), default=0) + 3 for tag in TAGS}
        for _ in range(2500):
            self._tick()
            self._bring_back()
            if all(self._arrived(peer, goal) for peer in self._living()):
                return
        self.check(False, f"no end in sight: {self._why_not(goal)}")

    def _bring_back(self) -> None:
        """What a launcher does."""
        for member in range(max(self.options.members, self.options.members_min)):
            if not self._here(member):
                self._begin_member(member)

    def check(self, right: bool, what: str) -> None:
        if not right:
            raise WrongError(f"tick {self.now}: {what}")

    def _arrived(self, peer: SimPeer, goal: dict[int, int]) -> bool:
        return peer.began is not None and all(
            any(op.tag == tag and op.number >= goal[tag] for op in peer.returned) for tag in TAGS
        )

    def _why_not(self, goal: dict[int, int]) -> str:
        assert self.coordinator is not None
        lines = [f"coordinator {self.coordinator.phase}, {self.coordinator.hard}"]
        for peer in self._living():
            ring = peer.ring.view if peer.ring else None
            lines.append(
                f"{peer.peer}: {peer.machine.status.view}/{peer.machine.status.number} "
                f"{peer.machine.status.stage} {peer.machine._busy} ring {ring} "
                f"holding {peer.holding} waiting {peer.waiting} lost {peer.machine.status.lost} "
                f"counts {peer.counts} ops {[(o.op, o.attempt) for o in peer.ops.values()]}"
            )
        return f"goal {goal}\n" + "\n".join(lines)

    def _living(self) -> list[SimPeer]:
        return [peer for peer in self.peers.values() if peer.alive]

    def _awake(self, peer: SimPeer) -> bool:
        return peer.alive and peer.stopped_until <= self.now

    def _here(self, member: int) -> bool:
        return all(p in self.peers and self.peers[p].alive for p in self._of(member))

    def _of(self, member: int) -> range:
        return range(member * self.options.width, (member + 1) * self.options.width)

    def member_of(self, peer: int) -> int:
        return peer // self.options.width

    def _tick(self) -> None:
        self.now += 1
        self._uplinks()
        if self.coordinator is not None and self.now % 2 == 0:
            self.phases.add(self.coordinator.phase)
            self.coordinator.tick()
            self._pump_coordinator()
        elif self.coordinator is None and self.now >= self.restart_at:
            self._begin_coordinator()
        for peer in self._living():
            if self._awake(peer):
                if self.now % 2 == 0:
                    peer.machine.tick()
                self._live(peer)
                self._pump_peer(peer)
        self._move_lanes()
        self._watch_rings()

    # ---------------------------------------------------------------- machines

    def _begin_coordinator(self) -> None:
        self.coordinator = self._make_coordinator(
            hard=self.disk,
            width=self.options.width,
            members_min=self.options.members_min,
            members_expected=self.options.members,
            gather_ticks=20,
            joint=self.options.width > 1,
            limits=LIMITS,
        )
        for uplink in self.uplinks.values():
            uplink.retry_at = self.now + self.rng.randint(1, 8)

    def _pump_coordinator(self) -> None:
        while self.coordinator is not None and (ready := self.coordinator.ready()):
            hard = ready.hard_state
            if hard is not None and self._crash == "before":
                self._coordinator_dies()
                return
            if hard is not None and self._store_first:
                self._store(hard)
            for address, message in ready.messages:
                uplink = self.uplinks.get(address)  # type: ignore[call-overload]
                if uplink is not None and uplink.open:
                    uplink.down.append((self.now + self.rng.randint(1, 4), message))
            if hard is not None and self._crash == "after":
                self._coordinator_dies(said=self.rng.random() < 0.5)
                return
            if hard is not None and not self._store_first:
                self._store(hard)

    def _store(self, hard: FleetHard) -> None:
        self.disk = hard
        if hard.view.number:
            if hard.view.number not in self.views:  # members of a fleet that was empty begin anew
                before = self.views.get(max(self.views, default=0))
                new = before is None or not {*before.members} & {*hard.view.members}
                self.histories[hard.view.number] = max(self.histories.values(), default=0) + new
            known = self.views.setdefault(hard.view.number, hard.view)
            self.check(known == hard.view, f"view {hard.view.number} was granted twice")

    def _coordinator_dies(self, *, said: bool = False) -> None:
        """``said``: what it sent last still arrives."""
        self._crash = None
        self.coordinator = None
        self.restart_at = self.now + self.rng.choice((1, 10, 60))
        for uplink in self.uplinks.values():
            last = [message for _, message in uplink.down] if said else []
            self._close(uplink)
            for message in last:
                if self._awake(uplink.peer) and not self._isolated(uplink.peer.peer):
                    uplink.peer.machine.receive(message)
                    self._pump_peer(uplink.peer)

    def _pump_peer(self, peer: SimPeer) -> None:
        while ready := peer.machine.ready():
            uplink = self.uplinks.get(peer.peer)
            for _, message in ready.messages:
                if uplink is not None and uplink.open and uplink.peer is peer:
                    uplink.up.append((self.now + self.rng.randint(1, 4), message))
            for effect in ready.effects:
                peer.perform(effect)

    def _begin_member(self, member: int) -> None:
        self.lives[member] += 1
        for number in self._of(member):
            old = self.peers.get(number)
            if old is not None:
                self._end(old)
            place = Place(number, self.lives[member], "", "", "")
            machine = self._make_peer(place, resend_ticks=4, hold_ticks=10)
            peer = self._make_engine(self, number, self.lives[member], machine)
            self.peers[number] = peer
            self.all_peers.append(peer)
            self.uplinks[number] = Uplink(peer, retry_at=self.now + self.rng.randint(0, 10))

    def _end(self, peer: SimPeer) -> None:
        peer.alive = False
        self._close(self.uplinks[peer.peer])

    def process_ended(self, peer: SimPeer) -> None:
        """A peer was told to leave: its whole member does."""
        for number in self._of(self.member_of(peer.peer)):
            if self.peers[number].incarnation == peer.incarnation:
                self._end(self.peers[number])

    # ---------------------------------------------------------------- uplinks

    def _uplinks(self) -> None:
        for uplink in self.uplinks.values():
            peer = uplink.peer
            if not uplink.open:
                if (
                    self.coordinator is not None
                    and self._awake(peer)
                    and (self.now >= uplink.retry_at and not self._isolated(peer.peer))
                ):
                    uplink.open = True
                    self.coordinator.connected(peer.peer, peer.incarnation)
                    peer.machine.connected()
                    self._pump_coordinator()
                continue
            if self._isolated(peer.peer):
                continue
            while uplink.open and uplink.up and uplink.up[0][0] <= self.now:
                _, message = uplink.up.popleft()
                self._maybe_replay(peer.peer, "up", message)
                assert self.coordinator is not None
                self.coordinator.receive(message)
                self._pump_coordinator()
            while uplink.open and uplink.down and uplink.down[0][0] <= self.now:
                if not self._awake(peer):
                    break
                _, message = uplink.down.popleft()
                self._maybe_replay(peer.peer, "down", message)
                peer.machine.receive(message)
                self._pump_peer(peer)
        self._replay()

    def _maybe_replay(self, peer: int, way: str, message: object) -> None:
        if self.rng.random() < self.options.replay and not self.calm:
            when = self.now + self.rng.randint(1, LATE_TICKS)
            self.replays.append((when, peer, way, message))

    def _replay(self) -> None:
        due = [one for one in self.replays if one[0] <= self.now]
        self.replays = [one for one in self.replays if one[0] > self.now]
        for _, number, way, message in due:
            self.faults["replay"] += 1
            if way == "up" and self.coordinator is not None:
                self.coordinator.receive(message)
                self._pump_coordinator()
            elif way == "down" and self._awake(self.peers[number]):
                self.peers[number].machine.receive(message)
                self._pump_peer(self.peers[number])

    def _close(self, uplink: Uplink) -> None:
        was_open, uplink.open = uplink.open, False
        uplink.up.clear()
        uplink.down.clear()
        uplink.retry_at = self.now + RECONNECT_TICKS
        if was_open and self.coordinator is not None:
            self.coordinator.disconnected(uplink.peer.peer, uplink.peer.incarnation)
            self._pump_coordinator()

    # ---------------------------------------------------------------- rings

    def lane(self, view: int, left: int, right: int) -> deque[Any]:
        return self.lanes.setdefault((view, left, right), deque())

    def _isolated(self, peer: int) -> bool:
        return self.isolated.get(self.member_of(peer), 0) > self.now

    def _can_talk(self, one: int, other: int) -> bool:
        if one == other:
            return True
        cut_off = self._isolated(one) or self._isolated(other)
        return not cut_off and self.apart.get((min(one, other), max(one, other)), 0) <= self.now

    def _rings(self, peer: SimPeer) -> list[Any]:
        return [ring for ring in (peer.ring, peer.beside) if ring is not None]

    def _ring_of(self, number: int, incarnation: int, view: int) -> Any:
        peer = self.peers.get(number)
        if peer is None or not peer.alive or peer.incarnation != incarnation:
            return None
        return next((ring for ring in self._rings(peer) if ring.view == view), None)

    def _move_lanes(self) -> None:
        for (view, left, right), lane in list(self.lanes.items()):
            if not lane or not self._can_talk(left, right):
                continue
            peer = self.peers[right]
            if not self._awake(peer):
                continue
            ring = next((r for r in self._rings(peer) if r.view == view and r.joined), None)
            if ring is None or ring.broken:
                continue
            for _ in range(self.rng.randint(0, 3)):
                if not lane or ring not in self._rings(peer):
                    break
                peer.hear(ring, *lane.popleft())
                self._pump_peer(peer)

    def _watch_rings(self) -> None:
        for peer in self._living():
            if not self._awake(peer):
                continue
            if peer.beside is not None and not peer.beside.joined:
                self._build(peer, peer.beside)
            ring = peer.ring
            if ring is not None and not ring.broken and self.rng.random() < 0.7:
                for side in (ring.left, ring.right):
                    if side != peer.peer:
                        self._watch(peer, ring, side)
            self._pump_peer(peer)

    def _neighbour(self, ring: Any, number: int) -> Any:
        incarnation = next(p.incarnation for p in ring.places if p.node == number)
        return self._ring_of(number, incarnation, ring.view)

    def _build(self, peer: SimPeer, ring: Any) -> None:
        sides = {ring.left, ring.right} - {peer.peer}
        ready = [
            side
            for side in sides
            if self._neighbour(ring, side) is not None and self._can_talk(peer.peer, side)
        ]
        if len(ready) == len(sides):
            if self.rng.random() < 0.5:
                peer.joined()
        elif self.now - ring.since > BUILD_TICKS or any(
            not self._exists(ring, side) for side in sides
        ):
            missing = min(sides - set(ready))
            refused = not self._exists(ring, missing)
            peer.beside = None
            peer.machine.lost(ring.view, missing, "can't be reached", reached=refused)

    def _exists(self, ring: Any, number: int) -> bool:
        """Whether the process is there, so that a connection is not refused at once."""
        incarnation = next(p.incarnation for p in ring.places if p.node == number)
        peer = self.peers.get(number)
        return peer is not None and peer.alive and peer.incarnation == incarnation

    def _watch(self, peer: SimPeer, ring: Any, side: int) -> None:
        """Notice that a neighbour has closed its end, unless nothing more is needed of it."""
        if self._neighbour(ring, side) is not None or not self._can_talk(peer.peer, side):
            return
        if self.lane(ring.view, side, peer.peer) and side == ring.left:
            return  # what it said before comes first
        undone = any(op.attempt and op.plan and not op.plan.done for op in peer.ops.values())
        waits = any(op.attempt and not op.finished for op in peer.ops.values())
        if undone or (waits and side == ring.left):
            ring.broken = True
            peer.machine.lost(ring.view, side, "it closed the connection")

    # ---------------------------------------------------------------- peers' lives

    def _live(self, peer: SimPeer) -> None:
        for tag in TAGS:
            under_way = sum(op.op.tag == tag for op in peer.ops.values())
            goes_on = peer.began is not None and (
                peer.leaves_at is None or peer.counts[tag] < peer.leaves_at[tag]
            )
            if goes_on and under_way < 2 and self.rng.random() < 0.15:
                peer.open(tag)
        at = peer.leaves_at
        if at and all(peer.counts[tag] >= at[tag] for tag in TAGS):
            peer.machine.leave()
        peer.go_on()
        stuck = waits = False
        for op in peer.ops.values():
            if op.attempt and peer.ring is not None:
                passed = peer.ring.begun[op.op].passed
                stuck, waits = stuck or passed, waits or not passed
        last, changed = getattr(peer, "watched", (None, 0))
        mark = (len(peer.returned), peer.machine.status.view, self._progress(peer))
        if mark != last:
            peer.watched = (mark, self.now)  # type: ignore[attr-defined]
            changed = self.now
        late = self.now - changed > 12
        stall = Stall.NO if not late else Stall.STUCK if stuck else Stall.WAITS
        peer.machine.stall(stall if stuck or waits else Stall.NO)

    def _progress(self, peer: SimPeer) -> int:
        return sum(len(op.plan._awaited) for op in peer.ops.values() if op.plan is not None)

    def finished(self, peer: SimPeer, op: SimOp) -> None:
        """A ring is through with an operation: so is the member, once all its ranks' rings are."""
        ranks = [self.peers[number] for number in self._of(self.member_of(peer.peer))]
        ends = [rank.ops.get(op.op) for rank in ranks]
        done = [end for end in ends if end and end.finished and end.attempt == op.attempt]
        if len(done) == len(ranks):
            for rank, end in zip(ranks, done, strict=True):
                rank.give(end)

    def returned(self, peer: SimPeer, op: SimOp) -> None:
        """Check that all agree on what an operation gave."""
        attempt, value = peer.returned[op.op]
        members = frozenset(self.member_of(p) for p in value)
        self._compare(peer, op.op, attempt, (attempt, members))
        granted = self.views.get(attempt)
        self.check(
            granted is not None and members == frozenset(granted.numbers),
            f"{op.op} is a sum of {sorted(members)} in view {granted}",
        )

    def undone(self, peer: SimPeer, op: OpId, view: int) -> None:
        """Check that nobody else has a result."""
        self.ends_undone += 1
        self._compare(peer, op, view, (0, frozenset()))

    def _compare(self, peer: SimPeer, op: OpId, view: int, outcome: tuple[int, Value]) -> None:
        joint = self.options.width > 1
        lane = -1 if joint else peer.peer % self.options.width
        known = self.outcomes.setdefault((self.histories.get(view, 0), lane, op), outcome)
        self.check(known == outcome, f"{op} gave {outcome} at {peer.peer} and {known} elsewhere")

    # ---------------------------------------------------------------- faults

    def _misfortune(self) -> None:
        options, rng = self.options, self.rng
        living = [p for p in self._living() if p.peer % options.width == 0]
        if living and rng.random() < options.kill:
            self._kill(rng.choice(living))
            if rng.random() < 0.3 and len(living) > 1:
                self._kill(rng.choice(living))
        if living and rng.random() < options.stop:
            self.faults["stop"] += 1
            peer = rng.choice(living)
            peer.stopped_until = self.now + rng.choice((5, 20, 100))
        if rng.random() < options.isolate:
            self.faults["isolate"] += 1
            self.isolated[rng.randrange(options.members)] = self.now + rng.choice((10, 60, 150))
        if len(living) > 1 and rng.random() < options.unreachable:
            self.faults["unreachable"] += 1
            one, other = sorted(peer.peer for peer in rng.sample(living, 2))
            self.apart[one, other] = self.now + rng.choice((20, 150))
        if living and rng.random() < options.cut:
            peer = rng.choice(living)
            if peer.ring is not None and not peer.ring.broken and len(peer.ring.ring) > 1:
                self.faults["cut"] += 1
                peer.ring.broken = True
                peer.machine.lost(peer.ring.view, peer.ring.left, "connection reset")
        if self.coordinator is not None and rng.random() < options.kill_coordinator:
            self.faults["kill_coordinator"] += 1
            self._crash = rng.choice(("before", "after"))
            if rng.random() < 0.4:
                self._coordinator_dies()
        if living and rng.random() < options.uplink_cut:
            self.faults["uplink_cut"] += 1
            self._close(self.uplinks[rng.choice(living).peer])
        if rng.random() < options.join:
            absent = [m for m in range(options.members + 1) if not self._here(m)]
            if absent:
                self.faults["join"] += 1
                self._begin_member(rng.choice(absent))
        if len(living) > 1 and rng.random() < options.leave:
            self.faults["leave"] += 1
            ranks = [self.peers[n] for n in self._of(self.member_of(rng.choice(living).peer))]
            end = {tag: max(rank.counts[tag] for rank in ranks) for tag in TAGS}
            for rank in ranks:
                rank.leaves_at = rank.leaves_at or dict(end)

    def _kill(self, peer: SimPeer) -> None:
        self.faults["kill"] += 1
        told = self.rng.random() < self.options.kill_told
        for number in self._of(self.member_of(peer.peer)):
            one = self.peers[number]
            self._end(one)
            if told and self.coordinator is not None:
                self.coordinator.receive(PeerGone(number, one.incarnation, "SIGKILL"))
                self._pump_coordinator()
