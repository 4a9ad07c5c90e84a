"""Which versions may not be restored from any more, and which are suspected to be bad.

A version that can't be put back is bad for good.  One after whose restore the loss soon is not
finite is only suspected, because the data or the script may do that by themselves: then the same
comes from an older version, and none is suspected any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from ftrain.comms.protocol.messages import Formation, RankFailure, RestorePlan, VersionId
from ftrain.recovery.protocol.plan import DurableVersion
from ftrain.recovery.protocol.planner import Memory, plan_restore

SUSPECTS_IN_ROW_MAX = 5  # ever older: those in memory are a step apart, and may share the fault


@dataclass(frozen=True, slots=True)
class _Suspects:
    """A version and all that was captured by the ranks that went on from it."""

    version: VersionId
    epoch: int  # of those ranks

    def __contains__(self, captured: object) -> bool:
        return isinstance(captured, VersionId) and (
            self.version <= captured and captured.epoch <= self.epoch
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """What a formation restores from."""

    plan: RestorePlan
    remarks: tuple[str, ...] = ()  # durable versions that are of no use
    news: str = ""  # why versions are trusted again, once


@dataclass(slots=True)
class BadVersions:
    """Versions that a rank could not put back, or withdrew, or that made the loss go bad.

    Memory and durable files are told apart: a version's file may be good where its memory is not.
    Of a suspected version neither is.
    """

    trusted: bool = False  # the loss says nothing about versions
    _memory: set[VersionId] = field(default_factory=set)
    _durable: set[VersionId] = field(default_factory=set)  # (fence, step)
    _withdrawn: set[VersionId] = field(default_factory=set)
    _suspects: list[_Suspects] = field(default_factory=list)
    _in_row: int = 0  # of the newest suspects, each one older than the one before
    _places: set[int] = field(default_factory=set)  # boundaries with a loss that is not finite
    _news: str = ""

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

    def suspect(self, formation: Formation, failures: Iterable[RankFailure]) -> bool:
        """Ranks of ``formation`` ended because of their loss: an older version is to be tried.

        False when that is known already, or makes no version suspect: then all are trusted.
        """
        places = {failure.step for failure in failures}
        version = formation.restore.parent
        if self.trusted or version is None:
            return False
        last = self._suspects[-1] if self._suspects else None
        if last is not None and formation.epoch <= last.epoch:
            return False  # other ranks of it were heard before
        if again := self._places & places:
            self.trust(
                f"the loss is bad at step {min(again)} again, with an older version: the data or "
                "the script does that, not the version"
            )
            return False
        older = last is not None and version < last.version
        self._in_row = self._in_row + 1 if older else 1
        self._places |= places
        if self._in_row > SUSPECTS_IN_ROW_MAX:
            self.trust(
                f"the loss went bad soon after {self._in_row} versions in a row were restored"
            )
            return False
        self._suspects.append(_Suspects(version, formation.epoch))
        return True

    def trust(self, why: str) -> None:
        """No version is suspected, now or later, because of ``why``."""
        self.trusted = True
        self._suspects.clear()
        self._news = (
            f"{why}; training goes on from the newest version, and in this launch no loss makes a "
            "version suspect any more"
        )

    @property
    def withdrawn(self) -> frozenset[VersionId]:
        """Those that are to be kept nowhere."""
        return frozenset(self._withdrawn)

    def choose(self, memory: Memory, durable: Collection[DurableVersion]) -> Choice:
        """What the next formation restores from; ``durable``: newest first.

        Rather than begin anew because all that there is is suspected, that is trusted again.
        """
        choice = self._choose(memory, durable)
        if choice.plan.level == "fresh" and self._suspects:
            self.trust("the loss went bad soon after a restore, and no older version is left")
            choice = self._choose(memory, durable)
        news, self._news = self._news, ""
        return replace(choice, plan=replace(choice.plan, trusted=self.trusted), news=news)

    def _choose(self, memory: Memory, durable: Iterable[DurableVersion]) -> Choice:
        newest, unusable, passed = self._good(durable)
        refused = self._memory.union(v for v in memory.versions if self._is_suspect(v))
        plan = plan_restore(memory, newest, frozenset(refused), (*unusable, *passed))
        return Choice(plan, unusable)

    def _good(
        self, durable: Iterable[DurableVersion]
    ) -> tuple[DurableVersion | None, tuple[str, ...], tuple[str, ...]]:
        """The first of ``durable`` that is not bad, and of those before it which are of no use and
        which are only suspected."""
        unusable: list[str] = []
        passed: list[str] = []
        for version in durable:
            captured = VersionId(version.epoch, version.step)
            name = f"durable step {version.step} of epoch {version.fence}"
            if VersionId(version.fence, version.step) in self._durable:
                unusable.append(f"{name} was found bad")
            elif captured in self._withdrawn:
                unusable.append(f"{name} was withdrawn")
            elif self._is_suspect(captured):
                passed.append(f"{name} is suspected")
            else:
                return version, tuple(unusable), tuple(passed)
        return None, tuple(unusable), tuple(passed)

    def _is_suspect(self, captured: VersionId) -> bool:
        return any(captured in suspects for suspects in self._suspects)
