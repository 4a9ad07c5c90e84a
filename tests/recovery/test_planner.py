"""Plans compared with an exhaustive twin: small worlds in which nodes lack images and parity."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from ftrain.comms.protocol.messages import (
    Held,
    HeldParity,
    NodePlace,
    ProtectedNode,
    RestorePlan,
    RoundId,
    Share,
    VersionId,
)
from ftrain.recovery.protocol.plan import DurableVersion
from ftrain.recovery.protocol.planner import Memory, Rates, plan_restore
from ftrain.recovery.protocol.rebuilds import rebuilds_for, round_to_keep, rounds_of
from ftrain.snapshot.erasure.code import ErasureCode
from ftrain.snapshot.erasure.field import inverse, multiply

BYTES = 1000


@dataclass(frozen=True)
class Round:
    """As it was made; node ``n`` of it had the ranks of seat ``n``."""

    id: RoundId
    version: VersionId
    parity: int
    holders: frozenset[int]


@dataclass
class World:
    """What there is, in the words of the test."""

    seats: tuple[int, ...]  # node of each
    local: int  # ranks of each
    members: int  # nodes 0 to members - 1 made all rounds
    images: set[tuple[int, VersionId, int]]  # node, version, rank
    rounds: list[Round]
    refused: frozenset[VersionId] = frozenset()
    durable: DurableVersion | None = None
    reached: int = 0
    step_s: float = 1.0
    rates: Rates = field(default_factory=Rates)

    def ranks(self, seat: int) -> range:
        return range(seat * self.local, (seat + 1) * self.local)

    def has(self, node: int, version: VersionId, seat: int) -> bool:
        return all((node, version, rank) in self.images for rank in self.ranks(seat))

    @property
    def memory(self) -> Memory:
        """The same as the coordinator sees it."""
        held: dict[int, list[Held]] = {node: [] for node in self.seats}
        for node, version, rank in sorted(self.images):
            share = (Share(str(rank), node, 0, 1),)
            held[node].append(Held(version, rank, "", share, True, -1))
        members = tuple(
            ProtectedNode(n, tuple(self.ranks(n)), BYTES + n) for n in range(self.members)
        )
        parity = {
            node: tuple(
                HeldParity(r.id, r.version, r.parity, members)
                for r in self.rounds
                if node in r.holders
            )
            for node in self.seats
        }
        places = tuple(
            NodePlace(node, 1, seat * self.local, self.local, "", "")
            for seat, node in enumerate(self.seats)
        )
        return Memory(places, held, parity, self.reached, self.step_s)

    def plan(self) -> RestorePlan:
        return plan_restore(self.memory, self.durable, self.refused, (), self.rates)


# ---------------------------------------------------------------- the twin


def rank_of(rows: Sequence[Sequence[int]]) -> int:
    """Of a matrix over GF(2^8), by elimination."""
    left = [list(row) for row in rows]
    found = 0
    for column in range(len(left[0]) if left else 0):
        pivot = next((row for row in left if row[column]), None)
        if pivot is None:
            continue
        left.remove(pivot)
        found += 1
        scale = inverse(pivot[column])
        for row in left:
            factor = multiply(row[column], scale)
            row[:] = [a ^ multiply(factor, b) for a, b in zip(row, pivot, strict=True)]
    return found


def complete(world: World, round_: Round) -> set[int]:
    """Nodes that have all that the round needs of them."""
    return {
        n
        for n in range(world.members)
        if n in round_.holders and n in world.seats and world.has(n, round_.version, n)
    }


def spans(world: World, round_: Round, stripe: int) -> bool:
    """Whether the chunks of a stripe that are there give all others."""
    size, data = world.members, world.members - round_.parity
    code = ErasureCode(data, round_.parity)
    holders = [(stripe + row) % size for row in range(round_.parity)]
    contributors = [n for n in range(size) if n not in holders]
    whole = complete(world, round_)
    rows = [
        [int(i == j) for j in range(data)] for i, node in enumerate(contributors) if node in whole
    ]
    rows += [
        list(code.parity_rows[row])
        for row, node in enumerate(holders)
        if node in round_.holders and node in world.seats
    ]
    return rank_of(rows) == data


def gives_back(world: World, round_: Round, seat: int) -> bool:
    """Whether the images of one seat can be rebuilt."""
    size = world.members
    own = {(seat - row) % size for row in range(round_.parity)}  # stripes whose parity it kept
    stripes = [stripe for stripe in range(size) if stripe not in own]
    return seat < size and all(spans(world, round_, stripe) for stripe in stripes)


def lacking(world: World, version: VersionId) -> list[int]:
    """Seats whose node has not all of its ranks' images."""
    return [s for s, node in enumerate(world.seats) if not world.has(node, version, s)]


def kept(world: World) -> Round | None:
    """Of the rounds that give all of themselves back the one that is worth most."""
    found = []
    for round_ in world.rounds:
        whole = [spans(world, round_, stripe) for stripe in range(world.members)]
        if round_.version in world.refused or not all(whole):
            continue
        if not round_.holders.intersection(world.seats):
            continue
        lost = world.members - len(complete(world, round_))
        fits = all(gives_back(world, round_, s) for s in lacking(world, round_.version))
        found.append((fits, max(0, round_.parity - lost), round_.version, round_.id, round_))
    return max(found, key=lambda worth: worth[:-1], default=[None])[-1]


def ways(world: World) -> Iterator[tuple[float, str, VersionId | None]]:
    """Everything that the ranks could be restored from, with its price."""

    def again(step: int) -> float:
        return max(0, world.reached - step) * world.step_s

    rates, durable = world.rates, world.durable
    floor = VersionId(0, -1)
    if durable is None:
        yield again(0), "fresh", None
    else:
        floor = VersionId(durable.fence, durable.step)
        yield again(durable.step) + rates.durable_s, "durable", floor
    world_size = len(world.seats) * world.local
    for version in {version for _, version, _ in world.images}:
        somewhere = {rank for node, v, rank in world.images if v == version}
        if version in world.refused or version < floor:
            continue
        if somewhere == set(range(world_size)):
            yield again(version.step) + rates.memory_s, "memory", version
    round_ = kept(world)
    if round_ is not None and round_.version > floor:
        lost = lacking(world, round_.version)
        if lost and all(gives_back(world, round_, seat) for seat in lost):
            moved = max(BYTES + seat for seat in lost) / rates.parity_bytes_per_s
            price = again(round_.version.step) + moved + rates.parity_s
            yield price, "parity", round_.version


# ---------------------------------------------------------------- random worlds


def draw_version(draw: random.Random) -> VersionId:
    """A later epoch goes on from where the one before was."""
    epoch = draw.randint(1, 2)
    return VersionId(epoch, draw.randint(1, 5) + 4 * (epoch - 1))


def draw_world(seed: int) -> World:
    draw = random.Random(seed)
    members = draw.randint(2, 5)
    local, parity = draw.randint(1, 2), draw.randint(1, min(2, members - 1))
    seats = list(range(members))
    for seat in draw.sample(seats, draw.choice((0, 1, 1, 2, min(3, members)))):
        seats[seat] = draw.choice((seat, members + seat))
    versions = [draw_version(draw) for _ in range(draw.randint(1, 4))]
    lack = draw.choice((0.0, 0.1, 0.3))
    images = {
        (node, version, rank)
        for version in versions
        for seat, node in enumerate(seats)
        if node < members or draw.random() < 0.1
        if draw.random() >= lack
        for rank in range(seat * local, (seat + 1) * local)
        if draw.random() >= lack / 3
    }
    rounds = [
        Round(
            RoundId(draw.randint(1, 2), number),
            draw.choice(versions),
            parity,
            frozenset(n for n in range(members) if draw.random() >= lack),
        )
        for number in range(draw.randint(0, 3))
    ]
    durable = None
    if draw.random() < 0.4:
        found = draw_version(draw)
        durable = DurableVersion(found.epoch, found.step, "path", members * local, found.epoch)
    return World(
        tuple(seats),
        local,
        members,
        images,
        rounds,
        frozenset(v for v in versions if draw.random() < 0.1),
        durable,
        reached=draw.randint(0, 12),
        step_s=draw.choice((0.01, 0.2, 1.0, 5.0)),
        rates=Rates(0.0, draw.choice((0.0, 0.1)), draw.choice((1e2, 5e8)), draw.choice((0.3, 1.0))),
    )


def test_no_way_is_cheaper_than_the_plan() -> None:
    levels: Counter[str] = Counter()
    for seed in range(6000):
        world = draw_world(seed)
        plan, found = world.plan(), list(ways(world))
        prices = {(level, version): price for price, level, version in found}
        named = plan.level, plan.version
        assert named in prices, f"seed {seed}: {plan} is none of {prices}"
        least = min(prices.values())
        assert prices[named] == pytest.approx(least), f"seed {seed}: {plan}, not {prices}"
        round_ = kept(world)
        assert plan.round == (round_.id if round_ else None), f"seed {seed}"
        if plan.level == "parity":
            assert round_ is not None
            wanted = {world.seats[seat]: seat for seat in lacking(world, round_.version)}
            assert {r.node: r.lost for r in plan.rebuilds} == wanted, f"seed {seed}"
            assert all(gives_back(world, round_, r.lost) for r in plan.rebuilds), f"seed {seed}"
            assert {r.round for r in plan.rebuilds} == {plan.round}
        else:
            assert not plan.rebuilds
        levels[plan.level] += 1
    print(dict(levels))
    assert min(levels[level] for level in ("fresh", "memory", "parity", "durable")) >= 100


# ---------------------------------------------------------------- in words


def world_of(nodes: int, parity: int, lost: Sequence[int], versions: Sequence[int] = (7,)) -> World:
    """All nodes had every version and its round; the ``lost`` are replaced by empty ones."""
    seats = tuple(nodes + n if n in lost else n for n in range(nodes))
    there = [n for n in range(nodes) if n not in lost]
    images = {(n, VersionId(1, step), n) for n in there for step in versions}
    rounds = [
        Round(RoundId(1, number), VersionId(1, step), parity, frozenset(there))
        for number, step in enumerate(versions, start=1)
    ]
    return World(seats, 1, nodes, images, rounds, reached=9)


def test_one_node_more_than_parity_stands_falls_to_the_durable_version_and_says_why() -> None:
    world = world_of(4, 1, (1, 3))
    world.durable = DurableVersion(1, 2, "1/2.json", 4, 1)
    plan = world.plan()
    assert (plan.level, plan.path, plan.round, plan.rebuilds) == ("durable", "1/2.json", None, ())
    words = "step 7 of epoch 1 is lost with nodes 1, 3: 2 of 4, and its parity stands the loss of 1"
    assert words in plan.reason.split("; ")
    assert "\n" not in plan.reason


def test_as_many_as_parity_stands_are_rebuilt_and_the_sums_are_told() -> None:
    plan = world_of(5, 2, (0, 4)).plan()
    assert (plan.level, plan.version, plan.round) == ("parity", VersionId(1, 7), RoundId(1, 1))
    assert [(r.lost, r.node) for r in plan.rebuilds] == [(0, 5), (4, 9)]
    assert plan.sources == (1, 2, 3, 5, 9)
    assert plan.reason.startswith("step 7 of epoch 1 rebuilt from parity: 2 steps of 1 s again + ")
    assert "a fresh start: 9 steps of 1 s again = 9 s" in plan.reason


def test_a_newer_round_that_would_go_with_the_next_node_gives_way() -> None:
    world = world_of(5, 2, (0,), (5, 8))
    newest = world.rounds[-1]
    world.rounds[-1] = Round(newest.id, newest.version, 2, newest.holders - {3})
    plan = world.plan()
    assert (plan.version, plan.round) == (VersionId(1, 5), RoundId(1, 1))
    assert "step 8 of epoch 1 would be lost with fewer nodes more than an older one" in plan.reason


def test_of_rounds_that_stand_as_much_the_newest_version_is_kept_not_the_latest_round() -> None:
    world = world_of(3, 1, (), (8, 5))
    assert world.plan().round == RoundId(1, 1)


def test_images_without_parity_of_the_round_do_not_count() -> None:
    """Two that are no neighbours have at most one row of parity in a stripe, but nobody asks them
    for images of a round that they have nothing of."""
    world = world_of(5, 2, (0,))
    round_ = world.rounds[0]
    world.rounds[0] = Round(round_.id, round_.version, 2, round_.holders - {1, 3})
    plan = world.plan()
    assert (plan.level, plan.round) == ("fresh", None)
    assert "is lost with nodes 0, 1, 3: 3 of 5" in plan.reason


def test_ranks_that_no_node_of_a_round_had_can_not_be_rebuilt() -> None:
    world = world_of(3, 1, ())
    memory = world.memory
    moved = (NodePlace(0, 1, 0, 2, "", ""), NodePlace(1, 1, 2, 1, "", ""))
    rounds = rounds_of(memory.parity)
    rebuilds, lack = rebuilds_for(rounds[0], moved, memory.held)
    assert (rebuilds, lack) == ((), "has no parity of ranks 0 to 1")
    assert round_to_keep(rounds, moved, memory.held) == RoundId(1, 1)  # rather than none
    assert round_to_keep(rounds, moved, memory.held, {VersionId(1, 7)}) is None
