"""The coordinator's store in a directory, for coordinators on one host.

``lock`` is held by the leader, and by the kernel's doing no longer than it lives; a leader that is
stopped stays the leader, and nobody takes its place.  ``term`` holds the number of the newest term,
``leader`` its address, ``state`` what was saved.  Each is replaced whole and synced.  File systems
shared by hosts are not for this: their locks are what their servers make of them.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ftrain.comms.errors import (
    FtrainError,
    LeadershipLostError,
    ObjectStoreError,
    RunDirectoryError,
    StoreFullError,
    StoreUnreachableError,
)
from ftrain.comms.store.base import Leader, check_address, check_state

# The kernel tells nobody when a lock that others hold is free, except who waits without a deadline.
_TRY_AGAIN_S = 0.05
_LOOK_AGAIN_S = 0.1


class FileStore:
    """A :class:`~ftrain.comms.store.base.CoordinatorStore` in ``directory``, made if need be.

    Raises RunDirectoryError when that can't be.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._closing = threading.Event()
        self._open: list[FileTerm | FileLeaderWatch] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            os.close(_open_lock(directory))
        except OSError as error:
            raise RunDirectoryError(
                f"{directory} can't hold the coordinator's state ({error.strerror}): use another"
                " directory"
            ) from None

    def campaign(self, address: str, timeout_s: float) -> FileTerm | None:
        """As the protocol says; raises RunDirectoryError for a number of a term that is none."""
        check_address(address)
        deadline_s = time.monotonic() + timeout_s
        while not self._closing.is_set():
            with _said(self._directory):
                fd = _try_lock(self._directory, fcntl.LOCK_EX)
                if fd is not None:
                    return self._begin(fd, address)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return None
            self._closing.wait(min(left_s, _TRY_AGAIN_S))
        raise _closed(self._directory)

    def leader(self, timeout_s: float) -> Leader | None:
        """As the protocol says; it takes no time."""
        with _said(self._directory):
            return _leader_of(self._directory)

    def watch_leader(self, heard: Callable[[Leader | None], None]) -> FileLeaderWatch:
        """As the protocol says; changes are told within 0.1 s."""
        if self._closing.is_set():
            raise _closed(self._directory)
        watch = FileLeaderWatch(self._directory, heard)
        self._open.append(watch)
        return watch

    def close(self) -> None:
        """As the protocol says."""
        self._closing.set()
        for each in self._open:
            each.resign() if isinstance(each, FileTerm) else each.close()

    def _begin(self, fd: int, address: str) -> FileTerm:
        try:
            number = _newest_term(self._directory) + 1
            _replace(self._directory / "term", b"%d\n" % number)
            _replace(self._directory / "leader", msgspec.json.encode(Leader(address, number)))
        except BaseException:  # whatever it was, the lock must not outlive the attempt
            os.close(fd)
            raise
        term = FileTerm(self._directory, fd, number)
        self._open.append(term)
        if self._closing.is_set():  # by another thread, which may not have seen this term
            term.resign()
        return term


class FileTerm:
    """A :class:`~ftrain.comms.store.base.Term`: a lock that is held.

    A process that is forked meanwhile, and runs no other program, holds it too.
    """

    def __init__(self, directory: Path, fd: int, number: int) -> None:
        self.number = number
        self.lost = threading.Event()
        self._directory = directory
        self._fd = fd
        self._mutex = threading.Lock()

    def assured_s(self) -> float:
        """As the protocol says: for as long as the term is not over."""
        return 0.0 if self.lost.is_set() else math.inf

    def save(self, state: bytes) -> None:
        """As the protocol says."""
        check_state(state)
        with self._mutex, _said(self._directory):
            self._check()
            _replace(self._directory / "state", state)

    def load(self) -> bytes | None:
        """As the protocol says."""
        with self._mutex, _said(self._directory):
            self._check()
            try:
                return (self._directory / "state").read_bytes()
            except FileNotFoundError:
                return None

    def resign(self) -> None:
        """As the protocol says."""
        with self._mutex:
            self.lost.set()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _check(self) -> None:
        """The kernel sees to it that nobody else has the lock, unless its file was replaced."""
        if not self.lost.is_set():
            newest = _newest_term(self._directory)
            if newest == self.number and _is_lock_of(self._fd, self._directory):
                return
            self.lost.set()
        raise LeadershipLostError(
            f"this coordinator's term {self.number} in {self._directory} is over: ask the store who"
            " leads"
        )


class FileLeaderWatch:
    """A :class:`~ftrain.comms.store.base.LeaderWatch`: a thread that looks at the directory."""

    def __init__(self, directory: Path, heard: Callable[[Leader | None], None]) -> None:
        self.newest: Leader | None = None
        self.trouble: FtrainError | None = None
        self._directory = directory
        self._heard = heard
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leader-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """As the protocol says."""
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        first = True
        while not self._stopping.is_set():
            try:
                with _said(self._directory):
                    leader = _leader_of(self._directory)
                self.trouble = None
                if first or leader != self.newest:
                    self.newest, first = leader, False
                    self._heard(leader)
            except FtrainError as error:
                self.trouble = error
            self._stopping.wait(_LOOK_AGAIN_S)


def _open_lock(directory: Path) -> int:
    return os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _is_lock_of(fd: int, directory: Path) -> bool:
    """Whether the open file is still the one that others would lock."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(directory / "lock"))
    except FileNotFoundError:
        return False


def _try_lock(directory: Path, how: int) -> int | None:
    """The lock's descriptor; None while somebody holds it otherwise."""
    fd = _open_lock(directory)
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        if _is_lock_of(fd, directory):
            return fd
    except BlockingIOError:
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _leader_of(directory: Path) -> Leader | None:
    # Who only looks shares the lock for a moment, and a candidate of that moment tries again.
    fd = _try_lock(directory, fcntl.LOCK_SH)
    if fd is not None:
        os.close(fd)
        return None
    try:
        leader = msgspec.json.decode((directory / "leader").read_bytes(), type=Leader)
    except FileNotFoundError:
        return None  # the first one ever holds the lock, and has not written its address yet
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _damaged(directory / "leader") from None
    # Between a new leader's number and its address the file tells of the one before.
    return leader if leader.term == _newest_term(directory) else None


def _newest_term(directory: Path) -> int:
    try:
        return int((directory / "term").read_bytes())
    except FileNotFoundError:
        return 0
    except ValueError:
        raise _damaged(directory / "term") from None


def _replace(path: Path, content: bytes) -> None:
    """Give a file other content, whole and synced, whenever the process or the host stops."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        with open(fresh, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _said(directory: Path) -> Iterator[None]:
    """Turn what the system says into a sentence."""
    try:
        yield
    except FtrainError:
        raise
    except OSError as error:
        raise _sentence(directory, error) from None


def _sentence(directory: Path, error: OSError) -> ObjectStoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(f"{directory} has no room for the coordinator's state: make some")
    return StoreUnreachableError(
        f"the coordinator's state in {directory} can't be used ({error.strerror}): look at the"
        " directory and its disk"
    )


def _damaged(path: Path) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} does not hold what a coordinator writes there: put it right, or use another"
        " directory"
    )


def _closed(directory: Path) -> StoreUnreachableError:
    return StoreUnreachableError(f"the store in {directory} was closed here: open it again")
