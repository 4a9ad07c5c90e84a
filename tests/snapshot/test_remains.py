"""What is said to be sound of a round, and what can be rebuilt of it, where it is a close thing."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from damage_trials import ROUND, VERSION, Memory, sealed_image, sections
from parity_samples import bundle_of, record_of_rows, write_parity

from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.checkpoint.image import ImageReader
from ftrain.comms.errors import StateError
from ftrain.comms.protocol.messages import Rebuild
from ftrain.snapshot.chunks import node_row, own_images, sound_answer, sound_chunks
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.parity import ImageRow, NodeRow, ParityReader, ParityRecord
from ftrain.snapshot.remains import HopelessError, Remains
from ftrain.snapshot.store import Image, SlotStore
from ftrain.snapshot.stripes import Chunk, RowChunk, Summer

Held = dict[int, dict[int, bytearray]]


def row_of(node: int, images: dict[int, bytearray]) -> NodeRow:
    rows = [ImageRow(rank, len(data), ImageReader(data).digest) for rank, data in images.items()]
    return NodeRow(node, tuple(rows))


def images_of(held: dict[int, bytearray]) -> list[Image]:
    return [Image(rank, True, memoryview(data), (rank, 0)) for rank, data in held.items()]


@pytest.fixture
def two_images() -> tuple[ParityRecord, dict[int, bytearray]]:
    """A node with two images, cut into pages."""
    draw = random.Random(0)
    mine = {r: bytearray(sealed_image(draw, r, 0, VERSION, 4 * PAGE_BYTES)) for r in (2, 3)}
    pages = sum(map(len, mine.values())) // PAGE_BYTES
    others = tuple(NodeRow(node, ()) for node in range(1, pages + 1))
    record = record_of_rows((row_of(0, mine), *others), 1, 0)
    assert record.chunk_bytes == PAGE_BYTES
    assert record.group.data == pages
    return record, mine


def test_only_what_is_damaged_is_not_sound(
    two_images: tuple[ParityRecord, dict[int, bytearray]],
) -> None:
    record, mine = two_images
    every = set(range(record.group.data))
    assert sound_chunks(record, images_of(mine)) == (tuple(sorted(every)), ())
    draw = random.Random(1)
    first = 0
    for data in mine.values():
        layout = ImageReader(data).header.layout
        begin = layout.data_offset // PAGE_BYTES
        whole = range(len(data) // PAGE_BYTES)
        for name, start, stop in sections(layout):
            at = draw.randrange(start, stop)
            data[at] ^= 4
            if name == "data":
                expected = range(at // PAGE_BYTES, at // PAGE_BYTES + 1)
            elif name in (
                "first header",
                "gap",
                "small section",
            ):  # what tells of the data is as it was
                expected = range(begin)
            else:
                expected = whole
            chunks, words = sound_chunks(record, images_of(mine))
            assert every - set(chunks) == {first + page for page in expected}, name
            assert len(words) == 1
            data[at] ^= 4
        first += len(whole)


def test_other_images_than_those_that_were_protected_are_not_sound(
    two_images: tuple[ParityRecord, dict[int, bytearray]],
) -> None:
    record, mine = two_images
    assert sound_chunks(record, images_of({2: mine[2]}))[0] == ()
    assert sound_chunks(record, images_of({2: mine[2], 4: mine[3]}))[0] == ()
    # What lies behind an image of another size is not where it was.
    larger = {2: mine[2] + bytes(PAGE_BYTES), 3: mine[3]}
    assert sound_chunks(record, images_of(larger))[0] == ()
    larger = {2: mine[2], 3: mine[3] + bytes(PAGE_BYTES)}
    assert sound_chunks(record, images_of(larger))[0] == tuple(range(len(mine[2]) // PAGE_BYTES))


class PlainHolder:
    """What a node holds, without a manager."""

    def __init__(self, reader: ParityReader, images: dict[int, bytearray]) -> None:
        self.reader, self.images = reader, images

    def chunk(self, _: object, chunk: int, chunk_bytes: int, nbytes: int) -> Chunk:
        pieces = bundle_of(self.images, chunk_bytes).pieces(chunk, 0, nbytes)
        return RowChunk(memoryview(b"".join(pieces)))

    def row(self, _: object, stripe: int, row: int, nbytes: int) -> Chunk:
        return RowChunk(self.reader.row(stripe, row)[:nbytes])


def test_stripes_that_a_lost_image_does_not_reach_need_not_be_left() -> None:
    draw = random.Random(2)
    pages = (1, 20, 20, 20)
    held: Held = {
        n: {n: bytearray(sealed_image(draw, n, n, VERSION, p * PAGE_BYTES))}
        for n, p in enumerate(pages)
    }
    rows = tuple(row_of(node, images) for node, images in held.items())
    summer = Summer(engine().engine)
    holders = {}
    for node in (1, 2, 3):
        record = record_of_rows(rows, 1, node)
        parity = memoryview(bytearray(record.without_digests().total_bytes))
        write_parity(parity, record, held, summer).seal()
        holders[node] = PlainHolder(ParityReader(parity), held[node])
    assert record.chunk_bytes > len(held[0][0])  # only the first stripe is needed

    def remains() -> Remains:
        answers = {n: sound_answer(h.reader, images_of(h.images)) for n, h in holders.items()}
        return Remains(Rebuild(ROUND, 0, 9), VERSION, answers)

    held[2][2][-1] ^= 1  # in the last of its chunks
    found = remains()
    room = {0: memoryview(bytearray(len(held[0][0])))}
    found.rebuild(room, holders.__getitem__, summer)
    assert room == held[0]
    assert found.damage == (
        "rank 2's image: chunk 19 does not match its digest: take another copy",
    )
    held[2][2][record.chunk_bytes + PAGE_BYTES] ^= 1
    with pytest.raises(HopelessError, match="2 chunks are sound of a stripe that needs 3"):
        remains()


@pytest.fixture
def store() -> Iterator[tuple[SlotStore, Memory]]:
    """A node with one image."""
    image = sealed_image(random.Random(3), 0, 0, VERSION)
    memory = Memory(len(image))
    memory.view[:] = image
    found = SlotStore(run_id="run", slots=1, memory_share_max=0.5)
    found.custody.set_group(VERSION.epoch, [0], None)
    found.adopt(0, 0, memory.fd)
    yield found, memory
    found.region(0, 0).close()
    memory.view.release()


def test_an_image_whose_header_is_damaged_is_not_protected(
    store: tuple[SlotStore, Memory],
) -> None:
    slots, memory = store
    assert node_row(slots, 0, VERSION).images[0].digest == ImageReader(memory.view).digest
    memory.view[PAGE_BYTES - 1] ^= 1  # the seal: what was begun before it can still be read
    with pytest.raises(StateError, match="has no valid seal"):
        node_row(slots, 0, VERSION)
    with pytest.raises(StateError, match="has no valid seal"):
        own_images(slots, VERSION)  # so that no round begins with it
