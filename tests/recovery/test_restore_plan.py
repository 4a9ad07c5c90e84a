"""Which version is restored from, with what was found bad left out."""

from __future__ import annotations

from ftrain.comms.protocol.messages import Held, NodePlace, RestorePlan, Share, VersionId
from ftrain.recovery.protocol.bad_versions import BadVersions
from ftrain.recovery.protocol.plan import DurableVersion
from ftrain.recovery.protocol.planner import Memory

ONE_PLACE = (NodePlace(0, 1, 0, 1, "", ""),)


def held(*versions: VersionId) -> dict[int, list[Held]]:
    """One node, one rank, these versions in memory."""
    share = (Share("0", 0, 0, 1),)
    return {0: [Held(version, 0, "", share, True, -1) for version in versions]}


def durable(fence: int, step: int) -> DurableVersion:
    return DurableVersion(fence, step, f"{fence}/{step}.json", 1, fence)


def choose(bad: BadVersions, memory: list[VersionId], files: list[DurableVersion]) -> RestorePlan:
    """As the coordinator does it."""
    return bad.choose(Memory(ONE_PLACE, held(*memory)), files).plan


def test_each_bad_version_leads_to_the_next_older_one_down_to_a_fresh_start() -> None:
    memory = [VersionId(2, 9), VersionId(2, 8), VersionId(1, 4)]
    files = [durable(1, 6), durable(1, 3)]
    bad = BadVersions()
    found = []
    while True:
        plan = choose(bad, memory, files)
        found.append((plan.level, plan.version and plan.version.step))
        if not bad.add(plan):
            break
    assert found == [
        ("memory", 9),
        ("memory", 8),
        ("durable", 6),
        ("memory", 4),
        ("durable", 3),
        ("fresh", None),
    ]
    assert "step 9 of epoch 2 was found bad" in plan.reason
    assert "durable step 6 of epoch 1 was found bad" in choose(bad, [], files).reason


def test_a_withdrawn_version_is_restored_from_no_place() -> None:
    bad = BadVersions()
    assert bad.withdraw([VersionId(1, 5)])
    assert not bad.withdraw([VersionId(1, 5)])
    plan = choose(bad, [VersionId(1, 5), VersionId(1, 4)], [durable(1, 5)])
    assert (plan.level, plan.version) == ("memory", VersionId(1, 4))
    assert choose(bad, [VersionId(1, 5)], [durable(1, 5)]).level == "fresh"
    assert bad.withdrawn == {VersionId(1, 5)}


def test_a_version_bad_in_memory_may_be_good_on_the_disk() -> None:
    bad = BadVersions()
    plan = choose(bad, [VersionId(1, 5)], [durable(1, 5)])
    assert plan.level == "memory"
    assert bad.add(plan)
    assert not bad.add(plan)
    plan = choose(bad, [VersionId(1, 5)], [durable(1, 5)])
    assert (plan.level, plan.path) == ("durable", "1/5.json")
    assert plan.reason == "step 5 from the durable version; step 5 of epoch 1 was found bad"
