"""Loads versions from directories that were broken on purpose, for so many seconds.

Run by test_fuzz.py in a process of its own, because it limits its memory and watches which files
are opened.  Usage: ``fuzz_reader.py FOLDER SEED SECONDS``.  Ends with a traceback, and the number
of the trial, when something happens that must not.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard  # noqa: F401  (imported now: later only the directory may be opened)
from fuzz_mutations import MUTATIONS

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.files import LocalFile
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageWriter
from ftrain.checkpoint.manifest import DurableVersion, open_files
from ftrain.checkpoint.retention import Retention, VersionKey
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.checkpoint.segment_writer import copy_segment
from ftrain.checkpoint.tensors import StateTensor, plan_image
from ftrain.comms.errors import CorruptionError, FtrainError
from ftrain.comms.protocol.messages import VersionId
from ftrain.runtime.group import GroupView
from ftrain.runtime.restore import Restoration

RUN, TOPOLOGY, RANKS, CHUNK = "run", "ab" * 16, 2, 4096
VERSIONS: tuple[VersionKey, ...] = ((1, 3), (2, 5), (2, 8))
COMPRESSED: VersionKey = (2, 8)
SHAPES = {"w": (60, 40), "b": (33,), "m": (16, 8, 5), "scalar": ()}
DTYPES = {"m": torch.bfloat16}
GUARD = 4096  # elements before and behind a tensor that is filled
MEMORY_BYTES = 768 * 1024 * 1024  # more than the process has once all is imported
TRIAL_S_MAX = 10.0

Values = dict[str, torch.Tensor]


def whole_values(key: VersionKey) -> Values:
    generator = torch.Generator().manual_seed(key[1])
    return {
        name: torch.randn(shape, generator=generator).to(DTYPES.get(name, torch.float32))
        for name, shape in SHAPES.items()
    }


def tree_of(key: VersionKey, rank: int) -> dict[str, Any]:
    small = torch.arange(rank + 5)
    return {"state": {"step": key[1], "rng": small, "note": "x" * 300}, "rank": rank}


def layout(values: Values, rank: int) -> list[StateTensor]:
    """The rank's tensors: "w" by rows, the rest whole on every rank."""
    found = []
    for name, value in values.items():
        if name == "w":
            rows = value.shape[0] // RANKS
            part = value[rank * rows : (rank + 1) * rows].clone()
            place = Placement(tuple(value.shape), (rank * rows, 0))
            found.append(StateTensor(name, part, str(rank), place))
        else:
            found.append(StateTensor.whole(name, value, "0,1"))
    return found


def image_of(key: VersionKey, rank: int) -> bytearray:
    tensors = layout(whole_values(key), rank)
    plan = plan_image(tensors, GroupView(rank, RANKS, 0, (0, 1)).share, 2000, CHUNK)
    identity = ImageIdentity(RUN, TOPOLOGY, VersionId(*key), rank, RANKS, 0, 1)
    buffer = bytearray(plan.total_bytes)
    writer = ImageWriter(buffer, plan, identity)
    writer.begin(encode_tree(tree_of(key, rank), "state"))
    bytes_of = {t.name: t.tensor.reshape(-1).view(torch.uint8).numpy() for t in tensors}
    for s in plan.segments:
        part = bytes_of[s.name][s.start : s.start + s.nbytes]
        writer.data[s.offset : s.offset + s.nbytes] = part.tobytes()
    for chunk in range(writer.chunks):
        writer.finish_chunk(chunk)
    writer.seal()
    return buffer


def make_directory(directory: Path) -> None:
    """Two fences, three versions of two ranks, the newest of them compressed."""
    store = DurableStore(directory)
    store.begin_fence(1, RUN, None)
    store.begin_fence(2, RUN, VersionId(*VERSIONS[0]))
    for key in VERSIONS:
        version = VersionId(*key)
        for rank in range(RANKS):
            store.write_image(key[0], version, rank, image_of(key, rank))
            path = directory / str(key[0]) / str(key[1]) / f"rank{rank}.seg"
            if key == COMPRESSED:
                compress(path)
        store.publish_written(key[0], version, RUN, RANKS)


def compress(path: Path) -> None:
    packed = path.with_suffix(".packed")
    reader = SegmentReader(LocalFile(path))
    with packed.open("wb") as file:
        copy_segment(reader, file.write, compress=True)
    reader.close()
    packed.replace(path)
    reader = SegmentReader(LocalFile(path))
    assert any(row.codec != "raw" for row in reader.footer.chunks)
    reader.close()


class Guarded:
    """Tensors to be filled, with a stretch before and behind each that nobody may write to."""

    def __init__(self) -> None:
        self.tensors: list[StateTensor] = []
        self._guards: list[torch.Tensor] = []
        for name, shape in SHAPES.items():
            count = int(np.prod(shape))
            buffer = torch.full((GUARD + count + GUARD,), -7.0, dtype=DTYPES.get(name))
            middle = buffer[GUARD : GUARD + count].reshape(shape)
            self.tensors.append(StateTensor.whole(name, middle, "0,1"))
            self._guards += (buffer[:GUARD], buffer[GUARD + count :])

    def check(self) -> None:
        assert all(bool((guard == -7).all()) for guard in self._guards), "written out of bounds"


EVENTS = frozenset(
    (
        *("open", "os.scandir", "os.listdir", "os.remove", "os.rename", "os.link", "os.mkdir"),
        *("os.rmdir", "os.symlink", "os.truncate", "os.chmod", "os.utime", "shutil.rmtree"),
    )
)


class Watch:
    """Ends the process when a file is touched that is not in the directory."""

    def __init__(self, directory: Path) -> None:
        self._inside = f"{directory}{os.sep}"
        self._directory = str(directory)
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in EVENTS or isinstance(arguments[0], int):
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(f"/proc/self/fd{os.sep}") or path == self._directory:
            return  # a file that is open already, once more
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if not real.startswith(self._inside):
            self.on = False
            os.write(2, f"{event} of {path} outside of the directory\n".encode())
            os._exit(3)


def load_everything(directory: Path, expected: dict[VersionKey, tuple[Values, list[Any]]]) -> str:
    """As a job that starts would, and more; returns how far it came.

    ``expected``: what versions have to be, by key; empty if they may be anything.
    """
    try:
        survey = DurableStore(directory).survey()
    except FtrainError:
        return "directory refused"
    loaded = 0
    for version in (*survey.versions, *survey.hidden):
        with open_files(version) as files:
            for file in files:
                if isinstance(file, SegmentReader):
                    examine(file)
            loaded += restored(version, files, expected)
    return f"{loaded} of {len(survey.versions) + len(survey.hidden)} versions loaded"


def examine(reader: SegmentReader) -> None:
    """Read each chunk, verified or not; nothing but CorruptionError may come of it."""
    scratch = Scratch()
    for check in (reader.verify, lambda: reader.small):
        try:
            check()
        except CorruptionError:
            pass
    for chunk in range(len(reader.footer.chunks)):
        try:
            reader.read(chunk, scratch, verify=False)
        except CorruptionError:
            pass


def restored(
    version: DurableVersion, files: list[Any], expected: dict[VersionKey, tuple[Values, list[Any]]]
) -> bool:
    guarded = Guarded()
    restoration = Restoration(files)
    try:
        trees = [restoration.small(rank) for rank in range(RANKS)]
        restoration.fill(guarded.tensors, TOPOLOGY)
    except FtrainError:
        guarded.check()
        return False
    guarded.check()
    if expected:
        values, small = expected[version.key]
        for tensor in guarded.tensors:
            assert torch.equal(tensor.tensor, values[tensor.name]), f"{version.key}: wrong tensor"
        assert [tree["state"]["step"] for tree in trees] == [version.step] * RANKS
        assert repr(trees) == repr(small), f"{version.key}: wrong small state"
    return True


def main(folder: str, seed: str, seconds: str) -> None:
    place = Path(folder)
    pristine, directory = place / "pristine", place / "checkpoints"
    make_directory(pristine)
    truth = {
        key: (whole_values(key), [tree_of(key, rank) for rank in range(RANKS)]) for key in VERSIONS
    }
    assert load_everything(pristine, truth) == f"{len(VERSIONS)} of {len(VERSIONS)} versions loaded"
    watch = Watch(directory)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    ends: Counter[str] = Counter()
    number, longest, end = int(seed), 0.0, time.monotonic() + float(seconds)
    while time.monotonic() < end:
        number += 1
        chance = random.Random(number)
        for old in (directory, place / "outside"):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(pristine, directory)
        (place / "outside").mkdir()
        forged = False
        try:
            for _ in range(chance.choice((1, 1, 2))):
                forged = chance.choice(MUTATIONS)(directory, chance) or forged
        except (ValueError, LookupError, TypeError, OSError):
            pass  # a second mutation finds no file that it could read
        began = time.monotonic()
        watch.on = True
        try:
            ends[load_everything(directory, {} if forged else truth)] += 1
            if chance.random() < 0.1:
                sweep(directory)
        except BaseException:
            watch.on = False
            print(f"trial {number} fails", file=sys.stderr)
            raise
        watch.on = False
        longest = max(longest, time.monotonic() - began)
        assert longest < TRIAL_S_MAX, f"trial {number} took {longest:.1f} s"
    print(f"{number - int(seed)} trials, the longest {longest:.2f} s: {dict(ends.most_common())}")


def sweep(directory: Path) -> None:
    try:
        DurableStore(directory).sweep(Retention(1), RUN)
    except FtrainError:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
