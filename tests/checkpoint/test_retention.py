"""Retention policies."""

from __future__ import annotations

import pytest

from ftrain.checkpoint.retention import Retention
from ftrain.comms.errors import UsageError


def test_keep_last_orders_by_fence_and_then_by_step() -> None:
    versions = [(1, 900), (3, 10), (2, 50), (3, 9)]
    policy = Retention(2)
    assert policy.kept(versions) == {(3, 10), (3, 9)}
    assert policy.retired(versions) == {(1, 900), (2, 50)}
    assert policy.retired(versions[:2]) == frozenset()
    assert policy.kept([]) == frozenset()


def test_a_generator_is_used_once() -> None:
    assert Retention(1).retired((1, step) for step in range(4)) == {(1, 0), (1, 1), (1, 2)}


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="keep_last=0"):
        Retention(0)


def test_one_of_every_so_many_steps_is_kept_for_good() -> None:
    policy = Retention(1, every=100)
    steps = [30, 90, 110, 150, 205, 290, 310]
    assert policy.kept((1, step) for step in steps) == {(1, s) for s in (30, 110, 205, 310)}
    assert policy.kept((1, step) for step in steps[:-1]) == {(1, s) for s in (30, 110, 205, 290)}


def test_it_is_satisfied_once_there_are_enough() -> None:
    assert not Retention(2).satisfied([(1, 5)])
    assert Retention(2).satisfied([(1, 5), (1, 6)])
    with pytest.raises(UsageError, match="keep_every=-1"):
        Retention(1, every=-1)
