"""All ranks of a ring learn that all of them have come to a point, with words to the right only.

A rank that has come to the point and heard that the ``h`` ranks to its left have, tells its right
neighbour of ``h + 1``.  Who hears of all others knows it of everybody: after as many hops as there
are other ranks, where a token that goes round needs twice as many.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RingBarrier:
    """One rank's part.  Ask :meth:`to_say` after every call of the others."""

    ranks: int
    _reached: bool = False
    _heard: int = 0  # ranks to the left that have
    _said: int = 0

    @property
    def passed(self) -> bool:
        """Whether all ranks have come to the point."""
        return self._reached and self._heard >= self.ranks - 1

    def reach(self) -> None:
        """This rank has come to the point."""
        self._reached = True

    def heard(self, ranks: int) -> None:
        """The left neighbour says that ``ranks`` in a row have, itself the last; ValueError for
        more than there are others."""
        if not 0 < ranks < self.ranks:
            raise ValueError(f"{ranks} of {self.ranks} ranks can't have come there")
        self._heard = max(self._heard, ranks)

    def to_say(self) -> int:
        """How many in a row to tell the right neighbour of, once; 0: nothing new."""
        run = min(self._heard + 1, self.ranks - 1) if self._reached else 0
        if run <= self._said:
            return 0
        self._said = run
        return run
