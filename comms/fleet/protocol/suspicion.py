"""Which peer is to blame when links of a ring carry garbage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Suspicion:
    """Counts, for each peer, the links that carried garbage at one end of which it was.

    Once is no time: that may have been a bit that was flipped on the way.  Who hears garbage may be
    the one that is broken, so it is the peer at most links; of two ends that are at equally many it
    is the one that sent.
    """

    def __init__(self) -> None:
        self._links: Counter[int] = Counter()

    def worst(self, links: Sequence[tuple[int, int]]) -> int | None:
        """The peer to do without, given who just complained of whom; None: nobody yet."""
        before = self._links.copy()
        self._links.update(peer for link in links for peer in set(link))
        senders = {sender for _, sender in links}
        again = [peer for link in links for peer in link if before[peer]]
        return max(again, key=lambda p: (self._links[p], p in senders, p), default=None)
