"""Collectives among replica groups that come and go: one peer's side.

A peer meets the others of its lane in a ring, and has a thread that talks to the coordinator.
While nothing changes, the ring alone carries an operation.  When a member is lost, all rings are
halted; the coordinator says what became of what was under way (:mod:`.protocol.verdicts`), and the
rest is tried again among those that are left.  So an operation ends the same way for everybody:
:meth:`FleetHandle.wait` returns, or raises FleetChangedError with the inputs restored.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial

from ftrain.comms.collectives.meeting import Meeting
from ftrain.comms.collectives.ring import Ring
from ftrain.comms.collectives.work import Work
from ftrain.comms.errors import (
    FleetChangedError,
    FleetLeftError,
    FtrainError,
    PeerGarbledError,
    PeerLostError,
    UsageError,
)
from ftrain.comms.fleet.access import Access
from ftrain.comms.fleet.backups import Backups
from ftrain.comms.fleet.link import FleetLink
from ftrain.comms.fleet.operations import FleetHandle, FleetOp, Operations, is_before
from ftrain.comms.fleet.protocol.messages import (
    OPS_MAX,
    Counts,
    Decision,
    Stall,
    Verdict,
)
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
from ftrain.comms.fleet.settings import FleetSettings
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId

Make = Callable[[int, int], Work]
"""A part of an operation, given this peer's rank and the number of ranks."""


class Fleet:
    """One peer's place in a fleet, from now on.

    Args:
        coordinator: where it listens, or how to find that.
        peer: number of this peer: that of its member times the members' width, plus its rank there.
        incarnation: of the member; higher than in every life before, equal for all its ranks.
        bind: host to listen on for the other peers.
        host: under which others reach it; "": as ``bind`` says.
        state: where this peer gives its state to newcomers.
    """

    def __init__(
        self,
        coordinator: str | Callable[[], Awaitable[str]],
        run_id: str,
        secret: bytes,
        peer: int,
        incarnation: int,
        *,
        bind: str = "127.0.0.1",
        host: str = "",
        state: str = "",
        settings: FleetSettings | None = None,
    ) -> None:
        self.peer = peer
        self.backups = Backups()
        self._settings = settings or FleetSettings()
        identity = Identity(run_id, "rank", peer, incarnation)
        self._meeting = Meeting(identity, secret, bind, host, state)
        self.place = self._meeting.place
        self.access = Access(identity, secret, bind, host)
        self._one_halt = threading.Lock()
        self._lock = threading.RLock()  # of everything below
        self._changed = threading.Condition(self._lock)
        self._ops = Operations()
        self._view = 0
        self._members: tuple[int, ...] = ()
        self._ring: Ring | None = None
        self._beside: tuple[Build, Ring] | None = None
        self._places: dict[int, Place] = {}  # of peers that it was told of
        self._order: tuple[int, ...] = ()  # the lane's peers in the ring's order
        self._building = 0  # view that a ring is being made for
        self._switching: Switch | None = None
        self._holding = True  # until there is a view
        self._waiting = False
        self._error: FtrainError | None = None
        self._moved = (0, 0.0)  # what the ring had moved, and since when it is that
        machine = FleetPeer(
            self._meeting.place,
            resend_ticks=self._settings.ticks(self._settings.resend_s),
            hold_ticks=self._settings.ticks(self._settings.hold_s),
        )
        self._link = FleetLink(
            machine,
            identity,
            secret,
            find=coordinator if callable(coordinator) else partial(_at, coordinator),
            perform=self._perform,
            on_tick=self._watch,
            refused=self._end,
            tick_s=self._settings.tick_s,
        )
        self._machine = machine
        self._link.start()

    # ------------------------------------------------------------------ for its user

    @property
    def view(self) -> int:
        """Number of the present membership; 0 before the first."""
        return self._view

    @property
    def members(self) -> tuple[int, ...]:
        """The members at present, in the ring's order."""
        return self._members

    @property
    def ring(self) -> tuple[int, tuple[Place, ...]]:
        """The number of the present membership, and the places of the lane's peers in order, as
        far as they are known here: newcomers know all."""
        with self._lock:
            places = self._places
            return self._view, tuple(places[peer] for peer in self._order if peer in places)

    def next_number(self, tag: int = 0) -> int:
        """Number of the next operation with a tag."""
        with self._lock:
            return self._ops.counts.get(tag, 0)

    @property
    def waiting(self) -> bool:
        """Whether operations wait for more members."""
        return self._waiting

    def wait_for_view(self, timeout_s: float) -> int:
        """Return the number of the membership once this peer is in one.

        Raises TimeoutError, FleetLeftError.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._view or self._error, timeout_s)
            self.raise_if_over()
            if not self._view:
                raise TimeoutError(f"the fleet has not let this peer in within {timeout_s} s")
            return self._view

    def begin(self, make: Make, *, tag: int = 0, retry: bool = True) -> FleetHandle:
        """Begin an operation of one part.

        Every peer of the lane begins the same operations; those of one tag in the same order.  With
        ``retry`` it is tried again among the rest when a change undoes it.  Its memory is the
        fleet's until the handle is over.
        """
        op = self.open(tag=tag, retry=retry)
        self.add(op, make, last=True)
        return op.handle

    def open(self, *, tag: int = 0, retry: bool = True) -> FleetOp:
        """Begin an operation of several parts: from here on it belongs to the present membership,
        so this waits while that is about to change, and while there are too few members."""
        if not 0 <= tag < 65536:
            raise UsageError(f"a tag is a number from 0 to 65535, not {tag}")
        with self._lock:
            if not (self._view or self._error):
                raise UsageError("the fleet has not let this peer in yet: wait_for_view first")
            self._changed.wait_for(lambda: self._error or self._may_open(tag))
            if len(self._ops.running) >= OPS_MAX:
                raise UsageError(f"{OPS_MAX} operations are under way: wait for some of them")
            op = self._ops.open(tag, retry=retry)
            error = self._error or (_undone(op) if op.op in self._ops.undone else None)
            if error is not None:
                self._ops.close(op)
                op.handle.end(error)
            return op

    def _may_open(self, tag: int) -> bool:
        number = OpId(tag, self._ops.counts.get(tag, 0))
        later = self._switching is not None and not is_before(number, self._switching.first)
        return not (self._holding or self._waiting or later)

    def add(self, op: FleetOp, make: Make, *, last: bool) -> None:
        """Give an operation its next part; raises UsageError for what can't be one."""
        with self._lock:
            op.works.append(make)
            op.complete = last
            self._put_all()

    def take_back(self, op: FleetOp) -> None:
        """An operation that was opened is not wanted after all; nothing happens if it has parts, or
        is not the newest of its tag."""
        with self._lock:
            self._ops.take_back(op)

    def leave(self, timeout_s: float = 10.0) -> None:
        """Leave in order: the others go on without this member from the next operation that none
        has begun; what is under way is finished first."""
        self._link.call(self._machine.leave)
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None, timeout_s)
        self.close()

    def close(self) -> None:
        """Be gone at once; what is under way ends with FleetLeftError."""
        self._end(FleetLeftError("the fleet was closed here"))
        self._link.stop()
        self._meeting.close()

    # ------------------------------------------------------------------ what the machine wants

    def _perform(self, effect: object) -> None:
        if isinstance(effect, Build | Install | Halt):
            with self._lock:  # from here on nothing that was wanted before may take effect
                self._building = 0 if isinstance(effect, Halt) else effect.view
        if isinstance(effect, Build):
            self._spawn(self._build, effect)
        elif isinstance(effect, Hold):
            with self._lock:
                self._holding = True
                started = self._ops.started(waiting=self._waiting)
            self._machine.held(effect.number, started)
        elif isinstance(effect, Release):
            self._release(effect)
        elif isinstance(effect, Halt):
            self._spawn(self._halt, effect)
        elif isinstance(effect, Install):
            self._spawn(self._install, effect)
        elif isinstance(effect, Switch):
            self._switch(effect)
        elif isinstance(effect, Leave):
            self._spawn(self._end, FleetLeftError(effect.reason))

    def _spawn(self, what: Callable[..., object], *args: object) -> None:
        threading.Thread(target=what, args=args, name="ftrain-fleet-step", daemon=True).start()

    def _build(self, effect: Build | Install) -> Ring | None:
        """Make a ring; None when it could not be made or is not wanted any more."""
        places = {place.node: place for place in effect.places}
        try:
            ring = self._meeting.join(
                effect.view,
                [places.get(peer) for peer in effect.ring],
                self._settings.ring,
                timeout_s=self._settings.build_s,
                failed=partial(self._ring_failed, effect.view),
            )
        except FtrainError as error:
            self._link.call(partial(self._not_built, effect.view, error))
            return None
        with self._lock:
            wanted = self._building == effect.view and self._error is None
            if wanted and isinstance(effect, Build):
                self._beside = effect, ring
        if not wanted:
            ring.close()
            return None
        if isinstance(effect, Build):
            self._link.call(partial(self._machine.built, effect.view))
        return ring

    def _not_built(self, view: int, error: FtrainError) -> None:
        node = error.node if isinstance(error, PeerLostError) else self.peer
        garbled = isinstance(error, PeerGarbledError)
        self._machine.lost(view, node, str(error), reached=garbled, garbled=garbled)

    def _ring_failed(self, view: int, error: FtrainError) -> None:
        """By a ring's thread."""
        node = error.node if isinstance(error, PeerLostError) else self.peer
        garbled = isinstance(error, PeerGarbledError)
        self._link.call(lambda: self._machine.lost(view, node, str(error), garbled=garbled))

    def _release(self, effect: Release) -> None:
        with self._lock:
            beside, self._beside = (self._beside, None) if effect.drop else (None, self._beside)
            if effect.drop:
                self._building = 0
            self._holding = not self._view
            self._changed.notify_all()
            self._put_all()
        if beside is not None:
            self._spawn(beside[1].close)

    def _halt(self, effect: Halt) -> None:
        with self._one_halt:  # who comes second finds what the first one left
            self._stop_rings()
            with self._lock:
                counts, states = self._ops.begun(), self._ops.states()
                self._link.call(lambda: self._machine.halted(effect.number, counts, states))

    def _stop_rings(self) -> None:
        with self._lock:
            ring, self._ring = self._ring, None
            beside, self._beside = self._beside, None
            self._switching, self._holding = None, True
        under_way = ring.halt() if ring is not None else {}
        if beside is not None:
            beside[1].halt()
        with self._lock:
            for op in self._ops.running.values():
                if op.op in under_way:
                    op.halted(under_way[op.op])

    def _install(self, effect: Install) -> None:
        decisions = {decision.op: decision for decision in effect.decisions}
        with self._lock:
            if self._building != effect.view:
                return
            ended = self._ops.settle({op: one.verdict for op, one in decisions.items()})
            for op in list(self._ops.running.values()):
                self._settle(op, decisions.get(op.op))
            for op in ended:
                self._ops.close(op)
                op.handle.end(_undone(op))
        if not effect.ring:
            self._link.call(lambda: self._machine.moved(effect.view))
            return
        ring = self._build(effect)
        if ring is None:
            return
        with self._lock:
            if self._building != effect.view:  # another change has begun meanwhile
                self._spawn(ring.close)
                return
            self._enter(effect, effect, ring)
            for op in list(self._ops.running.values()):
                if op.attempt and op.op in decisions:
                    self._mend(op, ring, decisions[op.op], effect)
            self._put_all()
            self._link.call(lambda: self._machine.moved(effect.view))

    def _settle(self, op: FleetOp, decision: Decision | None) -> None:
        if decision is None or decision.verdict is Verdict.UNDONE:
            op.undo(self.backups)
        elif decision.verdict is Verdict.DONE:
            self._finish(op)

    def _mend(self, op: FleetOp, ring: Ring, decision: Decision, effect: Install) -> None:
        sources = op.sources(decision, effect.ring)
        parts, op.parts = op.parts, {}
        for number, part in parts.items():
            ring.mend(
                op.op,
                number,
                part,
                sources[number],
                last=number == max(parts),
                over=partial(self._over, op),
            )

    def _switch(self, effect: Switch) -> None:
        with self._lock:
            if self._view and not self._take_back(effect.first):
                self._machine.refused(effect.view)
                return
            self._switching = effect
            self._holding = False
            self._changed.notify_all()
            self._put_all()
            self._go_on_switching()

    def _take_back(self, first: Counts) -> bool:
        """Whether what is not before these is on no ring any more, and never was over."""
        late = [op for op in self._ops.beyond(first) if op.attempt]
        ring = self._ring
        if self._ops.over_beyond(first) or ring is None:
            return not late and not self._ops.over_beyond(first)
        for op in late:
            if not ring.withdraw(op.op):
                return False
            op.undo(self.backups)
        return True

    def _go_on_switching(self) -> None:
        """Use the ring beside once all before it is over; the lock is held."""
        effect = self._switching
        if effect is None or (self._view and not self._ops.drained(effect.first)):
            return
        self._switching = None
        old, beside = self._ring, self._beside
        self._beside = None
        self._enter(effect, beside[0] if beside else None, beside[1] if beside else None)
        self._put_all()
        if old is not None:
            self._spawn(old.close)
        self._link.call(lambda: self._machine.moved(effect.view))

    def _enter(
        self, effect: Install | Switch, made: Build | Install | None, ring: Ring | None
    ) -> None:
        if not self._view:
            self._ops.begin_at(effect.first)
        self._view, self._members, self._ring = effect.view, effect.members, ring
        self._order = made.ring if made is not None else ()
        for place in made.places if made is not None else ():
            self._places[place.node] = place
        self._holding, self._waiting = False, effect.waiting
        self._moved = (0, time.monotonic())
        self._changed.notify_all()

    # ------------------------------------------------------------------ operations

    def _put_all(self) -> None:
        """Put on the ring what may be; the lock is held."""
        ring = self._ring
        if ring is None or self._holding or self._waiting:
            return
        for _, op in sorted(self._ops.running.items()):
            limit = self._switching.first if self._switching is not None else None
            if not op.works or op.parts or (limit is not None and not is_before(op.op, limit)):
                continue
            if op.attempt in (0, self._view):
                self._put(op, ring)

    def _put(self, op: FleetOp, ring: Ring) -> None:
        op.attempt, op.members = self._view, self._members
        while op.put < len(op.works):
            number, op.put = op.put, op.put + 1
            try:
                work = op.works[number](ring.rank, ring.ranks)
                if work.backup is not None:
                    op.backups.append(work.backup)
                last = op.complete and number == len(op.works) - 1
                ring.put(op.op, number, work, last=last, over=partial(self._over, op))
            except FtrainError as error:
                self._ops.undone.add(op.op)
                self._ops.close(op)
                op.handle.end(error)
                return

    def _over(self, op: FleetOp) -> None:
        """By a ring's thread: everybody has the result."""
        with self._lock:
            self._ops.returned(op)
            op.finish(self.backups)
            self._go_on_switching()

    def _finish(self, op: FleetOp) -> None:
        self._ops.close(op)
        op.finish(self.backups)

    # ------------------------------------------------------------------ inside

    def _watch(self) -> None:
        """In every tick: whether operations make progress."""
        now = time.monotonic()
        with self._lock:
            ring = self._ring
            if ring is None:
                return
            waits, under_way = ring.waits()
            if not (waits or under_way):
                self._moved = (0, now)
                stall = Stall.NO
            else:
                moved = ring.moved + ring.traffic()
                if moved != self._moved[0]:
                    self._moved = (moved, now)
                late = now - self._moved[1] > self._settings.stall_s
                stall = Stall.NO if not late else Stall.STUCK if under_way else Stall.WAITS
        self._machine.stall(stall)

    def _end(self, error: FtrainError) -> None:
        """It is over; from any thread but a ring's."""
        with self._changed:
            if self._error is None:
                self._error = error
            rings = [self._ring, self._beside[1] if self._beside else None]
            self._ring, self._beside, self._building = None, None, 0
        for ring in rings:
            if ring is not None:
                ring.halt()
        with self._changed:
            self._ops.fail(self._error)
            self._changed.notify_all()

    def raise_if_over(self) -> None:
        """Raise what ended this peer's part in the fleet, if something has."""
        if self._error is not None:
            raise type(self._error)(*self._error.args)


def _undone(op: FleetOp) -> FleetChangedError:
    return FleetChangedError(f"operation {op.op.number} was undone: members were lost")


async def _at(address: str) -> str:
    return address
