"""Which nodes protect each other, and where each chunk of a version's parity lies (RAIM, REFT).

Every node cuts its own bytes into ``n - m`` chunks.  A stripe is made of one chunk each of
``n - m`` nodes of a group of ``n``, and of ``m`` chunks of parity on the other ``m``; there are
``n`` stripes, whose parity lies on different nodes in turn.  So whichever ``m`` nodes are lost, a
stripe has lost ``m`` chunks, and every node sends, receives and keeps as much as the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftrain.comms.errors import StateError


@dataclass(frozen=True, slots=True)
class ParityGroup:
    """Nodes that protect each other: any ``parity`` of them may be lost at once.

    ``parity`` 0: they do not, there are too few of them.
    """

    nodes: tuple[int, ...]
    parity: int

    @property
    def data(self) -> int:
        """Chunks of data in a stripe, and chunks that a node's bytes are cut into."""
        return len(self.nodes) - self.parity

    def holders(self, stripe: int) -> tuple[int, ...]:
        """The nodes that keep the parity of a stripe, first row first."""
        count = len(self.nodes)
        return tuple(self.nodes[(stripe + row) % count] for row in range(self.parity))

    def contributors(self, stripe: int) -> tuple[int, ...]:
        """The nodes whose data are in a stripe, in the order of its chunks."""
        holders = self.holders(stripe)
        return tuple(node for node in self.nodes if node not in holders)

    def stripes_of(self, node: int) -> tuple[int, ...]:
        """The stripes that a node's chunks are in, one each, in order."""
        stripes = range(len(self.nodes))
        return tuple(stripe for stripe in stripes if node not in self.holders(stripe))

    def held_by(self, node: int) -> tuple[tuple[int, int], ...]:
        """The parity that a node keeps: stripes and rows of them."""
        stripes = range(len(self.nodes))
        held = [(stripe, self.holders(stripe)) for stripe in stripes]
        return tuple((stripe, who.index(node)) for stripe, who in held if node in who)


def groups_of(racks: Mapping[int, str], size: int, parity: int) -> tuple[ParityGroup, ...]:
    """Groups of ``size`` nodes or somewhat more, spread over racks as evenly as they can be.

    Args:
        racks: what fails together with each node, by number; "": nothing that is known of.
        size: nodes in a group; no group is smaller unless all nodes together are fewer.
        parity: nodes of each group that may be lost.

    Raises:
        StateError: a group of ``size`` would have no room for data beside its parity.
    """
    if not 0 <= parity < size:
        raise StateError(
            f"a group of {size} nodes can't stand the loss of {parity}: make snapshot.group larger "
            "or snapshot.parity smaller"
        )
    count = max(1, len(racks) // size)
    # Nodes of one rack follow each other here, and go to different groups.
    sizes = Counter(rack for rack in racks.values() if rack)
    ordered = sorted(racks, key=lambda node: (-sizes[racks[node]], racks[node], node))
    dealt = [tuple(sorted(ordered[number::count])) for number in range(count)]
    return tuple(ParityGroup(nodes, min(parity, len(nodes) - 1)) for nodes in dealt if nodes)


def chunk_bytes(node_bytes: Sequence[int], data: int, alignment: int) -> int:
    """How long the chunks of a group are, whose nodes have so many bytes; what is shorter counts
    as followed by zeros."""
    largest = max(node_bytes, default=0)
    return -(-largest // (data * alignment)) * alignment
