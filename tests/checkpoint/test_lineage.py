"""What counts as history, whoever publishes what and when."""

from __future__ import annotations

import random

from ftrain.checkpoint.protocol.lineage import Fence, filed, next_fence, settling
from ftrain.comms.protocol.messages import VersionId


def test_what_an_epoch_publishes_after_its_successor_began_is_never_seen() -> None:
    first = next_fence(1, None, [])
    second = next_fence(2, VersionId(1, 80), [first])
    assert second.shows(VersionId(1, 80))
    assert not second.shows(VersionId(1, 81))
    assert second.shows(VersionId(2, 1000))
    assert not second.shows(VersionId(3, 1))


def test_going_on_from_an_older_epoch_forgets_those_between() -> None:
    first = next_fence(1, None, [])
    second = next_fence(2, VersionId(1, 50), [first])
    third = next_fence(3, VersionId(2, 70), [second, first])
    fourth = next_fence(4, VersionId(1, 40), [first, second, third])
    assert fourth == Fence(4, (VersionId(1, 40),))
    assert not fourth.shows(VersionId(2, 60))


def test_a_fresh_start_has_no_history() -> None:
    assert next_fence(9, None, [Fence(8, (VersionId(7, 3),))]) == Fence(9)


def test_the_newest_record_settles_it_that_has_a_version_or_what_it_rests_on() -> None:
    first, parent = Fence(3), VersionId(3, 50)
    second, third = (next_fence(fence, parent, [first], [parent]) for fence in (7, 11))
    records = [second, third, first]
    assert settling(records, {VersionId(3, 50), VersionId(3, 90)}) == third
    assert settling(records, {VersionId(3, 40), VersionId(3, 90)}) == first  # 50 was swept
    assert settling(records, {VersionId(3, 90), VersionId(7, 60)}) == second
    assert settling(records, {VersionId(3, 90), VersionId(11, 55)}) == third
    assert settling([*records, Fence(12)], {VersionId(3, 50)}) == Fence(12)  # it began anew
    assert settling(records[:2], set()) is None


def test_what_is_saved_from_memory_makes_the_record_stand_that_it_is_filed_under() -> None:
    first, held, withdrawn = Fence(1), VersionId(1, 19), VersionId(1, 20)
    second = next_fence(2, held, [first], [withdrawn])  # granted, but no rank ran: the job ends
    assert settling([first, second], filed(2, held)) == second
    assert second.shows(held)
    third = next_fence(3, held, [first, second], filed(2, held))
    assert third.rests_on == held
    assert settling([first, second, third], filed(2, held)) == third


def test_what_goes_on_from_memory_hides_what_the_epoch_before_publishes_late() -> None:
    first, held, late = Fence(3), VersionId(3, 95), VersionId(3, 100)
    durable = [VersionId(3, step) for step in (60, 80, 99)]
    second = next_fence(7, held, [first], durable)
    assert second.rests_on == VersionId(3, 80)
    assert settling([first, second], {*durable, late}) == second
    assert not second.shows(late)
    assert settling([first, second], {VersionId(3, 60), late}) == first  # 80 was swept for it
    third = next_fence(8, VersionId(7, 97), [first, second], [*durable, late])
    assert third.rests_on == VersionId(3, 80)
    assert settling([first, next_fence(9, held, [first])], {late}) != first  # nothing to lose
    fourth = next_fence(9, held, [first], [late])  # published and swept while 9 was being granted
    assert settling([first, fourth], {late}) == first
    assert settling([first, fourth], {late, VersionId(9, 96)}) == fourth


def test_history_is_that_of_the_record_which_showed_the_parent() -> None:
    """Not of one that went back further, published nothing, and whose parent is gone."""
    first = next_fence(1, None, [])
    second = next_fence(2, VersionId(1, 50), [first])
    third = next_fence(3, VersionId(1, 30), [second, first])
    fourth = next_fence(4, VersionId(2, 70), [third, second, first])
    assert fourth.ancestors == (VersionId(1, 50), VersionId(2, 70))


def test_what_is_shown_is_what_a_walk_back_through_time_finds() -> None:
    """Against a model that keeps every epoch's parent and walks back."""
    for seed in range(200):
        chance = random.Random(seed)
        parents: dict[int, VersionId | None] = {}
        record: Fence | None = None
        records: list[Fence] = []
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
            record = next_fence(fence, parent, records)
            records.append(record)
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
