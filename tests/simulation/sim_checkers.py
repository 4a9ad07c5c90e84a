"""What must always hold, judged from outside the machines by one who sees everything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ftrain.comms.protocol.messages import Formation, VersionId

# What a job that is given up may say of a version that is not durable ...
EXCUSES = ("could not be saved", "is lost: node", "no node's memory has all")
# ... if something of this happened. What may keep the end of a run from being durable.
TROUBLES = (
    "disk full",
    "torn write",
    "slow disk",
    "cut",
    "stall",
    "clock jump",
    "write found",
    "node dies",
)


class Violation(AssertionError):
    """An invariant is broken."""


def demand(truth: bool, what: str) -> None:
    """Raise :class:`Violation` unless ``truth``."""
    if not truth:
        raise Violation(what)


@dataclass(slots=True)
class Checkers:
    """God's notebook."""

    members: set[int] = field(default_factory=set)  # the nodes of the newest formation
    granted: int = 0  # newest epoch that is on stable storage, or was asked to be formed
    formed: int = 0  # newest epoch that was asked to be formed
    formations: dict[int, tuple[object, ...]] = field(default_factory=dict)
    steps_lost: int = 0
    published: list[tuple[int, VersionId]] = field(default_factory=list)
    withdrawn: set[VersionId] = field(default_factory=set)  # by a rank that captured it wrongly

    @property
    def saved(self) -> set[VersionId]:
        """The durable versions that are any good."""
        return {version for _, version in self.published} - self.withdrawn

    @property
    def newest_saved(self) -> VersionId | None:
        """The newest of them."""
        return max(self.saved, default=None)

    def ended_saved(self, reason: str) -> None:
        """The job says that a step is saved."""
        named = re.search(r"step (\d+) (was |is )?saved", reason)
        steps = {version.step for version in self.saved}
        demand(named is None or int(named[1]) in steps, f"{reason}: only {steps} are")

    def epoch_granted(self, epoch: int, members: set[int]) -> None:
        """A formation of ``epoch`` is asked for, of these nodes."""
        demand(epoch > self.formed, f"epoch {epoch} granted after {self.formed}")
        self.formed = epoch
        self.granted = max(self.granted, epoch)
        self.members = members

    def seats_given(self, before: Sequence[int], now: Sequence[int], present: set[int]) -> None:
        """A formation is asked for: whoever is present keeps the seat of the formation before."""
        moved = [old for old, new in zip(before, now, strict=False) if old != new]
        demand(not present & set(moved), f"seats {before} became {now} with {present} present")

    def epoch_stored(self, epoch: int, members: set[int]) -> None:
        """``epoch`` is on stable storage: it is granted, whatever becomes of it."""
        if epoch > self.granted:
            self.granted, self.members = epoch, members

    def formation_announced(self, formation: Formation) -> None:
        """A formation goes out to a node: one membership per epoch."""
        # A snapshot manager may get a new address within an epoch; nothing else may change.
        members = tuple((p.node, p.incarnation, p.first_rank) for p in formation.places)
        fixed = (members, formation.store_port, formation.restore)
        known = self.formations.setdefault(formation.epoch, fixed)
        demand(known == fixed, f"two memberships in epoch {formation.epoch}: {known}, {fixed}")

    def ranks_forked(self, node: int, incarnation: int, formation: Formation) -> None:
        """A node begins to fork. One that lost its seat while nothing reached it may be late."""
        demand(
            formation.epoch == self.granted or node not in self.members,
            f"node {node} forks for epoch {formation.epoch} while {self.granted} is granted",
        )
        place = next((p for p in formation.places if p.node == node), None)
        demand(place is not None, f"node {node} forks for {formation.epoch} without a seat in it")
        assert place is not None
        demand(
            place.incarnation == incarnation,
            f"node {node} incarnation {incarnation} forks as incarnation {place.incarnation}",
        )

    def alive_epochs(self, epochs: dict[int, int]) -> None:
        """Nodes with ranks alive at one moment, and of which epoch.

        Who lost its seat while it was silent is not known to have ended them, and is on its own.
        """
        members = {epoch for node, epoch in epochs.items() if node in self.members}
        demand(len(members) <= 1, f"ranks of epochs {sorted(members)} are alive at once")
        others = {epoch for node, epoch in epochs.items() if node not in self.members}
        demand(
            all(epoch < self.granted for epoch in others),
            f"nodes without a seat run epochs {sorted(others)}, {self.granted} is granted",
        )

    def plan_chosen(self, chosen: VersionId | None, best: VersionId | None) -> None:
        """A restore plan was made, while all the memory it speaks of is there."""
        demand(chosen == best, f"plan restores {chosen}, newest restorable is {best}")

    def manifest_published(
        self, fence: int, version: VersionId, written: set[int], ranks: int
    ) -> None:
        """A manifest appears; ``written``: ranks with durable files of it under that fence."""
        demand(
            fence == self.granted, f"published under fence {fence}, epoch {self.granted} granted"
        )
        demand(
            written == set(range(ranks)),
            f"manifest of {version} under fence {fence}, but only ranks {written} are in it",
        )
        self.published.append((fence, version))


@dataclass(slots=True)
class CommitChecker:
    """What one decider may call committed, in one life of its memory."""

    node: int
    newest: VersionId | None = None
    seen: set[VersionId] = field(default_factory=set)

    def process_restarted(self) -> None:
        """A new process learns the same again, from the surviving memory."""
        self.seen.clear()

    def committed(self, version: VersionId, lacks: str) -> None:
        """The decider says so; ``lacks``: what god sees missing of the version here."""
        demand(not lacks, f"node {self.node} counts {version} as committed, but {lacks}")
        demand(version not in self.seen, f"node {self.node} committed {version} twice")
        later = [v for v in self.seen if v > version]
        demand(not later, f"node {self.node} went back from {later} to {version}")
        self.seen.add(version)
        self.newest = max(version, self.newest or version)
