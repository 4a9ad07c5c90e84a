"""An agent's children: started, noticed the moment they end, and never left behind.

The agent is a subreaper, so ranks (which the worker server forks for it) and whatever they leave
behind become its children as well.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ftrain.comms.process import become_subreaper, python_command
from ftrain.launch.children import children_of, ended_child

OnEnd = Callable[[int], None]  # called with the wait status

_UNCLAIMED_MAX = 1024
_LOOK_AGAIN_S = 0.005


class Reaper:
    """Waits for every child of this process, from the running asyncio loop."""

    def __init__(self) -> None:
        become_subreaper()
        self._watched: dict[int, OnEnd] = {}
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self._unclaimed: dict[int, int] = {}  # pid -> status, of children nobody watched yet
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        on_end: OnEnd,
        *,
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> int:
        """Start ``python -m module arguments`` in a process group of its own; returns its pid."""
        popen = subprocess.Popen(
            [*python_command(), "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=pass_fds,
            process_group=0,
        )
        self._started[popen.pid] = popen
        self._watched[popen.pid] = on_end
        return popen.pid

    def watch(self, pid: int, on_end: OnEnd) -> None:
        """Call ``on_end`` when ``pid``, which is or soon will be a child, ends (or has ended)."""
        status = self._unclaimed.pop(pid, None)
        if status is None:
            self._watched[pid] = on_end
        else:
            self._loop.call_soon(on_end, status)

    def kill(self, pid: int) -> None:
        """SIGKILL a watched child and its process group; nothing happens when it has ended."""
        if pid in self._watched:
            _kill_group(pid)
            _signal(pid, signal.SIGKILL)

    def strays(self) -> list[int] | None:
        """Living children that nobody watches: processes that a dead rank started.

        None: there is no descriptor left to look for them with.
        """
        try:
            return [pid for pid in _children() if pid not in self._watched]
        except OSError:
            return None

    async def kill_strays(self, deadline_s: float = 5.0) -> bool:
        """End every stray; whether none is left at the deadline."""
        deadline = time.monotonic() + deadline_s
        while (left := self.strays()) != [] and time.monotonic() < deadline:
            for pid in left or ():
                _signal(pid, signal.SIGKILL)
            await asyncio.sleep(_LOOK_AGAIN_S)
            self._reap()
        return left == []

    async def kill_all(self, deadline_s: float = 5.0) -> bool:
        """End every child; whether none is left at the deadline."""
        deadline = time.monotonic() + deadline_s
        while self._watched and time.monotonic() < deadline:
            for pid in list(self._watched):
                self.kill(pid)
            await asyncio.sleep(_LOOK_AGAIN_S)
            self._reap()
        return await self.kill_strays(deadline - time.monotonic()) and not self._watched

    def _reap(self) -> None:
        while (pid := ended_child()) is not None:
            on_end = self._watched.pop(pid, None)
            if on_end is not None:
                _kill_group(pid)  # before its number is free for others
            status = os.waitpid(pid, 0)[1]
            popen = self._started.pop(pid, None)
            if popen is not None:
                popen.returncode = os.waitstatus_to_exitcode(status)
            if on_end is not None:
                on_end(status)
            else:
                self._unclaimed[pid] = status
                while len(self._unclaimed) > _UNCLAIMED_MAX:
                    del self._unclaimed[next(iter(self._unclaimed))]

    def forget_strays(self) -> None:
        """No child is about to be watched: forget who ended unwatched (their pids come again)."""
        self._unclaimed.clear()


def _children() -> list[int]:
    """Living children of this process."""
    found: list[int] = []
    try:
        for task in Path("/proc/self/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    except OSError:  # a kernel without that file: look through all processes
        return children_of(os.getpid())
    return found


def _kill_group(pid: int) -> None:
    """SIGKILL the process group that ``pid`` led, if it led one."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # PermissionError: only a zombie of another user is left


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
