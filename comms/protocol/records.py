"""What the coordinator must not forget: its hard state, and the incident that is still open."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ftrain.comms.protocol.effects import Incident
from ftrain.comms.protocol.messages import (
    Formation,
    NodePlace,
    NodeReport,
    RankFailure,
    VersionId,
)
from ftrain.comms.protocol.roster import Trouble

EXIT_FAILED = 1
EXIT_SAVED = 75  # EX_TEMPFAIL: saved, run me again
EXIT_FORCED = 130


@dataclass(frozen=True, slots=True)
class OpenIncident:
    """Something broke, and not every node runs again."""

    epoch: int
    step: int
    cause: str = ""  # in words, by the most telling evidence so far
    failures: tuple[RankFailure, ...] = ()
    nodes: tuple[tuple[int, str], ...] = ()
    recomputed: int = 0

    def joined(self, trouble: Trouble, places: tuple[NodePlace, ...]) -> OpenIncident:
        """With what became known since: the first word is seldom the most telling one."""
        known = Trouble(self.failures, self.nodes).joined(trouble)
        return replace(self, cause=known.words(places), failures=known.failures, nodes=known.nodes)

    def rewound(self, reached: int, restored: int) -> OpenIncident:
        """With the steps counted that a formation goes back over."""
        return replace(self, recomputed=self.recomputed + max(0, reached - restored))


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipHard:
    """What must survive the coordinator; plain values, JSON-able by msgspec."""

    launch: str = ""  # the `ftrain launch` that everything but `epoch` and `durable` belongs to
    epoch: int = 0  # highest ever granted, over all launches of the run
    durable: VersionId | None = None  # newest published
    formation: Formation | None = None  # of `epoch`, once it is made
    seats: tuple[int, ...] = ()  # node numbers of the last formation that was made, in rank order
    formations: int = 0  # made so far
    base: VersionId | None = None  # newest committed when `epoch` was granted
    failures_in_row: int = 0  # with no newly committed version in between
    same_in_row: int = 0  # of which the newest ones had this very cause:
    last_cause: str = ""
    counted_epoch: int = 0  # the failure that ended this epoch is counted
    stop_cause: str = ""  # a graceful stop was asked for
    giving_up: str = ""  # no restart helps, and why: what memory holds is being saved
    give_up_code: int = EXIT_FAILED  # the exit code then
    stop_step: int = -1  # the boundary that ranks of `epoch` end at
    incident: OpenIncident | None = None
    ended: int = -1  # exit code, once the job is over
    end_reason: str = ""

    @staticmethod
    def of_launch(hard: MembershipHard | None, launch: str) -> MembershipHard:
        """What of ``hard`` counts in ``launch``."""
        if hard is None:
            return MembershipHard(launch=launch)
        if hard.launch != launch:
            return MembershipHard(launch=launch, epoch=hard.epoch, durable=hard.durable)
        return hard

    def exit_code(self, otherwise: int) -> int:
        """What the job ends with: a job that was given up keeps its code however it is saved."""
        return self.give_up_code if self.giving_up else otherwise

    @property
    def restarts(self) -> int:
        """Formations of this launch before the one in hand."""
        return self.formations


def count_failure(hard: MembershipHard, committed: VersionId | None, cause: str) -> MembershipHard:
    """Count a failure of ``hard.epoch``; a version committed since its grant breaks the row."""
    progressed = committed is not None and (hard.base is None or committed > hard.base)
    same = not progressed and cause == hard.last_cause
    return replace(
        hard,
        failures_in_row=1 if progressed else hard.failures_in_row + 1,
        same_in_row=hard.same_in_row + 1 if same else 1,
        last_cause=cause,
        counted_epoch=hard.epoch,
    )


def count_trouble(
    hard: MembershipHard, committed: VersionId | None, trouble: Trouble
) -> MembershipHard:
    """Count what ended ``hard.epoch``, once per epoch, whoever counts."""
    # A version that can't be put back is refused from then on, so such failures are finite.
    named = hard.formation is not None and hard.formation.restore.version is not None
    finite = named and any(f.kind in ("restore", "loss") for f in trouble.failures)
    if hard.counted_epoch == hard.epoch or finite:
        return hard
    return count_failure(hard, committed, trouble.nature())


def failures_in_words(hard: MembershipHard) -> str:
    """How often it failed since something was achieved."""
    row, same = hard.failures_in_row, hard.same_in_row
    said = f"{row} failures in a row with no new version in between"
    return f"{said}, {same} of them the very same" if same > 1 else said


def begin_incident(
    hard: MembershipHard, trouble: Trouble, places: tuple[NodePlace, ...], reached: int
) -> MembershipHard:
    """Open an incident, or add to the one that is open."""
    open_ = hard.incident or OpenIncident(hard.epoch, reached)
    return replace(hard, incident=open_.joined(trouble, places))


def close_incident(
    incident: OpenIncident, formation: Formation, reports: tuple[NodeReport, ...]
) -> Incident:
    """The record of an incident that is over."""
    return Incident(
        epoch=incident.epoch,
        step=incident.step,
        cause=incident.cause,
        failures=incident.failures,
        nodes=incident.nodes,
        phases=tuple((r.node, r.phases) for r in reports),
        formation=formation,
        steps_recomputed=incident.recomputed,
    )
