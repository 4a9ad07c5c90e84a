"""The election, and who gets what from whom, against counting by hand; mutants are caught."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from ftrain.comms.errors import StateError
from ftrain.comms.fleet.protocol import shared_state
from ftrain.comms.fleet.protocol.shared_state import (
    BLOCK_BYTES,
    Content,
    Offer,
    Plan,
    Role,
    TensorEntry,
    agree,
)

VOTE, SEND, RECEIVE = Role.ENFORCE_POPULAR, Role.SEND_ONLY, Role.RECEIVE_ONLY


def entry(key: str, *digests: int, last: int = BLOCK_BYTES, dtype: str = "float32") -> TensorEntry:
    """A tensor of as many blocks as digests."""
    nbytes = (len(digests) - 1) * BLOCK_BYTES + last if digests else 0
    return TensorEntry(key, dtype, (nbytes // 4,), nbytes, tuple(bytes([d]) * 16 for d in digests))


def simple(value: int) -> Content:
    return (entry("w", value),)


def offers_of(rng: random.Random) -> list[Offer]:
    """Members with contents that differ here and there."""
    sizes = [(rng.randint(0, 4), rng.choice([4, 1000, BLOCK_BYTES])) for _ in range(3)]

    def content() -> Content:
        return tuple(
            entry(f"t{number}", *(rng.choice([1, 1, 1, 2]) for _ in range(blocks)), last=last)
            for number, (blocks, last) in enumerate(sizes)
        )

    some = [content() for _ in range(rng.randint(1, 3))]
    roles = [VOTE, VOTE, VOTE, RECEIVE]
    members = rng.sample(range(20), rng.randint(1, 6))
    offers = [Offer(m, rng.randint(1, 3), rng.choice(roles), rng.choice(some)) for m in members]
    if rng.random() < 0.2:
        offers[0] = replace(offers[0], role=SEND)
    return offers


def counted(offers: Sequence[Offer]) -> tuple[int, Content] | None:
    """Who is elected, by hand."""
    for offer in offers:
        if offer.role is SEND:
            return offer.revision, offer.content
    newest = max((o.revision for o in offers if o.role is VOTE), default=None)
    votes: list[tuple[int, int, Content]] = []
    for offer in offers:
        if offer.role is VOTE and offer.revision == newest:
            same = [
                o.member
                for o in offers
                if (o.role, o.revision, o.content) == (VOTE, newest, offer.content)
            ]
            votes.append((-len(same), min(same), offer.content))
    return (newest, min(votes)[2]) if votes and newest is not None else None


def violations(offers: Sequence[Offer], plan: Plan) -> list[str]:
    """What is wrong with a plan."""
    wrong = []
    if (plan.revision, plan.content) != counted(offers):
        wrong.append("another content is elected")
    loads: Counter[int] = Counter()
    for offer in offers:
        got = Counter(b for blocks in plan.fetches.get(offer.member, {}).values() for b in blocks)
        needed = {
            (n, block)
            for n, tensor in enumerate(plan.content)
            for block, digest in enumerate(tensor.digests)
            if offer.content[n].digests[block] != digest
        }
        if got != Counter(needed):
            wrong.append(f"member {offer.member} gets {got}, needs {needed}")
        for donor, blocks in plan.fetches.get(offer.member, {}).items():
            there = next(o for o in offers if o.member == donor)
            if there.role is RECEIVE:
                wrong.append(f"{donor} only receives, and sends")
            for n, block in blocks:
                start, stop = plan.content[n].span(block)
                loads[donor] += stop - start
                if there.content[n].digests[block] != plan.content[n].digests[block]:
                    wrong.append(f"{donor} sends what it does not have")
    whole = [o.member for o in offers if o.content == plan.content and o.role is not RECEIVE]
    if whole and max(loads[m] for m in whole) - min(loads[m] for m in whole) > BLOCK_BYTES:
        wrong.append(f"donors send unevenly: {loads}")
    return wrong


def sweep(seeds: int = 1500) -> list[str]:
    """Everything that is wrong in many cases."""
    wrong = []
    for seed in range(seeds):
        offers = offers_of(random.Random(seed))
        try:
            plan = agree(offers)
        except StateError:
            if counted(offers) is not None:
                wrong.append(f"seed {seed} is refused")
            continue
        except (KeyError, ValueError) as error:  # of a mutant
            wrong.append(f"seed {seed} has no plan: {error!r}")
            continue
        wrong += [f"seed {seed}: {what}" for what in violations(offers, plan)]
    return wrong


def test_every_plan_is_as_counted_by_hand() -> None:
    assert not sweep()


def outcome(offers: Sequence[Offer]) -> Plan | str:
    try:
        return agree(offers)
    except StateError as error:
        return str(error)


def test_the_order_of_the_offers_does_not_matter() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        offers = offers_of(rng)
        assert outcome(offers) == outcome(rng.sample(offers, len(offers)))


def _all_voters(offers: Sequence[Offer]) -> list[Offer]:
    return [offer for offer in offers if offer.role is VOTE]


def _receivers_too(offers: Sequence[Offer]) -> list[Offer]:
    newest = max(offer.revision for offer in offers)
    return [offer for offer in offers if offer.revision == newest]


def _tie_to_the_highest(eligible: Sequence[Offer]) -> Offer:
    votes = Counter(offer.content for offer in eligible)
    return max(eligible, key=lambda offer: (votes[offer.content], offer.member))


def _anybody_sends(offers: Sequence[Offer], block: Any, digest: bytes) -> tuple[int, ...]:
    return tuple(offer.member for offer in offers if offer.has(block, digest))


def _holders_of_anything(offers: Sequence[Offer], block: Any, digest: bytes) -> tuple[int, ...]:
    return tuple(offer.member for offer in offers if offer.sends)


def _one_holder(offers: Sequence[Offer], block: Any, digest: bytes) -> tuple[int, ...]:
    return tuple(o.member for o in offers if o.sends and o.has(block, digest))[:1]


def _first_blocks_only(content: Content, elected: Content) -> tuple[Any, ...]:
    return tuple(
        (n, 0)
        for n, (mine, wanted) in enumerate(zip(content, elected, strict=True))
        if mine.digests != wanted.digests
    )


def _whole_tensors(content: Content, elected: Content) -> tuple[Any, ...]:
    return tuple(
        (n, block)
        for n, (mine, wanted) in enumerate(zip(content, elected, strict=True))
        if mine.digests != wanted.digests
        for block in range(len(wanted.digests))
    )


MUTANTS: list[tuple[str, Callable[..., Any]]] = [
    ("_eligible", _all_voters),
    ("_eligible", _receivers_too),
    ("_most_popular", _tie_to_the_highest),
    ("_most_popular", lambda eligible: eligible[0]),
    ("_holders", _anybody_sends),
    ("_holders", _holders_of_anything),
    ("_holders", _one_holder),
    ("lacking", _first_blocks_only),
    ("lacking", _whole_tensors),
]


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_a_broken_variant_is_caught(
    name: str, mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_state, name, mutant)
    assert sweep(600)


def test_most_of_the_newest_win_and_of_two_halves_the_lowest() -> None:
    lag = [Offer(m, 1, VOTE, simple(9)) for m in (0, 1, 2)]
    plan = agree([*lag, Offer(7, 2, VOTE, simple(3)), Offer(5, 2, VOTE, simple(4))])
    assert (plan.revision, plan.content) == (2, simple(4))
    plan = agree([*lag, *(Offer(m, 2, VOTE, simple(v)) for m, v in ((5, 4), (7, 3), (8, 3)))])
    assert plan.content == simple(3)


def test_one_that_says_it_is_the_truth_outdoes_newer_ones() -> None:
    others = [Offer(m, 5, VOTE, simple(2)) for m in (1, 2)]
    plan = agree([Offer(0, 1, SEND, simple(1)), *others])
    assert (plan.revision, plan.content) == (1, simple(1))
    assert plan.fetches == {1: {0: ((0, 0),)}, 2: {0: ((0, 0),)}}
    assert plan.lacks(1) == ("w",)
    assert plan.lacks(0) == ()


def test_one_that_lags_gives_what_it_has() -> None:
    old = (entry("a", 1, 1), entry("b", 2))
    new = (entry("a", 1, 1), entry("b", 3))
    plan = agree([Offer(0, 2, VOTE, new), Offer(1, 1, VOTE, old), Offer(2, 0, RECEIVE, _else())])
    assert plan.fetches[1] == {0: ((1, 0),)}
    assert plan.fetches[2] == {0: ((0, 1), (1, 0)), 1: ((0, 0),)}
    assert plan.holders((0, 0)) == (0, 1)
    assert plan.holders((1, 0)) == (0,)


def _else() -> Content:
    return entry("a", 7, 8), entry("b", 9)


REFUSED: list[tuple[list[Offer], str]] = [
    (
        [Offer(0, 1, RECEIVE, simple(1)), Offer(4, 1, RECEIVE, simple(1))],
        "members 0, 4 only receive, so there is no state to share",
    ),
    (
        [Offer(1, 1, SEND, simple(1)), Offer(3, 1, SEND, simple(2)), Offer(5, 1, VOTE, simple(1))],
        "members 1 and 3 both say that theirs is the truth, and differ in 'w'",
    ),
    (
        [Offer(1, 1, SEND, simple(1)), Offer(3, 2, SEND, simple(1))],
        "members 1 and 3 .* differ in revisions 1 and 2",
    ),
    (
        [Offer(m, 1, VOTE, simple(1)) for m in (1, 2)] + [Offer(0, 1, VOTE, (entry("v", 1),))],
        "member 0 does not have the same tensors as member 1: it lacks 'w', only it has 'v'",
    ),
    (
        [Offer(0, 1, VOTE, simple(1)), Offer(2, 1, RECEIVE, (entry("w", 1, dtype="float16"),))],
        "member 2 .*: 'w' is float16 of shape .*, not float32 of shape",
    ),
    (
        [Offer(m, 1, VOTE, simple(1 + (m == 6)), expects=True) for m in (2, 4, 6)],
        "the state drifted .*: 'w' on member 6",
    ),
]


@pytest.mark.parametrize(("offers", "why"), REFUSED)
def test_what_does_not_go_together_is_refused_by_name(offers: list[Offer], why: str) -> None:
    with pytest.raises(StateError, match=why) as error:
        agree(offers)
    assert "\n" not in str(error.value)


def test_only_what_is_expected_not_to_have_drifted_may_not() -> None:
    steady = [Offer(m, 1, VOTE, simple(1), expects=True) for m in (0, 1)]
    plan = agree([*steady, Offer(2, 0, VOTE, simple(5))])
    assert plan.lacks(2) == ("w",)


def test_a_long_list_of_tensors_is_cut() -> None:
    many = tuple(entry(f"t{n}", 1) for n in range(9))
    with pytest.raises(StateError, match=r"it lacks 't0', 't1', 't2', 't3' and 5 more"):
        agree([Offer(0, 1, VOTE, many), Offer(1, 1, VOTE, many), Offer(2, 1, VOTE, ())])
