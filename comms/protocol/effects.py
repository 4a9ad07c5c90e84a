"""What the membership machines ask their engines to do, as frozen values.

Each comment names the input that answers the effect; an effect without one needs no answer.  An
engine must answer every effect that names an answer, in failure too, and may answer late: answers
to an epoch that has passed are dropped by the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftrain.comms.protocol.messages import (
    Formation,
    Held,
    HeldParity,
    NodePlace,
    NodeReport,
    Notice,
    Phases,
    RankFailure,
    RestorePlan,
    VersionId,
)

# ---------------------------------------------------------------- of Membership (coordinator)


@dataclass(frozen=True, slots=True)
class Form:
    """Make a formation: a fresh store and a restore plan. Answer: ``Membership.formed``.

    ``epoch`` is persisted already, and never was nor will be used for another formation.
    """

    epoch: int
    places: tuple[NodePlace, ...]  # in rank order
    reports: tuple[NodeReport, ...]  # of all nodes that are there, those without a place too
    restarts: int
    reached: int = 0  # highest boundary of any rank so far

    @property
    def members(self) -> frozenset[int]:
        """The nodes that have a place: only those can be asked by the ranks."""
        return frozenset(place.node for place in self.places)

    @property
    def held(self) -> dict[int, tuple[Held, ...]]:
        """What each member's memory holds."""
        return {r.node: r.held for r in self.reports if r.node in self.members}

    @property
    def parity(self) -> dict[int, tuple[HeldParity, ...]]:
        """What parity each member holds."""
        return {r.node: r.parity for r in self.reports if r.node in self.members}


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a formation can't be made: an answer to :class:`Form`."""

    why: str
    lasting: bool = False  # trying again is of no use


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish the manifest of a version whose files all of ``nodes`` have written under ``fence``.

    Answer: ``Membership.published`` or ``Membership.publish_failed``; an equal manifest that is
    there already counts as published (a coordinator that was killed in between asks again).
    """

    fence: int
    version: VersionId
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Incident:
    """Something broke and every node runs again: one record."""

    epoch: int  # that broke
    step: int  # highest boundary that a rank had reached in it
    cause: str  # in words
    failures: tuple[RankFailure, ...]
    nodes: tuple[tuple[int, str], ...]  # nodes that were lost, and why
    phases: tuple[tuple[int, Phases], ...]  # by node
    formation: Formation  # that replaced it
    steps_recomputed: int

    @property
    def restore(self) -> RestorePlan:
        """Where the state came from, and why."""
        return self.formation.restore

    @property
    def new_epoch(self) -> int:
        """The epoch that runs now."""
        return self.formation.epoch


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell whoever watches the job."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class EndJob:
    """The job is over; every node is being told to finish. Comes again after a coordinator restart.

    Exit codes: 0 done, 1 failed, 75 saved (run it again), 130 forced.
    """

    exit_code: int
    reason: str


# ---------------------------------------------------------------- of NodeMember (agent)


@dataclass(frozen=True, slots=True)
class ForkRanks:
    """Fork this node's ranks.

    Answers: ``ranks_forked``, then ``ranks_stepped``, then ``ranks_done``; or ``rank_failed``.
    """

    formation: Formation


@dataclass(frozen=True, slots=True)
class UpdatePeers:
    """Same epoch, but some snapshot manager has a new address."""

    formation: Formation


@dataclass(frozen=True, slots=True)
class FinishCaptures:
    """Let the surviving ranks finish their captures and those of the dead ranks.

    Answer: ``captures_finished``.
    """

    epoch: int
    dead: tuple[int, ...]  # global ranks


@dataclass(frozen=True, slots=True)
class KillRanks:
    """End every rank of the node, of whatever epoch. Answer: ``ranks_gone``, when none is left."""

    epoch: int


@dataclass(frozen=True, slots=True)
class HoldRanks:
    """Tell the ranks to hold at their next boundary. Answer: ``holding``, after they were told."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ReleaseRanks:
    """Let the ranks run to ``stop_step`` and end. Answer: ``ranks_done``, or ``rank_failed``."""

    epoch: int
    stop_step: int


@dataclass(frozen=True, slots=True)
class FlushVersion:
    """Write ``version``, or the first committed one after it, to durable files under ``fence``.

    Answer: ``flushed`` or ``flush_refused``; only one is asked for at a time.
    """

    version: VersionId
    fence: int


@dataclass(frozen=True, slots=True)
class Exit:
    """End the agent; no rank is left."""

    code: int
