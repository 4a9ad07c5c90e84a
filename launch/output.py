"""What ranks print: into log files in torchrun's layout, and line by line to the terminal.

One thread does all of it, so that a slow disk or a paused terminal holds up the ranks that print,
never the agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import threading
from collections import deque
from pathlib import Path

from ftrain.comms.errors import UsageError

_PIPE_BYTES = 1 << 20  # what ranks can print while this thread is held up
_READ_BYTES = 1 << 16
_LINE_BYTES_MAX = 1 << 16
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

    def __init__(self, fd: int, log_fd: int, console_fd: int, prefix: bytes) -> None:
        self.fd = fd
        self.log_fd = log_fd
        self.console_fd = console_fd
        self._prefix = prefix
        self._partial = b""

    def take(self, data: bytes) -> None:
        """Pass data on; an incomplete line waits for its rest."""
        if self.log_fd >= 0:
            _write_all(self.log_fd, data)
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
        if shown and not _write_all(self.console_fd, shown):
            self.console_fd = -1  # the terminal is gone


class OutputPump:
    """Reads the pipes that ranks print into. Its thread runs until :meth:`close`."""

    def __init__(self) -> None:
        self._new: deque[_Stream] = deque()
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
        log_fd = -1
        if (redirects | tee) & bit:
            directory.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            log_fd = os.open(directory / f"{kind}.log", flags, 0o644)
        console_fd = -1 if redirects & bit and not tee & bit else _CONSOLE[kind]
        reading, writing = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # over the user's limit: the default size does
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._new.append(_Stream(reading, log_fd, console_fd, prefix.encode()))
        os.eventfd_write(self._wake, 1)
        return writing

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
        with selectors.DefaultSelector() as selector:
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


def _write_all(fd: int, data: bytes) -> bool:
    """Whether all was written; a full disk or a closed terminal loses output, nothing else."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        return False
    return True
