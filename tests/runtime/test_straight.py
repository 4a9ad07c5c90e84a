"""Restoring from files: long runs of bytes go straight to the live tensors, and count only then."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.files import LocalFile, Seen, unseen
from ftrain.checkpoint.header import PAGE_BYTES, ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.segment_writer import SegmentStream
from ftrain.checkpoint.tensors import StateTensor, plan_image, tensor_view
from ftrain.comms.errors import CorruptionError, ObjectStoreError
from ftrain.comms.protocol.messages import Share, VersionId
from ftrain.runtime.restore import Restoration

TOPOLOGY = "ab" * 16
CHUNK = 1 << 20
SHARE = Share("0", 0, 0, 1)
SHAPES = {
    "long": (700, 1024),
    "wide": (1024, 300),
    "bias": (1024,),
    "scalar": (),
    "tail": (90_000,),
}


def saved_tensors() -> list[StateTensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        StateTensor.whole(name, torch.randn(shape, generator=generator), "0")
        for name, shape in SHAPES.items()
    ]


def blank(tensors: list[StateTensor]) -> list[StateTensor]:
    return [StateTensor(t.name, torch.full_like(t.tensor, -7), t.share, t.place) for t in tensors]


def write(path: Path, plan: ImagePlan, data: bytes, *, compress: bool = False) -> None:
    identity = ImageIdentity("run", TOPOLOGY, VersionId(1, 5), 0, 1, 0, 1)
    with path.open("wb") as file:
        stream = SegmentStream(file.write, identity, plan, compress=compress)
        for chunk in range(plan.layout.chunks):
            start, stop = plan.layout.chunk_range(chunk)
            stream.add(memoryview(data)[start:stop])
        stream.finish(b"small")


def save(path: Path, tensors: list[StateTensor]) -> None:
    plan = plan_image(tensors, lambda key: SHARE, 0, CHUNK)
    data = bytearray(plan.layout.data_bytes)
    by_name = {t.name: tensor_view(t.tensor) for t in tensors}
    for segment in plan.segments:
        data[segment.offset : segment.offset + segment.nbytes] = by_name[segment.name]
    write(path, plan, bytes(data))


def flip(path: Path, at: int) -> None:
    """Damage a byte of the data."""
    content = bytearray(path.read_bytes())
    content[PAGE_BYTES + at] ^= 16
    path.write_bytes(content)


@contextmanager
def opened(*paths: Path) -> Iterator[list[SegmentReader]]:
    readers = [SegmentReader(LocalFile(path)) for path in paths]
    try:
        yield readers
    finally:
        for reader in readers:
            reader.close()


def equal(found: list[StateTensor], wanted: list[StateTensor]) -> bool:
    return all(torch.equal(a.tensor, b.tensor) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("readers", [1, 2])
def test_damaged_chunks_are_replaced_by_another_copys(tmp_path: Path, readers: int) -> None:
    """Whatever of them lies in the live tensors by then; each copy is damaged somewhere else."""
    tensors = saved_tensors()
    one, two = tmp_path / "1.seg", tmp_path / "2.seg"
    save(one, tensors)
    chunks = -(-one.stat().st_size // CHUNK) - 1
    assert chunks >= 4
    chance = random.Random(readers)
    for _ in range(6):
        save(one, tensors)
        save(two, tensors)
        bad = chance.sample(range(chunks), 2)
        for path, chunk in zip((one, two), bad, strict=True):
            flip(path, chunk * CHUNK + chance.randrange(CHUNK // 2))
        found = blank(tensors)
        with opened(one, two) as files:
            restoration = Restoration(files, readers=readers)
            restoration.fill(found, TOPOLOGY)
        assert equal(found, tensors)
        assert restoration.sources == [str(two)]
        assert len(restoration.damage) == 1  # the second copy's was not wanted
        with opened(one) as files, pytest.raises(CorruptionError, match="there is no other"):
            Restoration(files, readers=readers).fill(blank(tensors), TOPOLOGY)


def test_a_copy_of_another_layout_repairs_what_was_read_straight(tmp_path: Path) -> None:
    """Columns of a tensor can't be read straight; they mend what rows left undone."""
    tensors = [t for t in saved_tensors() if t.name == "wide"]
    whole = tensors[0].tensor
    rows, columns = [], []
    for number in range(2):
        half = whole[512 * number : 512 * (number + 1)].contiguous()
        rows.append(StateTensor("wide", half, "0", Placement((1024, 300), (512 * number, 0))))
        half = whole[:, 150 * number : 150 * (number + 1)].contiguous()
        columns.append(StateTensor("wide", half, "0", Placement((1024, 300), (0, 150 * number))))
    paths = [tmp_path / f"{n}.seg" for n in range(4)]
    for path, tensor in zip(paths, (*rows, *columns), strict=True):
        save(path, [tensor])
    with opened(*paths[:2]) as files:
        found = blank(tensors)
        Restoration(files, readers=2).fill(found)
        assert equal(found, tensors)
    with opened(*paths[2:]) as files:
        found = blank(tensors)
        Restoration(files, readers=2).fill(found)
        assert equal(found, tensors)


@pytest.mark.parametrize("readers", [1, 2])
def test_what_was_accepted_is_not_written_to_again(tmp_path: Path, readers: int) -> None:
    """A file that holds the same bytes twice, the second time damaged."""
    saved = torch.arange(4 * CHUNK // 4, dtype=torch.int32)
    nbytes = 4 * saved.numel()
    twice = [
        Segment("w", "int32", (saved.numel(),), "0", 0, nbytes, Placement.whole((saved.numel(),)))
        for _ in range(2)
    ]
    plan = ImagePlan(lay_out(twice), (SHARE,), 0, CHUNK)
    path = tmp_path / "twice.seg"
    for damaged_chunk in range(4, 8):
        write(path, plan, bytes(tensor_view(saved)) * 2)
        flip(path, damaged_chunk * CHUNK + 4321)
        found = [StateTensor.whole("w", torch.full_like(saved, -7), "0")]
        with opened(path) as files:
            Restoration(files, readers=readers).fill(found, TOPOLOGY)
        assert torch.equal(found[0].tensor, saved)


class GoneFrom(LocalFile):
    """A file whose store is gone from one read of data on, for one of the threads."""

    def __init__(self, path: Path, *, for_main: bool) -> None:
        super().__init__(path)
        self.for_main, self.reads, self.reads_before = for_main, 0, 0

    def read_into(self, offset: int, parts: Sequence[memoryview], seen: Seen = unseen) -> None:
        self.reads += 1
        super().read_into(offset, parts, seen)
        main = threading.current_thread() is threading.main_thread()
        if threading.active_count() > 1 and main == self.for_main and not self.reads_before:
            self.reads_before = self.reads
            raise ObjectStoreError("the store is gone")


@pytest.mark.parametrize("for_main", [True, False])
def test_a_reader_that_fails_stops_the_others(tmp_path: Path, for_main: bool) -> None:
    tensors = [StateTensor.whole("w", torch.zeros(64 * CHUNK // 4), "0")]
    save(tmp_path / "w.seg", tensors)
    file = GoneFrom(tmp_path / "w.seg", for_main=for_main)
    reader = SegmentReader(file)
    with closing(reader), pytest.raises(ObjectStoreError, match="is gone"):
        Restoration([reader], readers=2).fill(blank(tensors))
    assert 0 < file.reads_before <= file.reads <= file.reads_before + 4
    assert file.reads < 60


PEAK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_straight as here
import torch

def peak_bytes():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024

def fill(nbytes):
    tensor = here.StateTensor.whole("w", torch.zeros(nbytes // 4), "0")
    with here.opened(Path(sys.argv[1])) as files:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is taken now
        before = peak_bytes()
        here.Restoration(files, readers=2).fill([tensor])
        print(peak_bytes() - before)
    assert tensor.tensor[-1] == 1

fill(64 << 20)
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_load_takes_two_chunks_of_memory_at_most(tmp_path: Path, packed: bool) -> None:
    """On top of the state, however large that is; imports and threads are in it."""
    path = tmp_path / "large.seg"
    saved = StateTensor.whole("w", torch.randn(16 << 20), "0")
    saved.tensor[-1] = 1
    plan = plan_image([saved], lambda key: SHARE, 0, 16 << 20)
    write(path, plan, bytes(tensor_view(saved.tensor)), compress=packed)
    assert packed == (path.stat().st_size < (60 << 20))
    words = [sys.executable, "-c", PEAK, str(path), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * (16 << 20)
