"""Whether the ranks' shares of one version belong together."""

from __future__ import annotations

from collections.abc import Iterable

from ftrain.comms.protocol.messages import Held


def collectives_agree(held: Iterable[Held]) -> bool:
    """Whether all ranks had joined equally many collectives at that boundary (-1: unknown).

    A rank that left one out computed with gradients of its own; a version with its state must
    neither be committed nor restored, however complete it is.
    """
    return len({record.collectives for record in held if record.collectives >= 0}) <= 1
