"""A peer of the simulated fleet: the real machine and ring rules, over simulated lanes.

What a chunk holds is the set of members whose elements are in it, so that a sum of the wrong ones
is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftrain.comms.fleet.protocol.messages import Counts, Decision, OpState, Verdict
from ftrain.comms.fleet.protocol.peer import (
    Build,
    FleetPeer,
    Halt,
    Hold,
    Install,
    Leave,
    Release,
    Switch,
)
from ftrain.comms.fleet.protocol.verdicts import bitmap_of, bits_of
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import (
    ChunkId,
    Do,
    Kind,
    Layout,
    MendOperation,
    OpId,
    Phase,
    RingOperation,
)
from ftrain.comms.protocol.ring_barrier import RingBarrier

if TYPE_CHECKING:
    from fleet_world import World

CHUNKS = 2  # of each segment
TAGS = (0, 1)
TOLD = 1  # operations of this tag are not tried again
Value = frozenset[int]


@dataclass
class SimOp:
    """An operation that this peer has begun."""

    op: OpId
    attempt: int = 0  # 0: on no ring
    members: tuple[int, ...] = ()
    rank: int = 0
    layout: Layout = field(default_factory=lambda: Layout(1, 1, 1))
    plan: RingOperation | MendOperation | None = None
    values: dict[ChunkId, Value] = field(default_factory=dict)
    finished: bool = False  # the ring says that all have it


@dataclass
class SimRing:
    """One peer's end of the ring of a view."""

    view: int
    ring: tuple[int, ...]
    places: tuple[Place, ...]
    members: tuple[int, ...]
    rank: int
    begun: dict[OpId, RingBarrier] = field(default_factory=dict)
    done: dict[OpId, RingBarrier] = field(default_factory=dict)
    joined: bool = False
    since: int = 0  # tick in which it began to be built
    broken: bool = False

    @property
    def left(self) -> int:
        return self.ring[(self.rank - 1) % len(self.ring)]

    @property
    def right(self) -> int:
        return self.ring[(self.rank + 1) % len(self.ring)]


class SimPeer:
    """One process of the fleet."""

    def __init__(self, world: World, peer: int, incarnation: int, machine: FleetPeer) -> None:
        self.world = world
        self.peer, self.incarnation = peer, incarnation
        self.machine = machine
        self.alive, self.stopped_until = True, 0
        self.ring: SimRing | None = None
        self.beside: SimRing | None = None
        self.ops: dict[OpId, SimOp] = {}
        self.counts = dict.fromkeys(TAGS, 0)
        self.began: Counts | None = None  # where this peer came in
        self.returned: dict[OpId, tuple[int, Value]] = {}
        self.undone: dict[OpId, int] = {}  # what is not tried again here, and since which view
        self.holding = True  # until there is a view
        self.waiting = False
        self.installing: Install | None = None
        self.switching: Switch | None = None
        self.left = ""
        self.leaves_at: dict[int, int] | None = None  # for each tag, the end of what it does

    # ---------------------------------------------------------------- effects

    def perform(self, effect: object) -> None:
        if isinstance(effect, Build):
            self.beside = self._new_ring(effect, ())
        elif isinstance(effect, Hold):
            self.holding = True
            self.machine.held(effect.number, self._started())
        elif isinstance(effect, Release):
            if effect.drop:
                self.beside = None
            self.holding = self.began is None
        elif isinstance(effect, Halt):
            self._halt(effect)
        elif isinstance(effect, Install):
            self._install(effect)
        elif isinstance(effect, Switch):
            self._switch(effect)
        elif isinstance(effect, Leave):
            self.left = effect.reason
            self.alive = False
            self.world.process_ended(self)

    def _new_ring(self, effect: Build | Install, members: tuple[int, ...]) -> SimRing | None:
        if self.peer not in effect.ring:
            return None
        rank = effect.ring.index(self.peer)
        since = self.world.now
        return SimRing(effect.view, effect.ring, effect.places, members, rank, since=since)

    def _halt(self, effect: Halt) -> None:
        self.ring, self.beside, self.installing, self.switching = None, None, None, None
        self.holding = True
        states = [self._state(op) for _, op in sorted(self.ops.items())]
        states += [OpState(op, 0, False) for op in self.ended_undone()]
        self.machine.halted(effect.number, tuple(self.counts.items()), tuple(states))

    def ended_undone(self) -> list[OpId]:
        return [op for op in self.undone if op.number < self.counts[op.tag]]

    def _state(self, op: SimOp) -> OpState:
        if op.plan is None:
            return OpState(op.op, op.attempt, False)
        held = [op.plan.holds(chunk) for chunk in op.layout.ids()]
        return OpState(op.op, op.attempt, op.plan.done, bitmap_of(held))

    def _started(self) -> Counts:
        """Next operation of each tag that is on no ring."""
        counts = dict(self.counts)
        for undone in sorted(self.undone):
            if undone.number == counts[undone.tag]:
                counts[undone.tag] += 1
        for op in self.ops.values():
            if not op.attempt:
                counts[op.op.tag] = min(counts[op.op.tag], op.op.number)
        return tuple(counts.items())

    def _install(self, effect: Install) -> None:
        decisions = {d.op: d for d in effect.decisions}
        for op in list(self.ops.values()):
            decision = decisions.get(op.op)
            if decision is None or decision.verdict is Verdict.UNDONE:
                op.attempt, op.plan, op.values, op.finished = 0, None, {}, False
            elif decision.verdict is Verdict.DONE:
                self._return(op)
        for undone in (d.op for d in decisions.values() if d.verdict is Verdict.UNDONE):
            if undone in self.ops and undone.tag == TOLD:
                self._end_undone(undone, effect.view)
            elif undone.number >= self.counts[undone.tag]:
                self.undone[undone] = effect.view
        self.installing = effect
        self.beside = self._new_ring(effect, effect.members)
        if self.beside is None:
            self.machine.moved(effect.view)

    def _switch(self, effect: Switch) -> None:
        self.switching = effect
        first = dict(effect.first)
        late = [o for o in self.ops.values() if o.op.number >= first.get(o.op.tag, 0)]
        over = any(o.number >= first.get(o.tag, 0) for o in self.returned)
        if self.began is not None and (over or any(self._all_began(o) for o in late)):
            self.switching = None
            self.machine.refused(effect.view)
            return
        for op in late:
            op.attempt, op.plan, op.values, op.finished = 0, None, {}, False
        self.holding = False
        self.go_on_switching()

    def _all_began(self, op: SimOp) -> bool:
        return bool(op.attempt and self.ring and self.ring.begun[op.op].passed)

    def go_on_switching(self) -> None:
        """Use the ring beside once all before it is over."""
        effect = self.switching
        if effect is None or not (self.began is None or self._drained(effect.first)):
            return
        self.switching = None
        self.ring, self.beside = self.beside, None
        if self.ring is not None:
            self.ring.members = effect.members
        self._enter(effect.view, effect.first, effect.waiting)

    def _drained(self, first: Counts) -> bool:
        """Whether everything before these has been begun here, and is over."""
        under_way = any(op.op.number < dict(first).get(op.op.tag, 0) for op in self.ops.values())
        return not under_way and all(self.counts[tag] >= number for tag, number in first)

    def _enter(self, view: int, first: Counts, waiting: bool) -> None:
        if self.began is None:
            self.began = first
            self.counts |= dict(first)
        self.holding, self.waiting = False, waiting
        self.machine.moved(view)

    def joined(self) -> None:
        """The ring beside is connected on both sides."""
        ring = self.beside
        assert ring is not None
        ring.joined = True
        effect = self.installing
        if effect is None:
            self.machine.built(ring.view)
            return
        self.installing = None
        self.ring, self.beside = ring, None
        decisions = {d.op: d for d in effect.decisions}
        for op in list(self.ops.values()):
            if op.attempt:
                self._mend(op, decisions[op.op])
        self._enter(effect.view, effect.first, effect.waiting)

    # ---------------------------------------------------------------- operations

    def go_on(self) -> None:
        """Begin what may begin, move what may move."""
        if self.ring is None or self.ring.broken or self.holding or self.waiting:
            return
        limits = None if self.switching is None else dict(self.switching.first)
        for op in sorted(self.ops.values(), key=lambda o: o.op):
            if not op.attempt and (limits is None or op.op.number < limits.get(op.op.tag, 0)):
                self._begin(op)

    def open(self, tag: int) -> None:
        """The user calls for one more operation."""
        op = OpId(tag, self.counts[tag])
        self.counts[tag] += 1
        self.ops[op] = SimOp(op)
        if tag != TOLD:
            self.undone.pop(op, None)
        elif op in self.undone:
            self._end_undone(op, self.undone[op])

    def _end_undone(self, op: OpId, view: int) -> None:
        """The user is told that it never was."""
        del self.ops[op]
        self.undone[op] = view
        self.world.undone(self, op, view)

    def _begin(self, op: SimOp) -> None:
        ring = self.ring
        assert ring is not None
        ranks = len(ring.ring)
        op.attempt, op.members, op.rank, op.finished = ring.view, ring.members, ring.rank, False
        op.layout = Layout(ranks * CHUNKS, ranks, 1)
        op.plan = RingOperation(Kind.ALL_REDUCE, ring.rank, op.layout)
        if ranks == 1:
            op.values = {chunk: frozenset([self.peer]) for chunk in op.layout.ids()}
        self._put(op)

    def _mend(self, op: SimOp, decision: Decision) -> None:
        ring = self.ring
        assert ring is not None
        assert op.plan is not None
        ids = op.layout.ids()
        held = {peer: bits_of(bits, len(ids)) for peer, bits in decision.held}
        ranks = {peer: rank for rank, peer in enumerate(ring.ring)}
        sources = {
            chunk: min(ranks[peer] for peer, bits in held.items() if bits[n])
            for n, chunk in enumerate(ids)
            if not all(bits[n] for bits in held.values())
        }
        lacks = {chunk for chunk in sources if not op.plan.holds(chunk)}
        op.finished = False
        op.plan = MendOperation(ring.rank, len(ring.ring), sources, lacks)
        self._put(op)

    def _put(self, op: SimOp) -> None:
        ring = self.ring
        assert ring is not None
        _barrier(ring, ring.begun, op.op).reach()
        _barrier(ring, ring.done, op.op)
        self.speak(op)

    def hear(self, ring: SimRing, word: str, op: OpId, *rest: object) -> None:
        """A message from the left neighbour in a ring."""
        begun = self.ops.get(op) if ring is self.ring else None
        if word == "chunk" and (begun is None or not begun.attempt):
            ring.broken = True  # it was withdrawn here
            self.machine.lost(ring.view, ring.left, "a chunk came of what is not under way")
        elif word == "chunk":
            assert begun is not None
            self._take(begun, *rest)  # type: ignore[arg-type]
        else:
            table = ring.begun if word == "begun" else ring.done
            _barrier(ring, table, op).heard(rest[0])  # type: ignore[arg-type]
        if begun is not None and begun.attempt:
            self.speak(begun)

    def _take(self, op: SimOp, phase: Phase, chunk: ChunkId, value: Value) -> None:
        assert op.plan is not None
        do = op.plan.arrived(phase, chunk)
        if do is Do.NOTHING:
            return
        if do in (Do.ADD_AND_SEND, Do.ADD_KEEP_AND_SEND):
            value = value | {self.peer}
        if do is Do.ADD_AND_SEND:
            self._send("chunk", op.op, Phase.REDUCE, chunk, value)
            return
        old = op.values.setdefault(chunk, value)
        self.world.check(old == value, f"{op.op}: a chunk changed from {old} to {value}")
        if do is Do.KEEP_AND_TELL:
            self._send("chunk", op.op, Phase.SPENT, chunk, value)
        elif do in (Do.KEEP_AND_SEND, Do.ADD_KEEP_AND_SEND):
            self._send("chunk", op.op, Phase.GATHER, chunk, value)

    def speak(self, op: SimOp) -> None:
        """Say what there is to say about an operation, and end it when it is over."""
        ring, plan = self.ring, op.plan
        assert ring is not None
        assert plan is not None
        begun, done = ring.begun[op.op], ring.done[op.op]
        if ranks := begun.to_say():
            self._send("begun", op.op, ranks)
        if begun.passed:
            while plan.left_to_start:
                phase, chunk = plan.start()
                value = op.values[chunk] if phase is Phase.GATHER else frozenset([self.peer])
                self._send("chunk", op.op, phase, chunk, value)
        if begun.passed and plan.done:
            done.reach()
        if ranks := done.to_say():
            self._send("done", op.op, ranks)
        if begun.passed and self.is_over(op, done) and not op.finished:
            op.finished = True
            for undone in self.ended_undone():  # all are in this view, and know of it
                del self.undone[undone]
            self.world.finished(self, op)

    def is_over(self, op: SimOp, done: RingBarrier) -> bool:
        return done.passed

    def _send(self, *message: object) -> None:
        ring = self.ring
        assert ring is not None
        if len(ring.ring) > 1:
            self.world.lane(ring.view, self.peer, ring.right).append(message)

    def _return(self, op: SimOp) -> None:
        """The user has the result."""
        values = set(op.values.values())
        self.world.check(len(values) == 1, f"{op.op} at {self.peer}: parts of {values}")
        self.world.check(op.op not in self.returned, f"{op.op} returned twice")
        whole = set(op.values) == set(op.layout.ids())
        self.world.check(whole, f"{op.op} at {self.peer} was called done, and is not whole")
        del self.ops[op.op]
        self.returned[op.op] = (op.attempt, values.pop())
        self.world.returned(self, op)
        self.go_on_switching()

    def give(self, op: SimOp) -> None:
        """The ring and the member's other ranks are through with it."""
        self._return(op)


def _barrier(ring: SimRing, table: dict[OpId, RingBarrier], op: OpId) -> RingBarrier:
    return table.setdefault(op, RingBarrier(len(ring.ring)))
