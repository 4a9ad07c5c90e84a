"""Parity as it lies in memory, and what is damaged of it; for every loss see the proofs."""

from __future__ import annotations

import random

import pytest
from parity_samples import Images, drawn, encoded, rebuilt, record_of

from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.comms.errors import CorruptionError, MemoryShortError, StateError
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.parity import BLOCK_BYTES, ParityReader, ParityWriter
from ftrain.snapshot.stripes import Summer


def test_blocks_that_images_share_and_chunks_of_many_blocks() -> None:
    draw = random.Random(0)
    images: Images = {
        0: {0: draw.randbytes(3 * PAGE_BYTES), 1: draw.randbytes(2 * BLOCK_BYTES + PAGE_BYTES)},
        1: {2: draw.randbytes(BLOCK_BYTES - PAGE_BYTES), 3: draw.randbytes(5 * PAGE_BYTES)},
        2: {4: draw.randbytes(BLOCK_BYTES)},
    }
    held = {node: encoded(images, 1, node) for node in images}
    assert held[1].record.blocks == 2
    summer = Summer(engine().engine)
    assert rebuilt(images, held, 0, (1, 2), summer) == images[0]
    with pytest.raises(StateError, match="of a stripe that needs 2"):
        rebuilt(images, held, 0, (1,), summer)


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
