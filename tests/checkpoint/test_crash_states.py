"""Every state that a disk may be in after a power cut, for histories of the real store.

The operations of whole jobs that save, die and are followed are recorded, then a disk that keeps of
what was not synced whatever it likes is cut off at many points of them (disk_model.py), and what is
left is read, checked and swept by the real store.  What is checked is in power_cuts.py.
``pytest -m soak tests/checkpoint/test_crash_states.py -s`` goes through 3000 histories.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import crash_histories
import pytest
from crash_histories import (
    Inline,
    LateSweepWorld,
    PrunedWorld,
    UnsafeRecordWorld,
    World,
    explore,
)
from image_samples import TOPOLOGY
from power_writer import RANKS, RUN, image_of

import ftrain.checkpoint.directory as directory_module
import ftrain.checkpoint.durable as durable_module
from ftrain.checkpoint.directory import explained, fresh_name, make_folders
from ftrain.checkpoint.durable import DurableStore, Survey
from ftrain.checkpoint.files import NewFile, sync_folder
from ftrain.checkpoint.image import ImageReader
from ftrain.checkpoint.manifest import DurableVersion, FileRecord
from ftrain.checkpoint.protocol.lineage import Fence
from ftrain.checkpoint.retention import Retention
from ftrain.checkpoint.segment_writer import plan_file
from ftrain.comms.errors import FtrainError
from ftrain.comms.protocol.messages import VersionId

Patch = pytest.MonkeyPatch

POINTS = 15
QUICK, FIXED, FRESH, SOAK = range(10), range(50), 20, range(1000, 4000)
MUTANT_SEEDS = range(60)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Memory where there is some: nothing of it has to be safe."""
    memory = Path("/dev/shm")
    folder = Path(mkdtemp(dir=memory, prefix="ftrain-crash-")) if memory.is_dir() else tmp_path
    yield folder
    shutil.rmtree(folder)


def explore_all(place: Path, seeds: range) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in seeds:
        try:
            found.update(explore(place / str(seed), seed, POINTS))
        except Exception as error:
            raise AssertionError(f"history {seed}: {type(error).__name__}: {error}") from error
        finally:
            shutil.rmtree(place / str(seed))
    return found


def told(found: Counter[str], seeds: range, began: float) -> str:
    return (
        f"\n{len(seeds)} histories of {found['operations']} operations, {found['full']} of which "
        f"found the disk full: {found['states']} states after a power cut, "
        f"{time.monotonic() - began:.0f} s"
    )


def test_some_histories(place: Path) -> None:
    assert explore_all(place, QUICK)["states"] >= len(QUICK) * POINTS


@pytest.mark.slow
def test_fifty_histories(place: Path) -> None:
    began = time.monotonic()
    found = explore_all(place, FIXED)
    print(told(found, FIXED, began))
    assert found["full"] >= len(FIXED) // 2


@pytest.mark.slow
def test_fresh_histories(place: Path) -> None:
    first = random.Random(time.time_ns()).randrange(10**6, 10**9)
    print(f"fresh histories from {first}")
    explore_all(place, range(first, first + FRESH))


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_three_thousand_histories(place: Path) -> None:
    began = time.monotonic()
    print(told(explore_all(place, SOAK), SOAK, began))


@pytest.mark.parametrize("world", [PrunedWorld, UnsafeRecordWorld, LateSweepWorld])
def test_sweeps_at_the_worst_moments(place: Path, monkeypatch: Patch, world: type[World]) -> None:
    monkeypatch.setattr(crash_histories, "World", world)
    explore_all(place, range(40))


def test_a_seed_is_one_history(place: Path) -> None:
    def history(name: str) -> list[object]:
        (place / name).mkdir()
        world = World(place / name, 5)
        world.run()
        return [op[:3] for op in world.recorder.trace if op[0] in ("said", "sync", "write")]

    assert history("a") == history("b")


# ---------------------------------------------------------------- mutants


def syncs_no_folder(patch: Patch) -> None:
    for module in (directory_module, durable_module):
        patch.setattr(module, "sync_folder", lambda folder: None)


def syncs_no_file(patch: Patch) -> None:
    patch.setattr(NewFile, "sync", lambda file: None)


class PublishesFirst(World):
    """The manifest before the files."""

    def _save(self, fence: int, step: int) -> None:
        version, records = VersionId(fence, step), []
        for rank in range(RANKS):
            planned = plan_file(ImageReader(image_of(fence, step, rank)))
            records.append(FileRecord(rank, planned.nbytes, planned.tail.digest))

        def publish() -> None:
            with explained(self._store.directory, 0):
                make_folders(self._store.directory / str(fence) / str(step))
            self._store.publish(fence, version, RUN, TOPOLOGY, RANKS, records)
            for rank in range(RANKS):
                image = image_of(fence, step, rank)
                self._store.write_image(fence, version, rank, image, Inline())  # type: ignore[arg-type]

        self._tell((fence, step), publish)


class Unchecked(DurableVersion):
    """Nobody looks whether its files are there."""

    def check(self) -> None:
        return


def publishes_first(patch: Patch) -> None:
    patch.setattr(crash_histories, "World", PublishesFirst)
    patch.setattr(durable_module, "DurableVersion", Unchecked)
    patch.setattr(durable_module, "_refuse_published", lambda folder: None)


def renames_over(patch: Patch) -> None:
    def put(path: Path, content: bytes) -> bool:
        fresh = fresh_name(path)
        with NewFile(fresh, direct=False) as file:
            file.write_at(0, content)
            file.sync()
        fresh.replace(path)
        sync_folder(path.parent)
        return True

    patch.setattr(durable_module, "put_once", put)


def sweeps_data_first(patch: Patch) -> None:
    def sweep(store: DurableStore, policy: Retention, run_id: str) -> tuple[Path, ...]:
        survey = store.survey()
        keep = policy.kept([version.key for version in survey.versions])
        for version in survey.versions:
            if version.key not in keep:
                for rank in range(RANKS):
                    version.file(rank).unlink()
                version.path.unlink()
                sync_folder(version.path.parent)
        return ()

    patch.setattr(crash_histories, "sweep", sweep)


def sweeps_unsafe_versions(patch: Patch) -> None:
    patch.setattr(crash_histories, "World", PrunedWorld)
    patch.setattr(DurableStore, "_make_safe", lambda store: None)


def sweeps_for_an_unsafe_record(patch: Patch) -> None:
    """As the store once did: history 1079 of that time."""

    def make_safe(store: DurableStore) -> None:
        for folder in {version.path.parent for version in store.survey().versions}:
            sync_folder(folder)

    patch.setattr(crash_histories, "World", UnsafeRecordWorld)
    patch.setattr(DurableStore, "_make_safe", make_safe)
    patch.setattr(Survey, "superseded", property(lambda survey: survey.hidden))


def hides_what_a_late_sweep_left(patch: Patch) -> None:
    """The newest record settles it, whether or not what it goes on from is there."""

    def newest(fences: Iterable[Fence], complete: object) -> Fence | None:
        return max(fences, key=lambda record: record.fence, default=None)

    patch.setattr(crash_histories, "World", LateSweepWorld)
    patch.setattr(durable_module, "settling", newest)


def rests_on_what_it_goes_on_from(patch: Patch) -> None:
    """As the store once did: what was only in memory is in no file, so that the record is passed
    over until its epoch publishes."""

    def stands(fence: Fence, durable: Collection[VersionId]) -> bool:
        own = any(version.epoch == fence.fence for version in durable)
        return own or (bool(fence.ancestors) and fence.ancestors[-1] in durable)

    patch.setattr(Fence, "stands", stands)


def shows_what_is_over(patch: Patch) -> None:
    patch.setattr(Fence, "shows", lambda fence, version: True)


def begins_without_a_record(patch: Patch) -> None:
    patch.setattr(DurableStore, "begin_fence", lambda *arguments: None)


def says_it_all_the_same(patch: Patch) -> None:
    """A full disk is no reason not to say that a version is published."""
    publish = DurableStore.publish_written

    def publish_anyway(*arguments: object) -> None:
        try:
            publish(*arguments)  # type: ignore[arg-type]
        except FtrainError:
            return

    patch.setattr(DurableStore, "publish_written", publish_anyway)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "syncs no folder": syncs_no_folder,
    "syncs no file": syncs_no_file,
    "publishes before the files are there": publishes_first,
    "renames over what is published": renames_over,
    "sweeps the data before the manifest": sweeps_data_first,
    "sweeps before what stays is safe": sweeps_unsafe_versions,
    "sweeps before the record that hides it is safe": sweeps_for_an_unsafe_record,
    "hides what a late sweep left": hides_what_a_late_sweep_left,
    "passes over what goes on from memory": rests_on_what_it_goes_on_from,
    "shows what an epoch that is over published": shows_what_is_over,
    "begins without a record": begins_without_a_record,
    "says that it is published when the disk is full": says_it_all_the_same,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(place: Path, name: str, monkeypatch: Patch) -> None:
    MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError, match=r"history \d+") as caught:
        explore_all(place, MUTANT_SEEDS)
    print(f"\n{name}: {str(caught.value)[:200]}")
