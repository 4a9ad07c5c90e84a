"""How long something waits for a worker server: not for ever for one that is never ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_SLOW_S = 20.0  # when to say that it waits
_READY_S_MAX = 300.0  # ... and when to give up: torch may come from a cold network file system
_ENDS_MAX = 3  # of servers meanwhile: the next one would end in the same way


class Patience:
    """One that waits, now and then.

    Args:
        give_up: told why; the wait is over then.
        kill: ends the server, which is caught in something.
        say: takes news, a kind and a sentence.
        who: begins the news: "the ranks wait".
    """

    def __init__(
        self,
        give_up: Callable[[str], None],
        kill: Callable[[], None],
        say: Callable[[str, str], None],
        who: str,
    ) -> None:
        self._give_up = give_up
        self._kill = kill
        self._say = say
        self._who = who
        self._ends = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def begin(self) -> None:
        """Something waits from now on."""
        self.end()
        self._ends = 0
        self._timer = self._loop.call_later(_SLOW_S, self._slow)

    def end(self) -> None:
        """Nothing waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def server_ended(self, how: str) -> None:
        """A server ended, perhaps while something waits."""
        self._ends += 1
        if self._timer is not None and self._ends >= _ENDS_MAX:
            self.end()
            self._give_up(f"the worker server ended: {how}")

    def _slow(self) -> None:
        self._say("info", f"{self._who} for the worker server, which is not ready yet")
        self._timer = self._loop.call_later(_READY_S_MAX - _SLOW_S, self._late)

    def _late(self) -> None:
        self._timer = None
        why = f"the worker server was not ready in {_READY_S_MAX:g} s"
        self._say("warning", f"{why}: it is being replaced")
        self._kill()
        self._give_up(why)
