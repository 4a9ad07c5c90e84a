"""Which versions may not be restored from any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ftrain.comms.protocol.messages import RestorePlan, VersionId
from ftrain.recovery.protocol.plan import DurableVersion


@dataclass(slots=True)
class BadVersions:
    """Versions that a rank could not put back, or withdrew.

    Memory and durable files are told apart: a version's file may be good where its memory is not.
    """

    _memory: set[VersionId] = field(default_factory=set)
    _durable: set[VersionId] = field(default_factory=set)  # (fence, step)
    _withdrawn: set[VersionId] = field(default_factory=set)

    def add(self, plan: RestorePlan) -> bool:
        """What ``plan`` names is bad; False when that is known already, or it names nothing."""
        found = self._durable if plan.level == "durable" else self._memory
        if plan.version is None or plan.version in found:
            return False
        found.add(plan.version)
        return True

    def withdraw(self, versions: Collection[VersionId]) -> bool:
        """Ranks captured ``versions`` wrongly: no copy is good; False when that is known of all."""
        known = self._withdrawn.issuperset(versions)
        self._memory.update(versions)
        self._withdrawn.update(versions)
        return not known

    @property
    def withdrawn(self) -> frozenset[VersionId]:
        """Those that are to be kept nowhere."""
        return frozenset(self._withdrawn)

    @property
    def memory(self) -> frozenset[VersionId]:
        """Those in memory."""
        return frozenset(self._memory)

    def good(
        self, durable: Iterable[DurableVersion]
    ) -> tuple[DurableVersion | None, tuple[str, ...]]:
        """The first of ``durable`` that is not bad, and remarks about those before it."""
        remarks: list[str] = []
        for version in durable:
            captured = VersionId(version.epoch, version.step)
            found_bad = VersionId(version.fence, version.step) in self._durable
            if not found_bad and captured not in self._withdrawn:
                return version, tuple(remarks)
            why = "was found bad" if found_bad else "was withdrawn"
            remarks.append(f"durable step {version.step} of epoch {version.fence} {why}")
        return None, tuple(remarks)
