"""Who writes to a directory: a lock that the kernel takes back when its holder ends, however."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ftrain.checkpoint.directory import make_folders
from ftrain.comms.errors import RunDirectoryError

_LOCK = "lock"


def hold(path: Path, what: str, instead: str) -> int:
    """Hold the file at ``path`` until the descriptor that this returns is closed.

    A process that is forked meanwhile holds it too, unless it closes its copy.

    Raises:
        RunDirectoryError: another process holds it; ``what`` is in use, and ``instead`` says what
            to do other than wait.
        OSError: the file can't be made, or its file system has no locks.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:  # another user's: to lock it, reading is enough
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "not known yet"
        os.close(fd)
        raise RunDirectoryError(
            f"{what} is in use by another process (pid {holder}): wait for it, or {instead}"
        ) from None
    except OSError:
        os.close(fd)
        raise
    with suppress(OSError):  # only to be told to others; a full disk may not take it
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def hold_versions(folder: Path, instead: str) -> int:
    """Hold a directory of durable versions, made if need be; -1 where that can't be locked.

    Whoever publishes versions holds it: of two, each would begin above the other's fences and so
    hide what that one saves.  Raises RunDirectoryError as :func:`hold`.
    """
    try:
        make_folders(folder)
        return hold(folder / _LOCK, f"the directory of durable versions {folder}", instead)
    except RunDirectoryError:
        raise
    except OSError:
        return -1  # no locks there; what can't be written is said by who writes


@contextmanager
def held_versions(folder: Path, instead: str) -> Iterator[None]:
    """The same for a while; raises as :func:`hold_versions`."""
    fd = hold_versions(folder, instead)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)
