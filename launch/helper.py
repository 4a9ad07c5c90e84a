"""A process that serves an agent over a local socket, started again whenever it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftrain.comms import local
from ftrain.comms.links import LocalLink
from ftrain.comms.process import describe_exit
from ftrain.launch.reaper import Reaper

_HEALTHY_S = 10.0  # having lived so long, its death is no crash loop
_PAUSE_S_MIN, _PAUSE_S_MAX = 0.1, 5.0  # before the next start, in a crash loop
_LAST_S = 0.2  # between closing its connection and its end
_REFUSED_PAUSE_S = 1.0  # ... when the system had no process or descriptor for it


class HelperProcess:
    """Runs ``python -m module --fd N``; N is the process's end of a local socket to this one.

    Args:
        on_start: a process was started; the place to post the first messages.
        on_message: called with each message and its descriptors, which it has to close.
        on_down: the process ended, and how; another one follows.
        on_refused: the next one can't be started, and why; it is tried until it can.
    """

    def __init__(
        self,
        module: str,
        environment: Mapping[str, str],
        reaper: Reaper,
        *,
        on_start: Callable[[], None],
        on_message: Callable[[Any, list[int]], None],
        on_down: Callable[[str], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self.pid = 0  # 0: none runs at this moment
        self._module = module
        self._environment = environment
        self._reaper = reaper
        self._on_start = on_start
        self._on_message = on_message
        self._on_down = on_down
        self._on_refused = on_refused
        self._loop = asyncio.get_running_loop()
        self._link: LocalLink | None = None
        self._started_s = 0.0
        self._pause_s = 0.0
        self._refused = False
        self._closed = False

    def start(self) -> None:
        """Start the process. Raises OSError when it can't be: there is nothing to lose yet."""
        ours, theirs = local.pair()
        link = LocalLink(ours, self._on_message, self._hung_up)
        with theirs:
            fd = theirs.fileno()
            arguments = ["--fd", str(fd)]
            try:
                self.pid = self._reaper.start(
                    self._module,
                    arguments,
                    self._ended,
                    environment=self._environment,
                    pass_fds=[fd],
                )
            except OSError:
                link.close()
                raise
        self._started_s = self._loop.time()
        self._link = link
        self._on_start()

    def _start_again(self) -> None:
        if self._closed:
            return
        try:
            self.start()
        except OSError as error:  # what else lives here is worth more than this process
            if not self._refused:
                self._on_refused(error.strerror or str(error))
            self._refused = True
            self._loop.call_later(_REFUSED_PAUSE_S, self._start_again)
        else:
            self._refused = False

    def post(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send without waiting; lost when no process runs."""
        if self._link is not None:
            self._link.post(message, fds)

    def kill(self) -> None:
        """SIGKILL the process; another one follows."""
        self._reaper.kill(self.pid)

    def close(self) -> None:
        """Start it no more; the process ends when it notices that nobody listens."""
        self._closed = True
        self._unlink()

    def _unlink(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _hung_up(self, reason: str) -> None:
        self._link = None  # nobody can talk to it any more, but it may end by itself, and say how
        self._loop.call_later(_LAST_S, self._reaper.kill, self.pid)

    def _ended(self, status: int) -> None:
        self.pid = 0  # before its last words: nobody answers them
        if self._link is not None:
            self._link.drain()  # descriptors of slots that it just made, say
        self._unlink()
        if self._closed:
            return
        crash_loop = self._loop.time() - self._started_s < _HEALTHY_S
        self._loop.call_later(self._pause_s, self._start_again)
        self._pause_s = max(_PAUSE_S_MIN, min(2 * self._pause_s, _PAUSE_S_MAX)) * crash_loop
        self._on_down(describe_exit(status))
