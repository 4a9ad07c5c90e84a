"""What ranks print: into log files in torchrun's layout, and line by line to the terminal.

One thread does all of it, so that a slow disk or a paused terminal holds up the ranks that print,
never the agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import shutil
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ftrain.comms.errors import UsageError

_PIPE_BYTES = 1 << 20  # what ranks can print while this thread is held up
_READ_BYTES = 1 << 16
_LINE_BYTES_MAX = 1 << 16
_ATTEMPT = re.compile(r"attempt_\d{1,18}")
_FIRST_ATTEMPTS = 3  # kept for ever
_BITS = {"stdout": 1, "stderr": 2}
_CONSOLE = {"stdout": 1, "stderr": 2}  # descriptors of this process


def parse_std(text: str, local_rank: int) -> int:
    """torchrun's ``Std`` for one rank: bits 1 stdout, 2 stderr, from "3" or "0:1,1:3".

    Raises :class:`UsageError`.
    """
    try:
        if ":" not in text:
            value = int(text)
        else:
            pairs = (item.split(":") for item in text.split(","))
            value = {int(rank): int(std) for rank, std in pairs}.get(local_rank, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 3:
        raise UsageError(
            f"{text!r} does not say which output goes where: write 0 none, 1 stdout, 2 stderr, "
            "3 both, or one of these per local rank, as 0:1,1:3"
        )
    return value


class _Stream:
    """One output of one rank."""

    def __init__(
        self,
        fd: int,
        log_fd: int,
        console_fd: int,
        prefix: bytes,
        on_full: Callable[[_Stream, OSError], None],
    ) -> None:
        self.fd = fd
        self.log_fd = log_fd
        self.console_fd = console_fd
        self._prefix = prefix
        self._partial = b""
        self._on_full = on_full

    def take(self, data: bytes) -> None:
        """Pass data on; an incomplete line waits for its rest."""
        if self.log_fd >= 0 and (error := _write_all(self.log_fd, data)):
            self._on_full(self, error)  # the next lines are tried again: somebody may make room
        if self.console_fd >= 0:
            text = (self._partial + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            *lines, self._partial = text.split(b"\n")
            if len(self._partial) > _LINE_BYTES_MAX:
                lines.append(self._partial)
                self._partial = b""
            self._show(lines)

    def end(self) -> None:
        """The rank, and all that inherited the stream from it, have closed it."""
        if self._partial and self.console_fd >= 0:
            self._show([self._partial])
        for fd in (self.fd, self.log_fd):
            if fd >= 0:
                os.close(fd)

    def _show(self, lines: list[bytes]) -> None:
        shown = b"".join(self._prefix + line + b"\n" for line in lines if line)
        if shown and _write_all(self.console_fd, shown):
            self.console_fd = -1  # the terminal is gone


class OutputPump:
    """Reads the pipes that ranks print into. Its thread runs until :meth:`close`.

    ``on_trouble`` is told once, from any thread, that logs can't be written; what would go there
    only is shown on the terminal then.
    """

    def __init__(self, on_trouble: Callable[[str], None]) -> None:
        self._on_trouble = on_trouble
        self._troubled = False
        self._new: deque[_Stream] = deque()
        self._selector = selectors.DefaultSelector()  # here, where it is told if it can't be had
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def open(
        self, kind: str, directory: Path, prefix: str, *, redirects: int = 0, tee: int = 3
    ) -> int:
        """A pipe for a rank's ``kind`` ("stdout" or "stderr"); returns the end to write into.

        With neither bit set the output goes to the terminal only, as torchrun has it; with
        ``redirects`` to ``directory`` only; with ``tee`` to both.
        """
        bit = _BITS[kind]
        reading, writing = os.pipe2(os.O_CLOEXEC)
        log_fd, console_fd = -1, _CONSOLE[kind]
        if (redirects | tee) & bit:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            try:
                directory.mkdir(parents=True, exist_ok=True)
                log_fd = os.open(directory / f"{kind}.log", flags, 0o644)
            except OSError as error:
                self._complain(directory, error)
            else:
                console_fd = -1 if redirects & bit and not tee & bit else console_fd
        with contextlib.suppress(OSError):  # over the user's limit: the default size does
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

        def full(stream: _Stream, error: OSError) -> None:
            self._complain(directory, error)
            if not bit & tee:
                stream.console_fd = _CONSOLE[kind]

        self._new.append(_Stream(reading, log_fd, console_fd, prefix.encode(), full))
        os.eventfd_write(self._wake, 1)
        return writing

    def _complain(self, directory: Path, error: OSError) -> None:
        if not self._troubled:
            self._troubled = True
            self._on_trouble(
                f"what ranks print is not kept in {directory}: {error.strerror}; it is shown here "
                "all the same, and training goes on: make room, or choose another launch.log_dir"
            )

    def close(self, timeout_s: float) -> None:
        """Pass on what is still in the pipes, then end the thread; at the deadline give up."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            os.close(self._wake)

    def _run(self) -> None:
        with self._selector as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                ready = selector.select(0 if self._closing else None)
                if self._closing and not any(key.data for key, _ in ready) and not self._new:
                    break
                for key, _ in ready:
                    if key.data is None:
                        os.eventfd_read(self._wake)
                    else:
                        _pass_on(selector, key.data)
                while self._new:
                    stream = self._new.popleft()
                    selector.register(stream.fd, selectors.EVENT_READ, stream)
            for key in list(selector.get_map().values()):
                if key.data is not None:
                    key.data.end()


def _pass_on(selector: selectors.BaseSelector, stream: _Stream) -> None:
    data = os.read(stream.fd, _READ_BYTES)
    if data:
        stream.take(data)
    else:
        selector.unregister(stream.fd)
        stream.end()


def _write_all(fd: int, data: bytes) -> OSError | None:
    """What kept it from being written; a full disk or a closed terminal loses output only."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        return error
    return None


def prune_attempts(folder: Path, newest: int) -> None:
    """Remove the logs of all attempts but the first few, which tell how it began, and the newest.

    Agents of several nodes may do this to one folder at the same time.
    """
    try:
        names = [name for name in os.listdir(folder) if _ATTEMPT.fullmatch(name)]
    except OSError:
        return  # nothing is kept there
    names.sort(key=lambda name: int(name.partition("_")[2]))
    for name in names[_FIRST_ATTEMPTS : max(_FIRST_ATTEMPTS, len(names) - newest)]:
        shutil.rmtree(folder / name, ignore_errors=True)
