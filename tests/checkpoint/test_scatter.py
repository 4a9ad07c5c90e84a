"""Chunks read straight into the memory that their bytes belong in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_samples import make_identity

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.files import LocalFile
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.checkpoint.scatter import Home, bring_home, interleaved
from ftrain.checkpoint.segment import PAGE_BYTES
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.checkpoint.segment_writer import SegmentStream
from ftrain.comms.errors import CorruptionError
from ftrain.comms.protocol.messages import Share

CHUNK = 1 << 20
CONTENT = random.Random(0).randbytes(CHUNK) + bytes(CHUNK)  # the second chunk shrinks
GUARD = 0xA5
RUNS = ((100, 90_000), (90_100, 65_536), (155_700, 40), (160_000, 3000), (900_000, 148_576))
IN_A_LONG_RUN, IN_A_SHORT_RUN, IN_NONE = 100_000, 161_000, 500_000


def write(path: Path, *, compress: bool) -> None:
    place = Placement.whole((len(CONTENT),))
    whole = Segment("w", "uint8", (len(CONTENT),), "0", 0, len(CONTENT), place)
    plan = ImagePlan(lay_out([whole]), (Share("0", 0, 0, 1),), 0, CHUNK)
    with path.open("wb") as file:
        stream = SegmentStream(file.write, make_identity(), plan, compress=compress)
        for start in range(0, len(CONTENT), CHUNK):
            stream.add(memoryview(CONTENT)[start : start + CHUNK])
        stream.finish(b"small")


class Memory:
    """Homes for some runs of a chunk, with guards around each of them."""

    def __init__(self) -> None:
        self.buffers = [bytearray([GUARD]) * (nbytes + 2) for _, nbytes in RUNS]
        self.homes = [
            Home(at, memoryview(buffer)[1:-1])
            for (at, _), buffer in zip(RUNS, self.buffers, strict=True)
        ]
        random.Random(1).shuffle(self.homes)

    def require_guards(self) -> None:
        assert all(buffer[0] == buffer[-1] == GUARD for buffer in self.buffers)

    def require(self, content: bytes) -> None:
        """Every run is home."""
        self.require_guards()
        for (at, nbytes), buffer in zip(RUNS, self.buffers, strict=True):
            assert buffer[1:-1] == content[at : at + nbytes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "rank0.seg"
    write(found, compress=False)
    return found


@pytest.fixture
def reader(path: Path) -> Iterator[SegmentReader]:
    found = SegmentReader(LocalFile(path))
    yield found
    found.close()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_runs_are_home_and_the_rest_is_returned(
    tmp_path: Path, compress: bool, verify: bool
) -> None:
    write(tmp_path / "x.seg", compress=compress)
    reader = SegmentReader(LocalFile(tmp_path / "x.seg"))
    assert (reader.footer.chunks[1].codec != "raw") == compress
    scratch = Scratch()
    for chunk in (0, 1):
        content = CONTENT[chunk * CHUNK :][:CHUNK]
        memory = Memory()
        rest = reader.read_into(chunk, memory.homes, scratch, verify=verify)
        memory.require(content)
        assert len(rest) == CHUNK
        for at, stop in ((0, 100), (155_640, 155_700), (163_000, 900_000)):
            assert rest[at:stop] == content[at:stop]
    reader.close()


@pytest.mark.parametrize("at", [IN_A_LONG_RUN, IN_A_SHORT_RUN, IN_NONE])
def test_damage_anywhere_in_the_chunk_is_noticed(
    path: Path, reader: SegmentReader, at: int
) -> None:
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES + at)
        file.write(bytes([CONTENT[at] ^ 4]))
    memory = Memory()
    with pytest.raises(CorruptionError, match="chunk 0 does not match its digest"):
        reader.read_into(0, memory.homes, Scratch())
    memory.require_guards()
    short = [home for home in memory.homes if len(home.memory) < 10_000]
    assert all(set(home.memory) == {GUARD} for home in short)  # copied only once they are right
    memory = Memory()
    reader.read_into(1, memory.homes, Scratch())
    memory.require(CONTENT[CHUNK:])


def test_a_file_that_is_cut_while_it_is_open_is_noticed(path: Path, reader: SegmentReader) -> None:
    with path.open("r+b") as file:
        file.truncate(PAGE_BYTES + 1_000_000)
    memory = Memory()
    with pytest.raises(CorruptionError, match="ends too early"):
        reader.read_into(0, memory.homes, Scratch())
    memory.require_guards()


def test_any_parts_are_filled_in_order(path: Path) -> None:
    """More of them than one system call takes, and longer ones than are read at once."""
    chance = random.Random(2)
    sizes = [chance.choice((1, 7, 64, 300)) for _ in range(3000)] + [700_000, 1, 300_000]
    parts = [memoryview(bytearray(size)) for size in chance.sample(sizes, len(sizes))]
    seen: list[bytes] = []
    file = LocalFile(path)
    file.read_into(PAGE_BYTES, parts, lambda part: seen.append(bytes(part)))
    file.close()
    assert b"".join(parts) == b"".join(seen) == CONTENT[: sum(sizes)]


def test_homes_and_the_rest_make_up_the_chunk() -> None:
    chance = random.Random(3)
    for _ in range(200):
        size = chance.randrange(1, 200)
        content = chance.randbytes(size)
        bounds = sorted(chance.sample(range(size + 1), min(size, 2 * chance.randrange(5))))
        runs = list(zip(bounds[::2], bounds[1::2], strict=False))
        homes = [Home(start, memoryview(bytearray(stop - start))) for start, stop in runs]
        chance.shuffle(homes)
        parts = interleaved(homes, memoryview(bytearray(size)))
        assert sum(map(len, parts)) == size
        at = 0
        for part in parts:
            part[:] = content[at : at + len(part)]
            at += len(part)
        assert all(home.memory == content[home.at : home.end] for home in homes)
        copied = [Home(home.at, memoryview(bytearray(len(home.memory)))) for home in homes]
        bring_home(memoryview(content), copied)
        assert [home.memory for home in copied] == [home.memory for home in homes]
