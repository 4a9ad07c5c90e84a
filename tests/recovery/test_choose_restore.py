"""The restore plan against a dumb twin that tries everything."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product

from ftrain.comms.protocol.messages import Held, Share, VersionId
from ftrain.recovery.protocol.plan import DurableVersion, choose_restore

Inventory = Mapping[int, Sequence[Held]]


def record(
    step: int, rank: int, shares: Sequence[Share], *, whole: bool = True, epoch: int = 1
) -> Held:
    return Held(VersionId(epoch, step), rank, "", tuple(shares), whole, -1)


def dumb_restorable(held: Inventory, version: VersionId, world_size: int) -> bool:
    """Try every choice of one node per share key; every rank's small section must be somewhere."""
    here = {n: [h for h in records if h.version == version] for n, records in held.items()}
    everything = [h for records in here.values() for h in records]
    if {h.rank for h in everything} != set(range(world_size)):
        return False
    keys = sorted({s.key for h in everything for s in h.shares})
    partitions = {(s.node, s.parts) for h in everything for s in h.shares}

    def has_all(node: int, key: str) -> bool:
        return any(
            all(
                any(h.whole and Share(key, owner, part, parts) in h.shares for h in here[node])
                for part in range(parts)
            )
            for owner, parts in partitions
        )

    return any(
        all(has_all(node, key) for node, key in zip(choice, keys, strict=True))
        for choice in product(here, repeat=len(keys))
    )


def random_inventory(rng: random.Random, world_size: int) -> dict[int, list[Held]]:
    """A few nodes of a few ranks, some replicating, some sharding, much of it lost."""
    local = rng.choice([n for n in (1, 2) if world_size % n == 0])
    nodes = world_size // local
    replicated, lost = rng.random() < 0.6, rng.choice((0.05, 0.3))
    held: dict[int, list[Held]] = {node: [] for node in range(nodes)}
    for epoch, step in [(rng.randint(1, 2), rng.randint(1, 4)) for _ in range(3)]:
        for rank in range(world_size):
            home, part = divmod(rank, local)
            shares = [Share(str(rank), home, 0, 1)] if not replicated or rng.random() < 0.3 else []
            if replicated:
                shares.append(Share("all", home, part, local))
            for node in range(nodes):
                if rng.random() >= lost:
                    held[node].append(record(step, rank, shares, whole=node == home, epoch=epoch))
    return held


def test_plan_equals_its_dumb_twin() -> None:
    rng = random.Random(3)
    levels = set()
    for _ in range(3000):
        world_size = rng.choice((1, 2, 3, 4))
        held = random_inventory(rng, world_size)
        versions = {h.version for records in held.values() for h in records}
        refused = frozenset(v for v in versions if rng.random() < 0.1)
        good = [v for v in versions - refused if dumb_restorable(held, v, world_size)]
        best = max(good, default=None)
        durable = None
        if rng.random() < 0.5:
            durable = DurableVersion(rng.randint(1, 2), rng.randint(1, 4), "p", world_size)
        plan = choose_restore(held, world_size, durable, refused)
        levels.add(plan.level)
        if durable and (best is None or VersionId(durable.fence, durable.step) > best):
            assert (plan.level, plan.fence, plan.path) == ("durable", durable.fence, "p")
        elif best is None:
            assert plan.level == "fresh"
        else:
            assert (plan.level, plan.version) == ("memory", best)
            holders = {n for n, records in held.items() if any(h.version == best for h in records)}
            assert set(plan.sources) == holders
    assert levels == {"memory", "durable", "fresh"}


def test_reason_names_what_was_missing() -> None:
    share = [Share("all", 0, 0, 2)], [Share("all", 0, 1, 2)]
    held = {
        0: [
            record(7, 0, share[0]),
            record(8, 0, share[0]),
            record(8, 1, share[1], whole=False),
            record(6, 0, share[0]),
            record(6, 1, share[1]),
        ]
    }
    durable = DurableVersion(1, 5, "p", 2)
    assert choose_restore(held, 2, durable).reason == (
        "step 6 of epoch 1 from memory; step 8 of epoch 1 lacks parts of the state of ranks all; "
        "step 7 of epoch 1 lacks rank 1; durable step 5 of epoch 1 is no newer"
    )


def test_files_of_another_number_of_ranks_serve_and_memory_does_not() -> None:
    plan = choose_restore({}, 2, DurableVersion(3, 5, "p", 4, epoch=2))
    assert (plan.level, plan.path, plan.parent) == ("durable", "p", VersionId(2, 5))
    assert plan.reason == "step 5 from the durable version of 4 ranks, laid over 2"
    held = {0: [record(7, rank, [Share(str(rank), 0, 0, 1)]) for rank in range(4)]}
    plan = choose_restore(held, 2, None)
    assert plan.level == "fresh"
    assert plan.reason == "a fresh start; step 7 of epoch 1 is of 4 ranks, not 2"
