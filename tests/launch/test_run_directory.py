"""Whose a run directory is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrain.comms.errors import RunDirectoryError
from ftrain.launch.run_directory import open_run_directory, read_run_record
from ftrain.launch.script import Script, check_script


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """A script on disk."""
    path = tmp_path / "my train!.py"
    path.write_text("x = 1\n")
    return check_script(str(path), module=False)


def test_identity_is_kept(tmp_path: Path, script: Script) -> None:
    run = tmp_path / "a" / "run"
    first = open_run_directory(run, script, world_size=2)
    first.close()
    second = open_run_directory(run, script, world_size=2)
    second.close()
    assert second.record == first.record == read_run_record(run)
    assert first.record.run_id.startswith("my-train-")
    assert second.notes == ()


def test_chosen_run_id(tmp_path: Path, script: Script) -> None:
    directory = open_run_directory(tmp_path / "run", script, world_size=1, run_id="exp:7_a.b")
    directory.close()
    assert directory.record.run_id == "exp:7_a.b"


def test_edited_script_is_noted_once(tmp_path: Path, script: Script) -> None:
    run = tmp_path / "run"
    open_run_directory(run, script, world_size=1).close()
    Path(script.path).write_text("x = 2\n")
    edited = check_script(script.path, module=False)
    notes = []
    for _ in range(2):
        directory = open_run_directory(run, edited, world_size=1)
        directory.close()
        notes.append(len(directory.notes))
    assert notes == [1, 0]


def test_moved_script_is_the_same(tmp_path: Path, script: Script) -> None:
    run = tmp_path / "run"
    open_run_directory(run, script, world_size=1).close()
    moved = Path(script.path).rename(tmp_path / "moved.py")
    open_run_directory(run, check_script(str(moved), module=False), world_size=1).close()
    assert read_run_record(run).script == str(moved)


def test_other_hosts_leave_the_record_to_node_0(tmp_path: Path, script: Script) -> None:
    run = tmp_path / "run"
    open_run_directory(run, script, world_size=2, run_id="x").close()
    before = (run / "run.json").read_bytes()
    elsewhere = Script(script.name, "/mnt/other/train.py", "0" * 32)  # compared when it joins
    joining = open_run_directory(run, elsewhere, world_size=2, run_id="x", node_rank=1)
    joining.close()
    assert joining.record.run_id == "x"
    assert (run / "run.json").read_bytes() == before


def test_a_failed_opening_lets_go(tmp_path: Path, script: Script) -> None:
    run = tmp_path / "run"
    open_run_directory(run, script, world_size=1).close()
    with pytest.raises(RunDirectoryError):
        open_run_directory(run, script, world_size=1, run_id="another")
    open_run_directory(run, script, world_size=1).close()


def test_another_number_of_ranks_is_noted_and_kept(tmp_path: Path, script: Script) -> None:
    run = tmp_path / "run"
    open_run_directory(run, script, world_size=1).close()
    opened = open_run_directory(run, script, world_size=3)
    opened.close()
    assert opened.notes == (f"{run} is of 1 ranks: laid over 3 from now on",)
    assert read_run_record(run).world_size == 3


def test_module_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "trial_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError('imported')\n")
    (package / "__main__.py").write_text("y = 1\n")
    (package / "train.py").write_text("x = 1\n")
    found = check_script("trial_package.train", module=True)
    assert (found.path, found.stem) == (str(package / "train.py"), "train")
    whole = check_script("trial_package", module=True)
    assert (whole.path, whole.stem) == (str(package / "__main__.py"), "trial_package")


def test_one_launch_at_a_time_saves_into_a_directory(tmp_path: Path) -> None:
    """Two would take turns in hiding what the other one saved."""
    (tmp_path / "train.py").write_text("print()")
    script = check_script(str(tmp_path / "train.py"), module=False)
    first, second = (
        open_run_directory(tmp_path / name, script, world_size=1) for name in ("a", "b")
    )
    for versions in (tmp_path / "versions", first.path / "checkpoints"):  # also the run's own
        first.hold_versions(versions)
        with pytest.raises(RunDirectoryError, match=r" is in use .* with checkpoint\.dir"):
            second.hold_versions(versions)
    first.close()
    second.hold_versions(tmp_path / "versions")
    second.hold_versions(first.path / "checkpoints")
    second.close()
