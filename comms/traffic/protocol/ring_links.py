"""What is known of the links between the members of a ring, in the form that searches use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ftrain.comms.errors import UsageError

Measured = Sequence[Sequence[float | None]]  # bytes/s from row to column; None: unknown, 0: broken
Member = TypeVar("Member")

_STEPS_PER_OCTAVE = 1 << 20
_BROKEN_SCORE = -(1 << 50)  # less than any sum of links that work: fewest broken ones come first


def measured_rows(
    members: Sequence[Member], rates: Mapping[tuple[Member, Member], float]
) -> list[list[float | None]]:
    """Rows for :class:`RingLinks` from bytes/s by (source, target); what is absent is unknown."""
    return [[rates.get((source, target)) for target in members] for source in members]


def score(rate: float) -> int:
    """Logarithm to base 2 of a rate, in integers: sums of it are the same in whatever order.

    Linear between powers of two, made of exact operations only, so that every machine gets the
    same number; a library's logarithm may differ in the last bit.
    """
    if rate == 0:
        return _BROKEN_SCORE
    mantissa, exponent = math.frexp(rate)
    return int((exponent + 2 * mantissa) * _STEPS_PER_OCTAVE)


class RingLinks:
    """Directed links of ``count`` members; ``rates[a][b]`` is in bytes/s from a to b, 0 if broken.

    A link that was not measured counts as ``assumed``: as slow as the slowest measured one that
    works.  So no ring looks better than another by what nobody knows, an unknown link is still
    better than a broken one, and a fast link has to be measured before it changes the order.

    Raises UsageError for a matrix that is not square, or rates that are negative or not finite.
    """

    __slots__ = ("assumed", "count", "measured", "rates")

    def __init__(self, measured: Measured) -> None:
        self.count = len(measured)
        self.measured = measured
        if not self.count or any(len(row) != self.count for row in measured):
            raise UsageError("a ring's links are one row of rates for each member, and as many in")
        known = [
            [rate for b, rate in enumerate(row) if rate is not None and a != b]
            for a, row in enumerate(measured)
        ]
        if any(row and (min(row) < 0 or not math.isfinite(sum(row))) for row in known):
            raise UsageError("a link's rate is neither negative nor infinite: 0 if it is broken")
        working = (rate for row in known for rate in row if rate)
        self.assumed = min(working, default=1.0)
        assumed = self.assumed
        self.rates = [[assumed if rate is None else rate for rate in row] for row in measured]
        for member in range(self.count):
            self.rates[member][member] = 0.0

    def slowest(self, order: Sequence[int]) -> float:
        """Rate of a ring's slowest link, in bytes/s; infinite for a ring of one."""
        return min((self.rates[a][b] for a, b in ring_pairs(order)), default=math.inf)

    def total_score(self, order: Sequence[int]) -> int:
        """Sum of the scores of a ring's links."""
        return sum(score(self.rates[a][b]) for a, b in ring_pairs(order))

    def unmeasured(self, order: Sequence[int]) -> int:
        """How many links of a ring were not measured."""
        return sum(self.measured[a][b] is None for a, b in ring_pairs(order))


def ring_pairs(order: Sequence[int]) -> list[tuple[int, int]]:
    """The directed links of a ring; none for a ring of one."""
    if len(order) < 2:
        return []
    return list(zip(order, (*order[1:], order[0]), strict=True))
