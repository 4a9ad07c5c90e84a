"""The tally against counting by hand."""

from __future__ import annotations

import random

from ftrain.comms.protocol.messages import VersionId
from ftrain.comms.protocol.quorum import Tally


def test_tally_equals_counting_by_hand() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        members = rng.sample(range(5), rng.randint(0, 4))
        tally, said = Tally(members), set()
        for _ in range(rng.randint(0, 30)):
            member, version = rng.randrange(5), VersionId(rng.randint(1, 2), rng.randint(0, 3))
            if rng.random() < 0.2:
                tally.withdraw(member, version)
                said.discard((member, version))
            else:
                tally.vote(member, version)
                said.add((member, version))
        versions = {v for _, v in said}
        complete = [v for v in versions if members and all((m, v) in said for m in members)]
        assert tally.newest() == max(complete, default=None)
        for version in versions:
            absent = tuple(sorted(m for m in members if (m, version) not in said))
            assert tally.missing(version) == absent
        for member in members:
            assert tally.versions_of(member) == tuple(sorted(v for m, v in said if m == member))


def test_a_majority_is_not_enough() -> None:
    tally, version = Tally(range(3)), VersionId(1, 7)
    for _ in range(5):
        tally.vote(0, version)
        tally.vote(1, version)
    assert tally.newest() is None
    assert tally.missing(version) == (2,)


def test_memory_is_bounded() -> None:
    tally = Tally(range(2))
    for step in range(1000):
        tally.vote(0, VersionId(1, step))
        tally.keep({VersionId(1, 3)}, window=4)
    assert tally.versions_of(0) == tuple(VersionId(1, s) for s in (3, 996, 997, 998, 999))
