"""Durable versions on a real file system, with the faults that file systems have."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from durable_samples import data_of, files, save
from image_samples import TOPOLOGY, make_identity, make_image, make_plan

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.image import ImageReader, ImageWriter
from ftrain.checkpoint.manifest import FileRecord, decode_fence
from ftrain.checkpoint.retention import Retention
from ftrain.comms.errors import CorruptionError, RunDirectoryError, StateError
from ftrain.comms.protocol.messages import VersionId

TESTS = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path: Path) -> DurableStore:
    return DurableStore(tmp_path / "run" / "checkpoints")


def test_what_is_published_is_loaded(store: DurableStore) -> None:
    assert store.versions() == ()
    version = save(store, 3, 7)
    assert store.versions() == (version,)
    assert (version.key, version.version, version.world_size) == ((3, 7), VersionId(3, 7), 2)
    assert version.path == store.directory / "3" / "7.json"
    assert files(store) == {"3/7.json", "3/7/rank0.seg", "3/7/rank1.seg"}
    assert version.nbytes == sum(version.file(rank).stat().st_size for rank in range(2))
    for rank in range(2):
        image = ImageReader(make_image(make_identity(7, rank, epoch=3), seed=70 + rank))
        assert data_of(version, rank) == image.data
        assert version.manifest.files[rank] == store.file_record(3, VersionId(3, 7), rank)


def test_a_slots_unused_bytes_are_not_written(store: DurableStore) -> None:
    image = bytes(make_image()) + bytes(50_000)
    record = store.write_image(3, VersionId(3, 7), 0, memoryview(image))
    assert record == store.file_record(3, VersionId(3, 7), 0)
    assert record.nbytes < len(image) - 10_000
    assert (store.directory / "3/7/rank0.seg").stat().st_size == record.nbytes


def test_versions_are_ordered_by_fence_and_step(store: DurableStore) -> None:
    for fence, parent in ((1, None), (2, VersionId(1, 600)), (9, VersionId(2, 100))):
        store.begin_fence(fence, "run", parent)
    for fence, step in ((1, 500), (2, 30), (2, 100), (9, 900)):
        save(store, fence, step, world_size=1)
    keys = [version.key for version in store.versions()]
    assert keys == [(9, 900), (2, 100), (2, 30), (1, 500)]
    assert store.survey().fence == 9


def test_what_a_zombie_publishes_is_hidden(store: DurableStore) -> None:
    store.begin_fence(1, "run", None)
    older = save(store, 1, 80, world_size=1)
    store.begin_fence(2, "run", VersionId(1, 80))
    zombie = save(store, 1, 99, world_size=1)  # later, under a fence that is over
    survey = store.survey()
    assert survey.versions == (older,)
    assert survey.hidden == (zombie,)
    newer = save(store, 2, 85, world_size=1)
    assert store.versions() == (newer, older)
    again = DurableStore(store.directory)
    assert again.begin_fence(2, "run", None) != 0  # said again by another process: no change
    assert again.versions() == (newer, older)


def test_what_a_stop_saves_from_memory_counts_under_the_next_fence(store: DurableStore) -> None:
    """Also if the only durable version before it was withdrawn."""
    withdrawn = save(store, 1, 20, world_size=1)
    held = VersionId(1, 19)
    store.begin_fence(2, "run", held)  # then the job was asked to stop, before a rank ran
    store.remove([withdrawn])
    store.write_image(2, held, 0, make_image(make_identity(19, 0, 1, epoch=1)))
    assert store.counts(2, held)
    store.publish_written(2, held, "run", 1)
    assert [version.key for version in store.versions()] == [(2, 19)]
    store.sweep(Retention(1), "run", withdrawn=[withdrawn.version])
    store.begin_fence(3, "run", held)
    assert [version.key for version in store.versions()] == [(2, 19)]


def test_a_fence_that_was_never_granted_is_hidden(store: DurableStore) -> None:
    good = save(store, 3, 7, world_size=1)
    image = make_image(make_identity(50, 0, 1, epoch=9))
    store.write_image(9, VersionId(9, 50), 0, image)
    store.publish_written(9, VersionId(9, 50), "run", 1)
    survey = store.survey()
    assert survey.versions == (good,)
    assert [version.key for version in survey.hidden] == [(9, 50)]


def test_a_damaged_fence_hides_nothing_of_its_own(store: DurableStore) -> None:
    store.begin_fence(1, "run", None)
    save(store, 1, 80, world_size=1)
    store.begin_fence(2, "run", VersionId(1, 80))
    save(store, 2, 90, world_size=1)
    (store.directory / "2/fence.json").write_text("{")
    survey = store.survey()
    assert [version.key for version in survey.versions] == [(2, 90), (1, 80)]
    assert len(survey.problems) == 1


def test_nothing_is_published_twice(store: DurableStore) -> None:
    version = save(store, 3, 7)
    before = version.path.read_bytes()
    assert store.publish_written(3, VersionId(3, 7), "run", 2) == version.path  # asked again
    with pytest.raises(StateError, match="published already"):
        store.write_image(3, VersionId(3, 7), 0, make_image(seed=9))
    with pytest.raises(StateError, match="exists already and differs"):
        store.publish(3, VersionId(2, 7), "run", TOPOLOGY, 2, version.manifest.files)
    assert version.path.read_bytes() == before
    assert files(store) == {"3/7.json", "3/7/rank0.seg", "3/7/rank1.seg"}


_PUBLISHER = """
import sys
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import FileRecord
from ftrain.comms.errors import StateError
from ftrain.comms.protocol.messages import VersionId
store, version = DurableStore(sys.argv[1]), VersionId(3, 7)
record = store.file_record(3, version, 0)
sys.stdin.readline()
try:
    store.publish(3, version, "run", sys.argv[2], 1, [record])
except StateError:
    raise SystemExit(9)
"""


def test_of_many_publishers_one_wins(store: DurableStore) -> None:
    store.begin_fence(3, "run", None)
    store.write_image(3, VersionId(3, 7), 0, make_image(make_identity(7, 0, 1)))
    publishers = [
        subprocess.Popen(
            [sys.executable, "-c", _PUBLISHER, store.directory, f"{number:032x}"],
            stdin=subprocess.PIPE,
        )
        for number in range(4)
    ]
    for publisher in publishers:
        assert publisher.stdin is not None
        publisher.stdin.write(b"\n")
        publisher.stdin.flush()
    codes = []
    for publisher in publishers:
        with publisher:
            codes.append(publisher.wait())
    assert sorted(codes) == [0, 9, 9, 9]
    (version,) = store.versions()
    assert version.manifest.topology == f"{codes.index(0):032x}"
    assert files(store) == {"3/7.json", "3/7/rank0.seg"}


def test_files_must_be_there_to_be_published(store: DurableStore) -> None:
    version = VersionId(3, 7)
    record = store.write_image(3, version, 0, make_image())
    with pytest.raises(CorruptionError, match=r"rank1\.seg can't be read"):
        store.publish_written(3, version, "run", 2)
    with pytest.raises(CorruptionError, match="one file for each"):
        store.publish(3, version, "run", TOPOLOGY, 2, [record])
    with pytest.raises(CorruptionError, match=r"rank1\.seg is missing"):
        store.publish(3, version, "run", TOPOLOGY, 2, [record, FileRecord(1, 10, "0" * 32)])
    store.write_image(3, version, 1, make_image(make_identity(7, 1, world_size=3)))
    with pytest.raises(CorruptionError, match="world_size=3"):
        store.publish_written(3, version, "run", 2)
    with pytest.raises(CorruptionError, match="run"):
        store.publish_written(3, version, "another run", 2)
    with pytest.raises(StateError, match="no ranks"):
        store.publish_written(3, version, "run", 0)
    assert store.versions() == ()


def test_only_the_sealed_image_asked_for_is_written(store: DurableStore) -> None:
    plan = make_plan()
    slot = bytearray(plan.total_bytes)
    ImageWriter(slot, plan, make_identity()).begin(b"")
    with pytest.raises(StateError, match="WRITING"):
        store.write_image(3, VersionId(3, 7), 0, slot)
    with pytest.raises(StateError, match="rank"):
        store.write_image(3, VersionId(3, 7), 1, make_image())
    with pytest.raises(StateError, match="step=7"):
        store.write_image(3, VersionId(3, 8), 0, make_image())
    with pytest.raises(StateError, match="negative"):
        store.write_image(-1, VersionId(3, 7), 0, make_image())
    image = make_image()
    image[-1] ^= 1
    with pytest.raises(CorruptionError, match="chunk 1 does not match"):
        store.write_image(3, VersionId(3, 7), 0, image)
    assert files(store) == set()


def test_damage_is_noticed_and_the_older_version_loads(store: DurableStore) -> None:
    older, newer = save(store, 3, 7), save(store, 3, 8)
    path = newer.file(1)
    whole = path.read_bytes()

    for at, what in ((4096 + 5000, "chunk 1"), (10, "header"), (len(whole) - 500, "footer|trail")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CorruptionError, match=what):
            data_of(newer, 1)
    path.write_bytes(older.file(1).read_bytes())  # a file that verifies, but of another version
    with pytest.raises(CorruptionError, match="not the file"):
        data_of(newer, 1)

    path.write_bytes(whole[:-1])
    survey = store.survey()
    assert survey.versions == (older,)
    assert len(survey.problems) == 1
    assert " bytes" in survey.problems[0]
    with pytest.raises(CorruptionError):
        data_of(newer, 1)
    path.unlink()
    assert "is missing" in store.survey().problems[0]
    path.symlink_to(older.file(1))
    with pytest.raises(CorruptionError, match="can't be read"):
        data_of(newer, 1)
    assert data_of(older, 1)


def test_torn_and_foreign_manifests_are_reported(store: DurableStore) -> None:
    version = save(store, 3, 7)
    text = version.path.read_bytes()
    for length in range(0, len(text) - 2, 7):
        version.path.write_bytes(text[:length])
        survey = store.survey()
        assert survey.versions == ()
        assert len(survey.problems) == 1
        assert "is damaged" in survey.problems[0]
    good = json.loads(text)
    for change in (
        {"step": 8},
        {"fence": 4},
        {"step": "../../etc"},
        {"world_size": 0, "files": []},
        {"files": good["files"][:1]},
        {"files": good["files"][::-1]},
        {"files": [{"rank": "../x", "nbytes": 1, "digest": "0" * 32}]},
        {"files": [{"rank": 0, "nbytes": -1, "digest": "0" * 32}]},
        {"extra": {"note": "forged"}},
    ):
        version.path.write_text(json.dumps(good | change))
        survey = store.survey()
        assert survey.versions == ()
        assert len(survey.problems) == 1
    for content in ("[" * 100_000, "null", "[]", "\0", '{"a": 1}'):
        version.path.write_text(content)
        assert len(store.survey().problems) == 1
        version.path.write_text(json.dumps(good | {"format": 3}))  # and another one's digest
        assert "is damaged" in store.survey().problems[0]


def test_strange_names_are_passed_over(store: DurableStore) -> None:
    version = save(store, 3, 7)
    for name in ("3/007.json", "3/x.json", "3/-1.json", "03/7.json", "notes/1.json", "5.json"):
        path = store.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(version.path.read_bytes())
    (store.directory / "3" / "9.json").symlink_to(version.path)
    (store.directory / "8").symlink_to(store.directory / "3")
    assert store.survey().versions == (version,)
    assert store.survey().problems == ()


def test_sweep_keeps_what_the_policy_keeps(store: DurableStore) -> None:
    save(store, 2, 1, world_size=1)
    store.begin_fence(3, "run", VersionId(2, 1))
    for step in (2, 3):
        save(store, 3, step, world_size=1)
    save(store, 2, 99, world_size=1)  # of a zombie
    save(store, 3, 50, world_size=1, run_id="another run")
    for step in (40, 41):  # passed by, and one that somebody still wants to publish
        store.write_image(3, VersionId(3, step), 0, make_image(make_identity(step)))
    store.write_image(3, VersionId(3, 60), 0, make_image(make_identity(60)))  # being written
    store.write_image(4, VersionId(3, 61), 0, make_image(make_identity(61)))
    (store.directory / "3/60/rank1.seg.123.new").write_text("being written")
    (store.directory / "3/60.json.123.new").write_text("being published")
    (store.directory / "2/1/notes.txt").write_text("the user's")
    (store.directory / "3/3/rank0.seg.123.new").write_text("of a killed writer")
    (store.directory / "3/45.json.123.new").write_text("of a killed publisher")
    (store.directory / "3/2.pin").write_text("")
    torn = store.directory / "3" / "80.json"
    torn.write_text("{")

    removed = store.sweep(Retention(1), "run", active={(3, 41)})
    assert files(store) == {
        "3/2.json",
        "3/2.pin",
        "3/2/rank0.seg",
        "3/3.json",
        "3/3/rank0.seg",
        "3/50.json",
        "3/50/rank0.seg",
        "3/41/rank0.seg",
        "3/60/rank0.seg",
        "3/60/rank1.seg.123.new",
        "3/60.json.123.new",
        "3/80.json",
        "2/1/notes.txt",
        "4/61/rank0.seg",
    }
    assert store.directory / "2/1.json" in removed
    assert [v.key for v in store.versions()] == [(3, 50), (3, 3), (3, 2)]
    assert store.sweep(Retention(1), "run", active={(3, 41)}) == ()


def test_what_is_hidden_stays_until_there_is_enough_else(store: DurableStore) -> None:
    save(store, 1, 80, world_size=1)
    store.begin_fence(2, "run", None)  # nothing could be put back
    assert store.sweep(Retention(2), "run") == ()
    save(store, 2, 5, world_size=1)
    assert store.sweep(Retention(2), "run") == ()
    save(store, 2, 9, world_size=1)
    store.sweep(Retention(2), "run")
    assert files(store) == {"2/5.json", "2/5/rank0.seg", "2/9.json", "2/9/rank0.seg"}
    assert not (store.directory / "1").exists()


def test_an_epoch_rests_on_nothing_that_does_not_count(store: DurableStore) -> None:
    save(store, 1, 80, world_size=1)
    store.write_image(9, VersionId(1, 85), 0, make_image(make_identity(85, 0, 1, epoch=1)))
    store.publish_written(9, VersionId(1, 85), "run", 1)  # under a fence that was never granted
    assert store.begin_fence(10, "run", VersionId(1, 90)).rests_on == VersionId(1, 80)
    save(store, 1, 95, world_size=1)
    assert [version.step for version in store.versions()] == [80]


def test_what_was_withdrawn_is_kept_by_nobody(store: DurableStore) -> None:
    older, newer = (save(store, 1, step, world_size=1) for step in (4, 5))
    store.sweep(Retention(2), "run", active={newer.key}, withdrawn={newer.version})
    assert store.versions() == (older,)
    assert not newer.path.exists()
    save(store, 1, 6, world_size=1)
    store.sweep(Retention(2), "run")
    assert not newer.file(0).exists()


def test_an_epoch_whose_record_was_deleted_is_refused(store: DurableStore) -> None:
    with pytest.raises(RunDirectoryError, match=r"2/fence\.json was deleted"):
        store.require_begun(2)
    store.require_begun(2, (2, "run", None))
    store.require_begun(2)


def test_a_directory_that_is_none_of_versions_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"version in .*/gone: there is no such dir"):
        DurableStore(tmp_path / "gone").find()
    save(DurableStore(tmp_path / "run/checkpoints"), 1, 80, world_size=1)
    with pytest.raises(RunDirectoryError, match=r"it is a run.s directory, .*run/checkp"):
        DurableStore(tmp_path / "run").find(80)


def test_an_open_file_outlives_its_name(store: DurableStore) -> None:
    reader = save(store, 3, 1).open(0)
    save(store, 3, 2)
    store.sweep(Retention(1), "run")
    assert not (store.directory / "3/1").exists()
    reader.verify()
    reader.close()


_WRITER = """
import sys
from image_samples import make_identity, make_image, make_plan
from ftrain.checkpoint.durable import DurableStore
from ftrain.comms.protocol.messages import VersionId
store = DurableStore(sys.argv[1])
plan = make_plan((200_000, 3_000_000))
first, survey = int(sys.argv[2]), store.survey()
fence = survey.fence + 1
store.begin_fence(fence, "run", survey.versions[0].version if survey.versions else None)
for step in range(first, first + 1000):
    image = make_image(make_identity(step, 0, 1, epoch=fence), plan, seed=1)
    store.write_image(fence, VersionId(fence, step), 0, image)
    store.publish_written(fence, VersionId(fence, step), "run", 1)
    print(flush=True)
"""


def test_a_killed_writer_leaves_only_whole_versions(store: DurableStore) -> None:
    rng = random.Random(7)
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, store.directory, str(attempt * 1000)],
            cwd=TESTS,
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            for _ in range(rng.randrange(1, 4)):
                process.stdout.readline()
            time.sleep(rng.random() * 0.02)
            process.kill()
        survey = store.survey()
        assert survey.problems == ()
        for version in survey.versions:
            data_of(version, 0)
        assert survey.versions
        store.begin_fence(survey.fence + 1, "run", survey.versions[0].version)
        store.sweep(Retention(2), "run")
        assert not [name for name in files(store) if "new" in name]
        assert len(store.versions()) == min(2, len(survey.versions))


_REFUSED = """
import os, resource, sys
from image_samples import make_image
from ftrain.checkpoint.durable import DurableStore
from ftrain.comms.errors import RunDirectoryError
from ftrain.comms.protocol.messages import VersionId
image = make_image()
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
if sys.argv[2] == "nobody" and os.geteuid() == 0:
    os.setgroups([])
    os.setresuid(65534, 65534, 65534)
try:
    DurableStore(sys.argv[1]).write_image(3, VersionId(3, 7), 0, image)
except RunDirectoryError as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


def _refusal(directory: Path, how: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _REFUSED, directory, how], cwd=TESTS, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert ("bytes were needed" in done.stdout) == (how == "limit")
    assert len(done.stdout.splitlines()) == 1
    return done.stdout


def test_a_file_too_large_is_said_and_removed(tmp_path: Path) -> None:
    assert "File too large" in _refusal(tmp_path, "limit")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_read_only_directory_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert "Permission denied" in _refusal(tmp_path, "nobody")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "3").write_text("")
    refusal = _refusal(tmp_path, "plain")
    assert "Not a directory" in refusal or "File exists" in refusal


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_read_only_wants_no_room(small_disk: Path) -> None:
    store = DurableStore(small_disk)
    version = save(store, 3, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for action in (lambda: store.pin(version.key), lambda: store.remove([version])):
        with pytest.raises(RunDirectoryError, match=r"Read-only file system\): change that"):
            action()


def test_a_full_disk_is_said_and_older_versions_stay(small_disk: Path) -> None:
    store = DurableStore(small_disk)
    version = save(store, 3, 1)
    plan = make_plan((100, 100_000))
    with pytest.raises(RunDirectoryError, match=r"No space left.*are free; make room"):
        store.write_image(3, VersionId(3, 2), 0, make_image(make_identity(2), plan))
    assert files(store) == {"3/1.json", "3/1/rank0.seg", "3/1/rank1.seg"}
    assert data_of(version, 0)
    save(store, 3, 3, world_size=1)


def test_a_store_of_which_nothing_counts_is_no_empty_one(store: DurableStore) -> None:
    """Or else training would begin anew beside versions that somebody can still make use of."""
    save(store, 1, 100)
    later = save(store, 1, 200)
    store.begin_fence(2, "run", VersionId(1, 100))
    store.remove([store.find(100)])
    record = store.directory / "2/fence.json"
    record.write_bytes(replace(decode_fence(record), rests_on=None).encode())
    survey = store.survey()
    assert (survey.versions, survey.hidden) == ((), (later,))
    assert "1/200.json is not of the history that epoch 2 goes on from" in survey.problems[0]


def test_what_came_after_a_lost_record_is_not_superseded(store: DurableStore) -> None:
    """Putting the record back makes it count again."""
    save(store, 4, 10, world_size=1)
    store.begin_fence(5, "run", VersionId(4, 10))
    for step in (20, 30):
        save(store, 5, step, world_size=1)
    (store.directory / "5/fence.json").rename(store.directory / "lost")
    assert store.survey().superseded == ()
    store.sweep(Retention(1), "run")
    (store.directory / "lost").rename(store.directory / "5/fence.json")
    assert [version.step for version in store.versions()] == [30, 20, 10]


def test_a_version_that_is_swept_while_it_is_looked_at_is_no_damage(store: DurableStore) -> None:
    """A run goes on while its versions are listed."""
    for step in range(1, 4):
        save(store, 1, step, world_size=1)
    over = threading.Event()

    def go_on() -> None:
        for step in range(4, 40):
            save(store, 1, step, world_size=1)
            store.sweep(Retention(1), "run")
        over.set()

    running = threading.Thread(target=go_on)
    running.start()
    looks = 0
    while not over.is_set():
        survey = store.survey()
        assert survey.versions
        assert survey.problems == ()
        looks += 1
    running.join()
    assert looks > 10
