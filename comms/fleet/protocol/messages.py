"""What a fleet's coordinator and its peers say to each other.

A *member* of a fleet is a replica group; its ranks are *peers*.  Peer ``n`` is rank ``n % width``
of member ``n // width``, and the peers of one *lane* (equal rank in every member) form a ring.
Both sides always say the whole of what they know or want, so a lost or repeated message costs time
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId

OPS_MAX = 8192  # operations that a peer may have under way
TAGS_MAX = 65536
AHEAD_MAX = 65536  # operations that a peer may have begun before another one
LOST_MAX = 64  # neighbours that a peer speaks of, the newest
WHY_CHARS_MAX = 500  # of a reason

Counts = tuple[tuple[int, int], ...]
"""For each tag the number of the next operation; a tag that is missing: 0."""


@dataclass(frozen=True, slots=True)
class OpState:
    """An operation that has begun here and not ended, or that ended here because it was undone."""

    op: OpId
    attempt: int  # view in which it began
    whole: bool  # its result is here, so this peer has told the others or is about to
    held: bytes = b""  # bit for each chunk of the result that is here; empty: can't be passed on


@dataclass(frozen=True, slots=True)
class Lost:
    """A neighbour that a peer lost its connection to, or could not connect to."""

    peer: int
    why: str
    number: int  # of the view whose ring it was, or was to be
    reached: bool = True  # there was a connection
    garbled: bool = False  # what came over it breaks the protocol


class Stage(Enum):
    """How far a peer has come in the change that it was told of last."""

    NONE = "none"
    BUILT = "built"  # its ring of the next view is there
    HELD = "held"  # and it begins nothing more before it hears when to use it
    HALTED = "halted"  # its ring has stopped, `ops` are final


class Stall(Enum):
    """Whether operations make progress."""

    NO = "no"
    WAITS = "waits"  # for others to begin
    STUCK = "stuck"  # all have begun, and nothing moves


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """The whole of what a peer knows about itself."""

    peer: int
    incarnation: int
    sequence: int
    place: Place
    view: int = 0  # whose ring it uses; 0: none yet
    number: int = 0  # newest change that it was told of
    stage: Stage = Stage.NONE  # in that
    counts: Counts = ()  # final in HELD and HALTED
    ops: tuple[OpState, ...] = ()  # final in HALTED
    lost: tuple[Lost, ...] = ()  # since it uses `view`
    stall: Stall = Stall.NO
    leaving: bool = False
    pong: int = 0  # newest ping that it heard


class Verdict(Enum):
    """What becomes of an operation that a change interrupted. Not mentioned: nobody began it."""

    DONE = "done"  # everybody has the result
    MEND = "mend"  # between them they have it, and pass it on in the next ring
    UNDONE = "undone"  # it never was, also for who has yet to begin it


@dataclass(frozen=True, slots=True)
class Decision:
    """About one operation of one lane."""

    op: OpId
    lane: int
    verdict: Verdict
    held: tuple[tuple[int, bytes], ...] = ()  # MEND: peer, its bits


class Order(Enum):
    """What the coordinator wants."""

    WAIT = "wait"  # to be let in
    PREPARE = "prepare"  # build the ring of the next view beside the present one
    HOLD = "hold"  # begin nothing more, and say what was begun
    HALT = "halt"  # stop the ring, and say what there is
    RUN = "run"  # the view holds
    LEAVE = "leave"  # this incarnation is not in it, and never will be again


@dataclass(frozen=True, slots=True)
class FleetDirective:
    """The whole of what the coordinator wants of one peer."""

    peer: int
    incarnation: int
    order: Order
    number: int  # of the newest change: what has a lower one is stale
    view: int = 0  # PREPARE, HOLD: that comes out of it; RUN: that holds
    ring: tuple[int, ...] = ()  # of that, the lane's peers in order, for who has yet to make it
    places: tuple[Place, ...] = ()  # of these, the peer's own and its neighbours'
    members: tuple[int, ...] = ()
    first: Counts = ()  # RUN: which operation is the first of the view, unless all halted
    halted: bool = False  # RUN: the view comes after a HALT rather than a HOLD
    decisions: tuple[Decision, ...] = ()  # RUN after HALT: those of the peer's lane
    waiting: bool = False  # RUN: too few members: begin nothing
    ping: int = 0
    heard: int = 0  # newest sequence of the peer's that this answers
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PeerGone:
    """Somebody who would know (a launcher) saw a peer's process end."""

    peer: int
    incarnation: int
    cause: str


@dataclass(frozen=True, slots=True)
class Member:
    """A replica group, in one of its lives."""

    member: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class View:
    """One membership of a fleet."""

    number: int = 0
    members: tuple[Member, ...] = ()  # in the ring's order
    places: tuple[Place, ...] = ()  # of all their peers
    first: Counts = ()
    halted: bool = False
    decisions: tuple[Decision, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """The members' numbers, in the ring's order."""
        return tuple(member.member for member in self.members)

    def __contains__(self, member: Member) -> bool:
        return member in self.members


@dataclass(frozen=True, slots=True)
class FleetHard:
    """What a coordinator must not forget."""

    number: int = 0  # highest one that any change was given
    view: View = View()
    before: View = View()  # the view that a graceful change began from
    seen: tuple[Member, ...] = ()  # newest incarnation of each member that ever was in a view
