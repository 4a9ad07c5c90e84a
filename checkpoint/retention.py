"""Which durable versions to keep: pure, told only their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ftrain.comms.errors import UsageError

VersionKey = tuple[int, int]  # (fence, step)


@dataclass(frozen=True, slots=True)
class Retention:
    """Keep the newest ``last`` versions, by fence and then by step, and for good the first one of
    every ``every`` steps (0: none).

    Raises ``UsageError`` when ``last`` is below 1 or ``every`` below 0.
    """

    last: int
    every: int = 0

    def __post_init__(self) -> None:
        """A run never gives up its last version."""
        if self.last < 1:
            raise UsageError(f"checkpoint.keep_last={self.last} keeps nothing: use 1 or more")
        if self.every < 0:
            raise UsageError(f"checkpoint.keep_every={self.every} steps: use 0 or more")

    def kept(self, versions: Iterable[VersionKey]) -> frozenset[VersionKey]:
        """Those of the complete ``versions`` of the history that stay."""
        ordered = sorted(set(versions))
        kept = set(ordered[-self.last :])
        if self.every:
            firsts: dict[int, VersionKey] = {}
            for version in sorted(ordered, key=lambda version: version[1]):
                firsts.setdefault(version[1] // self.every, version)
            kept |= set(firsts.values())
        return frozenset(kept)

    def retired(self, versions: Iterable[VersionKey]) -> frozenset[VersionKey]:
        """Those of ``versions`` that may be deleted."""
        versions = frozenset(versions)
        return versions - self.kept(versions)

    def satisfied(self, versions: Iterable[VersionKey]) -> bool:
        """Whether there are as many as are to be kept."""
        return len(set(versions)) >= self.last

    def remaining(
        self, history: Iterable[VersionKey], hidden: Iterable[VersionKey]
    ) -> frozenset[VersionKey]:
        """What stays of all that is there: what is not of the history (``hidden``) goes once there
        are enough of those that are."""
        history = frozenset(history)
        kept = self.kept(history)
        return kept if self.satisfied(history) else kept | frozenset(hidden)
