"""Whether the ranks' shares of one version belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ftrain.comms.protocol.messages import Held


def collectives_agree(held: Iterable[Held]) -> bool:
    """Whether all ranks had joined equally many collectives at that boundary (-1: unknown).

    A rank that left one out computed with gradients of its own; a version with its state must
    neither be committed nor restored, however complete it is.
    """
    return len({record.collectives for record in held if record.collectives >= 0}) <= 1


def whole_keys(records: Iterable[Held]) -> set[str]:
    """Share keys of which one node, that has these images, holds all parts of one partition."""
    parts: dict[tuple[int, str, int], set[int]] = defaultdict(set)
    for record in records:
        if record.whole:
            for share in record.shares:
                parts[share.node, share.key, share.parts].add(share.part)
    return {key for (_, key, count), found in parts.items() if found >= set(range(count))}
