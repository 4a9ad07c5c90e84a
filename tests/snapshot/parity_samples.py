"""Images of several nodes as plain bytes, the parity that each node keeps, and rebuilding."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from functools import partial

import pytest

from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.comms.errors import CorruptionError
from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.bundle import Bundle
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.parity import ImageRow, NodeRow, ParityReader, ParityRecord, ParityWriter
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
"""By node and rank."""


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
    """What ``holder`` keeps parity of."""
    rows = tuple(
        NodeRow(
            node,
            tuple(ImageRow(r, len(data), digest_of(data).hex()) for r, data in mine.items()),
        )
        for node, mine in images.items()
    )
    return record_of_rows(rows, parity, holder)


def record_of_rows(rows: tuple[NodeRow, ...], parity: int, holder: int) -> ParityRecord:
    """The same, of images that are described already."""
    return ParityRecord(
        run_id="run",
        epoch=3,
        round=17,
        version=VersionId(3, 40),
        holder=holder,
        incarnation=5,
        parity=parity,
        chunk_bytes=chunk_bytes([row.nbytes for row in rows], len(rows) - parity, PAGE_BYTES),
        nodes=rows,
    )


def bundle_of(images: Mapping[int, bytes | bytearray], length: int) -> Bundle:
    """Images of one node, in chunks of ``length``."""
    return Bundle({rank: memoryview(data) for rank, data in images.items()}, length)


def write_parity(
    room: memoryview,
    record: ParityRecord,
    images: Mapping[int, Mapping[int, bytes | bytearray]],
    summer: Summer,
) -> ParityWriter:
    """All of the parity that the record's holder keeps, but not sealed."""
    writer = ParityWriter(room, record)
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
        summer.fill(writer.rows[number], terms, partial(writer.finish_block, number))
    return writer


def encoded(images: Images, parity: int, holder: int) -> ParityReader:
    """What ``holder`` keeps."""
    record = record_of(images, parity, holder)
    room = memoryview(bytearray(record.without_digests().total_bytes + 100))
    writer = write_parity(room, record, images, Summer(engine().engine))
    with pytest.raises(CorruptionError, match="holds no parity"):
        ParityReader(room)
    sealed = writer.seal()
    reader = ParityReader(room)
    assert reader.record == sealed
    assert not list(reader.damaged())
    return reader


def rebuilt(
    images: Images,
    held: Mapping[int, ParityReader],
    node: int,
    there: Collection[int],
    summer: Summer,
) -> dict[int, bytearray]:
    """The images of a lost node, from what the nodes ``there`` have."""
    record = held[node].record

    def open_part(part: Part, count: int) -> Chunk:
        assert part.node in there
        if part.row >= 0:
            return RowChunk(held[part.node].row(part.stripe, part.row)[:count])
        bundle = bundle_of(images[part.node], record.chunk_bytes)
        return BundleChunk(bundle, record.group.stripes_of(part.node).index(part.stripe))

    room = {image.rank: bytearray(image.nbytes) for image in record.of(node).images}
    bundle = bundle_of(room, record.chunk_bytes)
    rebuild(record, node, bundle, lambda _: there, open_part, summer)
    return room
