"""Parity groups: who protects whom, and how likely it is that this is not enough."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import chain, combinations
from itertools import product as cases

import pytest

from ftrain.comms.errors import StateError
from ftrain.snapshot.protocol.placement import ParityGroup, chunk_bytes, groups_of
from ftrain.snapshot.survival import loss, loss_per_day, racks_that_may_fail


def drawn(draw: random.Random, nodes: int) -> dict[int, str]:
    names = ["", *"abcd"[: draw.randrange(1, 5)]]
    return {node: draw.choice(names) for node in draw.sample(range(100), nodes)}


def test_every_node_is_in_one_group_and_any_loss_leaves_enough_of_each_stripe() -> None:
    draw = random.Random(1)
    for _ in range(400):
        racks = drawn(draw, draw.randrange(1, 9))
        size = draw.randrange(2, 7)
        parity = draw.randrange(min(4, size))
        groups = groups_of(racks, size, parity)
        assert sorted(chain(*(group.nodes for group in groups))) == sorted(racks)
        for group in groups:
            assert len(group.nodes) >= min(size, len(racks))
            assert group.parity == min(parity, len(group.nodes) - 1)
            for lost in combinations(group.nodes, group.parity):
                for stripe in range(len(group.nodes)):
                    chunks = group.contributors(stripe) + group.holders(stripe)
                    assert sorted(chunks) == sorted(group.nodes)
                    assert len(set(chunks) - set(lost)) == group.data
            for node in group.nodes:
                assert len(group.stripes_of(node)) == group.data
                held = group.held_by(node)
                assert len(held) == group.parity
                assert all(group.holders(stripe)[row] == node for stripe, row in held)


def test_nodes_of_a_rack_are_spread_as_evenly_as_they_can_be() -> None:
    draw = random.Random(2)
    for _ in range(300):
        racks = drawn(draw, draw.randrange(2, 40))
        groups = groups_of(racks, draw.randrange(2, 6), 1)
        sizes = Counter(racks.values())
        for group in groups:
            for name, count in Counter(racks[node] for node in group.nodes).items():
                assert not name or count <= -(-sizes[name] // len(groups))
    four = {node: "abcd"[node // 4] for node in range(16)}
    groups = groups_of(four, 4, 1)
    assert [len({four[node] for node in group.nodes}) for group in groups] == [4] * 4
    assert racks_that_may_fail(groups, four) == ["a", "b", "c", "d"]
    assert racks_that_may_fail(groups_of(four, 16, 1), four) == []
    assert racks_that_may_fail(groups_of(four, 16, 4), four) == ["a", "b", "c", "d"]


def test_a_node_alone_claims_no_protection() -> None:
    assert groups_of({7: "a"}, 4, 2) == (ParityGroup((7,), 0),)
    assert groups_of({7: "", 3: ""}, 4, 2) == (ParityGroup((3, 7), 1),)
    assert groups_of({}, 4, 2) == ()
    with pytest.raises(StateError, match=r"snapshot\.parity smaller"):
        groups_of({1: "", 2: ""}, 2, 2)


def test_chunks_are_as_long_as_the_largest_node_needs() -> None:
    assert chunk_bytes([10, 0, 4097], 1, 4096) == 8192
    assert chunk_bytes([3 * 4096, 1], 3, 4096) == 4096
    assert chunk_bytes([0], 3, 4096) == chunk_bytes([], 3, 4096) == 0


def enumerated(
    groups: Sequence[ParityGroup], racks: Mapping[int, str], node: Fraction, rack: Fraction
) -> Fraction:
    """Every case there is."""
    nodes, names = sorted(racks), sorted(set(racks.values()) - {""})
    total = Fraction(0)
    for down in cases((False, True), repeat=len(names)):
        first = Fraction(1)
        for fails in down:
            first *= rack if fails else 1 - rack
        dark = {name for name, fails in zip(names, down, strict=True) if fails}
        for single in cases((False, True), repeat=len(nodes)):
            lost = {n for n, fails in zip(nodes, single, strict=True) if fails or racks[n] in dark}
            if any(len(lost & set(group.nodes)) > group.parity for group in groups):
                alone = sum(single)
                total += first * node**alone * (1 - node) ** (len(nodes) - alone)
    return total


def test_the_risk_is_that_of_all_cases_counted() -> None:
    draw = random.Random(3)
    sizes = [*range(1, 9)] * 3 + [12]
    for nodes in sizes:
        racks = drawn(draw, nodes)
        size = draw.randrange(2, 5)
        groups = groups_of(racks, size, draw.randrange(size))
        node, rack = Fraction(draw.randrange(1, 40), 1000), Fraction(draw.randrange(9), 10_000)
        found = loss(groups, racks, node, rack)
        assert found.exact
        assert found.probability == enumerated(groups, racks, node, rack)
        assert float(loss(groups, racks, float(node), float(rack)).probability) == pytest.approx(
            float(found.probability), rel=1e-12
        )


@pytest.mark.parametrize("node", [0.02, 0.1, 0.3])
def test_the_risk_is_what_a_simulation_sees(node: float) -> None:
    draw = random.Random(round(node * 100))
    racks = {number: "abcdef"[number // 3] for number in range(18)}
    groups = groups_of(racks, 6, 2)
    rack = 0.05
    expected = float(loss(groups, racks, node, rack).probability)
    seen = tries = 0
    while seen < 1000:
        tries += 1
        dark = {name for name in "abcdef" if draw.random() < rack}
        lost = {n for n in racks if racks[n] in dark or draw.random() < node}
        seen += any(len(lost.intersection(group.nodes)) > group.parity for group in groups)
    assert abs(seen / tries - expected) <= 3 * (expected * (1 - expected) / tries) ** 0.5


def test_many_shared_racks_give_a_bound() -> None:
    racks = {node: f"rack {node % 20}" for node in range(80)}
    groups = groups_of(racks, 4, 2)
    found = loss(groups, racks, 1e-4, 1e-5)
    assert not found.exact
    alone = float(loss(groups, racks, 1e-4).probability)
    assert alone < float(found.probability) < 3 * alone


def test_a_day_has_many_windows() -> None:
    racks = dict.fromkeys(range(8), "")
    groups = groups_of(racks, 8, 2)
    day = loss_per_day(groups, racks, node_mtbf_s=3.6e7, rack_mtbf_s=None, window_s=900)
    # Three of eight within a quarter of an hour, 96 times a day.
    assert float(day.probability) == pytest.approx(96 * 56 * (900 / 3.6e7) ** 3, rel=1e-3)
