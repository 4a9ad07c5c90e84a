"""Collectives over real sockets and shared memory: values, sameness, concurrency, mistakes."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
from ftrain.comms.collectives.meeting import Meeting, RingSettings
from ftrain.comms.collectives.ring import Ring
from ftrain.comms.collectives.work import Handle, Work
from ftrain.comms.errors import PeerLostError, UsageError
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import Kind

SECRET = bytes(32)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)
LINKS = {
    "memory": RingSettings(chunk_bytes=4096),
    "tcp": RingSettings(chunk_bytes=4096, share_memory=False),
    "tcp, 3 connections": RingSettings(chunk_bytes=4096, share_memory=False, connections=3),
}


@contextmanager
def rings(ranks: int, settings: RingSettings) -> Iterator[list[Ring]]:
    """So many ranks, all in this process."""
    meetings = [Meeting(Identity("run", "rank", n, 7), SECRET) for n in range(ranks)]
    places = [meeting.place for meeting in meetings]
    with ThreadPoolExecutor(ranks) as pool:
        made = list(pool.map(lambda m: m.join(1, places, settings, timeout_s=5), meetings))
        try:
            yield made
        finally:
            list(pool.map(lambda ring: ring.close(), made))
            for meeting in meetings:
                meeting.close()


def memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")


def values(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(-9, 9, (count,), generator=generator).to(dtype)


def reduced(how: Arithmetic, sources: list[torch.Tensor], owner: int) -> torch.Tensor:
    """In the ring's order, so that every bit has to be the same."""
    ranks = len(sources)
    ordered = [sources[(owner + 1 + n) % ranks] for n in range(ranks)]
    total = ordered[0].clone()
    for tensor in ordered[1:]:
        total = {
            Reduction.MIN: torch.minimum,
            Reduction.MAX: torch.maximum,
            Reduction.PROD: torch.mul,
        }.get(how.reduction, torch.add)(total, tensor)
    return total / ranks if how.reduction is Reduction.AVG else total


def begin_all(rings: list[Ring], works: Callable[[int], Work]) -> list[Handle]:
    return [ring.begin(works(rank)) for rank, ring in enumerate(rings)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("links", LINKS)
def test_every_kind_gives_what_it_should(ranks: int, links: str) -> None:
    rng = random.Random(ranks)
    with rings(ranks, LINKS[links]) as made:
        for round_ in range(24):
            dtype, kind = rng.choice(DTYPES), list(Kind)[round_ % 4]
            how = Arithmetic(
                rng.choice([r for r in Reduction if dtype.is_floating_point or r != Reduction.AVG]),
                dtype,
            )
            one_kind(made, kind, how, rng.choice([0, 1, 7, 3000, 40000]), round_ % ranks)


def one_kind(made: list[Ring], kind: Kind, how: Arithmetic, count: int, root: int) -> None:
    ranks, dtype = len(made), how.dtype
    edges = [count * n // ranks for n in range(ranks + 1)]
    if kind in (Kind.ALL_GATHER, Kind.REDUCE_SCATTER):
        count -= count % ranks
        edges = [count * n // ranks for n in range(ranks + 1)]
    whole = [values(dtype, count, 10 * count + rank) for rank in range(ranks)]
    own = [edges[r + 1] - edges[r] for r in range(ranks)]
    sources = [t[: own[r]] if kind is Kind.ALL_GATHER else t for r, t in enumerate(whole)]
    sizes = [own[r] if kind is Kind.REDUCE_SCATTER else count for r in range(ranks)]
    targets = [torch.zeros(size, dtype=dtype) for size in sizes]
    if kind is Kind.BROADCAST:
        targets[root].copy_(whole[root])
    before = [source.clone() for source in sources]

    def work(rank: int) -> Work:
        source, target = memory(sources[rank]), memory(targets[rank])
        return Work(kind, count, dtype.itemsize, source, target, how, root)

    for handle in begin_all(made, work):
        handle.wait(10)
    assert all(torch.equal(a, b) for a, b in zip(sources, before, strict=True))  # untouched
    if kind is Kind.BROADCAST:
        assert all(torch.equal(target, whole[root]) for target in targets)
    elif kind is Kind.ALL_GATHER:
        assert all(torch.equal(target, torch.cat(sources)) for target in targets)
    else:
        bounds = [segment_of(count, ranks, n) for n in range(ranks)]
        parts = [reduced(how, [s[a:b] for s in sources], n) for n, (a, b) in enumerate(bounds)]
        for rank, target in enumerate(targets):
            wanted = parts[rank] if kind is Kind.REDUCE_SCATTER else torch.cat(parts)
            assert torch.equal(target, wanted.to(dtype)), (kind, how, count)


def segment_of(count: int, ranks: int, number: int) -> tuple[int, int]:
    size, longer = divmod(count, ranks)
    start = number * size + min(number, longer)
    return start, start + size + (number < longer)


@pytest.mark.parametrize("links", LINKS)
def test_many_at_once_in_place(links: str) -> None:
    """More chunks than the ring has room for, in operations of all sizes."""
    ranks, how = 3, Arithmetic(Reduction.SUM, torch.float32)
    counts = [random.Random(n).choice([0, 5, 999, 50_000]) for n in range(40)]
    with rings(ranks, LINKS[links]) as made:
        tensors = [[torch.full((c,), float(r + n)) for n, c in enumerate(counts)] for r in range(3)]

        def everything(rank: int) -> None:
            handles = []
            for tensor in tensors[rank]:
                part = memory(tensor)
                work = Work(Kind.ALL_REDUCE, tensor.numel(), 4, part, part, how)
                handles.append(made[rank].begin(work))
            for handle in handles:
                handle.wait(20)

        with ThreadPoolExecutor(ranks) as pool:
            list(pool.map(everything, range(ranks)))
    for per_rank in tensors:
        for number, tensor in enumerate(per_rank):
            assert torch.all(tensor == 3 + 3 * number)


def test_ranks_that_do_not_mean_the_same_are_told() -> None:
    how = Arithmetic(Reduction.SUM, torch.float32)
    with rings(3, LINKS["memory"]) as made:
        parts = [memory(torch.zeros(count)) for count in (100, 100, 101)]
        works = [Work(Kind.ALL_REDUCE, p.nbytes // 4, 4, p, p, how) for p in parts]
        handles = [ring.begin(work) for ring, work in zip(made, works, strict=True)]
        for handle in handles:
            with pytest.raises((UsageError, PeerLostError)):  # the neighbour of one that is told
                handle.wait(5)
        with pytest.raises(UsageError, match="do not mean the same"):
            next(h for h in handles if isinstance(h.error, UsageError)).wait()


def test_what_can_not_be_reduced_is_refused() -> None:
    with pytest.raises(UsageError, match="bool can't be reduced; these can: float32"):
        Arithmetic(Reduction.SUM, torch.bool)
    with pytest.raises(UsageError, match="no average"):
        Arithmetic(Reduction.AVG, torch.int32)


def test_what_is_begun_together_ends_together_whatever_holds_it_up() -> None:
    """Own chunks may be the last that an operation waits for: others took all starts there are."""
    settings = RingSettings(chunk_bytes=4096, starts=1)
    for links in (settings, replace(settings, share_memory=False)):
        with rings(3, links) as made:
            for round_ in range(5):
                rng = random.Random(round_)
                works = [
                    some_work(rng, rng.choice(list(Kind)), rng.randrange(3)) for _ in range(12)
                ]
                handles = [[ring.begin(w[rank]) for w in works] for rank, ring in enumerate(made)]
                for per_rank in handles:
                    for handle in per_rank:
                        handle.wait(20)


def some_work(rng: random.Random, kind: Kind, root: int) -> list[Work]:
    count = rng.choice([3, 3000, 30_000])
    own = count // 3
    how = Arithmetic(Reduction.MAX, torch.float32)
    takes = own if kind is Kind.ALL_GATHER else count
    leaves = own if kind is Kind.REDUCE_SCATTER else count
    return [
        Work(kind, count, 4, memory(torch.ones(takes)), memory(torch.ones(leaves)), how, root)
        for _ in range(3)
    ]


def test_thousands_of_operations_at_once() -> None:
    how = Arithmetic(Reduction.SUM, torch.int32)
    with rings(2, LINKS["memory"]) as made:
        tensors = [torch.ones(3000, dtype=torch.int32) for _ in range(2)]
        handles = []
        for rank, ring in enumerate(made):
            for n in range(3000):
                part = memory(tensors[rank][n : n + 1])
                handles.append(ring.begin(Work(Kind.ALL_REDUCE, 1, 4, part, part, how)))
        for handle in handles:
            handle.wait(60)
        assert all(bool((tensor == 2).all()) for tensor in tensors)


@pytest.mark.parametrize("links", LINKS)
def test_who_is_done_may_leave(links: str) -> None:
    """Others may not know yet that everybody is done."""
    how = Arithmetic(Reduction.SUM, torch.float32)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(15):
            meetings = [Meeting(Identity("run", "rank", n, 7), SECRET) for n in range(3)]
            places = [meeting.place for meeting in meetings]

            def one(meeting: Meeting, places: list[Place] = places) -> None:
                ring = meeting.join(1, places, LINKS[links], timeout_s=5)
                part = memory(torch.ones(2000))
                ring.begin(Work(Kind.ALL_REDUCE, 2000, 4, part, part, how)).wait(10)
                ring.close()
                ring.close()  # again does nothing
                meeting.close()

            list(pool.map(one, meetings))


def test_memory_on_one_side_and_connections_on_the_other() -> None:
    how = Arithmetic(Reduction.SUM, torch.float32)
    settings = RingSettings(chunk_bytes=4096, connections=3)
    meetings = [Meeting(Identity("run", "rank", n, 7), SECRET) for n in range(4)]
    for elsewhere in meetings[2:]:
        elsewhere.place = replace(elsewhere.place, host="another")
    places = [meeting.place for meeting in meetings]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda m: m.join(1, places, settings, timeout_s=5), meetings))
        for round_ in range(10):
            tensors = [torch.arange(50_000.0) * (rank + round_) for rank in range(4)]
            works = [
                Work(Kind.ALL_REDUCE, 50_000, 4, memory(tensor), memory(tensor), how)
                for tensor in tensors
            ]
            for handle in begin_all(made, works.__getitem__):
                handle.wait(10)
            assert all(torch.equal(t, torch.arange(50_000.0) * (6 + 4 * round_)) for t in tensors)
        list(pool.map(lambda ring: ring.close(), made))
    for meeting in meetings:
        meeting.close()


def test_what_can_not_be_a_collective_is_refused() -> None:
    how, part = Arithmetic(Reduction.SUM, torch.float32), memory(torch.ones(8))
    with rings(2, LINKS["memory"]) as made:
        for work, words in (
            (Work(Kind.ALL_REDUCE, 9, 4, part, part, how), "has 32 bytes, not 9 elements"),
            (Work(Kind.ALL_REDUCE, 8, 4, part, part), "how chunks are combined"),
            (Work(Kind.BROADCAST, 8, 4, part, part, root=2), "no rank 2 in a ring of 2"),
            (Work(Kind.ALL_REDUCE, 8, 4, part, part.toreadonly(), how), "has to be writable"),
            (Work(Kind.ALL_GATHER, 16, 4, part, part), "it has 32 bytes"),
        ):
            with pytest.raises(UsageError, match=words):
                made[0].begin(work)
    for bad in ({"chunk_bytes": 1}, {"starts": 0}, {"connections": 0}):
        with pytest.raises(UsageError):
            RingSettings(**bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a host name"):
        Meeting(Identity("run", "rank", 0, 7), SECRET, bind="0.0.0.0")


def test_a_neighbour_that_is_another_one_or_does_not_come() -> None:
    meetings = [Meeting(Identity("run", "rank", n, 7), SECRET) for n in range(2)]
    with ThreadPoolExecutor(2) as pool:
        gone = replace(meetings[1].place, incarnation=8)
        with pytest.raises(PeerLostError, match="answered in its place"):
            meetings[0].join(1, [meetings[0].place, gone], LINKS["tcp"], timeout_s=1)
        places = [meeting.place for meeting in meetings]
        with pytest.raises(PeerLostError, match="did not come in time"):
            meetings[0].join(1, places, LINKS["tcp"], timeout_s=0.2)
        # The lanes of the attempts before are not mistaken for those of the next one.
        made = list(pool.map(lambda m: m.join(2, places, LINKS["tcp"], timeout_s=5), meetings))
        part = [memory(torch.ones(1)) for _ in made]
        how = Arithmetic(Reduction.SUM, torch.float32)
        for handle in begin_all(made, lambda r: Work(Kind.ALL_REDUCE, 1, 4, part[r], part[r], how)):
            handle.wait(5)
        list(pool.map(lambda ring: ring.close(), made))
    for meeting in meetings:
        meeting.close()


def test_strangers_do_not_keep_members_out() -> None:
    meetings = [Meeting(Identity("run", "rank", n, 7), SECRET) for n in range(2)]
    places = [meeting.place for meeting in meetings]
    host, _, port = places[1].address.rpartition(":")
    strangers = [socket.create_connection((host, int(port))) for _ in range(150)]
    strangers[0].sendall(os.urandom(1000))
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda m: m.join(1, places, LINKS["tcp"], timeout_s=5), meetings))
        list(pool.map(lambda ring: ring.close(), made))
    for stranger in strangers:
        stranger.close()
    for meeting in meetings:
        meeting.close()
