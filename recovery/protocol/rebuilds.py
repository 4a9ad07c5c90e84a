"""What parity is still good for: which lost nodes' images can be rebuilt, and from which round.

Everything here follows from what each node says it holds.  In a stripe each node of a group has
one part, a chunk of its images or a chunk of parity; whoever lacks any of them is lost to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ftrain.comms.protocol.messages import (
    Held,
    HeldParity,
    NodePlace,
    ProtectedNode,
    Rebuild,
    RoundId,
    VersionId,
)
from ftrain.snapshot.protocol.placement import ParityGroup


@dataclass(slots=True)
class Guarded:
    """One parity group in one round."""

    nodes: tuple[ProtectedNode, ...]
    parity: int
    holders: set[int] = field(default_factory=set)  # nodes that have all their parity

    def of(self, ranks: Collection[int]) -> ProtectedNode | None:
        """The node that had exactly these ranks."""
        wanted = tuple(sorted(ranks))
        return next((node for node in self.nodes if node.ranks == wanted), None)

    def lost(self, data: Collection[int]) -> set[int]:
        """The nodes that lack images or parity, when those in ``data`` have their images."""
        return {n.node for n in self.nodes if n.node not in data or n.node not in self.holders}

    def enough(self, data: Collection[int]) -> bool:
        """Whether all images can be had, when the nodes in ``data`` have theirs.

        Who has no parity of the round is not asked for images either: nothing there says that they
        are the ones that the parity was made of.
        """
        group = ParityGroup(tuple(node.node for node in self.nodes), self.parity)
        there = self.holders.intersection(data)
        return all(
            sum(node in there for node in group.contributors(stripe))
            + sum(node in self.holders for node in group.holders(stripe))
            >= group.data
            for stripe in range(len(group.nodes))
        )

    def stands(self, data: Collection[int]) -> int:
        """How many nodes more may be lost, whichever they are; -1: too many are lost already."""
        return max(0, self.parity - len(self.lost(data))) if self.enough(data) else -1


@dataclass(slots=True)
class Round:
    """What is left of a round of parity on all nodes."""

    id: RoundId
    version: VersionId
    groups: dict[tuple[int, ...], Guarded] = field(default_factory=dict)  # by their nodes


def rounds_of(parity: Mapping[int, Sequence[HeldParity]]) -> list[Round]:
    """Every round that some node has parity of, newest first."""
    found: dict[RoundId, Round] = {}
    for node, rounds in parity.items():
        for held in rounds:
            round_ = found.setdefault(held.round, Round(held.round, held.version))
            key = tuple(member.node for member in held.nodes)
            group = round_.groups.setdefault(key, Guarded(held.nodes, held.parity))
            if round_.version == held.version and group.nodes == held.nodes:
                group.holders.add(node)
    return [found[id_] for id_ in sorted(found, reverse=True)]


def with_images(
    held: Mapping[int, Sequence[Held]], version: VersionId
) -> dict[int, frozenset[int]]:
    """Of which ranks each node has whole images of a version."""
    ranks: dict[int, set[int]] = defaultdict(set)
    for node, records in held.items():
        ranks[node] |= {h.rank for h in records if h.whole and h.version == version}
    return {node: frozenset(found) for node, found in ranks.items()}


def rebuilds_for(
    round_: Round, places: Iterable[NodePlace], held: Mapping[int, Sequence[Held]]
) -> tuple[tuple[Rebuild, ...], str]:
    """What has to be rebuilt so that every place has its ranks' images of the round's version; or
    why that can't be, in words."""
    images = with_images(held, round_.version)
    rebuilds = []
    for place in places:
        ranks = range(place.first_rank, place.first_rank + place.local_world)
        if images.get(place.node, frozenset()).issuperset(ranks):
            continue
        found = [(group, group.of(ranks)) for group in round_.groups.values()]
        group, node = next(((g, n) for g, n in found if n is not None), (None, None))
        if group is None or node is None:
            return (), f"has no parity of ranks {ranks[0]} to {ranks[-1]}"
        if not group.enough(_data(group, images)):
            return (), _too_many(group, images)
        rebuilds.append(Rebuild(round_.id, node.node, place.node))
    return tuple(rebuilds), ""


def round_to_keep(
    rounds: Iterable[Round],
    places: Sequence[NodePlace],
    held: Mapping[int, Sequence[Held]],
    refused: Collection[VersionId] = (),
) -> RoundId | None:
    """The round whose parity is worth most until there is newer.

    First comes one that these places can be restored from, then the one that stands the most
    further losses of nodes, then the newest version: after a manager that leads was restarted, a
    later round may be of an older one.
    """
    best: tuple[bool, int, VersionId, RoundId] | None = None
    for round_ in rounds:
        if round_.version in refused:
            continue
        images = with_images(held, round_.version)
        stands = min(group.stands(_data(group, images)) for group in round_.groups.values())
        if stands < 0:
            continue
        fits = not rebuilds_for(round_, places, held)[1]
        worth = fits, stands, round_.version, round_.id
        if best is None or worth > best:
            best = worth
    return best[-1] if best is not None else None


def _data(group: Guarded, images: Mapping[int, frozenset[int]]) -> set[int]:
    """The nodes of a group that have all their images."""
    return {n.node for n in group.nodes if images.get(n.node, frozenset()).issuperset(n.ranks)}


def _too_many(group: Guarded, images: Mapping[int, frozenset[int]]) -> str:
    lost = sorted(group.lost(_data(group, images)))
    nodes = ", ".join(map(str, lost))
    return (
        f"is lost with nodes {nodes}: {len(lost)} of {len(group.nodes)}, and its parity stands "
        f"the loss of {group.parity}"
    )
