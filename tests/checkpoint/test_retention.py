"""Retention policies."""

from __future__ import annotations

import pytest

from ftrain.checkpoint.retention import KeepLast
from ftrain.comms.errors import UsageError


def test_keep_last_orders_by_fence_and_then_by_step() -> None:
    versions = [(1, 900), (3, 10), (2, 50), (3, 9)]
    policy = KeepLast(2)
    assert policy.kept(versions) == {(3, 10), (3, 9)}
    assert policy.retired(versions) == {(1, 900), (2, 50)}
    assert policy.retired(versions[:2]) == frozenset()
    assert policy.kept([]) == frozenset()


def test_a_generator_is_used_once() -> None:
    assert KeepLast(1).retired((1, step) for step in range(4)) == {(1, 0), (1, 1), (1, 2)}


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="keep_last=0"):
        KeepLast(0)
