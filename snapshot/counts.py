"""What other nodes' ranks had enqueued at their boundaries, passed on to this node's agent.

The counts come with the gossip anyway; the agent's observer compares them with its own ranks'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ftrain.comms.protocol.messages import Sealed, VersionId
from ftrain.snapshot.protocol.messages import BoundaryCounts

_PACE_S = 0.1  # a fraction of the observer's own pace
_VERSIONS_MAX = 4  # told at once: a rank's newest may be one that the others will never reach
_RANKS_MAX = 4096  # in one message, far below its limit of bytes


class CountsNews:
    """Gathers counts and posts the newest few versions' now and then."""

    def __init__(self, post: Callable[[BoundaryCounts], None]) -> None:
        self._post = post
        self._counts: dict[VersionId, dict[int, int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, sealed: Sealed) -> None:
        """Another node announced a version."""
        counts = {held.rank: held.collectives for held in sealed.held if held.collectives >= 0}
        if not counts:
            return
        self._counts.setdefault(sealed.version, {}).update(counts)
        while len(self._counts) > _VERSIONS_MAX:
            del self._counts[min(self._counts)]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PACE_S, self._tell)

    def close(self) -> None:
        """Post no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        self._timer = None
        for version, counts in sorted(self._counts.items()):
            ranks = tuple(sorted(counts))
            for start in range(0, len(ranks), _RANKS_MAX):
                part = ranks[start : start + _RANKS_MAX]
                self._post(BoundaryCounts(version, part, tuple(counts[rank] for rank in part)))
        self._counts.clear()
