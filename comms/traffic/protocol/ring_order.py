"""In which order the members of a ring stand.

All chunks of a collective pass every link of its ring, so the ring is as fast as its slowest link.
The order is the directed ring whose slowest link is fastest (the bottleneck travelling salesman
problem, with directions), not the one with the least sum of 1/rate as in PCCL (arXiv 2505.14065),
which may take one very slow link for several good ones.

Measured rates differ from one time to the next.  Rings whose slowest links differ by less than
``slack`` count as equal, and of those the one with the largest sum of logarithms of its rates is
taken.  That is what keeps the members of one host together: each way into another host is a slow
link, however fast it is among such, and the logarithm counts how many there are whatever the span
between the fastest and the slowest; a sum of latencies would need another measurement for the same.
What is still equal is decided by the numbers of the members, so that every process that has the
same rates finds the same ring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ftrain.comms.errors import UsageError
from ftrain.comms.traffic.protocol.ring_bound import cover_bound, quick_bound
from ftrain.comms.traffic.protocol.ring_exact import best_slowest, best_total
from ftrain.comms.traffic.protocol.ring_links import Measured, RingLinks
from ftrain.comms.traffic.protocol.ring_search import Nearest, good_ring

EXACT_MAX = 13  # members of which the best ring is found in less than a second
SLACK = 0.1  # what two probes of the same link may differ by
GAIN_MIN = 0.2


@dataclass(frozen=True, slots=True)
class Ring:
    """An order of members, and how good it is.

    Args:
        order: numbers of the members, from 0; each sends to the next, the last one to the first.
        slowest: rate of its slowest link, in bytes/s; 0 if it has to use a broken one.
        bound: in bytes/s; no ring's slowest link is faster.
        unmeasured: how many of its links nobody has measured; those count as slow.
        exact: whether no ring is better, rather than none was found.
    """

    order: tuple[int, ...]
    slowest: float
    bound: float
    unmeasured: int
    exact: bool

    @property
    def gap(self) -> float:
        """By which part of the bound the slowest link may be slower than the best one can be."""
        return 1 - self.slowest / self.bound if 0 < self.bound < math.inf else 0.0


def best_ring(measured: Measured, slack: float = SLACK, exact_max: int = EXACT_MAX) -> Ring:
    """The order in which the slowest link is fastest, exact for up to ``exact_max`` members.

    ``measured``: a square matrix, bytes/s from row to column; None where it is unknown, 0 where the
    link is broken.  A broken link is used only if every ring has one or, where the order is
    searched, if no ring without is found.  A single member is a ring.
    Raises UsageError for rates that can't be.
    """
    if not 0 <= slack < 1:
        raise UsageError(f"slack is a part of a rate, from 0 to less than 1, not {slack}")
    links = RingLinks(measured)
    if links.count == 1:
        return Ring((0,), math.inf, math.inf, 0, True)
    exact = links.count <= max(exact_max, 2)
    if exact:
        bound = best_slowest(links)
        order = best_total(links, bound * (1 - slack))
    else:
        nearest = Nearest(links.rates)
        bound = quick_bound(links.rates)
        order = good_ring(links, nearest, bound, slack)
        bound = cover_bound(links.rates, nearest.out, links.slowest(order), bound)
    return Ring(order, links.slowest(order), bound, links.unmeasured(order), exact)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the order is changed, and why or why not."""

    change: bool
    why: str


def decide(
    measured: Measured, current: Sequence[int], better: Ring, gain_min: float = GAIN_MIN
) -> Decision:
    """Whether to give up the ``current`` order for a ``better`` one, both by the same rates.

    Connections have to be made and those of now are lost, so what is gained has to be at least
    ``gain_min`` of the slowest link's rate.  A ring of other members is no choice.
    """
    if sorted(current) != sorted(better.order):
        return Decision(True, "the members are others")
    links = RingLinks(measured)
    now, then = links.slowest(current), links.slowest(better.order)
    if now == 0:
        if then > 0:
            return Decision(True, "a link of the ring is broken, and there is a way round it")
        return Decision(False, "a link of the ring is broken, and every ring has one")
    gain = then / now - 1 if math.isfinite(now) else 0.0
    told = f"the slowest link would be {gain:+.0%} at {then / 1e6:,.1f} MB/s"
    if then >= now * (1 + gain_min) and gain:
        return Decision(True, told)
    return Decision(False, f"{told}, and {gain_min:+.0%} is worth a change")
