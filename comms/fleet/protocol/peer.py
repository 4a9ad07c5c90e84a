"""One peer's machine in a fleet: does what the coordinator wants, and says how far it is.

It holds no operation itself: its engine (:class:`ftrain.comms.fleet.fleet.Fleet`, or the
simulation) has the ring and what is under way in it, and answers each effect by the input that the
effect names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ftrain.comms.fleet.protocol.messages import (
    LOST_MAX,
    WHY_CHARS_MAX,
    Counts,
    Decision,
    FleetDirective,
    Lost,
    OpState,
    Order,
    PeerStatus,
    Stage,
    Stall,
)
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ready import Address, Ready

COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Build:
    """Make the ring of the next view, beside the present one. Answer: ``built`` or ``lost``."""

    view: int
    ring: tuple[int, ...]  # peers, in order
    places: tuple[Place, ...]  # of this one and its neighbours


@dataclass(frozen=True, slots=True)
class Hold:
    """Put no further operation on the ring. Answer: ``held``, what the ring had at most."""

    number: int


@dataclass(frozen=True, slots=True)
class Release:
    """Go on as before: the hold is over, and a ring that was built beside is dropped, too, if
    ``drop``."""

    drop: bool


@dataclass(frozen=True, slots=True)
class Halt:
    """Stop the ring, drop the one beside. Answer: ``halted``, everything that was under way."""

    number: int


@dataclass(frozen=True, slots=True)
class Install:
    """Settle what was under way as decided, make the ring of the view and go on in it; with no
    ``ring`` there is none. Answer: ``moved`` or ``lost``."""

    view: int
    ring: tuple[int, ...]
    places: tuple[Place, ...]
    members: tuple[int, ...]
    first: Counts  # where who never was in a view begins
    decisions: tuple[Decision, ...]
    waiting: bool


@dataclass(frozen=True, slots=True)
class Switch:
    """Once everything before ``first`` is over, go on in the ring that was built for the view.

    Answer: ``moved``; or ``refused`` when an operation from there on is whole here, which it can be
    only if the hold was over.
    """

    view: int
    members: tuple[int, ...]
    first: Counts
    waiting: bool


@dataclass(frozen=True, slots=True)
class Leave:
    """It is over for this incarnation. No answer."""

    reason: str


class FleetPeer:
    """The machine of one peer, in one life.

    Receives :class:`FleetDirective`; sends :class:`PeerStatus` to the coordinator.
    """

    def __init__(self, place: Place, *, resend_ticks: int = 5, hold_ticks: int = 10) -> None:
        self._status = PeerStatus(place.node, place.incarnation, 1, place)
        self._resend_ticks = resend_ticks
        self._hold_ticks = hold_ticks
        self._held_ticks = 0
        self._since_ticks = 0
        self._heard = 0
        self._due = True
        self._wanted: FleetDirective | None = None
        self._busy: object = None  # the effect that has not been answered
        self._over = False
        self._effects: list[object] = []

    @property
    def status(self) -> PeerStatus:
        """What it says of itself."""
        return self._status

    @property
    def over(self) -> bool:
        """It was told to leave."""
        return self._over

    # ------------------------------------------------------------------ inputs

    def tick(self) -> None:
        """One unit of logical time has passed."""
        self._since_ticks += 1
        self._held_ticks = self._held_ticks + 1 if self._status.stage is Stage.HELD else 0
        if self._held_ticks > self._hold_ticks and self._busy is None:
            self._effects.append(Release(drop=False))  # nobody may wait long for a coordinator
            self._change(stage=Stage.BUILT)

    def connected(self) -> None:
        """There is a connection to a coordinator, perhaps another one."""
        self._due = True

    def receive(self, message: object) -> None:
        """What the coordinator wants."""
        if not isinstance(message, FleetDirective) or self._over:
            return
        mine = (message.peer, message.incarnation) == (
            self._status.peer,
            self._status.incarnation,
        )
        steps = (Order.PREPARE, Order.HOLD, Order.HALT)
        done = message.order in steps and message.number <= self._status.view
        if not mine or message.number < self._status.number or done:
            return  # stale
        self._heard = max(self._heard, message.heard)
        if message.ping > self._status.pong:
            self._change(pong=message.ping)
        if message.number > self._status.number:
            self._begin_change(message)
        self._wanted = message
        self._pursue()

    def built(self, view: int) -> None:
        """Answer to :class:`Build`."""
        if isinstance(self._busy, Build) and self._busy.view == view:
            self._busy = None
            self._change(stage=Stage.BUILT)
            self._pursue()

    def held(self, number: int, counts: Counts) -> None:
        """Answer to :class:`Hold`."""
        if isinstance(self._busy, Hold) and self._busy.number == number:
            self._busy = None
            self._change(stage=Stage.HELD, counts=counts)

    def halted(self, number: int, counts: Counts, ops: tuple[OpState, ...]) -> None:
        """Answer to :class:`Halt`."""
        if isinstance(self._busy, Halt) and self._busy.number == number:
            self._busy = None
            self._change(stage=Stage.HALTED, counts=counts, ops=ops)

    def moved(self, view: int) -> None:
        """Answer to :class:`Install` and :class:`Switch`; true even if it comes too late."""
        if view <= self._status.view:
            return
        lost = tuple(lost for lost in self._status.lost if lost.number >= view)
        self._change(view=view, lost=lost, stall=Stall.NO)
        if isinstance(self._busy, Install | Switch) and self._busy.view == view:
            self._busy = None
            self._change(stage=Stage.NONE, counts=(), ops=())
            self._pursue()

    def refused(self, view: int) -> None:
        """Answer to :class:`Switch`."""
        self.lost(view, self._status.peer, "it began more than was agreed on")

    def lost(
        self, view: int, peer: int, why: str, *, reached: bool = True, garbled: bool = False
    ) -> None:
        """A neighbour in the ring of a view is gone, or could not be reached for it.

        Also the answer to effects that need the neighbour.
        """
        if view < self._status.view:
            return
        lost = Lost(peer, why[:WHY_CHARS_MAX], view, reached, garbled)
        if all((one.peer, one.number) != (peer, view) for one in self._status.lost):
            self._change(lost=(*self._status.lost, lost)[-LOST_MAX:])

    def stall(self, stall: Stall) -> None:
        """Whether operations make progress, as of now."""
        if stall is not self._status.stall:
            self._change(stall=stall)

    def leave(self) -> None:
        """This member wants to go, in order: it begins nothing more."""
        if not self._status.leaving:
            self._change(leaving=True)

    def ready(self) -> Ready[None]:
        """What has to be done now."""
        late = self._heard < self._status.sequence and self._since_ticks >= self._resend_ticks
        messages: tuple[tuple[Address, object], ...] = ()
        if (self._due or late) and not self._over:
            self._due, self._since_ticks = False, 0
            messages = ((COORDINATOR, self._status),)
        effects, self._effects = tuple(self._effects), []
        return Ready(None, messages, effects)

    # ------------------------------------------------------------------ inside

    def _begin_change(self, directive: FleetDirective) -> None:
        """What the change before had come to is over; an order to halt drops it itself."""
        beside = self._status.stage in (Stage.BUILT, Stage.HELD)
        if directive.order is not Order.HALT and (beside or isinstance(self._busy, Build | Hold)):
            self._effects.append(Release(drop=True))
        self._busy = None
        self._change(number=directive.number, stage=Stage.NONE)

    def _pursue(self) -> None:
        """Take the next step towards what is wanted."""
        wanted, stage = self._wanted, self._status.stage
        if wanted is None or self._over:
            return
        if wanted.order is Order.LEAVE:
            self._over = True
            self._effects.append(Leave(wanted.reason))
        elif wanted.order is Order.HALT:
            if stage is not Stage.HALTED and not isinstance(self._busy, Halt):
                self._begin(Halt(wanted.number))
        elif self._busy is not None:
            return
        elif wanted.order in (Order.PREPARE, Order.HOLD):
            if stage is Stage.NONE and self._has_place(wanted):
                self._begin(Build(wanted.view, wanted.ring, wanted.places))
            elif wanted.order is Order.HOLD and stage is not Stage.HELD:
                self._begin(Hold(wanted.number))
        elif wanted.order is Order.RUN:
            self._run(wanted)

    def _run(self, wanted: FleetDirective) -> None:
        ring = wanted.ring if self._has_place(wanted) else ()
        if wanted.view > self._status.view and wanted.halted:
            self._begin(
                Install(
                    wanted.view,
                    ring,
                    wanted.places,
                    wanted.members,
                    wanted.first,
                    wanted.decisions,
                    wanted.waiting,
                )
            )
        elif wanted.view > self._status.view:
            self._begin(Switch(wanted.view, wanted.members, wanted.first, wanted.waiting))
        elif self._status.stage in (Stage.BUILT, Stage.HELD):
            self._effects.append(Release(drop=True))
            self._change(stage=Stage.NONE)

    def _has_place(self, wanted: FleetDirective) -> bool:
        return self._status.peer in wanted.ring and self._status.place in wanted.places

    def _begin(self, effect: object) -> None:
        self._busy = effect
        self._effects.append(effect)

    def _change(self, **fields: object) -> None:
        sequence = self._status.sequence + 1
        self._status = replace(self._status, sequence=sequence, **fields)  # type: ignore[arg-type]
        self._due = True
