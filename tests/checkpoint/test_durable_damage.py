"""Directories of durable versions that are not as the store left them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from durable_samples import files, save
from image_samples import make_identity, make_image

from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import DurableVersion
from ftrain.checkpoint.retention import Retention
from ftrain.checkpoint.versions import Survey
from ftrain.comms.errors import CorruptionError, RunDirectoryError, StateError
from ftrain.comms.protocol.messages import VersionId


@pytest.fixture
def store(tmp_path: Path) -> DurableStore:
    return DurableStore(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("name", ["7.json", "fence.json"])
def test_records_of_another_format_are_refused_by_name(store: DurableStore, name: str) -> None:
    path = save(store, 3, 7).path.with_name(name)
    good = json.loads(path.read_bytes())
    old = {key: value for key, value in good.items() if key not in ("xxh3", "written_s")}
    new = good | {"format": 3, "mesh": [2, 4], "xxh3": ""}
    new["xxh3"] = digest_of(json.dumps(new, separators=(",", ":")).encode()).hex()
    for record in (old | {"format": 1}, new):
        path.write_text(json.dumps(record))
        with pytest.raises(StateError, match=r"format [13].*use the ftrain that wrote it"):
            store.survey()


def test_a_forged_world_is_refused_before_its_ranks_are_counted(store: DurableStore) -> None:
    version = save(store, 3, 7)
    for world_size in (1, 3, 2**40, 2**63 - 1):
        version.path.write_bytes(replace(version.manifest, world_size=world_size).encode())
        assert "one file for each" in store.survey().problems[0]


def test_a_flipped_bit_in_a_format_number_is_damage(store: DurableStore) -> None:
    older = save(store, 3, 7)
    newer = save(store, 3, 8)
    for path, found in ((newer.path, 1), (newer.path.with_name("fence.json"), 2)):
        whole = path.read_bytes()
        for digit in b"0123456789":
            if digit != ord("2"):
                path.write_bytes(whole.replace(b'"format": 2', b'"format": %c' % digit))
                survey = store.survey()
                assert len(survey.problems) == 1
                assert survey.versions[-1] == older
                assert len(survey.versions) == found
        path.write_bytes(whole)
    file = newer.file(0)
    file.write_bytes(file.read_bytes()[:-1] + b"\3")
    with pytest.raises(CorruptionError, match="not the file that its manifest names"):
        newer.open(0)


def test_what_is_no_plain_file_is_not_opened(store: DurableStore, tmp_path: Path) -> None:
    older, newer = save(store, 3, 7), save(store, 3, 8)
    folder = newer.file(0).parent
    moved = folder.rename(tmp_path / "elsewhere")
    for make in (lambda: folder.symlink_to(moved), lambda: folder.write_text("no folder")):
        make()
        survey = store.survey()
        assert survey.versions == (older,)
        assert len(survey.problems) == 1
        folder.unlink()
    moved.rename(folder)
    record = newer.path.with_name("fence.json")
    content = record.read_bytes()
    (tmp_path / "fence.json").write_bytes(content)
    record.unlink()
    for make in (
        lambda: os.mkfifo(record),
        lambda: record.symlink_to(tmp_path / "fence.json"),
        lambda: record.mkdir(),
    ):
        make()
        assert len(store.survey().problems) == 1
        assert store.versions() == (newer, older)
        record.rmdir() if record.is_dir() and not record.is_symlink() else record.unlink()
    newer.file(0).unlink()
    os.mkfifo(newer.file(0))
    with pytest.raises(CorruptionError, match="no plain file"):
        newer.open(0)


def test_what_may_not_be_read_is_no_new_beginning(store: DurableStore) -> None:
    path = save(store, 3, 7).path
    for hidden in (path, path.with_name("fence.json")):
        hidden.chmod(0)
        program = _SURVEYOR.format(str(store.directory))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "Permission denied" in done.stdout
        hidden.chmod(0o644)


def test_a_limit_of_open_files_is_no_damage(store: DurableStore) -> None:
    version = save(store, 3, 7)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        with pytest.raises(RunDirectoryError, match=r"Too many open files.*ulimit"):
            version.open(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with store.opened(version) as files:
        assert not any(isinstance(file, CorruptionError) for file in files)


_SURVEYOR = """
import os
from ftrain.checkpoint.durable import DurableStore
from ftrain.comms.errors import RunDirectoryError
store = DurableStore({!r})
os.chmod(store.directory.parent.parent, 0o755)
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    store.survey()
except RunDirectoryError as error:
    print(error)
    raise SystemExit(2)
"""


def test_a_sweep_touches_nothing_that_came_after_its_look(
    store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a coordinator that is over, and stood still in the middle of a sweep."""
    for step in (1, 2):
        save(store, 3, step, world_size=1)
    newer: list[DurableVersion] = []

    def survey_and_stand_still() -> Survey[DurableVersion]:
        survey = store.survey()
        store.begin_fence(4, "run", VersionId(3, 2))
        newer.extend(save(store, 4, step, world_size=1) for step in (6, 5))
        store.write_image(4, VersionId(4, 7), 0, make_image(make_identity(7, epoch=4)))
        return survey

    late = DurableStore(store.directory)
    monkeypatch.setattr(late, "survey", survey_and_stand_still)
    late.sweep(Retention(1), "run")
    assert store.versions()[:2] == tuple(newer)
    assert [version.key for version in store.versions()] == [(4, 6), (4, 5), (3, 2)]
    assert "4/7/rank0.seg" in files(store)


def test_what_a_late_sweep_takes_from_a_new_epoch_is_replaced_by_what_it_kept(
    store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its look was before the epoch began, what it kept is hidden, and others sweep meanwhile."""
    policy = Retention(2, every=4)  # step 1 stays for good
    for step in (1, 2, 3):
        save(store, 3, step, world_size=1)
    parent = store.versions()[0].version

    def survey_and_stand_still() -> Survey:
        for step in (10, 11):
            save(store, 3, step, world_size=1)
        survey = store.survey()
        store.begin_fence(4, "run", parent)
        assert [version.step for version in store.versions()] == [3, 2, 1]
        assert store.sweep(policy, "run") == ()  # nothing that is hidden: it may be needed
        return survey

    late = DurableStore(store.directory)
    monkeypatch.setattr(late, "survey", survey_and_stand_still)
    late.sweep(policy, "run")
    assert [version.step for version in store.versions()] == [11, 10, 1]
    save(store, 4, 5, world_size=1)  # the new epoch was at it all the time
    assert [version.key for version in store.versions()] == [(4, 5), (3, 1)]


def test_what_a_killed_beginning_left_is_swept(store: DurableStore) -> None:
    save(store, 1, 5, world_size=1)
    (store.directory / "2").mkdir()
    (store.directory / "3").mkdir()
    (store.directory / "3/fence.json.77.new").write_text("{")
    (store.directory / ("9" * 19)).mkdir()  # a number, but none that anything can follow
    assert store.survey().fence == 3
    store.begin_fence(4, "run", VersionId(1, 5))
    store.sweep(Retention(1), "run")
    assert {path.name for path in store.directory.iterdir()} == {"1", "4", "9" * 19}
    assert [version.key for version in store.versions()] == [(1, 5)]
