"""Copies between shards, against NumPy's own slicing."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ftrain.checkpoint.boxes import Box, Copy, copies, disjoint, hull

WHOLE = Box((0, 0), (6, 8))


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(box.origin, box.shape, strict=True))


def random_box(chance: random.Random, shape: tuple[int, ...]) -> Box:
    origin = tuple(chance.randrange(size) for size in shape)
    return Box(
        origin, tuple(chance.randint(1, n - at) for at, n in zip(origin, shape, strict=True))
    )


def perform(copy: Copy, source: np.ndarray, target: np.ndarray) -> None:
    for index in np.ndindex(*copy.shape):
        at = copy.source + sum(i * s for i, s in zip(index, copy.source_strides, strict=True))
        to = copy.target + sum(i * s for i, s in zip(index, copy.target_strides, strict=True))
        assert target[to] == -1, "no element is written twice"
        target[to] = source[at]


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5), (2, 3, 2, 3)])
def test_any_run_of_any_box_lands_where_it_belongs_in_any_other(shape: tuple[int, ...]) -> None:
    chance = random.Random(str(shape))
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    for _ in range(300):
        source, target = random_box(chance, shape), random_box(chance, shape)
        flat = whole[slices(source)].reshape(-1)
        start, stop = sorted(chance.randint(0, source.volume) for _ in "ab")
        result = np.full(target.volume, -1)
        for copy in copies(source, start, stop, target):
            perform(copy, flat, result)
        wanted = whole[slices(target)].reshape(-1)
        given = np.isin(wanted, flat[start:stop])
        assert (result[given] == wanted[given]).all()
        assert (result[~given] == -1).all()


def test_a_run_is_cut_into_few_contiguous_boxes_in_order() -> None:
    box = Box((1, 2, 3), (3, 4, 5))
    for start in range(61):
        for stop in range(start, 61):
            runs = list(box.runs(start, stop))
            assert len(runs) <= 5
            at = start
            for run in runs:
                assert box.position(run.origin) == at
                at += run.volume
            assert at == stop


def test_equal_boxes_take_one_copy_in_one_dimension() -> None:
    box = Box((4, 0), (100, 30))
    assert copies(box, 17, 2000, box) == [Copy((1983,), 17, (1,), 17, (1,))]


def test_rows_of_the_same_width_are_one_copy() -> None:
    rows = Box((2, 0), (3, 8))
    assert copies(WHOLE, 0, 48, rows) == [Copy((24,), 16, (1,), 0, (1,))]


def test_hull_is_the_least_stretch_that_holds_all_that_is_wanted() -> None:
    assert hull(WHOLE, Box((1, 2), (2, 3))) == (10, 21)
    assert hull(Box((0, 0), (2, 8)), Box((3, 0), (2, 8))) == (0, 0)
    assert hull(Box((), ()), Box((), ())) == (0, 1)


def test_overlaps_are_seen() -> None:
    quarters = [Box((i, j), (3, 4)) for i in (0, 3) for j in (0, 4)]
    assert disjoint(quarters)
    assert not disjoint([*quarters, Box((2, 2), (2, 2))])
    assert disjoint([Box((at,), (3,)) for at in (6, 0, 3)])
    assert not disjoint([Box((at,), (4,)) for at in (6, 0, 3)])
    assert disjoint([])
    assert not disjoint([Box((0, 0), (2, 2))] * 2)
    assert disjoint([Box((), ())])
    rows = [Box((at, 0), (3, 8)) for at in range(0, 3 * 4000, 3)]
    assert disjoint([*rows, Box((0, 0), (0, 8))])  # thousands of shards take no thousands of times
    assert not disjoint([*rows, Box((5, 0), (1, 8))])
