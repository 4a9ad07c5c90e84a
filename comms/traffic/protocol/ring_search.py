"""A good ring of many members, by a deterministic search.

Chains are joined by the fastest links first.  Then the slowest link is raised: for a floor, each
link below it is removed by exchanging two neighbouring stretches of the ring (the one 3-opt move
that turns no stretch round, which matters as links have directions).  Where each exchange needs
another slow link, one is made and the search goes on from there, as in Posa's rotations.  A
binary search finds the highest floor that can be reached.  Last, exchanges better the sum of scores
without going below the floor.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from ftrain.comms.traffic.protocol.ring_links import RingLinks, ring_pairs, score

_JOIN_CHOICES = 16  # links of a member that are looked at first when chains are joined
_CHOICES = 16  # links of a member that are looked at to remove a slow one
_POLISH_CHOICES = 8
_LOOKS_MAX = 60_000  # exchanges that are looked at to remove one slow link
_WALK_STEPS_MAX = 200  # exchanges in a row that only move a slow link elsewhere
_SLOW_LINKS = 32
_SWEEPS_MAX = 20


class Nearest:
    """Of each member the others, the fastest link first: ``out`` that it sends to, ``back``."""

    __slots__ = ("back", "out")

    def __init__(self, rates: Sequence[Sequence[float]]) -> None:
        self.out = _by_rate(rates)
        self.back = _by_rate(list(zip(*rates, strict=True)))


def _by_rate(rates: Sequence[Sequence[float]]) -> list[list[int]]:
    members = range(len(rates))
    found = [sorted(members, key=row.__getitem__, reverse=True) for row in rates]
    for member, others in enumerate(found):
        others.remove(member)
    return found


def good_ring(links: RingLinks, nearest: Nearest, bound: float, slack: float) -> tuple[int, ...]:
    """A ring of three members or more, from 0; ``bound``: bytes/s that no slowest link exceeds."""
    ring = _Ring(_joined(links.rates, nearest))
    slowest = _raise(ring, links, nearest, bound)
    _polish(ring, links, nearest, slowest * (1 - slack))
    start = ring.place[0]
    return (*ring.order[start:], *ring.order[:start])


def _joined(rates: Sequence[Sequence[float]], nearest: Nearest) -> list[int]:
    """All members in a row: the fastest link that still joins two chains, again and again."""
    count = len(rates)
    after, before = [-1] * count, [-1] * count
    chain_of = list(range(count))

    def root(member: int) -> int:
        while chain_of[member] != member:
            chain_of[member] = chain_of[chain_of[member]]
            member = chain_of[member]
        return member

    def join(pairs: Iterator[tuple[int, int]]) -> None:
        for a, b in sorted(pairs, key=lambda pair: -rates[pair[0]][pair[1]]):
            if after[a] < 0 and before[b] < 0 and root(a) != root(b):
                after[a], before[b] = b, a
                chain_of[root(b)] = root(a)

    join((a, b) for a in range(count) for b in nearest.out[a][:_JOIN_CHOICES])
    heads = [member for member in range(count) if before[member] < 0]
    join((a, b) for a in range(count) if after[a] < 0 for b in heads if a != b)
    member, order = before.index(-1), []
    while member >= 0:
        order.append(member)
        member = after[member]
    return order


class _Ring:
    """An order that can be changed, and everybody's place in it."""

    def __init__(self, order: list[int]) -> None:
        self.order = order
        self.place = [0] * len(order)
        self.set(order)

    def set(self, order: list[int]) -> None:
        self.order = order
        for place, member in enumerate(order):
            self.place[member] = place

    def after(self, member: int) -> int:
        place = self.place[member] + 1
        return self.order[place if place < len(self.order) else 0]

    def before(self, member: int) -> int:
        return self.order[self.place[member] - 1]

    def exchanges(
        self, a: int, firsts: Sequence[int], lasts: Sequence[int]
    ) -> Iterator[tuple[int, int, int, int]]:
        """Ways to put a stretch ``first .. last`` behind ``a``: these, and the members around it.

        a b .. p [first .. last] q becomes a [first .. last] b .. p q: the links a-b, p-first and
        last-q go, a-first, last-b and p-q come.  Neither stretch is turned round.
        """
        count, place = len(self.order), self.place
        start = place[self.after(a)]
        ends = [((place[last] - start) % count, last) for last in lasts if last != a]
        for first in firsts:
            begin = (place[first] - start) % count
            if not begin or first == a:
                continue
            p = self.before(first)
            for end, last in ends:
                if end >= begin:
                    yield first, last, p, self.after(last)

    def exchange(self, a: int, first: int, last: int) -> None:
        """Put the stretch ``first .. last`` behind ``a``."""
        start = self.place[a] + 1
        order = self.order[start:] + self.order[:start]
        begin = order.index(first)
        end = order.index(last) + 1
        self.set(order[begin:end] + order[:begin] + order[end:])


def _raise(ring: _Ring, links: RingLinks, nearest: Nearest, bound: float) -> float:
    """Make the ring's slowest link as fast as can be found; its rate in bytes/s."""
    slowest = links.slowest(ring.order)
    higher = sorted({rate for row in links.rates for rate in row if slowest < rate <= bound})
    low, high = 0, len(higher)  # all below `low` are reached; `high` is not
    step = high - 1  # the bound itself first: often it can be reached
    while low < high:
        order = ring.order
        if _reach(ring, links, nearest, higher[step]):
            slowest = links.slowest(ring.order)
            low = step + 1
        else:
            ring.set(order)
            high = step
        step = (low + high) // 2
    return slowest


def _reach(ring: _Ring, links: RingLinks, nearest: Nearest, floor: float) -> bool:
    """Change the ring until no link is slower than ``floor``; False if no way is found."""
    rates = links.rates
    slow = [pair for pair in ring_pairs(ring.order) if rates[pair[0]][pair[1]] < floor]
    for a, b in slow:
        if ring.after(a) == b and not _remove(ring, links, nearest, floor, a):
            return False
    return True


def _remove(ring: _Ring, links: RingLinks, nearest: Nearest, floor: float, a: int) -> bool:
    """Remove the slow link behind ``a`` without making another one, or by way of others.

    Which way round is taken looks random, so that the walk doesn't go in circles, but is the same
    each time: numbers of a linear congruential generator (Numerical Recipes).
    """
    rates, dice, looks = links.rates, a, 0
    for _ in range(_WALK_STEPS_MAX):
        b = ring.after(a)
        row, detours = rates[a], []
        for way in _ways(ring, rates, nearest, floor, a):
            first, last, p, q = way
            looks += 1
            good = row[first] >= floor, rates[last][b] >= floor, rates[p][q] >= floor
            if all(good):
                ring.exchange(a, first, last)
                return True
            if sum(good) == 2:
                detours.append((first, last, (a, last, p)[good.index(False)]))
        if not detours or looks > _LOOKS_MAX:
            return False
        dice = (dice * 1664525 + 1013904223) % (1 << 32)
        first, last, slow = detours[(dice >> 8) % len(detours)]
        ring.exchange(a, first, last)
        a = slow  # behind whom there is a slow link now
    return False


def _ways(
    ring: _Ring, rates: Sequence[Sequence[float]], nearest: Nearest, floor: float, a: int
) -> Iterator[tuple[int, int, int, int]]:
    """Exchanges that may remove the link from a to b: with what is near, and of single members."""
    b = ring.after(a)
    yield from ring.exchanges(a, nearest.out[a][:_CHOICES], nearest.back[b][:_CHOICES])
    order = ring.order
    pairs = ring_pairs(order)
    a_leaves = rates[ring.before(a)][b] >= floor
    b_leaves = rates[a][ring.after(b)] >= floor
    for x, y in pairs:
        if x in (a, b):
            continue
        yield x, x, ring.before(x), y  # x between a and b
        if b_leaves:
            yield ring.after(b), x, b, y  # b between x and y
        if a_leaves and y != a:
            yield y, ring.before(a), x, a  # a between x and y


def _polish(ring: _Ring, links: RingLinks, nearest: Nearest, floor: float) -> None:
    """Better the sum of scores by exchanges, with no link slower than ``floor``.

    The ring is cut where a faster link can begin or end, and its slowest links also at each other:
    ways to other hosts become fewer that way.
    """
    rates = links.rates
    for _ in range(_SWEEPS_MAX):
        slow = heapq.nsmallest(
            _SLOW_LINKS, ring_pairs(ring.order), key=lambda pair: rates[pair[0]][pair[1]]
        )
        tails, heads = [a for a, _ in slow], [b for _, b in slow]
        changed = False
        for a in range(links.count):
            firsts = nearest.out[a][:_POLISH_CHOICES]
            lasts = nearest.back[ring.after(a)][:_POLISH_CHOICES]
            changed |= _better(ring, rates, floor, a, firsts, lasts)
        for a in tails:
            changed |= _better(ring, rates, floor, a, heads, tails)
        if not changed:
            return


def _better(
    ring: _Ring,
    rates: Sequence[Sequence[float]],
    floor: float,
    a: int,
    firsts: Sequence[int],
    lasts: Sequence[int],
) -> bool:
    b = ring.after(a)
    now = score(rates[a][b])
    for first, last, p, q in ring.exchanges(a, firsts, lasts):
        if min(rates[a][first], rates[last][b], rates[p][q]) < floor:
            continue
        gain = score(rates[a][first]) + score(rates[last][b]) + score(rates[p][q])
        if gain > now + score(rates[p][first]) + score(rates[last][q]):
            ring.exchange(a, first, last)
            return True
    return False
