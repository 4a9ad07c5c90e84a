"""What counts as history, whoever publishes what and when."""

from __future__ import annotations

import random

from ftrain.checkpoint.protocol.lineage import Fence, newest, next_fence
from ftrain.comms.protocol.messages import VersionId


def test_what_an_epoch_publishes_after_its_successor_began_is_never_seen() -> None:
    first = next_fence(1, None, None)
    second = next_fence(2, VersionId(1, 80), first)
    assert second.shows(VersionId(1, 80))
    assert not second.shows(VersionId(1, 81))
    assert second.shows(VersionId(2, 1000))
    assert not second.shows(VersionId(3, 1))


def test_going_on_from_an_older_epoch_forgets_those_between() -> None:
    first = next_fence(1, None, None)
    second = next_fence(2, VersionId(1, 50), first)
    third = next_fence(3, VersionId(2, 70), second)
    fourth = next_fence(4, VersionId(1, 40), third)
    assert fourth == Fence(4, (VersionId(1, 40),))
    assert not fourth.shows(VersionId(2, 60))


def test_a_fresh_start_has_no_history() -> None:
    assert next_fence(9, None, Fence(8, (VersionId(7, 3),))) == Fence(9)


def test_the_newest_record_settles_it() -> None:
    assert newest([Fence(3), Fence(11), Fence(7)]) == Fence(11)
    assert newest([]) is None


def test_what_is_shown_is_what_a_walk_back_through_time_finds() -> None:
    """Against a model that keeps every epoch's parent and walks back."""
    for seed in range(200):
        chance = random.Random(seed)
        parents: dict[int, VersionId | None] = {}
        record: Fence | None = None
        for fence in range(1, chance.randint(2, 12)):
            parent = None
            if record is not None and chance.random() < 0.9:
                shown = [
                    VersionId(epoch, step)
                    for epoch in parents
                    for step in range(12)
                    if record.shows(VersionId(epoch, step))
                ]
                parent = chance.choice(shown)
            record = next_fence(fence, parent, record)
            parents[fence] = parent
        assert record is not None
        history: dict[int, int] = {}
        epoch, last = record.fence, 11
        while True:
            history[epoch] = last
            before = parents[epoch]
            if before is None:
                break
            epoch, last = before.epoch, before.step
        for epoch in parents:
            for step in range(12):
                expected = step <= history.get(epoch, -1)
                assert record.shows(VersionId(epoch, step)) == expected, (seed, epoch, step)
