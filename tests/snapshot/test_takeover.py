"""Who finishes what for whom, and what is waited for."""

from __future__ import annotations

from itertools import product

import pytest

from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.protocol.custody import Custody, SlotState
from ftrain.snapshot.protocol.takeover import Takeover, Task

EVERYBODY = range(8)


def v(step: int) -> VersionId:
    return VersionId(1, step)


def group(ranks: int) -> tuple[Custody, Takeover, dict[int, frozenset[str] | None]]:
    """A node whose ranks have all sealed step 1, and hold the share "all"."""
    custody = Custody(3)
    custody.set_group(1, range(ranks), None)
    keys: dict[int, frozenset[str] | None] = {rank: frozenset({"all"}) for rank in range(ranks)}
    for rank in range(ranks):
        seal(custody, rank, 1)
    custody.commit(v(1))
    return custody, Takeover(custody, lambda rank, slot: keys[rank]), keys


def seal(custody: Custody, rank: int, step: int) -> None:
    if custody.writing(rank) < 0:
        assert custody.grant(rank, v(step)).slot >= 0
    custody.seal(rank, custody.writing(rank), v(step))


def test_each_image_is_asked_of_one_survivor_and_work_is_spread() -> None:
    custody, takeover, _ = group(4)
    for rank in range(4):
        custody.grant(rank, v(2))
    takeover.died(1)
    takeover.died(3)
    tasks = takeover.tasks(EVERYBODY)
    assert [(task.survivor, task.rank, task.version) for task in tasks] == [
        (0, 1, v(2)),
        (2, 3, v(2)),
    ]
    assert takeover.tasks(EVERYBODY) == []
    assert takeover.answered(v(2), 1, 0)
    assert not takeover.answered(v(2), 1, 0), "said twice"
    assert [task.survivor for task in takeover.tasks(EVERYBODY)] == [2], "0 could not do it"
    takeover.unreachable(2)
    assert {task.rank for task in takeover.tasks([2])} == {1, 3}, "asked again when it is back"
    takeover.died(2)
    assert takeover.tasks(EVERYBODY) == [
        Task(0, v(2), rank, custody.writing(rank)) for rank in (2, 3)
    ]


@pytest.mark.parametrize("held", [None, frozenset(), frozenset({"0"})])
def test_only_who_holds_the_same_shares_is_asked(held: frozenset[str] | None) -> None:
    custody, takeover, keys = group(2)
    for rank in (0, 1):
        custody.grant(rank, v(2))
    keys[0] = held
    takeover.died(1)
    assert takeover.tasks(EVERYBODY) == []
    keys[0] = frozenset({"all", "0"})
    assert takeover.tasks([]) == []
    assert len(takeover.tasks(EVERYBODY)) == 1


def test_another_epoch_begins_with_nothing_pending() -> None:
    custody, takeover, _ = group(2)
    for rank in (0, 1):
        custody.grant(rank, v(2))
    takeover.died(1)
    takeover.tasks(EVERYBODY)
    custody.set_group(2, [0, 1], v(1))
    takeover.new_epoch()
    assert not takeover.dead
    assert not takeover.waiting()
    assert takeover.tasks(EVERYBODY) == []


# What a rank can be at step 2: it has not come to it, skipped it, is writing it, or sealed it.
PLACES = ("before", "skipped", "writing", "sealed")


@pytest.mark.parametrize(
    ("first", "second", "dead"), list(product(PLACES, PLACES, [(), (0,), (1,), (0, 1)]))
)
def test_waits_exactly_for_what_can_still_be_completed(
    first: str, second: str, dead: tuple[int, ...]
) -> None:
    custody, takeover, _ = group(2)
    places = (first, second)
    for rank, place in enumerate(places):
        if place != "before":
            custody.writes(rank, 1, v(3 if place == "skipped" else 2))
        if place == "sealed":
            custody.seal(rank, 1, v(2))
        if place == "skipped":
            custody.abandon(rank, 1)
    for rank in dead:
        takeover.died(rank)

    def completable(rank: int) -> bool:
        other = 1 - rank
        if rank not in dead:
            return places[rank] != "skipped"
        if places[rank] == "writing":  # by the other one, if it is alive and still holds step 2
            return other not in dead and places[other] != "skipped"
        return places[rank] == "sealed"

    begun = any(place in ("writing", "sealed") for place in places)
    complete = places == ("sealed", "sealed")
    assert takeover.waiting() == (begun and not complete and completable(0) and completable(1))


def test_no_wait_when_every_survivor_failed() -> None:
    custody, takeover, _ = group(3)
    for rank in range(3):
        custody.grant(rank, v(2))
    for rank in (0, 1):
        seal(custody, rank, 2)
    takeover.died(2)
    for survivor in (0, 1):
        assert [task.survivor for task in takeover.tasks(EVERYBODY)] == [survivor]
        assert takeover.waiting()
        takeover.answered(v(2), 2, survivor)
    assert not takeover.waiting()
    assert custody.slots(2)[custody.writing(2)].state is SlotState.WRITING
