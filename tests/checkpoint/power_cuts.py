"""Power cuts on a real file system, and what must hold after each."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from image_samples import TOPOLOGY
from power_writer import KEEP, OPERATIONS, RANKS, RUN, cut_power, image_of

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.image import ImageReader
from ftrain.checkpoint.manifest import DurableVersion
from ftrain.checkpoint.retention import Retention
from ftrain.checkpoint.segment_reader import Scratch
from ftrain.comms.protocol.messages import VersionId

HERE = Path(__file__).parent
DISK_MIB = 16
_NAMESPACE_S_MAX = 60.0
Key = tuple[int, int]


class Disk:
    """An ext4 file system in a file, mounted or not."""

    def __init__(self, folder: Path) -> None:
        self._image = folder / "disk"
        self.place = folder / "mounted"
        self.place.mkdir()
        with self._image.open("wb") as file:
            file.truncate(DISK_MIB << 20)
        _run("mkfs.ext4", "-q", self._image)

    def mount(self) -> None:
        """What is on the disk, as after a boot; nothing is written back by itself for long."""
        _run("mount", "-o", "loop,commit=300", self._image, self.place)

    def cut(self) -> None:
        """Everything that is not on the disk by now is gone."""
        fd = os.open(self.place, os.O_RDONLY)
        try:
            cut_power(fd)
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """Take it away.

        A mount namespace that a test beside this one has made meanwhile has a copy of the mount:
        until that is gone, the file system lives on as it was when its power was cut.
        """
        _run("umount", self.place)
        deadline_s = time.monotonic() + _NAMESPACE_S_MAX
        while self._in_use():
            assert time.monotonic() < deadline_s, f"{self._image} is mounted somewhere else"
            time.sleep(0.01)

    def _in_use(self) -> bool:
        for file in Path("/sys/block").glob("loop*/loop/backing_file"):
            with suppress(OSError):  # gone since it was listed
                if file.read_text().strip() == str(self._image):
                    return True
        return False


def _run(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """A disk that is gone in the end."""
    disk = Disk(folder)
    disk.mount()
    try:
        yield disk
    finally:
        if os.path.ismount(disk.place):
            disk.unmount()


@dataclass
class Ledger:
    """What writers said so far."""

    begun: dict[int, Key] = field(default_factory=dict)  # fences, and what they go on from
    begins: dict[int, Key] = field(default_factory=dict)  # the same, perhaps never done
    published: set[Key] = field(default_factory=set)
    publishes: set[Key] = field(default_factory=set)  # the same, perhaps never done
    swept_late: bool = False  # by a process of an epoch that may be over

    def note(self, output: str) -> None:
        """Take a writer's words."""
        for line in output.splitlines():
            match line.split():
                case ["begins", *words]:
                    fence, *parent = map(int, words)
                    self.begins[fence] = (parent[0], parent[1])
                case ["begun", word, *_]:
                    self.begun[int(word)] = self.begins[int(word)]
                case ["publishes", fence, step]:
                    self.publishes.add((int(fence), int(step)))
                case ["published", fence, step]:
                    self.published.add((int(fence), int(step)))
                case ["sweeps", "late"]:
                    self.swept_late = True
                case ["done"] | ["failed:", *_]:
                    pass
                case _:
                    raise AssertionError(f"a writer said {line!r}")

    def merge(self, other: Ledger) -> None:
        """What the other one has as well."""
        self.begun |= other.begun
        self.begins |= other.begins
        self.published |= other.published
        self.publishes |= other.publishes
        self.swept_late |= other.swept_late

    def history(self, fence: int) -> dict[int, float]:
        """The epochs that ``fence`` goes on from, and the last step of each that counts."""
        found, last = {}, float("inf")
        while fence:
            found[fence] = last
            fence, last = self.begins.get(fence, (0, 0))
        return found


def cut_once(disk: Disk, ledger: Ledger, seed: int, mutant: str = "") -> None:
    """A writer, a power cut at a point that ``seed`` draws, and what must hold after a boot."""
    chance = random.Random(seed)
    directory = disk.place / "checkpoints"
    by_count = chance.random() < 0.7
    cut_at = chance.randrange(1, 2 * OPERATIONS) if by_count else 0
    with writing(directory, seed, cut_at, mutant) as writer:
        try:
            assert writer.stdout is not None
            output = writer.stdout.readline()
            if not by_count:
                time.sleep(chance.random() * 0.4)  # anywhere in its work
                disk.cut()
            output += writer.stdout.read()
        finally:
            writer.kill()
    assert "done" in output or "failed: " in output, output
    if "done" in output:
        disk.cut()
    ledger.note(output)
    disk.unmount()
    disk.mount()
    check(DurableStore(directory), ledger)


def kill_once(directory: Path, ledger: Ledger, seed: int) -> None:
    """A writer, a SIGKILL at one of its operations that ``seed`` draws, and what must hold."""
    cut_at = random.Random(seed).randrange(1, 2 * OPERATIONS)
    with writing(directory, seed, cut_at, "kill") as writer:
        assert writer.stdout is not None
        output = writer.stdout.read()
    assert writer.returncode == -signal.SIGKILL or "done" in output, output
    ledger.note(output)
    check(DurableStore(directory), ledger)


def writing(directory: Path, seed: int, cut_at: int, how: str) -> subprocess.Popen[str]:
    """A process that writes until then."""
    command = [sys.executable, HERE / "power_writer.py", directory, str(seed), str(cut_at), how]
    paths = {"PYTHONPATH": str(HERE.parent)}  # of the samples
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **paths})


def check(store: DurableStore, ledger: Ledger, *, zombies: bool = False) -> None:
    """After a boot: all that was published is there and right, and a sweep leaves nothing else.

    ``zombies``: what is hidden may be anything, because others swept it while it was published.
    """
    survey = store.survey()
    records = [int(path.parent.name) for path in store.directory.glob("*/fence.json")]
    newest = max(records, default=0)
    assert newest >= max(ledger.begun, default=0), "a fence that was begun is lost"
    shown = {version.key for version in survey.versions}
    there = shown | {version.key for version in survey.hidden}
    epochs = {fence for fence, _ in there}
    standing = [
        file.fence
        for file in store.fence_files()
        if file.fence in epochs or key_of(file.rests_on) in {None, *there}
    ]
    history = ledger.history(max(standing, default=newest))

    def counts(key: Key) -> bool:
        return key[1] <= history.get(key[0], -1)

    assert not [p for p in survey.problems if not zombies or counts(key_in(p))], survey.problems
    assert there <= ledger.publishes
    assert shown == {key for key in there if counts(key)}
    for lost in ledger.published - there:
        if zombies and not counts(lost):
            continue
        newer = sorted(key for key in shown if key > lost or not counts(lost))
        enough = 1 if ledger.swept_late else KEEP  # who sweeps late leaves the newest one, no more
        assert len(newer) >= enough, f"{lost} was published and is lost; there are {there}"
    for version in (*survey.versions, *survey.hidden):
        verify(version)

    fence, parent = survey.fence + 1, survey.versions[0].version if survey.versions else None
    store.begin_fence(fence, RUN, parent)
    goes_on_from = f"{parent.epoch} {parent.step}" if parent else "0 0"
    ledger.note(f"begins {fence} {goes_on_from}\nbegun {fence} {goes_on_from}")
    store.sweep(Retention(KEEP), RUN)
    check_swept(store, fence)
    assert store.versions() == survey.versions[:KEEP]


def key_of(version: VersionId | None) -> Key | None:
    """Where it lies: here each is published under the epoch in which it was captured."""
    return None if version is None else (version.epoch, version.step)


def key_in(problem: str) -> Key:
    """Of which version a sentence speaks."""
    found = re.search(r"/checkpoints/(\d+)/(\d+)?", problem)
    assert found is not None, problem
    return int(found[1]), int(found[2] or 0)


def verify(version: DurableVersion) -> None:
    """Every byte of a version is what was saved."""
    assert (version.world_size, version.manifest.topology) == (RANKS, TOPOLOGY)
    for rank in range(RANKS):
        reader = version.open(rank)
        reader.verify()
        image = ImageReader(image_of(*version.key, rank))
        scratch = Scratch()
        for chunk in range(reader.chunks):
            assert reader.read(chunk, scratch) == image.read(chunk)
        assert reader.small == image.small
        reader.close()


def check_swept(store: DurableStore, fence: int) -> None:
    """Nothing is there but whole versions and the records of fences."""
    survey = store.survey()
    expected = {store.directory / str(fence) / "fence.json"}
    for version in (*survey.versions, *survey.hidden):
        record = version.path.with_name("fence.json")
        if version in survey.versions or record.exists():  # of a fence that was begun
            expected.add(record)
        expected.add(version.path)
        expected |= {version.file(rank) for rank in range(RANKS)}
    files = {path for path in store.directory.rglob("*") if path.is_file()}
    assert files == expected, sorted(map(str, files ^ expected))
    folders = {path for path in store.directory.rglob("*") if path.is_dir()}
    assert folders == {
        folder for path in files for folder in path.parents if store.directory in folder.parents
    }
