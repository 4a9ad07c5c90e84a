"""An agent's worker server: kept running, asked to fork, and replaced when it answers no more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ftrain.comms.environment import inherited_environment
from ftrain.comms.job import JobSpec
from ftrain.comms.local import close_all
from ftrain.launch.contract import server_environment
from ftrain.launch.helper import HelperProcess
from ftrain.launch.patience import Patience
from ftrain.launch.reaper import Reaper
from ftrain.launch.worker_messages import (
    Forked,
    ForkFailed,
    ForkRequest,
    Preload,
    ScriptEdited,
    ServerReady,
    StoreRequest,
    StoreServed,
)

_ANSWER_LEASES = 4  # to fork takes milliseconds; of a large process, or on a slow disk, seconds
_UNWANTED_S = 1.0  # for an answer that nobody wants any more


class WorkerLink:
    """Keeps one worker server running, and has it fork the ranks of one request at a time.

    A server gets a request when it is ready.  Until then the request waits here, where it can be
    called off at once, and outlives a server that dies.

    Args:
        on_forked: a rank has a process.
        on_failed: no further rank of the request will have one, and why.
        on_change: a server was started, or is gone.
        on_down: a server ended, and how.
        on_ready: a server has imported everything; called before ranks are asked of it.
        on_store: the answer to a :class:`StoreRequest`.
        say: takes news, a kind and a sentence.
    """

    def __init__(
        self,
        job: JobSpec,
        threads: int,
        reaper: Reaper,
        *,
        on_forked: Callable[[Forked], None],
        on_failed: Callable[[str], None],
        on_change: Callable[[], None],
        on_down: Callable[[str], None],
        on_ready: Callable[[], None],
        on_store: Callable[[StoreServed], None],
        say: Callable[[str, str], None],
    ) -> None:
        self._preload = Preload(job.argv, job.module, job.config.launch.preload)
        self._answer_s_max = _ANSWER_LEASES * job.config.detection.node_lease_s
        self._on_forked = on_forked
        self._on_failed = on_failed
        self._on_change = on_change
        self._on_down = on_down
        self._on_ready = on_ready
        self._on_store = on_store
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._ready = False  # the server has imported everything
        self._request: ForkRequest | None = None  # not answered completely
        self._fds: Sequence[int] = ()  # of a request that still waits here
        self._asked = False  # it does not: the server has it
        self._left: set[int] = set()  # ranks of it without a process
        self._patience = Patience(self._fail, self.kill, say, "the ranks wait")
        self._late = ""  # why the server that has it was killed
        self._timer: asyncio.TimerHandle | None = None
        self._process = HelperProcess(
            "ftrain.launch.worker_server",
            server_environment(inherited_environment(), threads),
            reaper,
            on_start=self._started,
            on_message=self._received,
            on_down=self._went_down,
            on_refused=lambda why: say(
                "warning", f"the worker server can't be started ({why}): it is tried again"
            ),
        )

    @property
    def pid(self) -> int:
        """The server's process; 0 while there is none."""
        return self._process.pid

    @property
    def forking(self) -> bool:
        """Whether a request is not answered completely: ranks of it may still come."""
        return self._request is not None

    @property
    def ready(self) -> bool:
        """Whether there is a server that has imported everything."""
        return self._ready and self.pid != 0  # its last words may be that it is

    def post(self, request: StoreRequest) -> None:
        """Ask a server that is ready for a store."""
        self._process.post(request)

    def kill(self) -> None:
        """SIGKILL the server; another one follows."""
        self._process.kill()

    def start(self) -> None:
        """Start the server; raises OSError when that can't be."""
        self._process.start()

    def fork(self, request: ForkRequest, fds: Sequence[int]) -> None:
        """Have ranks forked; ``fds`` are the link's to close from now on."""
        self._request, self._fds, self._asked = request, fds, False
        self._left = {spec.rank for spec in request.ranks}
        self._late = ""
        self._patience.begin()
        self._ask()

    def call_off(self) -> None:
        """Ranks are not wanted any more.

        A request that waits is dropped; a server that has it gets a moment, then it is killed, so
        that no rank comes after that.
        """
        if self._asked:
            self._wait(_UNWANTED_S)
        else:
            self._over()

    def close(self) -> None:
        """Let go of the server, which ends by itself."""
        self._process.close()
        self._over()

    def _started(self) -> None:
        self._process.post(self._preload)
        self._on_change()

    def _ask(self) -> None:
        if self._request is None or self._asked or not self.ready:
            return
        self._patience.end()
        self._process.post(self._request, self._fds)
        close_all(self._fds)
        self._fds, self._asked = (), True
        self._wait(self._answer_s_max)

    def _received(self, message: Any, fds: list[int]) -> None:
        close_all(fds)
        if isinstance(message, Forked):
            if self._request is not None and message.epoch == self._request.epoch:
                self._left.discard(message.rank)
                if not self._left:
                    self._over()
            self._on_forked(message)
        elif isinstance(message, ForkFailed):
            asked = self._request.epoch if self._request is not None and self._asked else -1
            if message.epoch in (0, asked) and asked >= 0:  # 0: it died before it knew
                self._fail(message.cause)
        elif isinstance(message, StoreServed):
            self._on_store(message)
        elif isinstance(message, ScriptEdited):
            self._say("warning", f"{message.path} was edited: the ranks run the new text")
        elif isinstance(message, ServerReady):
            for problem in message.problems:
                self._say("warning", problem)
            self._ready = True
            self._on_ready()
            self._ask()

    def _went_down(self, how: str) -> None:
        self._ready = False
        self._say("info", f"the worker server ended ({how}); ranks are not hit")
        self._on_change()
        self._on_down(how)
        if self._asked:
            self._fail(self._late or f"the worker server ended: {how}")
        else:
            self._patience.server_ended(how)

    def _replace(self, waited_s: float) -> None:
        """It is stopped, or caught in something; ranks may come until it is gone."""
        self._late = f"the worker server did not answer for {waited_s:g} s"
        self._say("warning", f"{self._late}: it is being replaced")
        self._process.kill()

    def _fail(self, cause: str) -> None:
        self._over()
        self._on_failed(cause)

    def _over(self) -> None:
        """Nobody waits for an answer."""
        self._patience.end()
        if self._timer is not None:
            self._timer.cancel()
        close_all(self._fds)
        self._request, self._fds, self._asked = None, (), False

    def _wait(self, limit_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(limit_s, self._replace, limit_s)
