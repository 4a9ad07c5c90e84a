"""The directory of durable versions as files: names, folders that survive a power cut, errors."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ftrain.checkpoint.files import NewFile, sync_folder
from ftrain.comms.errors import FtrainError, RunDirectoryError

_KEPT = frozenset({errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST})  # not empty, or gone
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NUMBER = re.compile(r"0|[1-9]\d{0,17}")  # and the next one fits into 64 bits as well


@contextmanager
def explained(folder: Path, nbytes: int) -> Iterator[None]:
    """Turn what the file system says into one sentence."""
    try:
        yield
    except FtrainError:
        raise
    except OSError as error:
        advice = "change that, or set checkpoint.dir"
        if error.errno in _NO_ROOM:
            advice = (
                f"{nbytes} bytes were needed, {free_bytes(folder)} are free; make room, or set "
                "checkpoint.dir"
            )
        raise RunDirectoryError(
            f"{folder} can't be written to ({error.strerror}): {advice}"
        ) from error


def numbered(folder: Path, suffix: str) -> list[tuple[int, Path]]:
    """Entries named by a number and ``suffix``, largest number first; links are passed over.

    Folders if ``suffix`` is empty, else files.  Raises RunDirectoryError.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem = entry.name.removesuffix(suffix)
                is_kind = entry.is_file if suffix else entry.is_dir
                if (
                    entry.name.endswith(suffix)
                    and _NUMBER.fullmatch(stem)
                    and is_kind(follow_symlinks=False)
                ):
                    found.append((int(stem), Path(entry.path)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(f"{folder} can't be read: {error.strerror}") from None
    return sorted(found, reverse=True)


def fresh_name(path: Path) -> Path:
    """A name, never used before, under which to write what will be ``path``."""
    return path.with_name(f"{path.name}.{secrets.randbits(60)}.new")


def put_once(path: Path, content: bytes) -> bool:
    """Make a small file appear, complete and synced; False if there is one already, synced too.

    Raises OSError.
    """
    fresh = fresh_name(path)
    made = True
    try:
        _write_synced(fresh, content)
        try:
            os.link(fresh, path)  # unlike a rename, never over another one
        except FileExistsError:
            made = False
    finally:
        fresh.unlink(missing_ok=True)
    sync_folder(path.parent)  # also for the other one: who made it may have died before doing so
    return made


def replace_file(path: Path, content: bytes) -> None:
    """Give a small file, which one process writes, other content; whenever that one is killed, the
    old content or the new one is there.

    Raises OSError.
    """
    fresh = path.with_name(f"{path.name}.new")  # the same each time: no killed process leaves many
    fresh.unlink(missing_ok=True)
    try:
        _write_synced(fresh, content)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write_synced(path: Path, content: bytes) -> None:
    with NewFile(path, direct=False) as file:
        file.write_at(0, content)
        file.sync()


def make_folders(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def remove_matching(folder: Path, matches: Callable[[str], object]) -> list[Path]:
    """Remove the files with such names; returns them."""
    removed = [folder / name for name in names_in(folder) if matches(name)]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def names_in(folder: Path) -> list[str]:
    """What is in a folder; nothing if it is gone: somebody else tidies as well."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def sync_if_there(folder: Path) -> None:
    """Make the names in a folder survive a power cut, unless it is gone itself."""
    with suppress(FileNotFoundError):
        sync_folder(folder)


def remove_empty(folder: Path) -> None:
    """Remove the folder if nothing is in it."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in _KEPT:
            raise


def free_bytes(folder: Path) -> str:
    """How much room there is on the file system of ``folder``, made or not."""
    for place in (folder, *folder.parents):
        try:
            return str(shutil.disk_usage(place).free)
        except OSError:  # not made yet, or not ours to look at
            continue
    return "unknown"
