"""The parent's side of worker.py: asks, never blocks, and ends a process that takes too long."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

from ftrain.checkpoint.remote.filesystems import place_name
from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.protocol.messages import (
    Answer,
    Request,
    StoreFailed,
    StoreProgress,
    StoreSetup,
    StoreTold,
)
from ftrain.comms import errors, local
from ftrain.comms.environment import inherited_environment
from ftrain.comms.errors import ObjectStoreError, StoreUnreachableError
from ftrain.comms.links import LocalLink
from ftrain.comms.process import describe_returncode, pidfd_open, python_command

_CLOSE_S_MAX = 5.0
_KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.FtrainError)
}


class StoreClient:
    """Has a process of its own do requests to one object store, one at a time.

    Lives in an asyncio loop, in a thread that lives as long as the process (the kernel ends the
    worker with that thread).  The process is started by the first request.

    Args:
        uri: the place; ConfigError when it is none.
        limits: how patient and how fast it is used.
        on_told: gets a sentence for each attempt that failed and is made again.
    """

    def __init__(
        self,
        uri: str,
        limits: Limits | None = None,
        on_told: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name = place_name(uri)
        self._setup = StoreSetup(uri, limits or Limits())
        self._on_told = on_told
        self._on_progress: Callable[[StoreProgress], None] = _unseen
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._process: _Process | None = None
        self._answer: asyncio.Future[Any] | None = None
        self._stall_s: float | None = None
        self._what = ""
        self._stalled: asyncio.TimerHandle | None = None
        self._ending: set[_Process] = set()

    @property
    def pid(self) -> int:
        """The worker's process; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    async def ask(
        self,
        request: Request,
        deadline_s: float,
        *,
        stall_s: float | None = None,
        on_progress: Callable[[StoreProgress], None] | None = None,
    ) -> Answer:
        """What the store answers, once the requests before this one are done.

        Args:
            request: what to do.
            deadline_s: after so long the process is killed; the next request gets another one.
            stall_s: the same, after so long without progress; what is uploaded goes in parts of
                10 MiB and more, and there is none during one.
            on_progress: told now and then how far it is.

        Raises:
            StoreUnreachableError: it took too long.
            ObjectStoreError: the process died.
            FtrainError: of whatever kind the process met.
        """
        async with self._turn:
            self._on_progress = on_progress or _unseen
            self._stall_s = stall_s
            self._what = what = f"{type(request).__name__} to {self.name}"
            answer = self._answer = self._loop.create_future()
            process = self._running()
            late = self._loop.call_later(
                deadline_s, self._fail, f"{what} was not done within {deadline_s:g} s"
            )
            self._watch_stall()
            process.link.post(request)
            try:
                return self._unpacked(await answer)
            finally:
                late.cancel()
                if self._stalled is not None:
                    self._stalled.cancel()
                if not answer.done() or answer.cancelled() or answer.exception() is not None:
                    self._end()  # whatever it still does is of no use
                self._answer = None

    async def close(self) -> None:
        """End the process; returns when it is gone, or can't be ended for now."""
        self._end()
        ending = [process.gone for process in self._ending]
        if ending:
            await asyncio.wait(ending, timeout=_CLOSE_S_MAX)

    def _running(self) -> _Process:
        if self._process is None:
            try:
                self._process = process = _Process(self._received, self._died)
            except OSError as error:
                raise ObjectStoreError(
                    f"no process can be started to use {self.name} ({error.strerror}): look at the"
                    " limits of processes, memory and descriptors"
                ) from None
            self._ending.add(process)
            process.gone.add_done_callback(lambda _: self._ending.discard(process))
            process.link.post(self._setup)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _received(self, message: Any, fds: list[int]) -> None:
        local.close_all(fds)
        if isinstance(message, StoreTold):
            self._on_told(message.text)
        elif isinstance(message, StoreProgress):
            self._watch_stall()
            self._on_progress(message)
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _unpacked(self, message: Any) -> Answer:
        if isinstance(message, StoreFailed):
            raise _KINDS.get(message.kind, ObjectStoreError)(message.text)
        answer: Answer = message
        return answer

    def _watch_stall(self) -> None:
        """Begin to count anew how long there was no progress."""
        if self._stall_s is None:
            return
        if self._stalled is not None:
            self._stalled.cancel()
        why = f"{self._what} made no progress for {self._stall_s:g} s"
        self._stalled = self._loop.call_later(self._stall_s, self._fail, why)

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(
                StoreUnreachableError(f"{why}: it was given up, look at the store and the network")
            )

    def _died(self, process: _Process, how: str) -> None:
        if self._process is not process:
            return  # ended by us
        self._process = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(
                ObjectStoreError(f"the process that uses {self.name} ended ({how}): ask again")
            )


class _Process:
    """One worker process, with its end of the socket."""

    def __init__(
        self,
        on_message: Callable[[Any, list[int]], None],
        on_end: Callable[[_Process, str], None],
    ) -> None:
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        ours, theirs = local.pair()
        try:
            with theirs:
                self._popen = _start(theirs.fileno())
        except OSError:
            ours.close()
            raise
        self.pid = self._popen.pid
        self._pidfd = pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._ended)
        self.link = LocalLink(ours, on_message, lambda _: self.kill())

    def kill(self) -> None:
        """SIGKILL it; it is reaped when it is gone."""
        self.link.close()
        if self._pidfd >= 0:  # not reaped yet, so there is something to signal
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _ended(self) -> None:
        self.link.drain()  # its last words
        self.link.close()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        code = self._popen.poll()
        self.gone.set_result(None)
        self._on_end(self, describe_returncode(code if code is not None else 0))


def _start(fd: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*python_command(), "-m", "ftrain.checkpoint.remote.worker", "--fd", str(fd)],
        stdin=subprocess.DEVNULL,
        env=inherited_environment(),
        pass_fds=[fd],
        process_group=0,  # Ctrl-C is not for it
    )


def _unseen(progress: StoreProgress) -> None:
    """Nobody wants to see it."""
