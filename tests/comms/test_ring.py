"""The ring's routes, in every order in which chunks can move; and barriers."""

from __future__ import annotations

import random

import pytest

from ftrain.comms.protocol.ring import ChunkId, Do, Kind, Layout, Phase, RingOperation
from ftrain.comms.protocol.ring_barrier import RingBarrier

Sum = tuple[int, ...]  # the ranks whose elements are in it, in the order in which they were added


class World:
    """Ranks with links of ``starts + 1`` places, and the results that each has."""

    def __init__(self, kind: Kind, layout: Layout, root: int, starts: int, rooms: int) -> None:
        self.ranks = layout.ranks
        self.operations = [RingOperation(kind, rank, layout, root) for rank in range(self.ranks)]
        self.links: list[list[tuple[Phase, ChunkId, Sum]]] = [[] for _ in range(self.ranks)]
        self.startable = [starts] * self.ranks
        self.rooms = rooms
        self.results: list[dict[ChunkId, Sum]] = [{} for _ in range(self.ranks)]

    def moves(self) -> list[tuple[bool, int]]:
        """Every rank that can start a chunk, and every one that can take what is next."""
        found = []
        for rank, operation in enumerate(self.operations):
            room = len(self.links[(rank + 1) % self.ranks]) < self.rooms
            if operation.left_to_start and self.startable[rank] and room:
                found.append((True, rank))
            if self.links[rank]:
                phase, chunk, _ = self.links[rank][0]
                if room or operation.takes_out(phase, chunk):
                    found.append((False, rank))
        return found

    def start(self, rank: int) -> None:
        phase, chunk = self.operations[rank].start()
        self.startable[rank] -= 1
        self.send(rank, phase, chunk, (rank,))

    def send(self, rank: int, phase: Phase, chunk: ChunkId, value: Sum) -> None:
        self.links[(rank + 1) % self.ranks].append((phase, chunk, value))

    def take(self, rank: int) -> None:
        phase, chunk, value = self.links[rank].pop(0)
        operation = self.operations[rank]
        self.startable[rank] += operation.takes_out(phase, chunk)
        do = operation.arrived(phase, chunk)
        if do is Do.ADD_AND_SEND:
            self.send(rank, Phase.REDUCE, chunk, (*value, rank))
        elif do in (Do.ADD_AND_KEEP, Do.ADD_KEEP_AND_SEND):
            self.results[rank][chunk] = (*value, rank)
            if do is Do.ADD_KEEP_AND_SEND:
                self.send(rank, Phase.GATHER, chunk, (*value, rank))
        elif do is not Do.NOTHING:
            self.results[rank][chunk] = value
            if do is Do.KEEP_AND_SEND:
                self.send(rank, Phase.GATHER, chunk, value)
            elif do is Do.KEEP_AND_TELL:
                self.send(rank, Phase.SPENT, chunk, ())

    def run(self, rng: random.Random) -> bool:
        """Move in any order until all is done; False when nothing can move before."""
        while not all(operation.done for operation in self.operations):
            moves = self.moves()
            if not moves:
                return False
            starts, rank = rng.choice(moves)
            (self.start if starts else self.take)(rank)
        assert not any(self.links)
        return True


def expected(kind: Kind, layout: Layout, root: int, rank: int) -> dict[ChunkId, Sum]:
    ranks = layout.ranks
    everything = {ChunkId(s, i) for s in range(ranks) for i in range(layout.chunks)}
    if ranks == 1:
        return {}
    if kind is Kind.BROADCAST:
        return {} if rank == root else dict.fromkeys(everything, (root,))
    if kind is Kind.ALL_GATHER:
        return {c: (c.segment,) for c in everything if c.segment != rank}
    order = {c: tuple((c.segment + 1 + n) % ranks for n in range(ranks)) for c in everything}
    if kind is Kind.REDUCE_SCATTER:
        return {chunk: value for chunk, value in order.items() if chunk.segment == rank}
    return order


def test_every_rank_gets_the_same_whatever_moves_when() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        layout = Layout(rng.randint(0, 40), rng.randint(1, 6), rng.randint(1, 5))
        kind, root, starts = rng.choice(list(Kind)), rng.randrange(layout.ranks), rng.randint(1, 3)
        world = World(kind, layout, root, starts, starts + 1)
        assert world.run(rng), f"seed {seed}: nothing can move"
        for rank, results in enumerate(world.results):
            assert results == expected(kind, layout, root, rank), f"seed {seed}, rank {rank}"
        assert world.startable == [starts] * layout.ranks


def test_with_one_place_less_on_each_link_the_ring_can_fill_up() -> None:
    """Why a rank may start one chunk less than a link has places."""
    stuck = 0
    for seed in range(200):
        world = World(Kind.ALL_REDUCE, Layout(40, 4, 2), 0, starts=3, rooms=3)
        stuck += not world.run(random.Random(seed))
    assert stuck


def test_chunks_cover_every_element_once() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        layout = Layout(rng.randint(0, 100), rng.randint(1, 9), rng.randint(1, 20))
        seen: list[int] = []
        for segment in range(layout.ranks):
            for index in range(layout.chunks):
                start, stop = layout.chunk(ChunkId(segment, index))
                assert 0 <= stop - start <= layout.chunk_elements
                seen += range(start, stop)
            assert layout.segment(segment)[1] == len(seen)
        assert seen == list(range(layout.count))


def test_a_chunk_that_can_not_come_is_refused() -> None:
    operation = RingOperation(Kind.ALL_REDUCE, 1, Layout(8, 4, 2))
    operation.arrived(Phase.REDUCE, ChunkId(3, 0))
    for phase, chunk in (
        (Phase.REDUCE, ChunkId(3, 0)),  # again
        (Phase.REDUCE, ChunkId(0, 0)),  # begins here
        (Phase.GATHER, ChunkId(1, 0)),  # ends here
        (Phase.SPENT, ChunkId(1, 0)),
        (Phase.REDUCE, ChunkId(4, 0)),
        (Phase.REDUCE, ChunkId(2, 1)),
    ):
        with pytest.raises(ValueError, match="is not awaited"):
            operation.arrived(phase, chunk)


def test_nobody_passes_a_barrier_before_all_have_come() -> None:
    for seed in range(1000):
        rng = random.Random(seed)
        ranks = rng.randint(1, 7)
        barriers = [RingBarrier(ranks) for _ in range(ranks)]
        words: list[list[int]] = [[] for _ in range(ranks)]
        to_come, said = set(range(ranks)), 0
        while to_come or any(words):
            rank = rng.choice([*to_come, *(n for n in range(ranks) if words[n])])
            if rank in to_come and (not words[rank] or rng.random() < 0.5):
                to_come.remove(rank)
                barriers[rank].reach()
            else:
                barriers[rank].heard(words[rank].pop(0))
            if count := barriers[rank].to_say():
                words[(rank + 1) % ranks].append(count)
                said += 1
            assert not (to_come and any(barrier.passed for barrier in barriers))
        assert all(barrier.passed for barrier in barriers)
        assert said <= ranks * (ranks - 1)


def test_a_barrier_refuses_what_can_not_be() -> None:
    for count in (0, -1, 3):
        with pytest.raises(ValueError, match="of 3 ranks"):
            RingBarrier(3).heard(count)
