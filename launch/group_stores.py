"""Who asks for a formation's store, the coordinator, and who has it opened, a node's agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from ftrain.comms.process import describe_exit
from ftrain.comms.protocol.messages import OpenStore, StoreOpened
from ftrain.launch.patience import Patience
from ftrain.launch.reaper import Reaper
from ftrain.launch.worker_link import WorkerLink
from ftrain.launch.worker_messages import StoreRequest, StoreServed

_ASK_AGAIN_S = 1.0  # the order or its answer may have been lost with a connection
_ANSWER_S_MAX = 3.0  # a fork takes milliseconds
# A store that is taken for a stray, before it is known, is asked for again.  So often it is not:
# the server hangs.
_TRIES = 5
_AHEAD_S = 1.0  # after a formation: by then its ranks are forked


class StoreOrders:
    """The coordinator's side.

    Args:
        send: gives a message to a node's agent, if it is connected.
    """

    def __init__(self, send: Callable[[int, object], None]) -> None:
        self._send = send
        self._epoch = 0
        self._answer: asyncio.Future[StoreOpened] | None = None

    async def opened(self, node: int, epoch: int) -> int:
        """The port of the store that ``node`` opened for ``epoch``; RuntimeError when it can't."""
        self._epoch, self._answer = epoch, asyncio.get_running_loop().create_future()
        while not self._answer.done():
            self._send(node, OpenStore(epoch))
            await asyncio.wait([self._answer], timeout=_ASK_AGAIN_S)
        answer = self._answer.result()
        if answer.problem:
            raise RuntimeError(answer.problem)
        return answer.port

    def hear(self, message: StoreOpened) -> None:
        """A node's answer, perhaps to what was asked before, or again."""
        answer = self._answer
        if answer is not None and not answer.done() and message.epoch == self._epoch:
            answer.set_result(message)


class GroupStores:
    """An agent's side: the store of the formation, and the next one, opened ahead of time because
    forming must not wait for it.

    Args:
        server: forks the stores' processes.
        bind: host that stores listen on.
        opened: told of the store that was ordered, or why there is none.
        lost: the store that was told is gone, and how it ended.
        say: takes news, a kind and a sentence.
    """

    def __init__(
        self,
        server: WorkerLink,
        reaper: Reaper,
        bind: str,
        opened: Callable[[StoreOpened], None],
        lost: Callable[[str], None],
        say: Callable[[str, str], None],
    ) -> None:
        self._server = server
        self._reaper = reaper
        self._bind = bind
        self._opened = opened
        self._lost = lost
        self._say = say
        self._wanted = 0  # epoch that waits for its store
        self._patience = Patience(self._give_up, server.kill, say, "the group waits")
        self._told: StoreOpened | None = None
        self._present = 0  # process of the store that was told
        self._ahead: StoreServed | None = None
        self._late: asyncio.TimerHandle | None = None  # asked: when the server should have answered
        self._tries = 0
        self._loop = asyncio.get_running_loop()

    def order(self, message: OpenStore) -> None:
        """The coordinator wants a store, for a formation that begins when no rank is alive."""
        if self._told is not None and self._told.epoch == message.epoch:
            self._opened(self._told)  # it did not hear
            return
        if self._wanted != message.epoch:
            self._wanted = message.epoch
            self._patience.begin()
        self._go_on()

    def served(self, message: StoreServed) -> None:
        """The server's answer."""
        self._hear()
        if message.problem:
            self._give_up(message.problem)
            return
        self._reaper.watch(message.pid, partial(self._ended, message.pid))
        if self._ahead is not None:  # asked for twice
            self._reaper.kill(self._ahead.pid)
        self._ahead = message
        self._loop.call_soon(self._go_on)  # behind the news that it ended, if it did already

    def server_ready(self) -> None:
        """There is a worker server, which knows of nothing that was asked of another one."""
        self._hear()
        self._go_on()

    def server_down(self, how: str) -> None:
        """It ended; another one follows."""
        self._patience.server_ended(how)

    def close(self) -> None:
        """Nobody wants a store any more."""
        self._patience.end()
        self._hear()

    def _give_up(self, why: str) -> None:
        self._patience.end()
        if self._wanted:
            self._opened(StoreOpened(self._wanted, 0, why))
        self._wanted = 0

    def _go_on(self) -> None:
        if self._wanted and self._ahead is not None:
            gone, self._present = self._present, self._ahead.pid
            self._reaper.kill(gone)  # that of ranks which are gone
            self._told = StoreOpened(self._wanted, self._ahead.port)
            self._wanted, self._ahead = 0, None
            self._patience.end()
            self._opened(self._told)
            self._loop.call_later(_AHEAD_S, self._ask)
        elif self._wanted:
            self._ask()

    def _ask(self) -> None:
        if self._ahead is None and self._late is None and self._server.ready:
            self._late = self._loop.call_later(_ANSWER_S_MAX, self._ask_again)
            self._server.post(StoreRequest(self._bind))

    def _ask_again(self) -> None:
        self._late, self._tries = None, self._tries + 1
        if self._tries < _TRIES:
            self._ask()
        else:
            self._say("warning", "the worker server opens no store: it is being replaced")
            self._server.kill()

    def _hear(self) -> None:
        self._tries = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _ended(self, pid: int, status: int) -> None:
        if self._ahead is not None and self._ahead.pid == pid:
            self._ahead = None
            self._loop.call_later(_AHEAD_S, self._ask)
        elif pid == self._present:
            self._present, self._told = 0, None
            self._lost(describe_exit(status))
