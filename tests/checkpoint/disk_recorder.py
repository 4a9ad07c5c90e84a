"""Runs the real store in threads that stand for processes; writes down what it does to the disk.

One thread runs at a time, and which one is drawn before each operation, so that a seed is one
history.  A process may be killed before any operation, and the disk may be full for a while.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from disk_model import ROOT, Op

from ftrain.comms.errors import FtrainError

_TAKES_SPACE = frozenset({"open", "posix_fallocate", "pwrite", "mkdir", "link"})
_SWITCH = 0.25  # how often another process has the next turn
_STALL = 0.01  # how often a process stands still before an operation, and for how long
_STALL_OPERATIONS = 400
_WAIT_S = 30.0


class Killed(BaseException):
    """A process does nothing more."""


@dataclass(frozen=True)
class Death:
    """When a process is killed, in its own operations, or links made, until then."""

    operations: int = 1 << 60
    links: int = 1 << 60


class Process(threading.Thread):
    """A thread that stands for a process."""

    def __init__(self, recorder: Recorder, run: Callable[[], object], death: Death) -> None:
        super().__init__(daemon=True)
        self._recorder = recorder
        self._run = run
        self._left = death.operations
        self._links = death.links
        self.wakes = 0  # at which number of operations, if it stands still
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until it is done, or killed."""
        try:
            self._recorder.wait_for_turn(self)
            self._run()
        except (Killed, FtrainError):
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._recorder.ended(self)

    def operate(self) -> None:
        """Before each operation."""
        self._left -= 1
        if self._left <= 0:
            raise Killed
        self._recorder.take_turns(self)

    def linked(self) -> None:
        """After it made a link."""
        self._links -= 1
        if self._links == 0:
            self._left = 0


class Recorder:
    """The operations of all processes, in order."""

    def __init__(self, root: Path, seed: int) -> None:
        self.trace: list[Op] = []
        self.chance = random.Random(seed)
        self.full = range(0)  # numbers of the operations that find no space
        self.faults = 0
        self._root = str(root)
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self._next = itertools.count(1)
        self._fds: dict[int, int] = {}
        self._turns = threading.Condition()
        self._alive: list[Process] = []
        self._owner: Process | None = None

    def say(self, words: str) -> None:
        """Somebody was told something."""
        self.trace.append(("said", words))

    def go(self, *runs: Callable[[], object], death: Death = Death()) -> None:
        """Run these as processes at the same time, each until it ends; the first one may die."""
        deaths = [death, *(Death() for _ in runs[1:])]
        processes = [Process(self, *of) for of in zip(runs, deaths, strict=True)]
        self._alive = list(processes)
        self._owner = processes[0]
        with self._patched():
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        for process in processes:
            if process.error is not None:
                raise process.error

    # ---- turns

    def wait_for_turn(self, process: Process) -> None:
        """Until it is the process's turn."""
        with self._turns:
            if not self._turns.wait_for(lambda: self._owner is process, _WAIT_S):
                raise AssertionError("nobody gave the turn back")

    def take_turns(self, process: Process) -> None:
        """Perhaps somebody else goes on first, and perhaps for long."""
        if len(self._alive) < 2:
            return
        if self.chance.random() < _STALL:
            self.stand_still()
        elif self.chance.random() < _SWITCH:
            self._give_turn(process)

    def stand_still(self) -> None:
        """The process that asks does nothing while the others do much."""
        process = threading.current_thread()
        if isinstance(process, Process) and len(self._alive) > 1:
            process.wakes = len(self.trace) + self.chance.randrange(_STALL_OPERATIONS)
            self._give_turn(process)

    def _give_turn(self, process: Process) -> None:
        with self._turns:
            awake = [other for other in self._alive if other.wakes <= len(self.trace)]
            self._owner = self.chance.choice(awake or self._alive)
            self._turns.notify_all()
        self.wait_for_turn(process)

    def ended(self, process: Process) -> None:
        """The process does nothing more."""
        with self._turns:
            self._alive.remove(process)
            self._owner = self._alive[0] if self._alive else None
            self._turns.notify_all()

    # ---- operations

    @contextmanager
    def _patched(self) -> Iterator[None]:
        changed = {name: self._wrap(name, getattr(os, name)) for name in _HANDLERS}
        with mock.patch.multiple(os, **changed):
            yield

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        handler = _HANDLERS[name]

        def operation(*arguments: Any, **options: Any) -> Any:
            process = threading.current_thread()
            if not isinstance(process, Process):
                return real(*arguments, **options)
            if name != "close":  # the kernel does that for whoever is killed
                process.operate()
            if len(self.trace) in self.full and name in _TAKES_SPACE and _grows(name, arguments):
                self.faults += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = real(*arguments, **options)
            handler(self, result, *arguments)
            if name == "link":
                process.linked()
            return result

        return operation

    def _place(self, path: Any) -> tuple[int, str] | None:
        """Folder and name of a path below the root; None for any other."""
        text = os.fspath(path)
        if not text.startswith(self._root + os.sep):
            return None
        folder, *rest = 0, *text[len(self._root) + 1 :].split(os.sep)
        for part in rest[:-1]:
            folder = self._names[folder][part]
        return folder, rest[-1]

    def _name(self, place: tuple[int, str], node: int | None) -> None:
        folder, name = place
        if node is None:
            del self._names[folder][name]
        else:
            self._names[folder][name] = node
        self.trace.append(("name", folder, name, node))

    def _opened(self, fd: int, path: Any, flags: int, *_: Any) -> None:
        self._fds.pop(fd, None)
        text = os.fspath(path)
        if text.startswith("/proc/self/fd/"):
            self._fds[fd] = self._fds[int(text.rpartition("/")[2])]
        elif text == self._root:
            self._fds[fd] = ROOT
        elif (place := self._place(text)) is not None:
            node = self._names[place[0]].get(place[1])
            if node is None:
                node = next(self._next)
                self.trace.append(("file", node))
                self._name(place, node)
            self._fds[fd] = node

    def _closed(self, _: object, fd: int) -> None:
        self._fds.pop(fd, None)

    def _written(self, count: int, fd: int, data: Any, offset: int) -> None:
        if fd in self._fds:
            part = bytes(memoryview(data).cast("B")[:count])
            self.trace.append(("write", self._fds[fd], offset, part))

    def _allocated(self, _: object, fd: int, offset: int, size: int) -> None:
        if fd in self._fds:
            self.trace.append(("size", self._fds[fd], offset + size))

    def _synced(self, _: object, fd: int) -> None:
        if fd in self._fds:
            self.trace.append(("sync", self._fds[fd]))

    def _linked(self, _: object, source: Any, target: Any) -> None:
        from_, to = self._place(source), self._place(target)
        if from_ is not None and to is not None:
            self._name(to, self._names[from_[0]][from_[1]])

    def _replaced(self, _: object, source: Any, target: Any) -> None:
        self._linked(_, source, target)
        self._unlinked(_, source)

    def _unlinked(self, _: object, path: Any) -> None:
        if (place := self._place(path)) is not None:
            self._name(place, None)

    def _made(self, _: object, path: Any, *more: Any) -> None:
        if (place := self._place(path)) is not None:
            node = next(self._next)
            self._names[node] = {}
            self.trace.append(("folder", node))
            self._name(place, node)


def _grows(name: str, arguments: tuple[Any, ...]) -> bool:
    return name != "open" or bool(arguments[1] & os.O_CREAT)


_HANDLERS: dict[str, Callable[..., None]] = {
    "open": Recorder._opened,
    "close": Recorder._closed,
    "pwrite": Recorder._written,
    "posix_fallocate": Recorder._allocated,
    "fsync": Recorder._synced,
    "link": Recorder._linked,
    "replace": Recorder._replaced,
    "unlink": Recorder._unlinked,
    "rmdir": Recorder._unlinked,
    "mkdir": Recorder._made,
}
