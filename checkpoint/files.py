"""Bytes to and from local files: written by direct I/O where the file system takes it.

Direct I/O goes straight between memory and disk: no copy into the page cache, no memory taken from
training, and a steady rate.  It wants memory, offsets and lengths in whole pages, which is why
segment files are laid out in pages.  Where it is refused (tmpfs, some network file systems) the
same bytes go through the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.comms.errors import CorruptionError, RunDirectoryError
from ftrain.comms.process import NO_DESCRIPTOR

_READ_BYTES = 256 * 1024  # at once: what was read is still in the core's cache when hashed
_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
# Of one file, which another copy or an older version may do without; anything else is wrong with
# them all: rights, or this process's limits.
_DAMAGE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EIO,
        errno.ELOOP,
        errno.EINVAL,
        errno.EUCLEAN,
        errno.EBADMSG,
    }
)


Seen = Callable[[memoryview], object]


def unseen(part: memoryview) -> None:
    """Nobody wants to see it."""


class ReadableFile(Protocol):
    """Random access to a file, wherever it is."""

    where: str
    nbytes: int

    def read_into(self, offset: int, parts: Sequence[memoryview], seen: Seen = unseen) -> None:
        """Fill ``parts``, one behind the other, from ``offset`` on; ``seen`` gets what they hold,
        in order and in smaller parts, as soon as it is there.

        Raises:
            CorruptionError: the bytes can't be read, or there are not so many.
            ObjectStoreError: they lie in an object store that does not give them now.
        """

    def close(self) -> None:
        """Give it back."""


def page_buffer(nbytes: int) -> memoryview:
    """New writable memory that begins at a page and is at least ``nbytes`` long."""
    return memoryview(mmap.mmap(-1, max(PAGE_BYTES, nbytes)))


class LocalFile:
    """A file of this machine, for reading; thread-safe.

    Reads go through the page cache: it may hold the file already, and where it does not, its
    reading ahead keeps the disk busier than direct reads of whole chunks do.  Raises as
    :func:`unreadable` says when the file can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            self._fd = open_plain(path)
            self.nbytes = os.fstat(self._fd).st_size
        except OSError as error:
            raise unreadable(path, error) from None
        with suppress(OSError):  # advice
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, offset: int, parts: Sequence[memoryview], seen: Seen = unseen) -> None:
        """See :class:`ReadableFile`."""
        try:
            for part in parts:
                for first in range(0, len(part), _READ_BYTES):
                    piece = part[first : first + _READ_BYTES]
                    _fill(self._fd, piece, offset)
                    offset += len(piece)
                    seen(piece)
        except OSError as error:
            raise CorruptionError(f"{self.where} can't be read ({error.strerror})") from None
        except EOFError:
            raise CorruptionError(f"{self.where} ends too early: it is cut off") from None

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class NewFile:
    """A file that is made under a name of its own; written to by offset, from several threads.

    Args:
        path: must not exist.
        nbytes: space that is reserved for it at once, so that a full disk is found out before
            anything is written; 0: nothing is.
        direct: whether to go around the page cache where that is possible.

    Raises OSError as the system calls do.
    """

    def __init__(self, path: Path, nbytes: int = 0, *, direct: bool = True) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._direct = -1
        try:
            if nbytes:
                _reserve(self._fd, nbytes)
            if direct:
                self._direct = _try_directly(self._fd)
        except BaseException:  # whatever it was: the descriptors go with it
            self.close()
            raise

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is gone around."""
        return self._direct >= 0

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        """Write all of ``data`` at ``offset``; directly if it is whole pages in memory and file."""
        view = memoryview(data).cast("B")
        whole = not (offset % PAGE_BYTES or len(view) % PAGE_BYTES)
        if self._direct >= 0 and whole:
            try:
                _write_all(self._direct, offset, view)
                return
            except OSError as error:  # memory that does not begin at a page, most likely
                if error.errno not in _REFUSALS:
                    raise
        _write_all(self._fd, offset, view)

    def sync(self) -> None:
        """Return when everything is on stable storage."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close it; what was not synced may be lost."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def takes_direct_io(folder: Path) -> bool:
    """Whether files in ``folder`` can be written around the page cache; leaves nothing behind."""
    path = folder / f".direct-io.{os.getpid()}.new"
    try:
        with NewFile(path) as file:
            return file.is_direct
    except OSError:
        return False
    finally:
        with suppress(OSError):
            path.unlink()


def open_plain(path: Path) -> int:
    """Open a plain file for reading: no link, and nothing that one would wait for; ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no plain file")
    return fd


def unreadable(path: Path, error: OSError) -> CorruptionError | RunDirectoryError:
    """What it means that a file can't be opened."""
    if error.errno in _DAMAGE:
        return CorruptionError(f"{path} can't be read ({error.strerror})")
    what = "raise its limit (ulimit -n)" if error.errno in NO_DESCRIPTOR else "give rights to it"
    return RunDirectoryError(f"{path} can't be read ({error.strerror}): {what}")


def _open_directly(fd: int, mode: int) -> int:
    """The same file once more, whatever its name stands for by now."""
    return os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC | os.O_DIRECT)


def _try_directly(fd: int) -> int:
    try:
        return _open_directly(fd, os.O_WRONLY)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return -1


def _reserve(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        free = os.fstatvfs(fd)
        if free.f_bavail * free.f_frsize < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _fill(fd: int, memory: memoryview, offset: int) -> None:
    done = os.preadv(fd, [memory], offset)
    while done < len(memory):
        got = os.preadv(fd, [memory[done:]], offset + done)
        if not got:
            raise EOFError
        done += got


def _write_all(fd: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
