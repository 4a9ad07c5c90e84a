"""Which durable versions to keep: pure, told only their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ftrain.comms.errors import UsageError

VersionKey = tuple[int, int]  # (fence, step)


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest ``count`` versions, by fence and then by step; ``UsageError`` below 1."""

    count: int

    def __post_init__(self) -> None:
        """A run never gives up its last version."""
        if self.count < 1:
            raise UsageError(f"checkpoint.keep_last={self.count} keeps nothing: use 1 or more")

    def kept(self, versions: Iterable[VersionKey]) -> frozenset[VersionKey]:
        """Those of the complete, granted ``versions`` that stay."""
        return frozenset(sorted(set(versions), reverse=True)[: self.count])

    def retired(self, versions: Iterable[VersionKey]) -> frozenset[VersionKey]:
        """Those of ``versions`` that may be deleted."""
        versions = frozenset(versions)
        return versions - self.kept(versions)
