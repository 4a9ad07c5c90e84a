"""Parity as it lies in memory, and images rebuilt from it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import combinations

import pytest

from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.comms.errors import CorruptionError, MemoryShortError, StateError
from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.bundle import Bundle
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.parity import (
    BLOCK_BYTES,
    ImageRow,
    NodeRow,
    ParityReader,
    ParityRecord,
    ParityWriter,
)
from ftrain.snapshot.protocol.placement import chunk_bytes
from ftrain.snapshot.stripes import (
    BundleChunk,
    Chunk,
    Part,
    RowChunk,
    Summer,
    Term,
    parity_parts,
    rebuild,
)

Images = dict[int, dict[int, bytes]]


def drawn(draw: random.Random, nodes: int, pages_max: int) -> Images:
    """Images of up to three ranks on each node, some of them empty."""
    rank = 0
    images: Images = {}
    for node in draw.sample(range(40), nodes):
        mine = {}
        for _ in range(draw.randrange(4)):
            mine[rank] = draw.randbytes(PAGE_BYTES * draw.randrange(pages_max))
            rank += 1
        images[node] = mine
    return images


def record_of(images: Images, parity: int, holder: int) -> ParityRecord:
    rows = tuple(
        NodeRow(
            node,
            tuple(ImageRow(r, len(data), digest_of(data).hex()) for r, data in mine.items()),
        )
        for node, mine in images.items()
    )
    sizes = [row.nbytes for row in rows]
    return ParityRecord(
        run_id="run",
        epoch=3,
        round=17,
        version=VersionId(3, 40),
        holder=holder,
        incarnation=5,
        parity=parity,
        chunk_bytes=chunk_bytes(sizes, len(images) - parity, PAGE_BYTES),
        nodes=rows,
    )


def bundle_of(images: Mapping[int, bytes | bytearray], length: int) -> Bundle:
    return Bundle({rank: memoryview(data) for rank, data in images.items()}, length)


def encoded(images: Images, parity: int, holder: int) -> ParityReader:
    """What ``holder`` keeps."""
    record = record_of(images, parity, holder)
    room = memoryview(bytearray(record.without_digests().total_bytes + 100))
    writer = ParityWriter(room, record)
    summer = Summer(engine().engine)
    for number, held in enumerate(writer.record.rows):
        terms = [
            Term(
                part.factor,
                BundleChunk(
                    bundle_of(images[part.node], record.chunk_bytes),
                    record.group.stripes_of(part.node).index(held.stripe),
                ),
            )
            for part in parity_parts(record, held.stripe, held.row)
        ]
        summer.fill(
            writer.rows[number], terms, lambda block, row=number: writer.finish_block(row, block)
        )
    with pytest.raises(CorruptionError, match="holds no parity"):
        ParityReader(room)
    sealed = writer.seal()
    reader = ParityReader(room)
    assert reader.record == sealed
    assert not list(reader.damaged())
    return reader


@pytest.mark.parametrize("nodes", range(2, 9))
def test_lost_images_are_rebuilt(nodes: int) -> None:
    draw = random.Random(nodes)
    for parity in range(1, min(4, nodes)):
        images = drawn(draw, nodes, 8)
        held = {node: encoded(images, parity, node) for node in images}
        length = held[next(iter(images))].record.chunk_bytes
        for count in range(1, parity + 1):
            for lost in (
                draw.sample(list(combinations(images, count)), 3)
                if nodes > 4
                else (combinations(images, count))
            ):
                there = [node for node in images if node not in lost]
                record = held[there[0]].record

                def open_part(part: Part, count: int) -> Chunk:
                    assert part.node in there  # noqa: B023
                    if part.row >= 0:
                        return RowChunk(held[part.node].row(part.stripe, part.row)[:count])  # noqa: B023
                    stripes = record.group.stripes_of(part.node)  # noqa: B023
                    bundle = bundle_of(images[part.node], length)  # noqa: B023
                    return BundleChunk(bundle, stripes.index(part.stripe))

                for node in lost:
                    room = {i.rank: bytearray(i.nbytes) for i in record.of(node).images}
                    bundle = bundle_of(room, length)
                    rebuild(
                        record,
                        node,
                        bundle,
                        lambda _, there=there: there,
                        open_part,
                        Summer(engine().engine),
                    )
                    assert room == images[node]


def test_blocks_that_images_share_and_chunks_of_many_blocks() -> None:
    draw = random.Random(0)
    images: Images = {
        0: {0: draw.randbytes(3 * PAGE_BYTES), 1: draw.randbytes(2 * BLOCK_BYTES + PAGE_BYTES)},
        1: {2: draw.randbytes(BLOCK_BYTES - PAGE_BYTES), 3: draw.randbytes(5 * PAGE_BYTES)},
        2: {4: draw.randbytes(BLOCK_BYTES)},
    }
    held = {node: encoded(images, 1, node) for node in images}
    record = held[1].record
    assert record.blocks == 2

    def open_part(part: Part, count: int) -> Chunk:
        if part.row >= 0:
            return RowChunk(held[part.node].row(part.stripe, part.row)[:count])
        bundle = bundle_of(images[part.node], record.chunk_bytes)
        return BundleChunk(bundle, record.group.stripes_of(part.node).index(part.stripe))

    room = {image.rank: bytearray(image.nbytes) for image in record.of(0).images}
    bundle = bundle_of(room, record.chunk_bytes)
    rebuild(record, 0, bundle, lambda _: (1, 2), open_part, Summer(engine().engine))
    assert room == images[0]
    with pytest.raises(StateError, match="of a stripe that needs 2"):
        rebuild(record, 0, bundle, lambda _: (1,), open_part, Summer(engine().engine))


def test_every_flipped_bit_is_noticed() -> None:
    draw = random.Random(1)
    images = drawn(draw, 4, 6)
    reader = encoded(images, 1, next(iter(images)))
    record = reader.record
    sound = bytearray(record.total_bytes)
    sound[:] = reader._view
    body = next(at for at in range(record.data_offset, 0, -1) if sound[at - 1])
    for _ in range(400):
        torn = bytearray(sound)
        at = draw.randrange(body if draw.random() < 0.5 else len(sound))
        torn[at] ^= 1 << draw.randrange(8)
        try:
            again = ParityReader(memoryview(torn))
        except CorruptionError:
            continue
        if at >= record.data_offset:
            assert list(again.damaged()) == [(0, (at - record.data_offset) // BLOCK_BYTES)]
        else:
            assert at >= body  # zeros behind the record: they are read by nobody
    with pytest.raises(CorruptionError, match=r"of .* bytes"):
        ParityReader(memoryview(sound)[:-1])
    with pytest.raises(CorruptionError, match="only 0 bytes"):
        ParityReader(memoryview(b""))


def test_too_little_room_is_said() -> None:
    record = record_of(drawn(random.Random(2), 3, 4), 1, 0)
    record = record_of({5: {0: bytes(PAGE_BYTES)}, 7: {}}, 1, 7)
    with pytest.raises(MemoryShortError, match="its slot has 4096"):
        ParityWriter(memoryview(bytearray(PAGE_BYTES)), record)
    with pytest.raises(StateError, match="node 3 is not of the parity group"):
        record.of(3)
