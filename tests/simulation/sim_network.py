"""A network that delays, reorders, cuts, doubles, and replays up to 60 ticks late."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Hashable

REPLAY_TICKS_MAX = 60
_LATE_TICKS = 15


class Network:
    """Messages in flight between addresses; time is the caller's tick."""

    def __init__(self, rng: random.Random, delay_ticks_max: int, delivered: Counter[str]) -> None:
        self._rng = rng
        self._delay_ticks_max = delay_ticks_max
        self._delivered = delivered  # faults by kind
        self._queue: list[tuple[int, int, Hashable, Hashable, object]] = []
        self._count = 0
        self._cuts: list[tuple[frozenset[Hashable], int]] = []
        self._replay_until = 0
        self._delay_until = 0
        self._late: dict[Hashable, int] = {}

    def cut(self, a: Hashable, b: Hashable, until: int) -> None:
        """Nothing goes between ``a`` and ``b`` before tick ``until``."""
        self._cuts.append((frozenset((a, b)), until))

    def replay(self, until: int) -> None:
        """Each message sent before tick ``until`` may come a second time, late."""
        self._replay_until = until

    def delay(self, until: int) -> None:
        """Messages sent before tick ``until`` take much longer."""
        self._delay_until = until

    def late(self, target: Hashable, until: int) -> None:
        """Whatever is sent to ``target`` before tick ``until`` comes late."""
        self._late[target] = until

    def heal(self) -> None:
        """From now on messages arrive; what is in flight, replays too, still comes."""
        self._cuts.clear()
        self._late.clear()
        self._replay_until = self._delay_until = 0

    def send(self, now: int, source: Hashable, target: Hashable, message: object) -> None:
        """Put a message on its way."""
        if any(now < until and pair == {source, target} for pair, until in self._cuts):
            self._delivered["lost message"] += 1
            return
        delay = self._rng.randint(0, self._delay_ticks_max)
        if now < self._delay_until:
            delay += self._rng.randint(0, 15)
            self._delivered["delayed message"] += 1
        if now < self._late.get(target, 0):
            delay += _LATE_TICKS
            self._delivered["delayed message"] += 1
        self._push(now + delay, source, target, message)
        if now < self._replay_until and self._rng.random() < 0.5:
            late = self._rng.randint(1, REPLAY_TICKS_MAX)
            self._push(now + delay + late, source, target, message)
            self._delivered["replayed message"] += 1

    def _push(self, due: int, source: Hashable, target: Hashable, message: object) -> None:
        self._count += 1
        heapq.heappush(self._queue, (due, self._count, source, target, message))

    def deliver(self, now: int, to: Callable[[Hashable, object], None]) -> None:
        """Hand over everything that is due; a cut loses what is in flight, too."""
        while self._queue and self._queue[0][0] <= now:
            _, _, source, target, message = heapq.heappop(self._queue)
            if any(now < until and pair == {source, target} for pair, until in self._cuts):
                self._delivered["lost message"] += 1
                continue
            to(target, message)
