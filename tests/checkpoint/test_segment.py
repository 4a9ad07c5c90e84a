"""Segment files: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import random
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from image_samples import SMALL, make_identity, make_image, make_plan

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.codecs import PlaneCodec
from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.files import LocalFile, NewFile
from ftrain.checkpoint.image import ImageReader
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.checkpoint.pace import Pace
from ftrain.checkpoint.segment import MAGIC, TRAILER_BYTES, Footer
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.checkpoint.segment_writer import SegmentStream, copy_segment, plan_file, write_file
from ftrain.comms.errors import CorruptionError, StateError
from ftrain.comms.protocol.messages import Share

SIZES = (100, 5000, 3000)


def write(path: Path, image: bytearray) -> str:
    """The image's file; returns its digest."""
    planned = plan_file(ImageReader(image))
    with NewFile(path, planned.nbytes) as file, ThreadPoolExecutor(2) as workers:
        write_file(planned, file, workers, Pace())
        file.sync()
    return planned.tail.digest


def read(path: Path, digest: str | None = None) -> tuple[bytes, bytes]:
    """Data and small state of a file, every byte of it verified."""
    file = LocalFile(path)
    try:
        reader = SegmentReader(file, digest)
        reader.verify()
        scratch = Scratch()
        data = b"".join(bytes(reader.read(chunk, scratch)) for chunk in range(reader.chunks))
        return data, reader.small
    finally:
        file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rank0.seg"


def test_what_is_written_is_read(path: Path) -> None:
    image = make_image()
    digest = write(path, image)
    source = ImageReader(image)
    assert read(path, digest) == (bytes(source.data), SMALL)
    file = LocalFile(path)
    reader = SegmentReader(file)
    assert reader.plan.segments == source.segments
    assert (reader.shares, reader.identity) == (source.shares, source.identity)
    assert (reader.footer.collectives, reader.digest) == (42, digest)
    file.close()


def test_streamed_and_written_by_offset_are_the_same_bytes(path: Path) -> None:
    image = make_image()
    digest = write(path, image)
    parts: list[bytes] = []
    source = ImageReader(image)
    stream = SegmentStream(
        lambda part: parts.append(bytes(part)), source.identity, source.plan, source.collectives
    )
    for chunk in range(source.chunks):
        stream.add(source.read(chunk))
    found, nbytes = stream.finish(source.small)
    assert b"".join(parts) == path.read_bytes()
    assert (found, nbytes) == (digest, path.stat().st_size)


def numbers(dtype: str, count: int) -> bytes:
    """Numbers as weights are: the exponents alike, the mantissas not."""
    values = np.random.default_rng(0).normal(0, 0.02, count).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.tobytes()


@pytest.mark.parametrize(("dtype", "ratio"), [("float32", 1.12), ("bfloat16", 1.25)])
def test_compressed_copies_are_smaller_and_the_same(path: Path, dtype: str, ratio: float) -> None:
    item = 4 if dtype == "float32" else 2
    content = numbers(dtype, 64 * 1024)
    name = Segment("w", dtype, (64 * 1024,), "0", 0, len(content), Placement.whole((64 * 1024,)))
    plan = ImagePlan(lay_out([name]), (Share("0", 0, 0, 1),), 0, 64 * 1024)
    with path.open("wb") as file:
        stream = SegmentStream(file.write, make_identity(), plan)
        for start in range(0, len(content), plan.chunk_bytes):
            stream.add(memoryview(content)[start : start + plan.chunk_bytes])
        stream.finish(SMALL)
    source = SegmentReader(LocalFile(path))
    packed = path.with_suffix(".packed")
    with packed.open("wb") as file:
        digest, nbytes = copy_segment(source, file.write, compress=True)
    source.close()
    assert nbytes == packed.stat().st_size < path.stat().st_size / ratio
    assert read(packed, digest) == (content, SMALL)
    reader = SegmentReader(LocalFile(packed))
    assert {row.codec for row in reader.footer.chunks} >= {f"planes{item}-zstd"}
    unpacked = path.with_suffix(".unpacked")
    with unpacked.open("wb") as file:
        copy_segment(reader, file.write, compress=False)
    reader.close()
    assert unpacked.read_bytes() == path.read_bytes()


def test_what_does_not_shrink_is_kept_as_it_is() -> None:
    noise = random.Random(0).randbytes(40_000)
    codec = PlaneCodec(4)
    packed = codec.encode(memoryview(noise))
    assert len(packed) == 16 + len(noise)
    raw = bytearray(len(noise))
    codec.decode(memoryview(packed), memoryview(raw))
    assert raw == noise


def test_a_flipped_bit_anywhere_is_noticed(path: Path) -> None:
    digest = write(path, make_image())
    whole = path.read_bytes()
    chance = random.Random(1)
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises((CorruptionError, StateError)):
            read(path, digest)
    path.write_bytes(whole)
    read(path, digest)


def test_cuts_holes_and_other_files_are_noticed(path: Path) -> None:
    digest = write(path, make_image())
    whole = path.read_bytes()
    other = path.with_suffix(".other")
    write(other, make_image(make_identity(rank=1), seed=5))
    damaged = [whole[:size] for size in range(0, len(whole), 509)]
    damaged += [whole[:at] + bytes(512) + whole[at + 512 :] for at in range(4096, len(whole), 512)]
    damaged += [whole + bytes(4096), whole[4096:], other.read_bytes()]
    for content in damaged:
        if content == whole:  # a hole where nothing was
            continue
        path.write_bytes(content)
        with pytest.raises(CorruptionError):
            read(path, digest)


def test_a_later_format_is_refused_by_name(path: Path) -> None:
    write(path, make_image())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x03")
    with pytest.raises(StateError, match=r"format 3.*use the ftrain that wrote it"):
        read(path)


def forge(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Put another footer into the file, with a digest that is right."""
    whole = path.read_bytes()
    at, size = struct.unpack_from("<QQ", whole, len(whole) - TRAILER_BYTES)
    footer = json.loads(whole[at : at + size])
    change(footer)
    body = json.dumps(footer).encode()
    pad = -(len(body) + TRAILER_BYTES) % 4096
    trailer = struct.pack("<QQ16s24s8s", at, len(body), digest_of(body), b"", MAGIC)
    path.write_bytes(whole[:at] + body + bytes(pad) + trailer)


def first_slice(footer: dict) -> list:
    return next(iter(footer["tensors"].values()))["slices"][0]


HOSTILE: dict[str, Callable[[dict], object]] = {
    "a chunk outside the file": lambda f: f["chunks"][0].__setitem__(0, 1 << 60),
    "a chunk before the first": lambda f: f["chunks"][0].__setitem__(0, 0),
    "a negative place": lambda f: f["chunks"][0].__setitem__(0, -4096),
    "a huge chunk": lambda f: f["chunks"][0].__setitem__(2, 1 << 40),
    "more data than chunks": lambda f: f.update(data_bytes=1 << 43, chunk_bytes=4096),
    "no chunks": lambda f: f.update(chunks=[]),
    "huge small state": lambda f: f.update(small_bytes=1 << 28),
    "odd chunks": lambda f: f.update(chunk_bytes=5000),
    "unknown codec": lambda f: f["chunks"][0].__setitem__(3, "../../bin/sh"),
    "a tensor beyond the data": lambda f: first_slice(f).__setitem__(4, 1 << 30),
    "a slice beyond its tensor": lambda f: first_slice(f).__setitem__(0, [1 << 50]),
    "a run beyond its box": lambda f: first_slice(f).__setitem__(3, 1 << 30),
    "other dimensions": lambda f: first_slice(f).__setitem__(1, [2, 2, 2]),
    "data that no tensor is in": lambda f: f["tensors"].clear(),
    "overlapping tensors": lambda f: [
        t["slices"][0].__setitem__(4, 0) for t in f["tensors"].values()
    ],
    "an unknown type": lambda f: next(iter(f["tensors"].values())).update(dtype="object"),
    "an unknown share": lambda f: f.update(shares=[]),
    "a rank out of its world": lambda f: f.update(rank=99),
    "an unknown field": lambda f: f.update(pickle="gASV"),
    "a missing field": lambda f: f.pop("run_id"),
    "a text for a number": lambda f: f.update(step="7"),
    "another format": lambda f: f.update(format=1),
    "endless nesting": lambda f: f.update(tensors=json.loads("[" * 500 + "]" * 500)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_footer_is_refused(path: Path, name: str) -> None:
    write(path, make_image())
    forge(path, HOSTILE[name])
    with pytest.raises(CorruptionError):
        read(path)


def test_a_plain_chunk_that_is_shorter_than_its_bytes_is_refused(path: Path) -> None:
    """Its digest is that of what is there; what is behind it would not be compared."""
    write(path, make_image())
    start = path.read_bytes()[4096:8000]

    def shorten(footer: dict) -> None:
        footer["chunks"][0][1] = len(start)
        footer["chunks"][0][4] = digest_of(start).hex()

    forge(path, shorten)
    with pytest.raises(CorruptionError, match="another size"):
        read(path)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    codec = PlaneCodec(1)
    packed = codec.encode(memoryview(bytes(1 << 24)))
    assert len(packed) < 2000
    with pytest.raises(CorruptionError, match="another size"):
        codec.decode(memoryview(packed), memoryview(bytearray(4096)))
    for size in (0, 3, 20, len(packed) - 1):
        with pytest.raises(CorruptionError):
            codec.decode(memoryview(packed[:size]), memoryview(bytearray(1 << 24)))


def test_the_footer_is_json_that_a_stranger_can_read(path: Path) -> None:
    write(path, make_image())
    whole = path.read_bytes()
    at, size = struct.unpack_from("<QQ", whole, len(whole) - TRAILER_BYTES)
    footer = json.loads(whole[at : at + size])
    image = ImageReader(make_image())
    for segment in image.segments:
        (row,) = footer["tensors"][segment.name]["slices"]
        chunk, within = divmod(row[4], footer["chunk_bytes"])
        place = footer["chunks"][chunk][0] + within
        head = min(row[3], footer["chunk_bytes"] - within)
        assert whole[place : place + head] == image.segment_bytes(segment)[:head]
    assert msgspec.json.decode(whole[at : at + size], type=Footer).rank == 0


def test_tensors_of_any_sizes_fit(tmp_path: Path) -> None:
    for number, sizes in enumerate([(), (1,), (4096,), (4097, 1, 9000), (12_288, 64)]):
        plan = make_plan(sizes) if sizes else ImagePlan((), (), 10, 4096)
        image = make_image(plan=plan, small=b"" if number % 2 else b"s")
        path = tmp_path / f"{number}.seg"
        assert read(path, write(path, image))[0] == bytes(ImageReader(image).data)


def test_nobody_writes_to_a_file_that_was_given_up(path: Path) -> None:
    """Its descriptor's number may be another file's by then, and the image's slot reused."""
    image = make_image(plan=make_plan((3 * 4096, 4096)))
    planned = plan_file(ImageReader(bytes(image)))
    image[ImageReader(bytes(image)).header.layout.data_offset + 2 * 4096] ^= 1
    planned = plan_file(ImageReader(image))
    slow = Pace(4096)  # bytes per second: who has got as far waits for its turn
    slow.wait(1024)
    met = threading.Barrier(2)
    with ThreadPoolExecutor(2) as workers:
        with NewFile(path, planned.nbytes) as file, pytest.raises(CorruptionError):
            write_file(planned, file, workers, slow)
        idle = [workers.submit(met.wait, 0.3) for _ in range(2)]
        assert sorted(one.result() for one in idle) == [0, 1]
