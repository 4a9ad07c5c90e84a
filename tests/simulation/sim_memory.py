"""The memory of one node that snapshot managers keep: it survives processes, not the node."""

from __future__ import annotations

from dataclasses import dataclass, field

from ftrain.checkpoint.protocol.commit import VersionCommit
from ftrain.comms.protocol.messages import Held, Share, VersionId


@dataclass(slots=True)
class Memory:
    """Sealed images of the node's own ranks, and other nodes' small sections."""

    node: int
    slots: int
    sharded: bool
    first_rank: int = 0
    local_world: int = 1
    world_size: int = 1
    whole: dict[VersionId, set[int]] = field(default_factory=dict)  # version -> ranks sealed
    smalls: dict[VersionId, set[int]] = field(default_factory=dict)
    restored: VersionId | None = None  # what the present ranks began with

    @property
    def ranks(self) -> range:
        """The node's own ranks."""
        return range(self.first_rank, self.first_rank + self.local_world)

    def begin(self, version: VersionId, commit: VersionCommit) -> bool:
        """Make room for a version; False when every slot is still needed."""
        if version in self.whole:
            return True
        newest = commit.newest
        needed = {newest, self.restored if newest is None or newest.epoch < version.epoch else None}
        for old in sorted(self.whole):
            if len(self.whole) < self.slots:
                break
            if old not in needed and (old.epoch < version.epoch or commit.droppable(old)):
                del self.whole[old]
        if len(self.whole) >= self.slots:
            return False
        self.whole[version] = set()
        return True

    def seal(self, version: VersionId, rank: int) -> bool:
        """One rank's image is whole; True when it was the last of this node's."""
        self.whole[version].add(rank)
        return self.sealed(version)

    def sealed(self, version: VersionId) -> bool:
        """Whether all local ranks sealed ``version``."""
        return self.whole.get(version, set()) == set(self.ranks)

    def committed(self, version: VersionId) -> None:
        """Drop what is strictly older."""
        self.whole = {v: r for v, r in self.whole.items() if v >= version}
        self.smalls = {v: r for v, r in self.smalls.items() if v >= version}

    def held(self) -> tuple[Held, ...]:
        """The inventory."""
        found = [
            Held(v, rank, "", self._shares(rank), True, -1)
            for v, ranks in sorted(self.whole.items())
            for rank in sorted(ranks)
        ]
        found += [
            Held(v, rank, "", (), False, -1)
            for v, ranks in sorted(self.smalls.items())
            for rank in sorted(ranks)
        ]
        return tuple(found)

    def _shares(self, rank: int) -> tuple[Share, ...]:
        if self.sharded:
            return (Share(str(rank), self.node, 0, 1),)
        return (Share("all", self.node, rank - self.first_rank, self.local_world),)


def newest_restorable(memories: list[Memory], world_size: int) -> VersionId | None:
    """The dumb twin of the plan: what god sees restorable in these memories."""
    versions = {v for m in memories for v in (*m.whole, *m.smalls)}
    best = None
    for version in sorted(versions):
        smalls = {r for m in memories for d in (m.whole, m.smalls) for r in d.get(version, ())}
        if smalls != set(range(world_size)):
            continue
        if memories[0].sharded:
            whole = {r for m in memories for r in m.whole.get(version, ())}
            if whole != smalls:
                continue
        elif not any(m.whole.get(version, set()) >= set(m.ranks) for m in memories):
            continue
        best = version
    return best
