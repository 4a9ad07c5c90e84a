"""Durable versions in an object store that speaks S3 over HTTP, and under a file:// URI."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_samples import TOPOLOGY
from remote_samples import names_in, save, segments_of
from s3_server import S3Server
from sending import send

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import FileRecord, read_manifest
from ftrain.checkpoint.remote.fetch import fetch
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.reading import RemoteFile
from ftrain.checkpoint.remote.store import RemoteStore
from ftrain.checkpoint.retention import Retention
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.comms.errors import (
    CorruptionError,
    StateError,
)
from ftrain.comms.protocol.messages import VersionId

QUICK = Limits(connect_timeout_s=5, request_timeout_s=10, attempts=3, pause_s=0.05, pause_s_max=0.1)


@pytest.fixture
def local(tmp_path: Path) -> DurableStore:
    return DurableStore(tmp_path / "checkpoints")


@pytest.fixture(params=["s3", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RemoteStore, Path]]:
    """A store, and the folder that its objects are files in."""
    if request.param == "file":
        folder = tmp_path / "mounted" / "run 1"
        uri = folder.as_uri()
    else:
        s3: S3Server = request.getfixturevalue("s3")
        folder = s3.folder / "bucket/runs/1"
        uri = s3.uri("bucket/runs/1")
    place = Place(uri, QUICK)
    yield RemoteStore(place), folder
    place.close()


def test_what_is_uploaded_comes_back_bit_for_bit(
    remote: tuple[RemoteStore, Path], local: DurableStore, tmp_path: Path
) -> None:
    store, folder = remote
    version = save(local, 3, 7)
    before = segments_of(local.directory)
    sent = send(store, version)
    assert store.versions() == (sent,)
    assert (sent.key, sent.version, sent.world_size) == ((3, 7), VersionId(3, 7), 2)
    assert sent.nbytes < 0.95 * version.nbytes  # compressed
    assert names_in(folder) == {"3/fence.json", "3/7.json", "3/7/rank0.seg", "3/7/rank1.seg"}

    target = DurableStore(tmp_path / "elsewhere")
    counted: list[int] = []
    path = fetch(store, sent, target, counted.append)
    assert segments_of(target.directory) == before
    fetched = read_manifest(path)
    assert target.versions() == (fetched,)
    assert fetched.manifest.same_files(version.manifest)
    assert sum(counted) > 0

    counted.clear()
    assert fetch(store, sent, target, counted.append) == path  # nothing is read again
    assert counted  # it is alive: who waits for progress kills what makes none
    assert not any(counted)


def test_what_is_in_the_store_can_be_read_by_the_documented_format(
    remote: tuple[RemoteStore, Path], local: DurableStore, tmp_path: Path
) -> None:
    """The objects are a directory of versions themselves."""
    store, folder = remote
    sent = send(store, save(local, 3, 7))
    (copied,) = DurableStore(shutil.copytree(folder, tmp_path / "copied")).versions()
    assert copied.manifest == sent.manifest
    for rank in range(2):
        reader = copied.open(rank)
        reader.verify()
        assert {chunk.codec for chunk in reader.footer.chunks} == {
            "raw",
            "planes1-zstd",
            "planes4-zstd",
        }
        reader.close()


def test_an_upload_goes_on_where_it_was_cut_off(
    remote: tuple[RemoteStore, Path], local: DurableStore
) -> None:
    store, folder = remote
    version = save(local, 3, 7)
    first = version.open(0)
    record = store.upload(3, first)
    written = (folder / "3/7/rank0.seg").stat().st_mtime_ns
    counted: list[int] = []
    assert store.upload(3, first, counted.append) == record
    assert counted == []
    assert (folder / "3/7/rank0.seg").stat().st_mtime_ns == written
    first.close()
    send(store, version)
    assert send(store, version) == store.versions()[0]  # all of it again: no change


def test_a_truncated_object_is_not_believed(
    remote: tuple[RemoteStore, Path], local: DurableStore
) -> None:
    store, folder = remote
    version = save(local, 3, 7)
    sent = send(store, version)
    path = folder / "3/7/rank1.seg"
    whole = path.read_bytes()
    with store.place.writing("3/7/rank1.seg") as sink:
        sink(whole[: 8 * 4096])
    survey = store.survey()
    assert survey.versions == ()
    (problem,) = survey.problems
    assert "3/7/rank1.seg has 32768 of" in problem
    with pytest.raises(CorruptionError, match=r"rank1\.seg has 32768 of"):
        fetch(store, sent, DurableStore(local.directory.with_name("elsewhere")))

    with store.place.writing("3/8/rank0.seg") as sink:  # as an upload that was cut off leaves it
        sink(whole[: 8 * 4096])
    with pytest.raises(CorruptionError, match="has 32768 of"):
        store.publish(3, VersionId(3, 8), "run", TOPOLOGY, 1, [FileRecord(0, 40960, "0" * 32)])
    with pytest.raises(CorruptionError, match="cut off, or none"):
        store.publish(3, VersionId(3, 8), "run", TOPOLOGY, 1, [FileRecord(0, 32768, "0" * 32)])
    reader = save(local, 3, 8, world_size=1).open(0)
    record = store.upload(3, reader)  # over the rest
    reader.close()
    assert store.publish(3, VersionId(3, 8), "run", TOPOLOGY, 1, [record]).step == 8


def test_damage_in_an_object_is_noticed(
    remote: tuple[RemoteStore, Path], local: DurableStore, tmp_path: Path
) -> None:
    store, folder = remote
    sent = send(store, save(local, 3, 7, world_size=1))
    path = folder / "3/7/rank0.seg"
    content = bytearray(path.read_bytes())
    content[5 * 4096 + 17] ^= 1
    path.write_bytes(content)
    target = DurableStore(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match=r"rank0\.seg: chunk \d"):
        fetch(store, sent, target)
    assert target.versions() == ()
    assert names_in(target.directory) == {"3/fence.json"}


def test_a_deleted_object_is_noticed(s3: S3Server, local: DurableStore, tmp_path: Path) -> None:
    store = RemoteStore(Place(s3.uri("bucket/runs/1"), QUICK))
    older = send(store, save(local, 3, 6))
    newer = send(store, save(local, 3, 7))
    (s3.folder / "bucket/runs/1/3/7/rank0.seg").unlink()
    s3.restart()  # it remembers what it listed
    survey = store.survey()
    assert survey.versions == (older,)
    assert re.search(r"3/7/rank0\.seg is missing: take the next older", *survey.problems)
    with pytest.raises(CorruptionError, match=r"rank0\.seg is missing"):
        fetch(store, newer, DurableStore(tmp_path / "elsewhere"))


def test_a_damaged_chunk_is_read_from_the_store(
    remote: tuple[RemoteStore, Path], local: DurableStore
) -> None:
    store, _ = remote
    version = save(local, 3, 7, world_size=1)
    send(store, version)
    good = version.open(0)
    file = RemoteFile(store.place, "3/7/rank0.seg")
    reader = SegmentReader(file)
    assert reader.plan == good.plan
    assert reader.small == good.small
    for chunk in (3, 0):
        assert bytes(reader.read(chunk, Scratch())) == bytes(good.read(chunk, Scratch()))
    with pytest.raises(CorruptionError, match="ends too early"):
        file.read_into(file.nbytes - 10, [memoryview(bytearray(11))])
    reader.close()
    good.close()
    with pytest.raises(CorruptionError, match=r"rank5\.seg is missing"):
        RemoteFile(store.place, "3/7/rank5.seg")


def test_a_half_fetched_version_is_completed(
    remote: tuple[RemoteStore, Path], local: DurableStore, tmp_path: Path
) -> None:
    store, _ = remote
    version = save(local, 3, 7)
    before = segments_of(local.directory)
    sent = send(store, version)
    folder = tmp_path / "elsewhere"
    (folder / "3/7").mkdir(parents=True)
    (folder / "3/7/rank0.seg").write_bytes(before["3/7/rank0.seg"])
    (folder / "3/7/rank1.seg").write_bytes(before["3/7/rank1.seg"][:-4096])
    counted: list[int] = []
    fetch(store, sent, DurableStore(folder), counted.append)
    assert segments_of(folder) == before
    assert sum(counted) < 0.6 * version.nbytes  # one of two


def test_damaged_files_on_disk_are_made_good(
    remote: tuple[RemoteStore, Path], local: DurableStore
) -> None:
    store, _ = remote
    version = save(local, 3, 7)
    before = segments_of(local.directory)
    sent = send(store, version)
    content = bytearray(before["3/7/rank1.seg"])
    content[9000] ^= 1
    version.file(1).write_bytes(content)
    version.file(0).unlink()
    assert fetch(store, sent, local) == version.path
    assert segments_of(local.directory) == before


def test_what_a_zombie_publishes_is_hidden(
    remote: tuple[RemoteStore, Path], local: DurableStore, tmp_path: Path
) -> None:
    store, _ = remote
    older = send(store, save(local, 1, 80, world_size=1))
    began = DurableStore(tmp_path / "new owner")
    began.begin_fence(2, "run", VersionId(1, 80))
    store.begin_fences(began.fence_files())
    zombie = send(RemoteStore(store.place), save(local, 1, 99, world_size=1))
    survey = store.survey()
    assert (survey.versions, survey.hidden, survey.fence) == ((older,), (zombie,), 2)
    other = DurableStore(tmp_path / "liar")
    other.begin_fence(2, "run", None)
    with pytest.raises(StateError, match="another epoch 2, of run 'run', than run 'run' has"):
        store.begin_fences(other.fence_files())
    assert store.versions() == (older,)

    target = DurableStore(tmp_path / "elsewhere")
    fetch(store, older, target)
    fetch(store, zombie, target)
    survey_there = target.survey()
    assert [v.key for v in survey_there.versions] == [(1, 80)]
    assert [v.key for v in survey_there.hidden] == [(1, 99)]
    assert survey_there.fence == 2  # epochs go on from there


def test_a_version_of_a_fence_that_never_began_is_refused(
    remote: tuple[RemoteStore, Path], local: DurableStore
) -> None:
    store, _ = remote
    reader = save(local, 3, 7, world_size=1).open(0)
    record = store.upload(3, reader)
    reader.close()
    with pytest.raises(StateError, match="fence 3 was not begun"):
        store.publish(3, VersionId(3, 7), "run", TOPOLOGY, 1, [record])
    store.place.put("3/fence.json", b"{")
    assert len(store.survey().problems) == 1
    store.begin_fences(local.fence_files())
    store.publish(3, VersionId(3, 7), "run", TOPOLOGY, 1, [record])
    assert [v.key for v in store.versions()] == [(3, 7)]


def test_of_two_writers_the_second_changes_nothing(
    remote: tuple[RemoteStore, Path], local: DurableStore, tmp_path: Path
) -> None:
    store, folder = remote
    sent = send(store, save(local, 3, 7))
    before = segments_of(folder)
    other_place = DurableStore(tmp_path / "other")
    reader = save(other_place, 3, 7, numbers=20_000).open(0)
    other = RemoteStore(store.place)
    with pytest.raises(StateError, match="published with another content"):
        other.upload(3, reader)
    reader.close()
    with pytest.raises(StateError, match="exists already and differs"):
        other.publish(3, VersionId(3, 7), "run", "f" * 32, 2, sent.manifest.files)
    assert segments_of(folder) == before
    assert store.versions() == (sent,)


def test_a_copy_that_lost_an_object_is_made_good(
    remote: tuple[RemoteStore, Path], local: DurableStore
) -> None:
    """As by a rule of the bucket's that removes what is old."""
    store, _ = remote
    version = save(local, 3, 7)
    sent = send(store, version)
    store.place.remove("3/7/rank1.seg")
    assert store.survey().versions == ()
    assert send(store, version).manifest.same_files(sent.manifest)
    assert [v.key for v in store.versions()] == [(3, 7)]


def test_files_of_another_version_are_not_replaced(
    remote: tuple[RemoteStore, Path], local: DurableStore, tmp_path: Path
) -> None:
    store, _ = remote
    sent = send(store, save(local, 3, 7))
    target = DurableStore(tmp_path / "other")
    other = save(target, 3, 7, numbers=20_000)
    other.file(1).unlink()
    before = other.file(0).read_bytes()
    with pytest.raises(StateError, match="has another step 7 of epoch 3"):
        fetch(store, sent, target)
    assert other.file(0).read_bytes() == before


def test_a_damaged_source_is_not_published(
    remote: tuple[RemoteStore, Path], local: DurableStore
) -> None:
    store, _ = remote
    version = save(local, 3, 7, world_size=1)
    content = bytearray(version.file(0).read_bytes())
    content[6 * 16_384] ^= 1
    version.file(0).write_bytes(content)
    with pytest.raises(CorruptionError, match="does not match its digest"):
        send(store, version)
    assert store.survey().versions == ()


def test_sweeping_keeps_what_is_to_be_kept(local: DurableStore, tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    store = RemoteStore(Place(folder.as_uri(), QUICK))
    for fence, step in ((1, 5), (3, 1), (3, 2), (3, 3), (3, 4)):
        send(store, save(local, fence, step, world_size=1))
    local.begin_fence(2, "run", None)
    store.begin_fences(local.fence_files())
    left = ("1/4/rank0.seg", "3/8/rank0.seg", "3/3/rank0.seg.77.new", "3/1.json.77.new")
    for path in (*left, "3/9/rank0.seg", "3/7.json.77.new"):  # the last two may be written now
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("of a process that was killed")
    (folder / "3/1/notes.txt").write_text("the user's")
    (folder / "3/2.pin").write_text("")
    (folder / "3/80.json").write_text("{")
    removed = store.sweep(Retention(2), "run", active={(3, 8)})
    assert {"3/1.json", "1/5.json", "1/4/rank0.seg", "3/1.json.77.new"} <= set(removed)
    assert names_in(folder) == {
        "3/fence.json",
        "3/1/notes.txt",
        "3/2.json",
        "3/2.pin",
        "3/2/rank0.seg",
        "3/3.json",
        "3/3/rank0.seg",
        "3/4.json",
        "3/4/rank0.seg",
        "3/7.json.77.new",
        "3/8/rank0.seg",
        "3/80.json",
        "3/9/rank0.seg",
    }
    assert store.sweep(Retention(2), "run", active={(3, 8)}) == ()
    assert store.sweep(Retention(1), "another run", active={(3, 8)}) == ()


@pytest.mark.slow
def test_sweeping_a_bucket(s3: S3Server, local: DurableStore) -> None:
    store = RemoteStore(Place(s3.uri("bucket/runs/1"), QUICK))
    for fence, step in ((1, 5), (3, 1), (3, 2)):
        send(store, save(local, fence, step, world_size=1))
    folder = s3.folder / "bucket/runs/1"
    kept = {"3/fence.json", "3/2.json", "3/2/rank0.seg"}
    for _ in range(10):  # see s3_server about folder marks
        store.sweep(Retention(1), "run")
        s3.restart()
        assert kept <= names_in(folder)
        assert store.versions()[0].key == (3, 2)
        if names_in(folder) == kept:
            break
    assert names_in(folder) == kept


def test_a_record_without_versions_stays_whatever_else_lies_there(
    local: DurableStore, tmp_path: Path
) -> None:
    folder = tmp_path / "mounted"
    store = RemoteStore(Place(folder.as_uri(), QUICK))
    send(store, save(local, 3, 4, world_size=1))
    local.begin_fence(4, "run", VersionId(3, 4))
    store.begin_fences(local.fence_files())
    for name in ("999/notes.txt", "9999999999999999999/1.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("the user's")
    assert store.survey().problems == ()
    assert store.sweep(Retention(1), "run") == ()
    assert (folder / "4/fence.json").exists()


def test_every_name_on_the_way_to_a_file_is_synced(
    local: DurableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def recorded(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    version = save(local, 3, 7, world_size=1)
    root = tmp_path / "mounted" / "run"
    store = RemoteStore(Place(root.as_uri(), QUICK))
    monkeypatch.setattr(os, "fsync", recorded)
    send(store, version)
    assert {str(tmp_path), str(root.parent)} <= set(synced)  # where the first folders were made
    manifest = next(n for n, path in enumerate(synced) if Path(path).name.startswith("7.json"))
    for file in ("fence.json", "rank0.seg"):
        assert any(Path(path).name.startswith(file) for path in synced[:manifest])
    assert str(root / "3/7") in synced[:manifest]
    assert synced[manifest + 1 :] == [str(root / "3"), str(root)]
