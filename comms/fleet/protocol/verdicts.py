"""What becomes of the operations that a change of a fleet's membership interrupts.

A peer returns from an operation only when it has heard that all peers of the ring have the whole
result.  So, of the reports of *all* survivors:

* somebody has returned from it, or everybody has the whole result: it is done;
* between them they hold every chunk of the same attempt's result: they mend it, by passing chunks
  on in the next ring.  It counts as done only when all have it, which the next ring says; should
  that one break as well, the same is asked again;
* else nobody can have returned and nobody ever will: it never was, its inputs are restored.  Who
  has yet to begin it is told as well: where it is not tried again the others won't take part.

Exactly one of these is true, whoever asks, and a peer that died may have been told no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ftrain.comms.fleet.protocol.messages import Counts, Decision, OpState, PeerStatus, Verdict
from ftrain.comms.protocol.ring import OpId


@dataclass(slots=True)
class _Report:
    """What a halted peer says, so that an operation is found at once."""

    status: PeerStatus
    counts: dict[int, int] = field(init=False)
    states: dict[OpId, OpState] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = dict(self.status.counts)
        self.states = {state.op: state for state in self.status.ops}

    @property
    def peer(self) -> int:
        return self.status.peer


def decide(
    reports: Sequence[PeerStatus], width: int, *, joint: bool, trusted: bool = True
) -> tuple[Decision, ...]:
    """Decisions about everything that is under way at the halted survivors of a view.

    ``reports`` of all of them; ``joint``: an operation is done in all lanes or in none.  Without
    ``trusted`` garbage came over the ring, and nobody is missing: what nobody has returned from is
    undone, because what is held of it may be wrong.
    """
    known_reports = [_Report(report) for report in reports]
    ops = sorted({op for report in known_reports for op in report.states})
    lanes = [[r for r in known_reports if r.peer % width == lane] for lane in range(width)]
    decisions: list[Decision] = []
    for op in ops:
        found = [_decide(op, lane, peers) for lane, peers in enumerate(lanes)]
        garbled = not trusted and not any(returned(op, report) for report in known_reports)
        if garbled or (joint and (None in found or _torn(op, known_reports))):
            found = [None] * width
        undone = [
            Decision(op, lane, Verdict.UNDONE)
            for lane, one in enumerate(found)
            if one is None and (joint or any(op in report.states for report in lanes[lane]))
        ]
        known = [decision for decision in found if decision is not None]
        if joint and any(decision.verdict is Verdict.MEND for decision in known):
            known = [_mend(op, lane, peers) for lane, peers in enumerate(lanes)]
        decisions += known + undone
    return tuple(decisions)


def _decide(op: OpId, lane: int, reports: Sequence[_Report]) -> Decision | None:
    states = [_state(op, report) for report in reports]
    if any(returned(op, report) for report in reports):
        return Decision(op, lane, Verdict.DONE)
    if any(state is None for state in states):
        return None  # somebody has not begun it
    known = [state for state in states if state is not None]
    if len({state.attempt for state in known}) != 1:
        return None
    if all(state.whole for state in known):
        return Decision(op, lane, Verdict.DONE)
    if len({len(state.held) for state in known}) != 1:
        return None  # they do not mean the same by it
    if not known[0].held or not _complete(state.held for state in known):
        return None
    return _mend(op, lane, reports)


def _torn(op: OpId, reports: Sequence[_Report]) -> bool:
    """Whether the lanes have tried it in different views, and none has returned from it."""
    attempts = {state.attempt for r in reports if (state := _state(op, r)) is not None}
    return len(attempts) > 1 and not any(returned(op, report) for report in reports)


def _mend(op: OpId, lane: int, reports: Sequence[_Report]) -> Decision:
    """Also of a lane in which all have the whole: nobody returns before the other lanes may."""
    states = ((report.peer, _state(op, report)) for report in reports)
    held = tuple((peer, state.held) for peer, state in states if state is not None)
    return Decision(op, lane, Verdict.MEND, held)


def returned(op: OpId, report: _Report) -> bool:
    """Whether a halted peer has ended the operation: it was begun and is not under way."""
    begun = report.counts.get(op.tag, 0) > op.number
    return begun and _state(op, report) is None


def _state(op: OpId, report: _Report) -> OpState | None:
    return report.states.get(op)


def _complete(bitmaps: Iterable[bytes]) -> bool:
    """Whether every bit is set in one of them."""
    together, length = 0, 0
    for bitmap in bitmaps:
        together |= int.from_bytes(bitmap, "little")
        length = max(length, len(bitmap))
    return together == (1 << 8 * length) - 1


def bitmap_of(held: Sequence[bool]) -> bytes:
    """One bit a chunk, the first one the lowest; what is left of the last byte is set."""
    nbytes = -(-len(held) // 8)
    bits = sum(1 << n for n, here in enumerate(held) if here)
    padding = (1 << 8 * nbytes) - (1 << len(held))
    return (bits | padding).to_bytes(nbytes, "little")


def bits_of(bitmap: bytes, count: int) -> list[bool]:
    """The inverse of :func:`bitmap_of`."""
    bits = int.from_bytes(bitmap, "little")
    return [bool(bits >> n & 1) for n in range(count)]


def first_of(holders: Sequence[PeerStatus]) -> Counts:
    """For each tag the first operation of a view that comes after a hold.

    That is the first one that nobody has begun; but who leaves begins nothing more, so what others
    have begun beyond that is nowhere under way, and they take it along.
    """
    first: dict[int, int] = {}
    for holder in holders:
        for tag, number in holder.counts:
            first[tag] = max(number, first.get(tag, 0))
    for counts in [dict(holder.counts) for holder in holders if holder.leaving]:
        first = {tag: min(number, counts.get(tag, 0)) for tag, number in first.items()}
    return tuple(sorted(first.items()))
