"""A loss that is bad soon after a restore leads to an older version, but never round in circles."""

from __future__ import annotations

from collections.abc import Sequence

from ftrain.comms.protocol.messages import (
    Formation,
    Held,
    NodePlace,
    RankFailure,
    RestorePlan,
    Share,
    VersionId,
)
from ftrain.recovery.protocol.bad_versions import SUSPECTS_IN_ROW_MAX, BadVersions, Choice
from ftrain.recovery.protocol.plan import DurableVersion
from ftrain.recovery.protocol.planner import Memory

ONE_PLACE = (NodePlace(0, 1, 0, 1, "", ""),)


def choose(
    bad: BadVersions, memory: Sequence[VersionId], files: Sequence[tuple[int, int]]
) -> Choice:
    """One node, one rank; ``files``: (epoch, step)."""
    share = (Share("0", 0, 0, 1),)
    held = {0: [Held(version, 0, "", share, True, -1) for version in memory]}
    durable = [DurableVersion(epoch, step, "path", 1, epoch) for epoch, step in files]
    return bad.choose(Memory(ONE_PLACE, held), durable)


def went_bad(bad: BadVersions, epoch: int, plan: RestorePlan, step: int) -> bool:
    """A rank of the formation of ``epoch``, which restored ``plan``, saw a NaN at ``step``."""
    formation = Formation(epoch, (), "host", 1, plan, 1)
    return bad.suspect(formation, [RankFailure(0, "loss", "the loss is nan", 1, step=step)])


def version(choice: Choice) -> tuple[str, int]:
    return choice.plan.level, choice.plan.version.step if choice.plan.version else 0


def test_all_that_came_of_a_suspected_version_is_passed_over() -> None:
    bad = BadVersions()
    files = [(1, 22), (1, 20), (1, 10)]
    plan = choose(bad, [VersionId(1, 22)], files).plan
    assert went_bad(bad, 2, plan, 24)
    assert not went_bad(bad, 2, plan, 24)  # another rank of it, heard later
    choice = choose(bad, [VersionId(2, 23), VersionId(1, 22)], [(2, 23), *files])
    assert version(choice) == ("durable", 20)
    assert not choice.news
    assert not choice.plan.trusted
    assert not choice.remarks  # there is nothing wrong with the file
    assert "durable step 22 of epoch 1 is suspected" in choice.plan.reason
    # What the ranks that went on from the older version capture is as good as that.
    assert version(choose(bad, [VersionId(3, 21), VersionId(2, 23)], files)) == ("memory", 21)
    assert version(choose(bad, [VersionId(2, 23), VersionId(1, 21)], files)) == ("memory", 21)


def test_a_loss_that_is_bad_at_the_same_step_again_is_the_scripts_own() -> None:
    bad = BadVersions()
    assert went_bad(bad, 2, choose(bad, [VersionId(1, 22)], [(1, 20)]).plan, 26)
    older = choose(bad, [VersionId(2, 25)], [(1, 20)])
    assert version(older) == ("durable", 20)
    assert not went_bad(bad, 3, older.plan, 26)
    after = choose(bad, [VersionId(3, 25)], [(1, 20)])
    assert version(after) == ("memory", 25)
    assert after.plan.trusted
    assert "at step 26 again" in after.news
    assert not choose(bad, [VersionId(3, 25)], []).news  # said once
    assert not went_bad(bad, 4, after.plan, 30)
    assert version(choose(bad, [VersionId(4, 29)], [])) == ("memory", 29)


def test_where_there_is_nothing_older_training_does_not_begin_anew() -> None:
    bad = BadVersions()
    assert went_bad(bad, 2, choose(bad, [VersionId(1, 22)], []).plan, 26)
    choice = choose(bad, [VersionId(2, 25), VersionId(2, 24)], [])
    assert version(choice) == ("memory", 25)
    assert choice.plan.trusted
    assert "no older version is left" in choice.news


def test_only_so_many_versions_in_a_row_are_suspected() -> None:
    bad = BadVersions()
    files = [(1, step) for step in range(60, 0, -10)]
    epoch = 2
    while went_bad(bad, epoch, (choice := choose(bad, [], files)).plan, 100 + epoch):
        epoch += 1
    assert epoch == 2 + SUSPECTS_IN_ROW_MAX
    assert version(choice) == ("durable", 60 - 10 * SUSPECTS_IN_ROW_MAX)
    assert version(choose(bad, [], files)) == ("durable", 60)


def test_a_newer_version_begins_a_new_row() -> None:
    bad = BadVersions()
    for epoch in range(2, 20, 2):
        memory = [VersionId(epoch - 1, 10 * epoch)]
        plan = choose(bad, memory, [(1, 1)]).plan
        assert plan.level == "memory"
        assert went_bad(bad, epoch, plan, 10 * epoch + 3)
        assert version(choose(bad, memory, [(1, 1)])) == ("durable", 1)


def test_a_fresh_start_is_not_suspected() -> None:
    bad = BadVersions()
    assert not went_bad(bad, 1, choose(bad, [], []).plan, 3)
