"""A rank's side of the snapshot manager: slots to write, images to read.

Everything that matters lies in shared memory, so a dead manager stops nobody: the maps stay valid,
a slot that was granted ahead can still be written, and the next call finds the new manager.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ftrain.comms.errors import MemoryShortError, PeerLostError, RemoteProtocolError, StateError
from ftrain.comms.local import LocalSocket, connect_local
from ftrain.comms.protocol.messages import Held, VersionId
from ftrain.snapshot.memory import map_fd, populate
from ftrain.snapshot.protocol.messages import (
    Begin,
    ClientHello,
    ClientWelcome,
    Denied,
    Finished,
    FinishTask,
    Granted,
    ImageSealed,
    Open,
    Opened,
    Release,
    Repaired,
    RequestRefused,
    Reserve,
    Reserved,
    Withdraw,
)

UNAVAILABLE = "snapshot manager unavailable"

_START_S_MAX = 20.0  # for connecting first, and opening
_RESERVE_S_MAX = 120.0  # taking memory from the system
_BEGIN_S_MAX = 1.0
_SEALED_S_MAX = 2.0
_GREETING_S_MAX = 0.2
_ABSENT_S_MAX = 0.01  # once the manager was found missing, until it answers again
_TOLD_MAX = 8  # damaged images that one message names
_RETRY_S_MIN = 0.002
_RETRY_S_MAX = 0.05


@dataclass(frozen=True, slots=True)
class FinishRequest:
    """Finish the dead ``rank``'s image of ``version``: ``buffer`` is its slot, writable."""

    version: VersionId
    rank: int
    buffer: memoryview


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """One image of a version; ``whole`` False: it holds the small section only."""

    rank: int
    whole: bool
    buffer: memoryview


class Lock(Protocol):
    """What holds a slot's pages in place; see :class:`~ftrain.checkpoint.pinned.PageLock`."""

    def release(self) -> None: ...


class Unlocked:
    """Nothing does."""

    def __init__(self, view: memoryview) -> None: ...

    def release(self) -> None:
        """There is nothing to release."""


@dataclass(slots=True)
class _Slot:
    view: memoryview
    lock_pages: Callable[[memoryview], Lock]
    entered: bool = False  # its pages are in this process's page table
    lock: Lock | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)

    def enter(self) -> None:
        """Enter them, and let GPUs copy to them."""
        with self.busy:
            if not self.entered:
                populate(self.view)
                self.lock = self.lock_pages(self.view)
                self.entered = True

    def leave(self) -> None:
        """The map is going."""
        with self.busy:
            self.entered = True  # it need not be any more
            if self.lock is not None:
                self.lock.release()


class SnapshotClient:
    """One rank's connection to its node's snapshot manager. Usable from several threads.

    ``denied`` says why :meth:`begin` last returned None.  ``lock_pages`` is given a slot's memory
    before much is written to it; what it returns is released before the memory goes.

    Raises PeerLostError when no manager answers, StateError when it does not want this rank.
    """

    def __init__(
        self,
        socket_path: str,
        *,
        rank: int,
        world_size: int,
        epoch: int,
        node: int,
        lock_pages: Callable[[memoryview], Lock] = Unlocked,
    ) -> None:
        self.denied = ""
        self._lock_pages = lock_pages
        self._path = socket_path
        self._rank = rank
        self._world_size = world_size
        self._epoch = epoch
        self._node = node
        self._lock = threading.RLock()
        self._socket: LocalSocket | None = None
        self._requests = 0
        self._slots: list[_Slot] = []
        self._slot = -1  # this rank's to write, granted ahead or for `_writing`
        self._writing: VersionId | None = None
        self._unsaid = False  # the manager was not told of `_writing`
        self._newest: VersionId | None = None  # ever begun
        self._tasks: deque[tuple[FinishTask, int]] = deque()  # with its descriptor
        self._absent = False
        with self._lock:
            self._connect(time.monotonic() + _START_S_MAX)

    # ------------------------------------------------------------ writing

    def reserve(self, image_bytes: int) -> None:
        """Map slots of at least ``image_bytes``; raises MemoryShortError or PeerLostError."""
        with self._lock:
            if self._slots and min(slot.view.nbytes for slot in self._slots) >= image_bytes:
                return
            answer, fds = self._call(Reserve(0, image_bytes), Reserved, _RESERVE_S_MAX)
            try:
                views = [map_fd(fd, n) for fd, n in zip(fds, answer.nbytes, strict=True)]
            finally:
                for fd in fds:
                    os.close(fd)
            self._forget_slots()
            self._slots = [_Slot(view, self._lock_pages) for view in views]

    def begin(self, version: VersionId, wait_s: float | None = None) -> memoryview | None:
        """A writable slot for ``version``, or None (see ``denied``). Usually without any wait; with
        ``wait_s`` another manager may come up meanwhile.

        To be followed by :meth:`begun` once the image in it is begun.
        """
        with self._lock:
            if not self._slots:
                raise StateError("begin() before reserve(): there is no slot to write to")
            if self._newest is not None and version <= self._newest:
                self.denied = f"out of order: step {self._newest.step} was begun before"
                return None
            self._newest = version
            if self._slot >= 0:
                self._writing, self._unsaid = version, True
                return self._slots[self._slot].view
            try:
                answer, _ = self._call(
                    Begin(0, version),
                    (Granted, Denied),
                    self._wait(_BEGIN_S_MAX) if wait_s is None else wait_s,
                )
            except PeerLostError:
                self._absent = True
                self.denied = UNAVAILABLE
                return None
            self._absent = False
            if isinstance(answer, Denied):
                self.denied = answer.reason
                return None
            self._slot, self._writing = answer.slot, version
            return self._slots[self._slot].view

    def enter(self) -> None:
        """Enter the pages of the slot of :meth:`begin` into this process's page table, before much
        is written to it."""
        with self._lock:
            slot = self._slots[self._slot] if self._slots and self._slot >= 0 else None
        if slot is not None:
            slot.enter()

    def enter_more(self) -> bool:
        """Enter those of one more slot; False: all are entered."""
        slot = next((slot for slot in self._slots if not slot.entered), None)
        if slot is not None:
            slot.enter()
        return slot is not None

    def begun(self, version: VersionId) -> None:
        """Tell the manager what is in the slot that was granted ahead, if it does not know yet.

        Apart from :meth:`begin`, so that the training thread need not wait for a message to go.
        """
        with self._lock:
            if self._unsaid and self._writing == version:
                self._unsaid = False
                self._tell(Begin(0, version, self._slot))

    def sealed(self, version: VersionId, held: Held) -> None:
        """The image in the slot of :meth:`begin` is sealed.

        When no manager answers in time nothing is lost: the next one reads the image's header.
        """
        with self._lock:
            if self._writing != version or held.version != version:
                raise StateError(f"{version} was not begun, or given up for another")
            message = ImageSealed(0, version, self._slot)
            try:
                answer, _ = self._call(message, (Granted, Denied), self._wait(_SEALED_S_MAX))
            except PeerLostError:
                self._absent = True
                self._slot, self._writing = -1, None
                return
            self._absent = False
            self._slot, self._writing = -1, None
            if isinstance(answer, Granted):
                self._slot = answer.slot
                self._slots[answer.slot].enter()

    def withdraw(self, version: VersionId) -> None:
        """The image of a version that was sealed is worth nothing; its header is gone already.

        When no manager hears it the next one finds no image.
        """
        with self._lock:
            self._tell(Withdraw(version))

    # ------------------------------------------------------------ reading

    def open(self, version: VersionId, wait_s: float | None = None) -> list[OpenedImage]:
        """Every image of ``version`` on this node, read-only; kept until :meth:`release`.

        ``wait_s``: longer than usual, for what is being rebuilt there.  Raises PeerLostError, or
        StateError when there is none.
        """
        with self._lock:
            answer, fds = self._call(Open(0, version), Opened, wait_s or _START_S_MAX)
            try:
                views = [map_fd(fd, os.fstat(fd).st_size, writable=False) for fd in fds]
            finally:
                for fd in fds:
                    os.close(fd)
            return [
                OpenedImage(
                    part.rank, part.whole, views[part.file][part.offset : part.offset + part.nbytes]
                )
                for part in answer.parts
            ]

    def release(self, version: VersionId) -> None:
        """What :meth:`open` gave is no longer read; its buffers must not be used any more."""
        with self._lock:
            self._tell(Release(version))

    def repaired(self, version: VersionId, damage: Sequence[str], sources: Sequence[str]) -> None:
        """Say that ``version`` was put back in spite of ``damage``."""
        with self._lock:
            self._tell(Repaired(version, tuple(damage[:_TOLD_MAX]), tuple(sources[:_TOLD_MAX])))

    # ------------------------------------------------------------ finishing for the dead

    def fileno(self) -> int:
        """Readable when :meth:`poll` may have news; -1 while there is no manager."""
        sock = self._socket
        return sock.fileno() if sock is not None else -1

    def poll(self) -> FinishRequest | None:
        """A dead rank's image to finish, if there is one; never waits.

        Call it when :meth:`fileno` is readable, after every other call, and now and then while
        there is no manager: it reconnects.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if self._socket is None:
                self._connect(0.0)
            while not self._tasks:
                message, fds = self._receive(0.0)
                self._keep_task(message, fds)
            task, fd = self._tasks.popleft()
        except (TimeoutError, PeerLostError, StateError):
            return None
        finally:
            self._lock.release()
        view = map_fd(fd, task.nbytes)
        os.close(fd)
        return FinishRequest(task.version, task.rank, view)

    def finished(self, version: VersionId, rank: int, held: Held | None) -> None:
        """Answer to a :class:`FinishRequest`; None: could not be done. Drop its buffer."""
        with self._lock:
            self._tell(Finished(version, rank, held))

    def close(self) -> None:
        """Give up the connection and the maps (which go when nobody uses their views)."""
        with self._lock:
            self._disconnect()
            self._forget_slots()
            self._path = ""

    def _forget_slots(self) -> None:
        for slot in self._slots:
            slot.leave()
        self._slots = []

    # ------------------------------------------------------------ conversation

    def _wait(self, longest_s: float) -> float:
        return _ABSENT_S_MAX if self._absent else longest_s

    def _call(
        self, message: Any, expected: type | tuple[type, ...], wait_s: float
    ) -> tuple[Any, list[int]]:
        """Send a request and wait for its answer, through a change of manager if there is one."""
        deadline_s = time.monotonic() + wait_s
        while True:
            if self._socket is None:
                self._connect(deadline_s)
            try:
                return self._ask(message, expected, deadline_s)
            except PeerLostError:
                if time.monotonic() >= deadline_s:
                    raise

    def _ask(
        self, message: Any, expected: type | tuple[type, ...], deadline_s: float
    ) -> tuple[Any, list[int]]:
        self._requests += 1
        request = self._requests
        self._send(type(message)(request, *_rest(message)), deadline_s)
        while True:
            try:
                answer, fds = self._receive(max(0.001, deadline_s - time.monotonic()))
            except TimeoutError:
                self._disconnect()  # a late answer must not be taken for another's
                raise PeerLostError(f"{UNAVAILABLE}: no answer at {self._path}") from None
            if isinstance(answer, FinishTask) or getattr(answer, "request", request) != request:
                self._keep_task(answer, fds)
            elif isinstance(answer, RequestRefused):
                raise MemoryShortError(answer.reason) if answer.short else StateError(answer.reason)
            elif isinstance(answer, expected):
                return answer, fds
            else:
                self._disconnect()
                raise RemoteProtocolError(
                    f"the snapshot manager answered a {type(message).__name__} with a "
                    f"{type(answer).__name__}"
                )

    def _tell(self, message: object) -> None:
        """Send what has no answer; when there is no manager the next one learns it otherwise."""
        try:
            self._send(message, time.monotonic() + _ABSENT_S_MAX)
        except PeerLostError:
            return

    def _connect(self, deadline_s: float) -> None:
        """Connect and say who we are; tries once when the deadline has passed already."""
        retry_s = _RETRY_S_MIN
        while True:
            try:
                self._greet(max(deadline_s, time.monotonic() + self._wait(_GREETING_S_MAX)))
                self._absent = False  # it answers, so it may take its time with an answer
                return
            except StateError:
                self._disconnect()
                raise
            except PeerLostError:
                self._disconnect()
                if time.monotonic() + retry_s >= deadline_s:
                    raise PeerLostError(f"{UNAVAILABLE}: nobody answers at {self._path}") from None
            time.sleep(retry_s)  # nothing tells when somebody listens at a path
            retry_s = min(2 * retry_s, _RETRY_S_MAX)

    def _greet(self, deadline_s: float) -> None:
        self._socket = connect_local(self._path, max(0.001, deadline_s - time.monotonic()))
        hello = ClientHello(
            0, self._rank, self._world_size, self._node, self._epoch, self._slot, self._writing
        )
        answer, _ = self._ask(hello, ClientWelcome, deadline_s)
        if answer.slot < 0 and self._writing is None:
            self._slot = -1  # the new manager needs what is in the slot granted ahead

    def _send(self, message: object, deadline_s: float) -> None:
        if self._socket is None:
            raise PeerLostError(UNAVAILABLE)
        try:
            self._socket.settimeout(max(0.001, deadline_s - time.monotonic()))
            self._socket.send(message)
        except (TimeoutError, PeerLostError):
            self._disconnect()
            raise PeerLostError(f"{UNAVAILABLE}: it does not read at {self._path}") from None

    def _receive(self, timeout_s: float) -> tuple[Any, list[int]]:
        if self._socket is None:
            raise PeerLostError(UNAVAILABLE)
        try:
            self._socket.settimeout(timeout_s)
            return self._socket.receive()
        except (PeerLostError, RemoteProtocolError) as error:
            self._disconnect()
            raise PeerLostError(f"{UNAVAILABLE}: {error}") from None

    def _keep_task(self, message: object, fds: list[int]) -> None:
        if isinstance(message, FinishTask) and len(fds) == 1:
            self._tasks.append((message, fds[0]))
            return
        for fd in fds:  # the late answer to a request that was given up
            os.close(fd)

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        while self._tasks:
            os.close(self._tasks.popleft()[1])


def _rest(message: Any) -> list[Any]:
    """A request's fields behind its number."""
    return [getattr(message, name) for name in message.__dataclass_fields__ if name != "request"]
