"""Which path the next chunk takes, given each path's share."""

from __future__ import annotations

from collections.abc import Sequence


class Spread:
    """Smooth weighted round robin: after any number of chunks each path has had its share.

    Every path gains its share in credit for each chunk; the one with the most credit gets the chunk
    and pays 1 (as in nginx, 2012).  While shares stay the same, a path's chunks are never further
    than one (with two paths; the number of paths less one at most) from its share of them.  The
    sequence depends on nothing but the shares that were given so far.  Credit is kept when shares
    change, so that a small share gets its turn however short each operation is.
    """

    __slots__ = ("credit",)

    def __init__(self, paths: int) -> None:
        self.credit = [0.0] * paths

    def next(self, shares: Sequence[float]) -> int:
        """The path of the next chunk; the lowest number where several have the same claim.

        ``shares`` add up to 1; a path whose share is 0 gets nothing, and begins anew later.
        """
        open_paths = [path for path, share in enumerate(shares) if share > 0]
        self.credit = [
            credit if share > 0 else 0.0 for credit, share in zip(self.credit, shares, strict=True)
        ]
        for path in open_paths:
            self.credit[path] += shares[path]
        chosen = max(open_paths, key=lambda path: (self.credit[path], -path))
        self.credit[chosen] -= 1
        return chosen


def assign(shares: Sequence[float], chunks: int) -> tuple[int, ...]:
    """The path of each of ``chunks`` chunks, if the shares stay as they are."""
    spread = Spread(len(shares))
    return tuple(spread.next(shares) for _ in range(chunks))
