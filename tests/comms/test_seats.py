"""Who takes which seat."""

from __future__ import annotations

import itertools

import pytest

from ftrain.comms.protocol.seats import NOBODY, changes_in_words, empty_seats, take_seats


@pytest.mark.parametrize(
    ("last", "present", "expected", "taken"),
    [
        ((), {0, 1, 2}, (), (0, 1)),  # at first the lowest numbers
        ((), {1, 2}, (), (2, 1)),  # ... each in its own seat
        ((), {1, 2}, {0}, (NOBODY, 1)),  # ... also when it comes a little later
        ((0, 1), {0, 2, 3}, (), (0, 2)),
        ((0, 2), {0, 1, 2, 3}, (), (0, 2)),  # who comes back waits as a spare
        ((0, 2), {0, 1, 3}, (), (0, 1)),  # and takes the next empty seat
        ((0, 2), {0, 1}, {2}, (0, NOBODY)),  # a new coordinator has not heard of all
        ((2, 0), {1, 3}, (), (1, 3)),  # the first seat first
        ((0, 1), {0}, (), (0, NOBODY)),
        ((0, 1), {2}, (), (2, NOBODY)),
    ],
)
def test_seats(
    last: tuple[int, ...], present: set[int], expected: set[int], taken: tuple[int, ...]
) -> None:
    assert take_seats(last, 2, present, expected) == taken


def test_the_seats_that_nobody_takes() -> None:
    assert empty_seats((), 2, set()) == (0, 1)
    assert empty_seats((0, 2), 2, {0, 1}) == ()
    assert empty_seats((0, 2), 2, {0, 1}, {2}) == (2,)
    assert empty_seats((2, 0), 2, {1}) == (0,)


def test_nobody_sits_twice_and_who_is_present_never_moves() -> None:
    for last in itertools.permutations(range(4), 2):
        for size in range(5):
            for present in itertools.combinations(range(4), size):
                taken = take_seats(last, 2, present)
                nodes = [node for node in taken if node != NOBODY]
                assert len(set(nodes)) == len(nodes)
                assert set(nodes) <= set(present)
                assert len(nodes) == min(2, size)
                for before, now in zip(last, taken, strict=True):
                    assert before not in present or now == before


def test_changes_in_words() -> None:
    assert changes_in_words((), (0, 1)) == ""
    assert changes_in_words((), (0, 2)) == "node 2 takes the place of node 1"
    assert changes_in_words((0, 2), (1, 3)) == (
        "node 1 takes the place of node 0, node 3 takes the place of node 2"
    )
