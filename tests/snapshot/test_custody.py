"""The rules of slot custody: tables, random groups, and broken variants that must be caught."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest
from custody_world import Violation, World

from ftrain.comms.errors import LocalProtocolError
from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.protocol.custody import TRANSITIONS, Custody, Slot, SlotEvent, SlotState

SHAPES = [(1, 1, 2), (1, 2, 2), (1, 2, 3), (2, 1, 2), (2, 1, 3), (2, 2, 3), (3, 1, 3)]


def v(step: int, epoch: int = 1) -> VersionId:
    return VersionId(epoch, step)


def custody(ranks: int = 1, slots: int = 3) -> Custody:
    made = Custody(slots)
    made.set_group(1, range(ranks), None)
    return made


def capture(made: Custody, rank: int, version: VersionId) -> int:
    grant = made.grant(rank, version)
    assert grant.slot >= 0, grant.reason
    made.seal(rank, grant.slot, version)
    return grant.slot


def walk(custody_class: type[Custody], seed: int, operations: int = 160) -> World:
    rng = random.Random(seed)
    nodes, ranks, slots = SHAPES[seed % len(SHAPES)]
    world = World(custody_class, nodes=nodes, ranks=ranks, slots=slots, rng=rng)
    world.run(operations)
    return world


@pytest.mark.parametrize(("state", "event"), list(product(SlotState, SlotEvent)))
def test_slot_table_is_followed_exactly(state: SlotState, event: SlotEvent) -> None:
    slot = Slot(state)
    if (state, event) in TRANSITIONS:
        slot.apply(event, v(3))
        assert (slot.state, slot.version) == (TRANSITIONS[state, event], v(3))
    else:
        with pytest.raises(LocalProtocolError, match=state.value):
            slot.apply(event)
        assert slot.state is state


def test_three_slots_serve_a_writer_and_a_reader_for_ever() -> None:
    made = custody()
    for step in range(1, 10):
        capture(made, 0, v(step))
        made.commit(v(step))
        if step == 3:
            made.pin(made.sealed(v(3)))
    assert made.sealed(v(3))
    assert made.sealed_versions()[-1] == v(9)


def test_newest_committed_and_everything_newer_are_kept() -> None:
    made = custody(slots=3)
    for step in (1, 2, 3):
        capture(made, 0, v(step))
        if step == 1:
            made.commit(v(1))
    grant = made.grant(0, v(4))
    assert grant.slot == -1
    assert grant.reason.startswith("peers behind")
    made.commit(v(2))
    assert made.grant(0, v(4)).slot == -1, "a denied version stays denied"
    slot = made.grant(0, v(5)).slot
    assert made.slots(0)[slot].state is SlotState.WRITING
    assert made.sealed_versions() == [v(2), v(3)]


def test_who_is_patient_gets_the_slot_that_another_nodes_word_makes_free() -> None:
    made = custody(slots=3)
    for step in (1, 2, 3):
        capture(made, 0, v(step))
        if step == 1:
            made.commit(v(1))
    waiting = made.grant(0, v(4), patient=True)
    assert (waiting.slot, waiting.later) == (-1, True)
    made.commit(v(2))
    assert made.grant(0, v(4), patient=True).slot >= 0
    assert not made.grant(0, v(4), patient=True).later, "it was begun before"


def test_a_reader_is_named_when_it_is_in_the_way() -> None:
    made = custody(slots=2)
    capture(made, 0, v(1))
    made.commit(v(1))
    made.pin(made.sealed(v(1)))
    capture(made, 0, v(2))
    made.commit(v(2))
    assert made.grant(0, v(3)).reason.startswith("reader")


def test_another_ranks_skip_is_not_waited_for() -> None:
    made = custody(ranks=2, slots=2)
    for rank in (0, 1):
        capture(made, rank, v(1))
    made.commit(v(1))
    capture(made, 0, v(2))
    assert made.grant(0, v(3)).reason.startswith("peers behind")
    capture(made, 1, v(4))
    assert made.dead(v(2))
    capture(made, 0, v(4))
    assert made.complete(v(4))


def test_a_peers_skip_frees_the_slot() -> None:
    made = custody(slots=2)
    capture(made, 0, v(1))
    made.commit(v(1))
    capture(made, 0, v(2))
    made.hear(1, v(2), [v(2)])
    assert not made.dead(v(2))
    made.hear(1, v(3), [v(1)])
    assert made.dead(v(2))
    made.hear(1, v(2), [v(2)])  # late
    assert made.dead(v(2))
    assert made.grant(0, v(3)).reason.startswith("skipped elsewhere")
    capture(made, 0, v(4))


def test_restored_version_is_kept_until_the_new_epoch_commits() -> None:
    made = custody(slots=3)
    for step in (1, 2, 3):
        capture(made, 0, v(step))
        made.commit(v(step))
    made.set_group(2, [0], v(2))
    for step in (3, 4):
        capture(made, 0, v(step, 2))
    assert made.sealed(v(2))
    assert not made.sealed(v(3))
    assert made.grant(0, v(5, 2)).slot == -1
    made.commit(v(3, 2))
    capture(made, 0, v(6, 2))
    assert not made.sealed(v(2))


def test_stale_epochs_are_refused() -> None:
    made = custody()
    made.set_group(5, [0], None)
    assert not made.set_group(4, [0, 1], None)
    assert made.local_ranks == (0,)
    assert made.grant(0, v(1, 4)).reason.startswith("stale")


def test_ranks_that_moved_away_are_surplus_after_the_next_commit() -> None:
    made = custody(ranks=2)
    for rank in (0, 1):
        capture(made, rank, v(1))
    made.commit(v(1))
    made.set_group(2, [0], v(1))
    assert made.surplus() == []
    capture(made, 0, v(2, 2))
    made.commit(v(2, 2))
    assert made.surplus() == [1]
    made.forget(1)
    assert made.ranks() == [0]


def test_random_groups_never_lose_a_committed_version() -> None:
    fresh = random.randrange(1 << 30)
    print("fresh seeds from", fresh)
    total: Counter[str] = Counter()
    for seed in [*range(280), *range(fresh, fresh + 70)]:
        try:
            total.update(walk(Custody, seed).counts)
        except Violation as violation:
            pytest.fail(f"seed {seed}: {violation}")
    print(dict(total))
    for what in (
        "granted",
        "granted ahead",
        "committed",
        "denied peers behind",
        "denied reader",
        "denied skipped elsewhere",
        "rank skipped a version by itself",
        "manager restarted",
        "epoch",
    ):
        assert total[what] >= 20, f"the schedules are too polite: {what} {total[what]} times"


class KeepsOnlyCommitted(Custody):
    """Mutant: a sealed version that is not committed yet may be overwritten."""

    def dead(self, version: VersionId) -> bool:
        return True


class ForgetsBase(Custody):
    """Mutant: the version just restored from may be overwritten."""

    def set_group(self, epoch, local_ranks, base):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        return super().set_group(epoch, local_ranks, None)


class IgnoresReaders(Custody):
    """Mutant: a slot that is being read may be overwritten."""

    def pin(self, places):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        return None

    def unpin(self, places):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        return None


class BelievesFloorAlone(Custody):
    """Mutant: whatever is below a peer's floor counts as skipped by it."""

    def hear(self, node, floor, possible):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        return super().hear(node, floor, ())


class NeverHears(Custody):
    """Mutant: a peer's skip is not heeded, so its slot is never free again."""

    def hear(self, node, floor, possible):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        return None


class RetriesDenied(Custody):
    """Mutant: a rank may seal a version after it was counted as skipped."""

    def may_seal(self, rank: int, version: VersionId) -> bool:
        return True


class OldestIsAnchor(Custody):
    """Mutant: keeps the oldest version instead of the newest committed one."""

    @property
    def anchor(self) -> VersionId | None:
        return min(self.sealed_versions(), default=None)


@pytest.mark.parametrize(
    "mutant",
    [
        KeepsOnlyCommitted,
        ForgetsBase,
        IgnoresReaders,
        BelievesFloorAlone,
        NeverHears,
        RetriesDenied,
        OldestIsAnchor,
    ],
)
def test_broken_rules_are_caught(mutant: type[Custody]) -> None:
    caught = 0
    for seed in range(140):
        try:
            walk(mutant, seed)
        except (Violation, LocalProtocolError):
            caught += 1
    print(f"{mutant.__name__}: caught by {caught} of 140 seeds")
    assert caught >= 1


def test_a_withdrawn_version_is_neither_complete_nor_possible_and_its_readers_keep_its_slot() -> (
    None
):
    made = custody()
    capture(made, 0, v(1))
    number = capture(made, 0, v(2))
    made.commit(v(2))
    made.pin([(0, number)])
    assert made.withdraw(0, v(2)) == [number]
    assert not made.complete(v(2))
    assert made.dead(v(2))
    assert made.complete(v(1))
    assert made.committed == v(2)  # what was said is not taken back
    assert capture(made, 0, v(3)) != number
    made.unpin([(0, number)])
    assert made.grant(0, v(4)).slot == number
    assert made.withdraw(0, v(2)) == []
