"""How likely it is that a version is lost, by what the nodes of its groups may lose at once.

Losses of nodes are independent of each other, and so are those of racks, which take all their nodes
with them.  No two numbers that are nearly equal are subtracted, so that tiny probabilities keep the
digits of a float; with fractions the results are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, combinations
from math import comb, expm1

from ftrain.snapshot.protocol.placement import ParityGroup

Probability = float | Fraction

_DAY_S = 86400.0
_ENUMERATED_MAX = 12  # racks that several groups share: 4,096 cases


@dataclass(frozen=True, slots=True)
class Risk:
    """A probability; ``exact`` False: it is at most that."""

    probability: Probability
    exact: bool


def loss(
    groups: Sequence[ParityGroup],
    racks: Mapping[int, str],
    node: Probability,
    rack: Probability = 0,
) -> Risk:
    """The probability that some group loses more nodes than its parity can replace.

    Args:
        groups: of all nodes.
        racks: of each node; "": it fails with no other.
        node: probability that a node is lost within the time looked at.
        rack: the same of a rack.
    """
    named = [{racks[n] for n in group.nodes} - {""} for group in groups]
    counts = Counter(chain(*named))
    shared = sorted(name for name, count in counts.items() if count > 1) if rack else []
    if len(shared) > _ENUMERATED_MAX:
        bound = sum((_group_loss(g, racks, node, rack, (), ()) for g in groups), Fraction(0))
        return Risk(min(bound, Fraction(1)), exact=False)
    total: Probability = Fraction(0)
    for number in range(len(shared) + 1):
        chance = rack**number * (1 - rack) ** (len(shared) - number)
        for lost in combinations(shared, number):
            any_group: Probability = Fraction(0)
            for group in groups:
                mine = _group_loss(group, racks, node, rack, shared, lost)
                any_group = any_group + mine - any_group * mine
            total += chance * any_group
    return Risk(total, exact=True)


def loss_per_day(
    groups: Sequence[ParityGroup],
    racks: Mapping[int, str],
    *,
    node_mtbf_s: float,
    rack_mtbf_s: float | None,
    window_s: float,
) -> Risk:
    """The same for a day, in which nodes are lost at a constant rate each and ``window_s`` passes
    between the loss of one and the moment at which its redundancy is there again."""
    node = -expm1(-window_s / node_mtbf_s)
    rack = -expm1(-window_s / rack_mtbf_s) if rack_mtbf_s else 0.0
    risk = loss(groups, racks, node, rack)
    return Risk(min(1.0, float(risk.probability) * _DAY_S / window_s), risk.exact)


def racks_that_may_fail(groups: Sequence[ParityGroup], racks: Mapping[int, str]) -> list[str]:
    """The racks of which any one may be lost as a whole."""
    most: dict[str, bool] = {}
    for group in groups:
        for name, count in Counter(racks[node] for node in group.nodes).items():
            most[name] = most.get(name, True) and count <= group.parity
    return sorted(name for name, survives in most.items() if name and survives)


def _group_loss(
    group: ParityGroup,
    racks: Mapping[int, str],
    node: Probability,
    rack: Probability,
    known: Collection[str],
    lost: Collection[str],
) -> Probability:
    """Of one group, when it is known of some racks which of them are lost."""
    members = Counter(racks[n] for n in group.nodes)
    alone = members.pop("", 0)
    counts: list[Probability] = _binomial(alone, node)  # probability of each number of lost nodes
    for name, size in members.items():
        fails = Fraction(name in lost) if name in known else rack
        mine = [(1 - fails) * chance for chance in _binomial(size, node)]
        mine[size] += fails
        counts = _together(counts, mine)
    return sum(counts[group.parity + 1 :], Fraction(0))


def _binomial(size: int, chance: Probability) -> list[Probability]:
    return [comb(size, k) * chance**k * (1 - chance) ** (size - k) for k in range(size + 1)]


def _together(left: Sequence[Probability], right: Sequence[Probability]) -> list[Probability]:
    """Of the sum of two independent numbers."""
    found: list[Probability] = [Fraction(0)] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            found[i + j] += a * b
    return found
