"""What is waited for, and what is done when it does not come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waits:
    """Deadlines by what is waited for; one that is begun again counts from then on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, what: str) -> bool:
        return what in self._timers

    def begin(self, what: str, limit_s: float, otherwise: Callable[[], None]) -> None:
        """Wait for ``what``; after ``limit_s`` call ``otherwise``, which is to end it."""
        self.end(what)
        self._timers[what] = self._loop.call_later(limit_s, otherwise)

    def end(self, what: str) -> None:
        """It came, or is waited for no more."""
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()
