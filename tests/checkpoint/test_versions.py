"""What the commands need of a store of versions: a directory, file:// and S3 do the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from remote_samples import names_in, save
from s3_server import S3Server
from sending import send

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import PublishedVersion
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.store import RemoteStore
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.versions import VersionStore, all_readable
from ftrain.comms.errors import CorruptionError, RunDirectoryError, UsageError
from ftrain.comms.protocol.messages import VersionId

QUICK = Limits(connect_timeout_s=5, request_timeout_s=10, attempts=3, pause_s=0.05, pause_s_max=0.1)


@dataclass
class Case:
    """A store, the folder that its files are in, and how to put a version there."""

    store: VersionStore
    folder: Path
    local: DurableStore
    s3: S3Server | None = None

    def save(self, fence: int, step: int, world_size: int = 2) -> None:
        version = save(
            self.local, fence, step, world_size=world_size, numbers=5_000, chunk_bytes=16_384
        )
        if isinstance(self.store, RemoteStore):
            send(self.store, version)

    def begin(self, fence: int, parent: VersionId) -> None:
        self.local.begin_fence(fence, "run", parent)
        if isinstance(self.store, RemoteStore):
            self.store.begin_fences(self.local.fence_files())

    def settle(self) -> None:
        """The server caches what its folders hold; see s3_server about folder marks as well."""
        if self.s3 is not None:
            self.s3.restart()


@pytest.fixture(params=["directory", "file", "s3"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    local = DurableStore(tmp_path / "checkpoints")
    if request.param == "directory":
        yield Case(local, local.directory, local)
        return
    s3: S3Server | None = None
    folder = tmp_path / "mounted" / "run 1"
    uri = folder.as_uri()
    if request.param == "s3":
        s3 = request.getfixturevalue("s3")
        folder = s3.folder / "bucket/runs/1"
        uri = s3.uri("bucket/runs/1")
    place = Place(uri, QUICK)
    yield Case(RemoteStore(place), folder, local, s3)
    place.close()


def keys(versions: tuple[PublishedVersion, ...]) -> list[tuple[int, int]]:
    return [version.key for version in versions]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_survey_sorts_versions_by_what_they_are_good_for(case: Case) -> None:
    assert case.store.survey().versions == ()
    with pytest.raises(RunDirectoryError, match="there is no complete version in"):
        case.store.find()
    for step in (5, 6, 7, 8):
        case.save(1, step)
    case.begin(2, VersionId(1, 8))
    case.save(1, 9)  # by a process whose epoch is over
    (case.folder / "1/7/rank1.seg").unlink()
    (case.folder / "1/6/rank0.seg").write_bytes(b"cut")
    (case.folder / "1/4.json").write_bytes(b"{")
    case.settle()
    survey = case.store.survey()
    assert keys(survey.versions) == [(1, 8), (1, 5)]
    assert keys(survey.hidden) == [(1, 9)]
    assert [one.version.key for one in survey.damaged] == [(1, 7), (1, 6)]
    assert "1/7/rank1.seg is missing" in survey.damaged[0].damage
    assert "1/6/rank0.seg has 3 of" in survey.damaged[1].damage
    assert f"{case.store.name}/1/4.json is damaged" in survey.problems[-1]
    assert survey.problems[:-1] == tuple(one.damage for one in survey.damaged)
    assert (survey.fence, survey.granted) == (2, 2)
    assert case.store.find().key == (1, 8)
    assert case.store.find(5).key == (1, 5)
    with pytest.raises(UsageError, match=r"no version of step 7 in .* missing.*\): it has 8, 5"):
        case.store.find(7)
    with pytest.raises(UsageError, match=r"no version of step 9 in .* history: it has 8, 5"):
        case.store.find(9)


def test_an_epoch_without_its_record_is_told(case: Case) -> None:
    """All that it published is as good as gone, which must not look like an empty store."""
    case.save(1, 5)
    case.begin(2, VersionId(1, 5))
    case.save(2, 6)
    (case.folder / "2/fence.json").unlink()
    case.settle()
    survey = case.store.survey()
    assert keys(survey.versions) == [(1, 5)]
    (problem,) = survey.problems
    assert problem.startswith(f"{case.store.name}/2/fence.json is missing, without which")
    (case.folder / "1/fence.json").unlink()
    case.settle()
    assert [problem.split(",")[0] for problem in case.store.survey().problems] == [
        f"{case.store.name}/{fence}/fence.json is missing" for fence in (2, 1)
    ]
    with pytest.raises(RunDirectoryError, match=r"no complete version in .*: .*2/fence\.json is"):
        case.store.find()


def test_opened_files_are_those_that_were_written(case: Case) -> None:
    case.save(1, 5)
    version = case.store.find()
    with case.store.opened(version) as files:
        readers = all_readable(files)
        assert [reader.identity.rank for reader in readers] == [0, 1]
        assert sum(reader.nbytes for reader in readers) == version.nbytes
        for reader in readers:
            assert list(reader.damage(lambda nbytes: None)) == []


def test_what_can_not_be_opened_is_an_error_in_its_place(case: Case) -> None:
    case.save(1, 5, world_size=4)
    version = case.store.find()
    (case.folder / "1/5/rank0.seg").unlink()
    flip(case.folder / "1/5/rank1.seg", version.manifest.files[1].nbytes - 100)
    (case.folder / "1/5/rank2.seg").write_bytes((case.folder / "1/5/rank3.seg").read_bytes())
    case.settle()
    flip(case.folder / "1/5/rank3.seg", 4097)
    with case.store.opened(version) as files:
        errors = [str(file) for file in files[:3]]
        last = files[3]
        assert isinstance(last, SegmentReader)
        (damage,) = last.damage(lambda nbytes: None)
        with pytest.raises(CorruptionError, match=r"rank0\.seg"):
            all_readable(files)
    assert "rank0.seg" in errors[0]
    assert "rank1.seg has a damaged footer" in errors[1]
    assert "rank2.seg" in errors[2]
    assert str(damage).startswith(f"{case.store.name}/1/5/rank3.seg: chunk 0")


def test_pins_stay_until_they_are_taken_away(case: Case) -> None:
    for step in (5, 6):
        case.save(1, step)
    assert case.store.pinned() == frozenset()
    for version in case.store.survey().versions:
        case.store.pin(version.key)
        case.store.pin(version.key)
    assert case.store.pinned() == {(1, 5), (1, 6)}
    case.store.pin(case.store.find(6).key, pinned=False)
    case.settle()
    assert case.store.pinned() == {(1, 5)}
    case.store.pin(case.store.find(6).key, pinned=False)


def test_a_removed_version_is_gone_its_manifest_first(case: Case) -> None:
    for step in (5, 6):
        case.save(1, step, world_size=4)
    doomed = case.store.find(5)
    kept = {name for name in names_in(case.folder) if not name.startswith("1/5")}
    if case.s3 is None:
        (case.folder / "1/5/notes.txt").write_text("the user's")
        kept.add("1/5/notes.txt")
        case.store.remove([doomed])
        # Nothing else happens to a folder than that names go from it: the manifest's went before.
        times = [(case.folder / name).stat().st_mtime_ns for name in ("1", "1/5")]
        assert times[0] <= times[1]
    for _ in range(10):  # see s3_server about folder marks
        case.store.remove([doomed])
        assert not (case.folder / "1/5.json").exists()
        case.settle()
        assert keys(case.store.survey().versions) == [(1, 6)]
        if names_in(case.folder) == kept:
            break
    assert names_in(case.folder) == kept
