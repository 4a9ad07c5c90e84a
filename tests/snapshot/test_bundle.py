"""Whatever the sizes, any m lost nodes' images come back from what the others hold."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from ftrain.comms.errors import StateError
from ftrain.snapshot.bundle import Bundle
from ftrain.snapshot.erasure.code import ErasureCode
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.protocol.placement import ParityGroup, chunk_bytes

PAGE = 64


def read(bundle: Bundle, chunk: int, length: int) -> bytes:
    data = b"".join(bundle.pieces(chunk, 0, bundle.present(chunk)))
    return data.ljust(length, b"\0")


def test_pieces_are_the_bytes_in_order() -> None:
    draw = random.Random(1)
    for _ in range(200):
        images = {
            rank: draw.randbytes(draw.randrange(4) * PAGE) for rank in range(draw.randrange(5))
        }
        length = max(PAGE, draw.randrange(4) * PAGE)
        bundle = Bundle({rank: memoryview(data) for rank, data in images.items()}, length)
        whole = b"".join(images[rank] for rank in sorted(images))
        assert bundle.nbytes == len(whole)
        for chunk in range(-(-len(whole) // length)):
            part = whole[chunk * length : (chunk + 1) * length]
            assert bundle.present(chunk) == len(part)
            first, last = sorted(draw.randrange(len(part) + 1) for _ in range(2))
            assert b"".join(bundle.pieces(chunk, first, last)) == part[first:last]
        with pytest.raises(StateError, match="has 0 bytes, not those from 0 to 1"):
            list(bundle.pieces(len(whole) // length + 1, 0, 1))


@pytest.mark.parametrize("count", range(2, 9))
def test_every_loss_of_at_most_m_nodes_is_made_good(count: int) -> None:
    draw = random.Random(count)
    add = engine().engine.add
    for parity in range(1, min(4, count)):
        group = ParityGroup(tuple(draw.sample(range(50), count)), parity)
        images = {
            node: {
                rank: draw.randbytes(draw.randrange(5) * PAGE) for rank in range(draw.randrange(3))
            }
            for node in group.nodes
        }
        sizes = [sum(map(len, mine.values())) for mine in images.values()]
        length = chunk_bytes(sizes, group.data, PAGE)
        bundles = {
            node: Bundle({rank: memoryview(data) for rank, data in mine.items()}, length)
            for node, mine in images.items()
        }
        code = ErasureCode(group.data, parity)
        stripes = []  # of all chunks, the data first
        for stripe in range(count):
            data = [
                read(bundles[node], group.stripes_of(node).index(stripe), length)
                for node in group.contributors(stripe)
            ]
            rows = [bytearray(length) for _ in range(parity)]
            for row, factors in zip(rows, code.parity_rows, strict=True):
                for factor, chunk in zip(factors, data, strict=True):
                    add(factor, memoryview(chunk), memoryview(row))
            stripes.append([*data, *map(bytes, rows)])
        for lost in combinations(group.nodes, parity):
            for stripe, chunks in enumerate(stripes):
                places = (*group.contributors(stripe), *group.holders(stripe))
                gone = [number for number, node in enumerate(places) if node in lost]
                present = [number for number in range(count) if number not in gone]
                for number, factors in zip(gone, code.recovery_rows(gone, present), strict=True):
                    rebuilt = bytearray(length)
                    for factor, source in zip(factors, present, strict=False):
                        add(factor, memoryview(chunks[source]), memoryview(rebuilt))
                    assert rebuilt == chunks[number]
