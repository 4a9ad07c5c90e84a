"""The memory of one node that snapshot managers keep: it survives processes, not the node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ftrain.comms.protocol.messages import Held, Share, VersionId

_SMALL_VERSIONS_KEPT = 4


@dataclass(slots=True)
class Image:
    """What one slot holds: an image that is being written, or a sealed one."""

    version: VersionId
    sealed: bool = False


@dataclass(slots=True)
class Memory:
    """The node's slots, and other nodes' small sections."""

    node: int
    sharded: bool
    first_rank: int = 0
    local_world: int = 1
    world_size: int = 1
    images: dict[tuple[int, int], Image] = field(default_factory=dict)  # (rank, slot)
    smalls: dict[VersionId, dict[int, Held]] = field(default_factory=dict)

    @property
    def ranks(self) -> range:
        """The node's own ranks."""
        return range(self.first_rank, self.first_rank + self.local_world)

    def keep_smalls(self, held: Sequence[Held], needed: Callable[[VersionId], bool]) -> None:
        """Keep another node's small sections, of the newest versions and of the ``needed`` ones."""
        for record in held:
            self.smalls.setdefault(record.version, {})[record.rank] = record
        spare = [v for v in sorted(self.smalls) if not needed(v)]
        for version in spare[:-_SMALL_VERSIONS_KEPT]:
            del self.smalls[version]

    def sealed(self, version: VersionId) -> set[int]:
        """The ranks whose sealed image of ``version`` is here."""
        return {r for (r, _), i in self.images.items() if i.sealed and i.version == version}

    def known(self, version: VersionId) -> set[int]:
        """The ranks whose small section of ``version`` is here."""
        return self.sealed(version) | set(self.smalls.get(version, ()))

    def held(self) -> tuple[Held, ...]:
        """The inventory."""
        found = [
            Held(image.version, rank, "", self._shares(rank), True, -1)
            for (rank, _), image in self.images.items()
            if image.sealed
        ]
        found += [
            replace(held, whole=False)  # it still names the shares that its rank had
            for ranks in self.smalls.values()
            for held in ranks.values()
        ]
        return tuple(sorted(found, key=lambda h: (h.version, h.rank, h.whole)))

    def _shares(self, rank: int) -> tuple[Share, ...]:
        if self.sharded:
            return (Share(str(rank), self.node, 0, 1),)
        return (Share("all", self.node, rank - self.first_rank, self.local_world),)


def restorable(
    held: Sequence[tuple[int, Sequence[Held]]], world_size: int, *, sharded: bool
) -> set[VersionId]:
    """The dumb twin of the restore plan: every version that these nodes can restore together."""
    found = set()
    everyone = set(range(world_size))
    for version in {h.version for _, records in held for h in records}:
        smalls, whole, complete_nodes = set(), set(), 0
        for node, records in held:
            mine = [h for h in records if h.version == version]
            smalls |= {h.rank for h in mine}
            whole |= {h.rank for h in mine if h.whole}
            parts = {s.part for h in mine if h.whole for s in h.shares if s.node == node}
            counts = {s.parts for h in mine if h.whole for s in h.shares}
            complete_nodes += bool(counts) and parts == set(range(max(counts)))
        if smalls == everyone and (whole == everyone if sharded else complete_nodes):
            found.add(version)
    return found
