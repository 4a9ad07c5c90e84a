"""The best ring of a few members, by dynamic programming over subsets.

First the fastest slowest link that any ring has: a binary search over the distinct rates, each time
asking whether the links that are at least so fast hold a Hamiltonian cycle.  Then, of the rings
whose slowest link is nearly as fast, the one with the best sum of scores (Held and Karp, "A dynamic
programming approach to sequencing problems", 1962).  Members but 0 are bits of a subset: member v
is bit v - 1.  Time grows with 2^n n^2.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftrain.comms.traffic.protocol.ring_links import RingLinks, score

_NO_WAY = -(1 << 80)


def best_slowest(links: RingLinks) -> float:
    """Rate of the slowest link of the ring in which that is fastest, in bytes/s; two or more."""
    pairs = (row[:a] + row[a + 1 :] for a, row in enumerate(links.rates))
    rates = sorted({rate for row in pairs for rate in row})
    low, high = 0, len(rates)  # with all links there is a ring
    while high - low > 1:
        middle = (low + high) // 2
        if has_ring(links.rates, rates[middle]):
            low = middle
        else:
            high = middle
    return rates[low]


def has_ring(rates: Sequence[Sequence[float]], floor: float) -> bool:
    """Whether there is a ring of links of at least ``floor`` bytes/s."""
    others = range(1, len(rates))
    comes_from = [
        sum(1 << (a - 1) for a in others if a != b and rates[a][b] >= floor)
        for b in range(len(rates))
    ]
    begins = sum(1 << (b - 1) for b in others if rates[0][b] >= floor)
    everybody = (1 << len(others)) - 1
    ends = [0] * (everybody + 1)  # of each subset: with whom a path from 0 through it can end
    for subset in range(1, everybody + 1):
        left = subset
        while left:
            bit = left & -left
            left ^= bit
            before = subset ^ bit
            if ends[before] & comes_from[bit.bit_length()] if before else begins & bit:
                ends[subset] |= bit
    return bool(ends[everybody] & comes_from[0])


def best_total(links: RingLinks, floor: float) -> tuple[int, ...]:
    """The ring of links of at least ``floor`` bytes/s with the largest sum of scores.

    Of several the first in the order of tuples that begin with 0.  There has to be one.
    """
    count, rates = links.count, links.rates
    ways = [
        [(b, score(rate)) for b, rate in enumerate(row) if b not in (0, a) and rate >= floor]
        for a, row in enumerate(rates)
    ]
    home = [score(row[0]) if a and row[0] >= floor else _NO_WAY for a, row in enumerate(rates)]
    everybody = (1 << (count - 1)) - 1
    rest = [home]  # of each subset: best sum from each member outside it through it, to 0
    for subset in range(1, everybody + 1):
        row = [_NO_WAY] * count
        for a in range(count):
            if a and subset >> (a - 1) & 1:
                continue
            best = _NO_WAY
            for b, gain in ways[a]:
                if subset >> (b - 1) & 1:
                    total = gain + rest[subset ^ (1 << (b - 1))][b]
                    if total > best:
                        best = total
            row[a] = best
        rest.append(row)
    order, subset = [0], everybody
    while subset:
        here = order[-1]
        for b, gain in ways[here]:  # the lowest number that is as good as any
            after = subset ^ (1 << (b - 1))
            if after < subset and gain + rest[after][b] == rest[subset][here]:
                order.append(b)
                subset = after
                break
    return tuple(order)
