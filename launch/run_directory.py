"""A run's directory: whose it is, and who uses it now."""

from __future__ import annotations

import errno
import os
import re
import secrets
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ftrain.checkpoint.lock import hold, hold_versions
from ftrain.comms.errors import RunDirectoryError
from ftrain.comms.wire import BAD_INPUT
from ftrain.launch.script import Script

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """``run.json``: what a run directory belongs to."""

    run_id: str
    script: str  # absolute path of the script or module
    digest: str  # of its source at the newest launch
    world_size: int


class RunDirectory:
    """A run directory held by this process until :meth:`close` (or its end)."""

    def __init__(self, path: Path, record: RunRecord, notes: tuple[str, ...], lock_fd: int) -> None:
        self.path = path
        self.record = record
        self.notes = notes  # what the user should know, one line each
        self._lock_fds = [lock_fd]

    def hold_versions(self, folder: Path) -> None:
        """Hold the directory of the durable versions too: others may name it as theirs.

        Raises RunDirectoryError when somebody else writes to it.
        """
        fd = hold_versions(folder, "choose another with checkpoint.dir")
        if fd >= 0:
            self._lock_fds.append(fd)

    def adopt(self, run_id: str) -> None:
        """Belong to the run whose versions were put here.

        Raises RunDirectoryError.
        """
        self.record = replace(self.record, run_id=run_id)
        try:
            _write(self.path, self.record)
        except OSError as error:
            raise _unusable(self.path, error) from None

    def close(self) -> None:
        """Let another launch use the directory."""
        for fd in self._lock_fds:
            os.close(fd)


def open_run_directory(
    path: Path, script: Script, *, world_size: int, run_id: str = "", node_rank: int = 0
) -> RunDirectory:
    """Make or take over a run directory.

    ``run.json`` is node 0's, whose launch may share the directory with those of other hosts: they
    neither read nor write it. What it guards is compared when they join the coordinator.

    Raises :class:`RunDirectoryError` when it can't be written, when a live launch uses it, or when
    it belongs to another script, world size or run id. An edited script is only noted.
    """
    if run_id and not _RUN_ID.fullmatch(run_id):
        raise RunDirectoryError(
            f"the run id '{run_id}' must be 1 to 64 letters, digits, '.', '_', ':' or '-'"
        )
    path = path.absolute()
    lock_fd = -1
    try:
        (path / "state").mkdir(parents=True, exist_ok=True)
        name = f"lock-{node_rank}" if node_rank else "lock"
        what = f"the run directory {path}"
        lock_fd = hold(path / name, what, "choose another with --run-dir")
        found = None if node_rank else _read(path)
        record, notes = _settle(path, found, script, world_size, run_id)
        if record != found and not node_rank:
            _write(path, record)
    except OSError as error:
        if lock_fd >= 0:
            os.close(lock_fd)
        if isinstance(error, RunDirectoryError):
            raise
        raise _unusable(path, error) from None
    return RunDirectory(path, record, notes, lock_fd)


def read_run_record(path: Path) -> RunRecord:
    """The record of an existing run; :class:`RunDirectoryError` when there is none."""
    if not path.is_dir():
        raise RunDirectoryError(f"there is no run directory {path}")
    record = _read(path)
    if record is None:
        raise RunDirectoryError(f"{path} is not a run directory: it has no run.json")
    return record


def check_log_directory(path: Path) -> None:
    """Make it; :class:`RunDirectoryError` when that can't be, or nothing can be put there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RunDirectoryError(
            f"the log directory {path} can't be written ({error.strerror}): choose another with"
            " --log-dir"
        ) from None


def check_versions_directory(path: Path) -> None:
    """:class:`RunDirectoryError` when no durable version can be put there: better known now than
    after hours of training.  It is not made yet."""
    there = None
    try:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        why = "" if there.is_dir() else f"{there} is no directory"
        if not why:
            os.rmdir(tempfile.mkdtemp(prefix=".ftrain-", dir=there))  # what rights say is not all
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # there may be room by then
        why = "" if full else f"{there or path}: {error.strerror}"
    if why:
        raise RunDirectoryError(
            f"no durable version can be put into {path} ({why}): choose another directory with"
            " checkpoint.dir, or train without any: checkpoint=off"
        )


def write_synced(path: Path, content: bytes) -> None:
    """Replace a small file atomically; it is on stable storage when this returns."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write(path: Path, record: RunRecord) -> None:
    write_synced(path / "run.json", msgspec.json.format(msgspec.json.encode(record)))


def _unusable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"the run directory {path} can't be written ({error.strerror}): choose another with"
        " --run-dir"
    )


def _read(path: Path) -> RunRecord | None:
    try:
        return msgspec.json.decode((path / "run.json").read_bytes(), type=RunRecord)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except BAD_INPUT as error:
        raise RunDirectoryError(
            f"{path / 'run.json'} is not readable as a run's record ({error}): delete it and give"
            f" --run-id what `ftrain checkpoints show {path}` calls the run, or choose another"
            " directory with --run-dir"
        ) from None


def _settle(
    path: Path, found: RunRecord | None, script: Script, world_size: int, run_id: str
) -> tuple[RunRecord, tuple[str, ...]]:
    """The record to keep, and what is worth saying about the difference to the one found."""
    if found is None:
        fresh_id = run_id or f"{_plain(script.stem)}-{secrets.token_hex(4)}"
        record = RunRecord(
            run_id=fresh_id, script=script.path, digest=script.digest, world_size=world_size
        )
        return record, ()
    elsewhere = "choose another directory with --run-dir"
    moved = found.script != script.path
    if moved and found.digest != script.digest:
        raise RunDirectoryError(
            f"the run directory {path} belongs to another script, {found.script}: {elsewhere}"
        )
    if run_id and found.run_id != run_id:
        raise RunDirectoryError(
            f"the run directory {path} belongs to run '{found.run_id}', not '{run_id}': leave the"
            f" run id out, or {elsewhere}"
        )
    notes: list[str] = []
    if found.digest != script.digest:
        notes.append(f"{script.name} was edited since the last launch in {path}")
    if found.world_size != world_size:
        notes.append(f"{path} is of {found.world_size} ranks: laid over {world_size} from now on")
    record = RunRecord(
        run_id=found.run_id, script=script.path, digest=script.digest, world_size=world_size
    )
    return record, tuple(notes)


def _plain(text: str) -> str:
    """``text`` with only characters that a run id may hold."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:40] or "run"
