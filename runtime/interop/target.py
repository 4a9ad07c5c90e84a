"""Where an export goes: a file or directory that appears complete, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ftrain.checkpoint.files import sync_folder
from ftrain.comms.errors import FtrainError, RunDirectoryError

Progress = Callable[[int], None]  # told how many bytes more are done


@contextmanager
def appearing(out: Path, nbytes: int) -> Iterator[Path]:
    """A name to write to, a file or a folder, that becomes ``out`` when all went well.

    ``nbytes``: about how much it will take, for the error that says there is no room.

    Raises:
        RunDirectoryError: there is something at ``out``, or it can't be written.
    """
    if os.path.lexists(out):
        raise RunDirectoryError(f"{out} exists already: choose a new name, nothing is overwritten")
    if not out.absolute().parent.is_dir():
        raise RunDirectoryError(
            f"there is no directory {out.absolute().parent} to put {out.name} in"
        )
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise RunDirectoryError(
            f"{out} can't be written: {out.absolute().parent} is read-only for you; choose another "
            "place"
        )
    fresh = _fresh(out)
    if shutil.disk_usage(out.absolute().parent).free < nbytes:
        raise _no_room(out, nbytes, "No space left on device")
    try:
        yield fresh
        if fresh.is_dir():
            sync_folder(fresh)
        fresh.rename(out)
        sync_folder(out.absolute().parent)
    except FtrainError:
        raise
    except OSError as error:
        raise _no_room(out, nbytes, error.strerror or str(error)) from error
    finally:
        discard(out)


def discard(out: Path) -> None:
    """Remove what this process has written of ``out`` so far, if it is not complete."""
    fresh = _fresh(out)
    if fresh.is_dir():
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        with suppress(OSError):  # what made the export fail is what is told
            fresh.unlink(missing_ok=True)


def failed_in_torch(error: BaseException) -> OSError:
    """What torch's writer, which says no more than that something failed, says of a full disk."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OSError(errno.EIO, f"torch's writer failed: {first}")


def _fresh(out: Path) -> Path:
    return out.with_name(f"{out.name}.{os.getpid()}.new")


def _no_room(out: Path, nbytes: int, why: str) -> RunDirectoryError:
    free = shutil.disk_usage(out.absolute().parent).free
    return RunDirectoryError(
        f"{out} can't be written ({why}): about {nbytes} bytes are needed, {free} are free; make "
        "room, or choose another place"
    )
