"""What can be saved of a job that ends, and when to say that something could not be."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ftrain.comms.protocol.messages import Formation, NodeReport, RestorePlan, VersionId
from ftrain.comms.protocol.records import MembershipHard

_WARNING_TICKS = 1200  # between two warnings that a durable version failed


class FailedWrites:
    """Durable versions that failed: the first is told, then one now and then, with their number."""

    def __init__(self) -> None:
        self._failed = 0
        self._quiet_ticks = 0

    def tick(self) -> None:
        """One unit of logical time has passed."""
        self._quiet_ticks = max(0, self._quiet_ticks - 1)

    def warning(self, why: str) -> str:
        """Count one more; what is to be told of it, or ""."""
        self._failed += 1
        if self._quiet_ticks:
            return ""
        self._quiet_ticks = _WARNING_TICKS
        count = f" ({self._failed} times so far)" if self._failed > 1 else ""
        return f"no durable version could be written{count}: {why}"


class Committed:
    """The newest version that any node knows to be committed, but for those that ranks withdrew."""

    def __init__(self) -> None:
        self.newest: VersionId | None = None
        self.withdrawn: set[VersionId] = set()  # they count for nothing, however they were saved

    def hear(self, report: NodeReport) -> None:
        """A node says which is its newest, and what its ranks withdrew."""
        self.withdrawn.update(report.withdrawn)
        if self.newest in self.withdrawn:
            self.newest = None  # until a node says which is
        version = report.committed
        if version is not None and version not in self.withdrawn:
            self.newest = max(version, self.newest or version)


def formed(hard: MembershipHard, formation: Formation, reached: int, step: int) -> MembershipHard:
    """What is known once a formation is made that goes on from ``step``, when ranks had come to
    boundary ``reached``."""
    return replace(
        hard,
        durable=_durable_now(hard.durable, formation.restore),
        formation=formation,
        seats=tuple(place.node for place in formation.places),
        formations=hard.formations + 1,
        incident=hard.incident and hard.incident.rewound(reached, step),
    )


def _durable_now(known: VersionId | None, restore: RestorePlan) -> VersionId | None:
    """The newest durable version to count on, given what a formation goes on from.

    A run that goes on from a durable version has no newer one that is any good: what was known may
    be damaged, and what is there may have been written without a launcher.
    """
    if restore.in_memory:
        return known
    return restore.version if restore.level == "durable" else None


def unsaved_end(step: int, durable: VersionId | None, why: str) -> str:
    """How a run ended whose last version is not durable."""
    found = f"the newest durable version is step {durable.step}" if durable else "none is durable"
    return (
        f"every rank is done, but the end of the run, step {step}, is not durable ({found}): "
        f"{why or 'it was not captured'}; the same command does again what is missing"
    )


def saved_end(hard: MembershipHard, step: int, *, before: bool) -> str:
    """How a job ended that was stopped or given up, with ``step`` durable."""
    if hard.giving_up:
        return f"{hard.giving_up}; step {step} is saved: run again once that is mended"
    if before:
        return f"stopped ({hard.stop_cause}): step {step} was saved before"
    return f"stopped ({hard.stop_cause}) with step {step} saved"


@dataclass(frozen=True, slots=True)
class LastVersion:
    """What there is to save of a job whose ranks are gone: at most one of these is true."""

    to_write: VersionId | None = None  # every node holds it, and it is newer than what is durable
    durable: VersionId | None = None  # nothing newer is known
    nothing: bool = False  # nothing was trained


def last_version(
    members: tuple[NodeReport, ...],
    nodes: int,
    hard: MembershipHard,
    committed: Committed,
    reached: int,
) -> LastVersion:
    """What the present ``members`` of a group of ``nodes`` hold, or none of these."""
    durable, newest = hard.durable, newest_everywhere(members, nodes, committed.withdrawn)
    known = max((v for v in (newest, committed.newest) if v is not None), default=None)
    if hard.giving_up and newest is not None and newest.step == 0:
        newest = known = None  # nothing was trained
    if newest is not None and (durable is None or newest > durable):
        return LastVersion(to_write=newest)
    if durable is not None and (durable >= known if known is not None else durable.step >= reached):
        return LastVersion(durable=durable)
    return LastVersion(nothing=known is None and reached == 0)


def newest_everywhere(
    reports: tuple[NodeReport, ...], nodes: int, withdrawn: Collection[VersionId]
) -> VersionId | None:
    """The newest version of which every node holds the images of all its ranks."""
    if not reports or len(reports) < nodes:
        return None
    # A report of what is held may be older than the withdrawal.
    versions = {h.version for h in reports[0].held if h.version not in withdrawn}
    return max((v for v in versions if _is_everywhere(reports, v)), default=None)


def _is_everywhere(reports: tuple[NodeReport, ...], version: VersionId) -> bool:
    whole = [[h for h in r.held if h.whole and h.version == version] for r in reports]
    # Ranks that joined different collectives do not belong together.
    collectives = {h.collectives for held in whole for h in held if h.collectives >= 0}
    return len(collectives) <= 1 and all(
        len({h.rank for h in held}) >= report.local_world
        for held, report in zip(whole, reports, strict=True)
    )
