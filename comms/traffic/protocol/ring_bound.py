"""How fast the slowest link of a ring can be at most.

A ring leaves and enters every member, reaches each from each, and is a permutation.  So three
things bound it: each member's fastest link out and in; the widest paths from and to one member; and
the fastest slowest link of any set of rings that covers all members (bottleneck assignment: Gross,
"The bottleneck assignment problem", 1959).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Rates = Sequence[Sequence[float]]
Nearest = Sequence[Sequence[int]]  # of each member the others, the fastest link first


def quick_bound(rates: Rates) -> float:
    """The first two bounds, in bytes/s; time grows with the square of the members."""
    back: list[tuple[float, ...]] = list(zip(*rates, strict=True))
    links = min(min(map(max, rates)), min(map(max, back)))
    return min(links, _widest(rates), _widest(back))


def _widest(rates: Rates) -> float:
    """The narrowest of the widest paths from member 0 to each other one (Dijkstra)."""
    reach = dict(enumerate(rates[0]))
    del reach[0]
    narrowest = math.inf
    while reach:
        member = max(reach, key=reach.__getitem__)
        narrowest = min(narrowest, reach.pop(member))
        row = rates[member]
        for other, rate in reach.items():
            if row[other] > rate:
                reach[other] = min(row[other], narrowest)
    return narrowest


def cover_bound(rates: Rates, nearest: Nearest, low: float, high: float) -> float:
    """The third bound, if it is below ``high`` bytes/s; a ring of ``low`` bytes/s is known."""
    between = sorted({rate for row in rates for rate in row if low < rate <= high})
    first, last = -1, len(between)  # between[first] has a cover, between[last] has none
    while last - first > 1:
        middle = (first + last) // 2
        if has_cover(rates, nearest, between[middle]):
            first = middle
        else:
            last = middle
    return between[first] if first >= 0 else low


def has_cover(rates: Rates, nearest: Nearest, floor: float) -> bool:
    """Whether rings of links of at least ``floor`` bytes/s can cover all members.

    A perfect matching of members with those they send to, by augmenting paths, breadth first.
    """
    count = len(rates)
    comes_from = [-1] * count
    for root in range(count):
        tried_from = [-1] * count  # of each target: the member from which the search came to it
        queue, free = [root], -1
        for member in queue:
            row = rates[member]
            for target in nearest[member]:
                if row[target] < floor:
                    break
                if tried_from[target] < 0:
                    tried_from[target] = member
                    if comes_from[target] < 0:
                        free = target
                        break
                    queue.append(comes_from[target])
            if free >= 0:
                break
        if free < 0:
            return False
        _augment(root, free, tried_from, comes_from)
    return True


def _augment(root: int, free: int, tried_from: list[int], comes_from: list[int]) -> None:
    """Match ``root``, and move everybody on the path to ``free`` one further."""
    goes_to = {member: target for target, member in enumerate(comes_from) if member >= 0}
    target = free
    while True:
        member = tried_from[target]
        comes_from[target] = member
        if member == root:
            return
        target = goes_to[member]
