"""What a peer has under way with the others of its fleet, whichever ring it is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ftrain.comms.collectives.ring import Operation, Part
from ftrain.comms.collectives.work import Handle, Work
from ftrain.comms.errors import FtrainError
from ftrain.comms.fleet.backups import Backups
from ftrain.comms.fleet.protocol.messages import Counts, Decision, OpState, Verdict
from ftrain.comms.fleet.protocol.verdicts import bitmap_of, bits_of
from ftrain.comms.protocol.ring import ChunkId, Kind, OpId


class FleetHandle(Handle):
    """An operation among the members of a fleet.

    ``view`` and ``members`` are known once it is over: those whose elements are in the result.
    """

    def __init__(self, op: OpId) -> None:
        super().__init__()
        self.op = op
        self.view = 0
        self.members: tuple[int, ...] = ()


@dataclass(slots=True)
class FleetOp:
    """An operation that was begun here and is not over.

    Args:
        make: its parts' works, as of a ring: given rank and ranks, raises UsageError or
            FleetChangedError.
        retry: whether it is tried again among the rest when a change undoes it.
    """

    handle: FleetHandle
    retry: bool
    works: list[Callable[[int, int], Work]] = field(default_factory=list)
    complete: bool = False
    attempt: int = 0  # view in which it began; 0: it is on no ring
    members: tuple[int, ...] = ()
    put: int = 0  # parts that are on the ring
    parts: dict[int, Part] = field(default_factory=dict)  # once its ring was halted
    backups: list[memoryview] = field(default_factory=list)  # of the parts that are on the ring

    @property
    def op(self) -> OpId:
        """Its name."""
        return self.handle.op

    def halted(self, found: Operation) -> None:
        """Its ring was stopped: remember how far it had come."""
        self.parts = dict(found.parts)

    def state(self) -> OpState:
        """For the coordinator, after a halt."""
        parts = [self.parts[number] for number in sorted(self.parts)]
        if not self.attempt or not self.complete or len(parts) < len(self.works):
            return OpState(self.op, self.attempt, False)
        whole = all(part.plan.done for part in parts)
        can_mend = all(part.work.kind is not Kind.REDUCE_SCATTER for part in parts)
        held = [here for part in parts for here in part.held()]
        return OpState(self.op, self.attempt, whole, bitmap_of(held) if can_mend else b"")

    def undo(self, backups: Backups) -> None:
        """It never was: put the inputs back."""
        for part in self.parts.values():
            part.restore()
        self._give_back(backups)
        self.parts, self.attempt, self.put = {}, 0, 0

    def finish(self, backups: Backups) -> None:
        """Everybody has the result."""
        self._give_back(backups)
        self.handle.view, self.handle.members = self.attempt, self.members
        self.handle.end()

    def _give_back(self, backups: Backups) -> None:
        for backup in self.backups:
            backups.give(backup)
        self.backups.clear()

    def sources(self, decision: Decision, ring: tuple[int, ...]) -> dict[int, dict[ChunkId, int]]:
        """For each part, which rank of the new ring passes on each chunk that somebody lacks."""
        ranks = {peer: rank for rank, peer in enumerate(ring)}
        ids = [(n, chunk) for n in sorted(self.parts) for chunk in self.parts[n].layout.ids()]
        held = {ranks[peer]: bits_of(bits, len(ids)) for peer, bits in decision.held}
        found: dict[int, dict[ChunkId, int]] = {number: {} for number in self.parts}
        for index, (number, chunk) in enumerate(ids):
            if not all(bits[index] for bits in held.values()):
                found[number][chunk] = min(rank for rank, bits in held.items() if bits[index])
        return found


class Operations:
    """All of a peer's; not thread-safe: whoever has it has a lock."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}  # for each tag, the number of the next one
        self.running: dict[OpId, FleetOp] = {}
        self.newest: dict[int, int] = {}  # for each tag, the highest number that is over
        # What a change undid and is not tried again here.  Of what ended so, others may not have
        # heard yet; what has yet to begin here ends so as soon as it does.
        self.undone: set[OpId] = set()

    def begin_at(self, first: Counts) -> None:
        """Where this peer comes in."""
        self.counts = {tag: max(number, self.counts.get(tag, 0)) for tag, number in first}

    def open(self, tag: int, *, retry: bool) -> FleetOp:
        """The next one with a tag."""
        number = self.counts.get(tag, 0)
        self.counts[tag] = number + 1
        op = FleetOp(FleetHandle(OpId(tag, number)), retry)
        self.running[op.op] = op
        if retry:
            self.undone.discard(op.op)
        return op

    def take_back(self, op: FleetOp) -> None:
        """It is opened no more, if nobody can know of it."""
        tag, number = op.op.tag, op.op.number
        if not op.works and self.counts.get(tag) == number + 1:
            self.running.pop(op.op, None)
            self.counts[tag] = number

    def settle(self, verdicts: Mapping[OpId, Verdict]) -> list[FleetOp]:
        """Take note of what a change undid; what of that ends here."""
        ended: list[FleetOp] = []
        for op in (op for op, verdict in verdicts.items() if verdict is Verdict.UNDONE):
            running = self.running.get(op)
            if running is not None and not running.retry:
                ended.append(running)
            if running in ended or op.number >= self.counts.get(op.tag, 0):
                self.undone.add(op)
        return ended

    def returned(self, op: FleetOp) -> None:
        """A ring is through with it: so everybody is in that, and knows what was undone before."""
        self.close(op)
        self.undone = {op for op in self.undone if op.number >= self.counts.get(op.tag, 0)}

    def close(self, op: FleetOp) -> None:
        """It is over."""
        self.running.pop(op.op, None)
        self.newest[op.op.tag] = max(op.op.number, self.newest.get(op.op.tag, -1))

    def waiting(self) -> list[FleetOp]:
        """What is on no ring, in order."""
        return [op for _, op in sorted(self.running.items()) if not op.attempt]

    def begun(self) -> Counts:
        """For each tag the number of the next one."""
        return tuple(sorted(self.counts.items()))

    def started(self, *, waiting: bool) -> Counts:
        """For each tag the number of the first one that may as well begin in the next view: one
        that has parts and is on no ring; while all are ``waiting``, any."""
        counts = dict(self.counts)
        for op in sorted(self.undone):  # who comes in must not wait for the others there
            if op.number == counts.get(op.tag, 0):
                counts[op.tag] = op.number + 1
        for one in [one for one in self.waiting() if one.works or waiting]:
            counts[one.op.tag] = min(counts[one.op.tag], one.op.number)
        return tuple(sorted(counts.items()))

    def drained(self, first: Counts) -> bool:
        """Whether everything before these was begun here, and is over."""
        under_way = any(is_before(op, first) for op in self.running)
        return not under_way and all(self.counts.get(tag, 0) >= number for tag, number in first)

    def beyond(self, first: Counts) -> list[FleetOp]:
        """What is under way and not before these."""
        return [op for op in self.running.values() if not is_before(op.op, first)]

    def over_beyond(self, first: Counts) -> bool:
        """Whether something that is not before these is over."""
        limits = dict(first)
        return any(number >= limits.get(tag, 0) for tag, number in self.newest.items())

    def states(self) -> tuple[OpState, ...]:
        """Everything that is under way, after a halt."""
        ended = (op for op in sorted(self.undone) if op.number < self.counts.get(op.tag, 0))
        running = (op.state() for _, op in sorted(self.running.items()))
        return (*running, *(OpState(op, 0, False) for op in ended))

    def fail(self, error: FtrainError) -> None:
        """All of it ends badly."""
        running, self.running = list(self.running.values()), {}
        for op in running:
            op.handle.end(error)


def is_before(op: OpId, first: Counts) -> bool:
    """Whether an operation comes before the first ones of a view."""
    return op.number < dict(first).get(op.tag, 0)
