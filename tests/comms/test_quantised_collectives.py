"""Quantised all-reduces over real sockets and memory: same bits, how far off, how many bytes."""

from __future__ import annotations

import math
import random
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, product

import numpy as np
import pytest
import torch
from test_collectives import LINKS, begin_all, memory, rings

from ftrain.comms.collectives import ring as ring_module
from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
from ftrain.comms.collectives.codec import Codec, Quantised
from ftrain.comms.collectives.lanes import InLane, OutLane
from ftrain.comms.collectives.meeting import RingSettings
from ftrain.comms.collectives.quantise import QUANTISED, Quantisation, Scheme, Scratch, error_bound
from ftrain.comms.collectives.ring import Ring, Work
from ftrain.comms.errors import PeerLostError, UsageError
from ftrain.comms.protocol.chunk_frames import Head, HeadReceiver
from ftrain.comms.protocol.ring import ChunkId, Kind, Layout

CHUNK_BYTES = 4096
HOWS = [Quantisation(scheme, bits) for scheme, bits in product(Scheme, (8, 4))]
SUM, AVG = Reduction.SUM, Reduction.AVG


def normal(ranks: int, count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count + ranks)
    return [torch.randn(count, generator=generator).to(dtype) for _ in range(ranks)]


def work(how: Quantisation, arithmetic: Arithmetic, source: torch.Tensor, to: torch.Tensor) -> Work:
    size, dtype = source.numel(), source.dtype
    kind = Kind.ALL_REDUCE
    parts = memory(source), memory(to)
    return Work(kind, size, dtype.itemsize, *parts, arithmetic, quantise=how)


def all_reduced(
    made: list[Ring], how: Quantisation, reduction: Reduction, sources: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What every rank has in the end."""
    arithmetic = Arithmetic(reduction, sources[0].dtype)
    targets = [torch.full_like(source, 99) for source in sources]
    works = [work(how, arithmetic, s, t) for s, t in zip(sources, targets, strict=True)]
    for handle in begin_all(made, works.__getitem__):
        handle.wait(10)
    return targets


def assert_same_bits(results: list[torch.Tensor]) -> None:
    first = bytes(memory(results[0]))
    assert all(bytes(memory(other)) == first for other in results[1:])


def layout(count: int, ranks: int, itemsize: int) -> Layout:
    return Layout(count, ranks, CHUNK_BYTES // itemsize)


def chunks(plan: Layout) -> list[tuple[int, int, int]]:
    """Segment, first element and end of each."""
    ids = product(range(plan.ranks), range(plan.chunks))
    found = [(segment, *plan.chunk(ChunkId(segment, index))) for segment, index in ids]
    return [each for each in found if each[1] < each[2]]


def errors_and_bounds(
    how: Quantisation, reduction: Reduction, sources: list[torch.Tensor], result: torch.Tensor
) -> list[tuple[float, float, float]]:
    """Of every chunk: measured, promised, and what one quantisation of the result may be off."""
    ranks, dtype, average = len(sources), result.dtype, reduction is AVG
    found = []
    for segment, start, stop in chunks(layout(len(result), ranks, dtype.itemsize)):
        ordered = [sources[(segment + 1 + n) % ranks][start:stop].double() for n in range(ranks)]
        sums = list(accumulate(ordered))
        exact = sums[-1] / ranks if average else sums[-1]
        ranges = [(each.min().item(), each.max().item()) for each in sums]
        worst = (result[start:stop].double() - exact).abs().max().item()
        bound = error_bound(how, ranges, average=average, dtype=dtype)
        once = (exact.max() - exact.min()).item() / how.steps / 2
        found.append((worst, bound, once))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("links", LINKS)
def test_all_have_the_same_bits_within_the_bound(ranks: int, links: str) -> None:
    rng = random.Random(ranks)
    with rings(ranks, LINKS[links]) as made:
        for how, dtype in product(HOWS, QUANTISED):
            for count in (rng.choice([0, 1, 7]), 9001):
                sources = normal(ranks, count, dtype)
                before = [source.clone() for source in sources]
                reduction = rng.choice([SUM, AVG])
                results = all_reduced(made, how, reduction, sources)
                assert_same_bits(results)
                assert all(torch.equal(a, b) for a, b in zip(sources, before, strict=True))
                for worst, bound, _ in errors_and_bounds(how, reduction, sources, results[0]):
                    assert worst <= bound, (how, dtype, reduction, count)


@pytest.mark.parametrize("reduction", [SUM, AVG], ids=lambda reduction: reduction.name)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_bound_is_near_what_is_measured(ranks: int, reduction: Reduction) -> None:
    """And what is promised is needed: one quantisation alone would be closer, hops count."""
    with rings(ranks, LINKS["memory"]) as made:
        for how in HOWS:
            sources = normal(ranks, 50_000)
            result = all_reduced(made, how, reduction, sources)[0]
            found = errors_and_bounds(how, reduction, sources, result)
            worst, bound, once = (max(each) for each in zip(*found, strict=True))
            print(f"{ranks} ranks, {reduction.name}, {how}: {worst:.4f} of {bound:.4f}")
            assert bound / 10 < worst <= bound
            assert once < worst


def test_an_infinity_or_nan_is_seen_by_all_and_stays_in_its_chunk() -> None:
    ranks, count = 3, 9001
    spots = {0: math.nan, 4000: math.inf, 9000: -math.inf}
    with rings(ranks, LINKS["memory"]) as made:
        for (how, dtype), bad in product(product(HOWS, QUANTISED), range(ranks)):
            sources = normal(ranks, count, dtype)
            for place, value in spots.items():
                sources[bad][place] = value
            results = all_reduced(made, how, SUM, sources)
            assert_same_bits(results)
            for _, start, stop in chunks(layout(count, ranks, dtype.itemsize)):
                nans = results[0][start:stop].isnan()
                assert nans.all() if spots.keys() & range(start, stop) else not nans.any()


def test_equal_values_are_exact_and_one_rank_changes_nothing() -> None:
    for ranks in (1, 4):
        with rings(ranks, LINKS["tcp"]) as made:
            for how, dtype in product(HOWS, QUANTISED):
                sources = [torch.full((5000,), 1.5 * rank, dtype=dtype) for rank in range(ranks)]
                results = all_reduced(made, how, SUM, sources)
                assert all((each == 1.5 * sum(range(ranks))).all() for each in results)
    sources = normal(1, 5000)
    with rings(1, LINKS["memory"]) as made:
        assert torch.equal(all_reduced(made, HOWS[0], AVG, sources)[0], sources[0])


def test_an_average_of_float16_whose_sum_does_not_fit() -> None:
    with rings(3, LINKS["memory"]) as made:
        sources = [torch.full((3000,), 60_000.0, dtype=torch.float16) for _ in range(3)]
        assert (all_reduced(made, HOWS[0], AVG, sources)[0] == 60_000).all()
        assert all_reduced(made, HOWS[0], SUM, sources)[0].isposinf().all()


@pytest.mark.parametrize("links", LINKS)
def test_many_at_once_in_place_beside_others(links: str) -> None:
    """With one chunk of each rank in the ring, and with several; nothing waits for ever."""
    ranks, rng = 3, random.Random(5)
    counts = [rng.choice([0, 2, 999, 20_000]) for _ in range(24)]
    hows = [rng.choice([None, *HOWS]) for _ in counts]
    for starts in (1, 3):
        tensors = [[torch.full((c,), float(r + n)) for n, c in enumerate(counts)] for r in range(3)]
        with rings(ranks, replace(LINKS[links], starts=starts)) as made:

            def everything(
                rank: int,
                tensors: list[list[torch.Tensor]] = tensors,
                made: list[Ring] = made,
            ) -> None:
                plain = Arithmetic(SUM, torch.float32)
                works = [
                    replace(work(HOWS[0], plain, tensor, tensor), quantise=how)
                    for tensor, how in zip(tensors[rank], hows, strict=True)
                ]
                for handle in [made[rank].begin(each) for each in works]:
                    handle.wait(20)

            with ThreadPoolExecutor(ranks) as pool:
                list(pool.map(everything, range(ranks)))
        for number in range(len(counts)):
            assert all((each[number] == 3 + 3 * number).all() for each in tensors)


@pytest.mark.parametrize("links", ["memory", "tcp"])
def test_fewer_bytes_travel(links: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, count = 3, 150_000
    came: list[Head] = []
    opened = HeadReceiver.open

    def open_and_note(self: HeadReceiver, header: memoryview) -> Head:
        came.append(opened(self, header))
        return came[-1]

    monkeypatch.setattr(HeadReceiver, "open", open_and_note)
    plan = layout(count, ranks, 4)
    sizes = [stop - start for _, start, stop in chunks(plan)]
    for how in HOWS:
        with rings(ranks, LINKS[links]) as made:
            before = received_bytes(made)
            came.clear()
            all_reduced(made, how, SUM, normal(ranks, count))
            travelled = sum(head.nbytes for head in came)
            wanted = 2 * (ranks - 1) * sum(how.packed_bytes(size) for size in sizes)
            assert travelled == wanted  # each chunk once over all links but one, in each phase
            plain = 2 * (ranks - 1) * count * 4
            print(f"{links}, {how}: {travelled} of {plain} bytes, {travelled / plain:.4f}")
            assert travelled < plain * (how.bits / 32 + 0.003)
            if links == "tcp":  # as the kernel counts them, with 48 bytes before each chunk
                assert 0 < received_bytes(made) - before - travelled < 64 * len(came)


def received_bytes(made: list[Ring]) -> int:
    """Of all TCP connections."""
    socks = [lane._socket for ring in made for lane in ring._in.values()]  # type: ignore[attr-defined]
    total = 0
    for sock in socks:
        if sock.family != socket.AF_UNIX:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
            total += struct.unpack_from("<Q", info, 128)[0]  # tcpi_bytes_received
    return total


def test_ranks_that_quantise_otherwise_are_told() -> None:
    plain = Arithmetic(SUM, torch.float32)
    tensor = torch.ones(100)
    for other in (*HOWS[1:], None):
        with rings(3, LINKS["memory"]) as made:
            mine = work(HOWS[0], plain, tensor, tensor.clone())
            works = [mine, mine, replace(mine, quantise=other)]
            handles = [ring.begin(each) for ring, each in zip(made, works, strict=True)]
            for handle in handles:
                with pytest.raises((UsageError, PeerLostError)):  # neighbours of one that is told
                    handle.wait(5)
            with pytest.raises(UsageError, match=r"do not mean the same.*quantisation"):
                next(h for h in handles if isinstance(h.error, UsageError)).wait()


def test_what_can_not_be_quantised_is_refused() -> None:
    floats, part = Arithmetic(SUM, torch.float32), memory(torch.ones(8))
    good = Work(Kind.ALL_REDUCE, 8, 4, part, part, floats, quantise=Quantisation())
    with rings(2, LINKS["memory"]) as made:
        for bad, words in (
            (replace(good, kind=Kind.BROADCAST), "only an all-reduce can be quantised"),
            (replace(good, arithmetic=Arithmetic(Reduction.MAX, torch.float32)), "not MAX"),
            (replace(good, arithmetic=Arithmetic(SUM, torch.int32)), "int32 can't be quantised"),
        ):
            with pytest.raises(UsageError, match=words):
                made[0].begin(bad)


# ---------------------------------------------------------------- what has to be noticed


class OwnerKeepsWhatItHad(Quantised):
    """The last rank does not take what it told the others."""

    def add_and_keep(
        self,
        lane: InLane,
        own: memoryview,
        target: memoryview,
        ranks: int,
        onward: OutLane | None,
        head: Head,
    ) -> None:
        sums = self._quantiser.unpack_add(lane.borrow(), own)
        lane.give_back()
        assert onward is not None
        room = onward.room()
        self._quantiser.pack_sums(sums, room[: head.nbytes])
        np.frombuffer(target, np.float32)[:] = sums
        onward.send_room(head, room)


class QuantisesAtEachHop(Quantised):
    """What travels on is made from the values, not what came."""

    def keep(self, lane: InLane, target: memoryview, onward: OutLane | None, head: Head) -> None:
        self._quantiser.unpack(lane.borrow(), target)
        lane.give_back()
        if onward is not None:
            room = onward.room()
            self._quantiser.pack(target, room[: head.nbytes])
            onward.send_room(replace(head, value=0), room)


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize(
    ("mutant", "dtype"),
    [
        (OwnerKeepsWhatItHad, torch.float32),
        # Float32 would hide it from the zero-point scheme, whose values come to the same codes.
        (QuantisesAtEachHop, torch.bfloat16),
    ],
)
def test_parity_catches(
    mutant: type[Quantised],
    dtype: torch.dtype,
    how: Quantisation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def codec_for(
        kind: Kind, arithmetic: Arithmetic, quantise: Quantisation, scratch: Scratch
    ) -> Codec:
        return mutant(arithmetic, quantise, scratch)

    monkeypatch.setattr(ring_module, "codec_for", codec_for)
    with rings(4, RingSettings(chunk_bytes=CHUNK_BYTES)) as made:
        results = all_reduced(made, how, SUM, normal(4, 20_000, dtype))
        with pytest.raises(AssertionError):
            assert_same_bits(results)
