"""Images: round trips, every damage noticed, unfinished ones finished by another process."""

from __future__ import annotations

import mmap
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from image_samples import (
    CHUNK_BYTES,
    SMALL,
    TOPOLOGY,
    content,
    make_identity,
    make_image,
    make_plan,
)

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.header import (
    FORMAT,
    MAGIC,
    PAGE_BYTES,
    RECORD_BYTES,
    Header,
    ImageIdentity,
    ImageState,
    Layout,
)
from ftrain.checkpoint.image import ImageReader, ImageWriter, held_of, resume_writer, small_image
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.comms.errors import CorruptionError, FtrainError, StateError
from ftrain.comms.protocol.messages import Held, Share, VersionId


def test_what_is_written_is_read() -> None:
    identity, plan = make_identity(), make_plan()
    reader = ImageReader(make_image(identity, plan))
    assert reader.state is ImageState.SEALED
    assert reader.identity == identity
    assert reader.segments == plan.segments
    assert reader.shares == plan.shares
    assert reader.collectives == 42
    assert reader.whole
    assert reader.small == SMALL
    data = content(len(reader.data))
    for segment in reader.segments:
        expected = data[segment.offset : segment.offset + segment.nbytes]
        assert reader.segment_bytes(segment) == expected
    reader.verify()
    assert reader.data.readonly


def test_an_image_may_hold_no_tensors() -> None:
    plan = ImagePlan((), (), small_bytes_max=0, chunk_bytes=CHUNK_BYTES)
    reader = ImageReader(make_image(plan=plan, small=b""))
    assert reader.small == b""
    assert reader.chunks == 0
    reader.verify()


def test_a_slot_may_be_larger_and_hold_an_older_image() -> None:
    plan = make_plan()
    slot = bytearray(content(plan.total_bytes + 10_000, seed=5))
    for step, small in ((1, b"x" * 1000), (2, b"y"), (3, b"")):
        writer = ImageWriter(slot, plan, make_identity(step))
        writer.begin(small)
        for chunk in range(writer.chunks):
            writer.finish_chunk(chunk)
        digest = writer.seal()
        reader = ImageReader(slot)
        reader.verify()
        assert (reader.identity.version.step, reader.small) == (step, small)
        assert reader.digest == digest


def test_the_digest_depends_on_every_part() -> None:
    images = [
        make_image(),
        make_image(small=b"other"),
        make_image(seed=1),
        make_image(make_identity(step=8)),
        make_image(plan=make_plan((100, 5000, 2999))),
    ]
    assert len({ImageReader(image).digest for image in images}) == len(images)
    assert ImageReader(make_image()).digest == ImageReader(make_image()).digest


def test_the_pieces_of_all_chunks_are_every_byte_once() -> None:
    rng = random.Random(1)
    for _ in range(30):
        sizes = tuple(rng.choice((0, 1, 64, 4096, rng.randrange(20_000))) for _ in range(9))
        plan = make_plan(sizes)
        ends = {segment.name: segment.start for segment in plan.segments}
        for chunk in range(plan.layout.chunks):
            start, stop = plan.layout.chunk_range(chunk)
            for piece in plan.pieces(chunk):
                assert start <= piece.offset
                assert piece.offset + piece.nbytes <= stop
                segment = piece.segment
                assert piece.offset - segment.offset == piece.start - segment.start
                assert piece.start == ends[segment.name]
                assert piece.nbytes > 0
                ends[segment.name] += piece.nbytes
        assert ends == {s.name: s.start + s.nbytes for s in plan.segments}


def test_chunks_of_a_segment_hold_it() -> None:
    reader = ImageReader(make_image(plan=make_plan((4096, 0, 4097, 64, 9000))))
    found = [list(reader.plan.chunks_of(segment)) for segment in reader.segments]
    assert found == [[0], [], [1, 2], [2], [2, 3, 4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": "9"}, "unknown share"),
        ({"offset": 32}, "impossible place"),
        ({"start": -1}, "impossible place"),
        ({"offset": 0}, "overlap"),
    ],
)
def test_an_impossible_plan_is_refused(change: dict[str, Any], message: str) -> None:
    plan = make_plan()
    segments = (plan.segments[0], replace(plan.segments[1], **change))
    with pytest.raises(StateError, match=message):
        ImagePlan(segments, plan.shares, 0, CHUNK_BYTES)


def test_limits_of_a_plan() -> None:
    segments = lay_out([Segment("w", "uint8", (2**45,), "0", 0, 2**45, Placement.whole((2**45,)))])
    with pytest.raises(StateError, match="not a possible image"):
        _ = ImagePlan(segments, (Share("0", 0, 0, 1),), 0, CHUNK_BYTES).total_bytes
    with pytest.raises(StateError, match="not a possible image"):
        _ = ImagePlan((), (), 0, chunk_bytes=100).total_bytes


@pytest.mark.parametrize(
    "identity",
    [
        {"run_id": "é" * 33},
        {"run_id": "a\0b"},
        {"topology": "f" * 33},
        {"topology": "xyz"},
        {"rank": 2},
        {"version": VersionId(-1, 0)},
        {"incarnation": 2**64},
    ],
)
def test_an_identity_that_does_not_fit_is_refused(identity: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="does not fit"):
        replace(make_identity(), **identity)


def test_an_identity_of_the_largest_values_fits() -> None:
    version = VersionId(2**63 - 1, 2**63 - 1)
    identity = ImageIdentity("é" * 32, "f" * 32, version, 0, 2**32 - 1, 2**32 - 1, 2**64 - 1)
    assert ImageReader(make_image(identity)).identity == identity


def test_writer_refusals() -> None:
    plan = make_plan()
    with pytest.raises(StateError, match="reserve memory"):
        ImageWriter(bytearray(plan.total_bytes - 1), plan, make_identity())
    with pytest.raises(StateError, match="writable"):
        ImageWriter(bytes(plan.total_bytes), plan, make_identity())
    slot = make_image()
    writer = ImageWriter(slot, plan, make_identity(8))
    with pytest.raises(StateError, match="not begun"):
        writer.seal()
    with pytest.raises(StateError, match="plan a larger image"):
        writer.begin(bytes(1001))
    assert ImageReader(slot).identity.version.step == 7  # nothing was written
    writer.begin(SMALL)
    writer.finish_chunk(1)
    with pytest.raises(StateError, match=r"1 of 2 chunks|2 of 3 chunks"):
        writer.seal()
    writer.abandon()
    with pytest.raises(CorruptionError, match="no valid header"):
        ImageReader(slot)


def test_every_flipped_byte_is_noticed() -> None:
    image = make_image(small=b"s" * 500)
    rng = random.Random(2)
    ImageReader(image).verify()
    for at in range(len(image)):
        flip = 1 << rng.randrange(8)
        image[at] ^= flip
        with pytest.raises(FtrainError):
            _read_sealed(image)
        image[at] ^= flip
    ImageReader(image).verify()


def _read_sealed(image: bytes | bytearray) -> None:
    reader = ImageReader(image)
    reader.require(state=ImageState.SEALED)
    reader.verify()


def test_every_cut_is_noticed() -> None:
    image = bytes(make_image())
    layout = ImageReader(image).header.layout
    boundaries = {0, 1, 12, RECORD_BYTES, PAGE_BYTES, layout.table_offset, layout.small_offset}
    boundaries |= {layout.data_offset + layout.chunk_range(i)[0] for i in range(layout.chunks)}
    boundaries |= {layout.total_bytes}
    for boundary in boundaries:
        for length in (boundary - 1, boundary, boundary + 1):
            if 0 <= length < len(image):
                with pytest.raises(CorruptionError):
                    _read_sealed(image[:length])


def test_garbage_is_refused_with_bounded_memory() -> None:
    rng = random.Random(3)
    good = Header(
        ImageState.WRITING, True, make_identity(), 0, make_plan().layout, 0, bytes(16), bytes(16)
    ).pack()
    tracemalloc.start()
    for _ in range(3000):
        record = bytearray(good)
        for _ in range(rng.randrange(1, 8)):  # nonsense, but with the right digest
            at = rng.randrange(12, 300)
            record[at : at + 8] = rng.choice((rng.randbytes(8), b"\xff" * 8, bytes(8)))
        body = bytes(record[:2032])
        page = (body + digest_of(body)).ljust(PAGE_BYTES, b"\0")
        with pytest.raises(FtrainError):
            _read_sealed(page + bytes(4096))
        with pytest.raises(FtrainError):
            _read_sealed(rng.randbytes(rng.randrange(9000)))
        with pytest.raises(FtrainError):
            _read_sealed(MAGIC + struct.pack("<I", FORMAT) + rng.randbytes(9000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 1024 * 1024


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 1000,
        msgspec.msgpack.encode(([], [], [])),
        msgspec.msgpack.encode(([("w", "uint8", [-1], "0", 0, 1, 0)], [("0", 0, 0, 1)])),
        msgspec.msgpack.encode(([("w", "uint8", [1], "0", 0, 1, 64)], [])),
        msgspec.msgpack.encode(([("w", "uint8", [1], "0", 0, 1, 2**40)], [("0", 0, 0, 1)])),
        msgspec.msgpack.encode(([("w", "uint8", [1], "0", 0, 2**63, 0)], [("0", 0, 0, 1)])),
    ],
)
def test_an_impossible_index_is_refused(index: bytes) -> None:
    layout = Layout(len(index), 0, 4096, 4096)
    header = Header(
        ImageState.WRITING, True, make_identity(), 0, layout, 0, digest_of(index), digest_of(b"")
    )
    image = bytearray(layout.total_bytes)
    image[:RECORD_BYTES] = header.pack()
    image[PAGE_BYTES : PAGE_BYTES + len(index)] = index
    with pytest.raises(CorruptionError, match="index"):
        ImageReader(image)


def test_a_newer_format_is_named() -> None:
    image = make_image()
    struct.pack_into("<I", image, 8, FORMAT + 1)
    struct.pack_into("<I", image, RECORD_BYTES + 8, FORMAT + 1)
    with pytest.raises(StateError, match=f"format {FORMAT + 1}, this ftrain reads"):
        ImageReader(image)


def test_another_images_identity_is_refused() -> None:
    reader = ImageReader(make_image(), where="slot 2")
    reader.require(run_id="run", topology=TOPOLOGY, rank=0, world_size=2)
    for expected in (
        {"run_id": "walk"},
        {"topology": "ab"},
        {"rank": 1},
        {"world_size": 4},
        {"state": ImageState.WRITING},
    ):
        with pytest.raises(StateError, match="slot 2 is of"):
            reader.require(**expected)


def test_a_small_image_keeps_identity_and_digest() -> None:
    reader = ImageReader(make_image())
    small = ImageReader(small_image(reader))
    small.verify()
    assert not small.whole
    assert small.segments == ()
    assert (small.identity, small.small, small.collectives) == (reader.identity, SMALL, 42)
    version = VersionId(3, 7)
    whole_held, small_held = held_of(reader), held_of(small)
    assert whole_held == Held(version, 0, reader.digest, reader.shares, True, 42)
    assert small_held == Held(version, 0, digest_of(SMALL).hex(), reader.shares, False, 42)
    assert small_image(small) == small_image(reader)


def test_an_unfinished_image_is_finished_by_another_writer() -> None:
    plan = make_plan((5000, 9000))
    data = content(plan.layout.data_bytes)
    slot = bytearray(plan.total_bytes)
    writer = ImageWriter(slot, plan, make_identity(), collectives=9)
    writer.begin(SMALL)
    start, stop = writer.chunk_range(1)
    writer.data[start:stop] = data[start:stop]
    writer.finish_chunk(1)
    start, stop = writer.chunk_range(2)
    writer.data[start : stop - 10] = data[start : stop - 10]  # killed while copying

    reader = ImageReader(slot)
    assert reader.state is ImageState.WRITING
    assert reader.missing_chunks() == [0, 2, 3]
    with pytest.raises(StateError, match="state 'WRITING'"):
        held_of(reader)
    with pytest.raises(CorruptionError, match="lacks chunk 0"):
        reader.verify()

    survivor = resume_writer(slot)
    for chunk in survivor.missing_chunks():
        start, stop = survivor.chunk_range(chunk)
        survivor.data[start:stop] = data[start:stop]
        survivor.finish_chunk(chunk, digest_of(survivor.data[start:stop]))
    with pytest.raises(StateError, match="not sealed"):
        survivor.held()
    survivor.seal()
    reader = ImageReader(slot)
    assert survivor.held() == held_of(reader)
    reader.verify()
    assert bytes(reader.data) == data
    assert (reader.small, reader.collectives) == (SMALL, 9)
    assert reader.identity == make_identity()
    with pytest.raises(StateError, match="state"):
        resume_writer(slot)


def test_a_torn_seal_leaves_an_image_that_can_be_sealed() -> None:
    image = make_image()
    image[RECORD_BYTES + 100 : RECORD_BYTES + 200] = bytes(100)
    survivor = resume_writer(image)
    assert survivor.missing_chunks() == []
    survivor.seal()
    assert image == make_image()


_WRITER = """
import mmap, sys
from image_samples import make_identity, make_plan
from ftrain.checkpoint.image import ImageWriter
plan = make_plan((300_000, 700_000))
with open(sys.argv[1], "r+b") as file:
    slot = mmap.mmap(file.fileno(), 0)
print(flush=True)
for step in range(1, 1_000_000):
    writer = ImageWriter(slot, plan, make_identity(step))
    writer.begin(b"%d" % step)
    for chunk in range(writer.chunks):
        start, stop = writer.chunk_range(chunk)
        writer.data[start:stop] = bytes([(step + chunk) % 256]) * (stop - start)
        writer.finish_chunk(chunk)
    writer.seal()
"""


def test_a_writer_killed_at_any_moment_leaves_nothing_wrong(tmp_path: Path) -> None:
    plan = make_plan((300_000, 700_000))
    path = tmp_path / "slot"
    path.write_bytes(bytes(plan.total_bytes))
    rng = random.Random(4)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, path],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.random() * 0.01)
            process.kill()
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as slot:
            _check_slot(bytearray(slot))


def _check_slot(slot: bytearray) -> None:
    """Nothing, or an image whose finished chunks are right and which can be finished."""
    try:
        reader = ImageReader(slot)
    except CorruptionError:
        return
    step = reader.identity.version.step
    if reader.state is ImageState.WRITING:
        writer = resume_writer(slot)
        for chunk in writer.missing_chunks():
            start, stop = writer.chunk_range(chunk)
            writer.data[start:stop] = bytes([(step + chunk) % 256]) * (stop - start)
            writer.finish_chunk(chunk)
        writer.seal()
        reader = ImageReader(slot)
    reader.verify()
    assert reader.small == b"%d" % step
    for chunk in range(reader.chunks):
        start, stop = reader.header.layout.chunk_range(chunk)
        assert reader.data[start:stop] == bytes([(step + chunk) % 256]) * (stop - start)
