"""How the chunks to one peer are divided among the paths to it: interfaces, ports, connections.

C4P (C4, HPCA 2025) moves load between paths when their messages take different times.  Here each
path's share is proportional to its measured rate, so that all paths finish at the same time.

* The rate is bytes over the seconds in which the path was busy with them, so it doesn't depend on
  the share.  The results of one tick are one sample, which counts for ``newest_part``; one that
  differs by more than a factor of two is a change rather than noise, and counts alone.
* What is on its way bounds the rate from above: a chunk that has taken a second so far is no faster
  than its size per second.  So a path that becomes slow loses its share without having to finish.
* A path on which nothing has moved for ``stall_ticks`` though something is to, while another path
  could take it, is *out*: its share is 0, and its chunks have to be sent again by other paths.  So
  is one that has been slower than ``slow_part`` of the fastest for as long: what it adds is not
  worth waiting for its last chunk.  A path is bad only beside another one: if nothing moves on any,
  it is the peer that stands still, which is for others to judge.
* A path that is out is tried again after a back-off: a small share until one chunk is on its way,
  and when that has arrived, the share that its rate deserves.  The back-off doubles until a path
  has worked for several times as long as it was out.
* Where an idle path might have taken a chunk, but nothing arrived on any path meanwhile, a path may
  be out though it was the peer that stood still.  It is tried as soon as something arrives again.

Nothing here is random, and time comes as ticks.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from ftrain.comms.errors import ConfigError, LocalProtocolError
from ftrain.comms.traffic.protocol.spread import Spread

_BACK_OFF_DOUBLINGS_MAX = 6
_CHANGE = 2.0
_TRUST = 8  # times as long as it was out


@dataclass(frozen=True, slots=True)
class SharesConfig:
    """When a path is bad, and how it comes back.

    Args:
        tick_s: seconds of one tick.
        stall_ticks: without progress, or slow, until a path is out; at the defaults half a second.
        slow_part: of the fastest path's rate; a path that is slower is out.
        newest_part: what the newest sample counts for in a path's rate.
        back_off_ticks: until a path that is out is tried again; doubled each time it fails, up to
            64 times that.
        trial_part: share of a path that is tried, as a part of an equal share.

    Raises ConfigError for values that make no sense.
    """

    tick_s: float = 0.05
    stall_ticks: int = 10
    slow_part: float = 0.05
    newest_part: float = 0.5
    back_off_ticks: int = 20
    trial_part: float = 0.25

    def __post_init__(self) -> None:
        if self.tick_s <= 0 or self.stall_ticks < 2 or self.back_off_ticks < 1:
            raise ConfigError(
                "shares: tick_s is positive, stall_ticks 2, back_off_ticks 1 at least"
            )
        if not (0 <= self.slow_part < 1 and 0 < self.newest_part <= 1 and 0 < self.trial_part < 1):
            raise ConfigError("shares: slow_part, newest_part and trial_part are between 0 and 1")


class State(Enum):
    """What a path is used for."""

    OPEN = "open"  # its rate is known, and it has the share that this deserves
    TRIAL = "trial"  # nothing is known of how it is now
    OUT = "out"  # not used


@dataclass(frozen=True, slots=True)
class Sending:
    """A chunk on its way."""

    number: int
    path: int
    size_bytes: int


@dataclass(slots=True)
class _Path:
    state: State = State.TRIAL
    rate: float = 0.0  # bytes/s
    sending: deque[Sending] = field(default_factory=deque)  # in the order in which they were sent
    good_tick: int = 0  # when it was last not slow beside the others
    moved_tick: int = 0  # when something last arrived, or began on an idle path
    tick_bytes: int = 0  # that arrived in this tick
    tick_s: float = 0.0  # in which it was busy with them
    retry_tick: int = 0
    out_tick: int = 0
    failures: int = 0  # since it was last trusted


class Shares:
    """Divides chunks among the paths to one peer, at the side that sends them."""

    def __init__(self, paths: int, config: SharesConfig | None = None) -> None:
        if paths < 1:
            raise LocalProtocolError("a peer is reached by one path or more, not by none")
        self.config = config or SharesConfig()
        self.now = 0
        self._paths = [_Path() for _ in range(paths)]
        self._spread = Spread(paths)
        self._sent: dict[int, Sending] = {}
        self._count = 0
        self._arrived_tick = 0  # the last one in which anything has
        self.shares: tuple[float, ...] = self._weigh()

    @property
    def states(self) -> tuple[State, ...]:
        """Of each path."""
        return tuple(path.state for path in self._paths)

    @property
    def rates(self) -> tuple[float, ...]:
        """Of each path, in bytes/s as far as that is known; 0 before anything has arrived."""
        return tuple(self._rate(path) for path in self._paths)

    def send(self, size_bytes: int) -> Sending:
        """The next chunk: by which path, and under which number to tell that it has arrived."""
        sending = Sending(self._count, self._spread.next(self.shares), size_bytes)
        self._count += 1
        path = self._paths[sending.path]
        if not path.sending:
            path.moved_tick = self.now
        path.sending.append(sending)
        self._sent[sending.number] = sending
        if path.state is State.TRIAL:
            self.shares = self._weigh()  # one chunk is enough to try it
        return sending

    def arrived(self, number: int, busy_s: float) -> None:
        """A chunk has arrived.

        ``busy_s``: seconds since it was sent or, if that was later, since the one before it on the
        same path arrived.  What was given back by :meth:`tick` or :meth:`lost` is not heeded.
        """
        sending = self._sent.pop(number, None)
        if sending is None:
            return
        path = self._paths[sending.path]
        path.sending.remove(sending)
        path.moved_tick = self.now
        path.tick_bytes += sending.size_bytes
        path.tick_s += max(busy_s, 1e-9)

    def lost(self, number: int) -> tuple[Sending, ...]:
        """Path ``number`` has failed, as its connection says; what has to be sent again."""
        again = self._take_out(self._paths[number])
        self.shares = self._weigh()
        return again

    def tick(self) -> tuple[Sending, ...]:
        """One unit of time has passed; what has to be sent again, because its path is out now.

        It may arrive by the old path all the same: whoever receives has to know it by its place.
        """
        self.now += 1
        self._acquit()
        for path in self._paths:
            self._fold_in(path)
        self._judge_speeds()
        again: list[Sending] = []
        for path in self._paths:
            if self._is_bad(path):
                again += self._take_out(path)
        for path in self._paths:
            if path.state is State.OUT and self.now >= path.retry_tick:
                path.state = State.TRIAL
        self.shares = self._weigh()
        return tuple(again)

    def _acquit(self) -> None:
        """When something arrives after a silence, nobody was to blame for it."""
        if not any(path.tick_bytes for path in self._paths):
            return
        silence_began, self._arrived_tick = self._arrived_tick, self.now
        if self.now - silence_began < self.config.stall_ticks:
            return
        for path in self._paths:
            if path.out_tick > silence_began:
                path.retry_tick = min(path.retry_tick, self.now)
                path.failures = 0

    def _fold_in(self, path: _Path) -> None:
        """What arrived since the last tick is a sample of the path's rate."""
        if path.tick_bytes:
            sample = path.tick_bytes / path.tick_s
            noise = path.rate / _CHANGE < sample < path.rate * _CHANGE
            if path.state is State.OPEN and noise:
                path.rate += self.config.newest_part * (sample - path.rate)
            else:
                path.rate = sample
            if path.state is not State.OPEN:
                path.state, path.good_tick = State.OPEN, self.now
        path.tick_bytes, path.tick_s = 0, 0.0

    def _judge_speeds(self) -> None:
        enough = self.config.slow_part * self._fastest()
        for path in self._paths:
            if path.state is State.OPEN and path.rate >= enough:
                path.good_tick = self.now
                worked = self.now - path.retry_tick
                if path.failures and worked >= _TRUST * self._back_off(path.failures):
                    path.failures = 0

    def _rate(self, path: _Path) -> float:
        """Measured, and no more than what has not arrived yet allows."""
        waited = self.now - path.moved_tick - 1  # whole ticks at least
        if not path.sending or waited < 1:
            return path.rate
        return min(path.rate, path.sending[0].size_bytes / (waited * self.config.tick_s))

    def _fastest(self) -> float:
        return max((path.rate for path in self._paths if path.state is State.OPEN), default=0.0)

    def _is_stalled(self, path: _Path) -> bool:
        return bool(path.sending) and self.now - path.moved_tick >= self.config.stall_ticks

    def _is_bad(self, path: _Path) -> bool:
        if self._is_stalled(path):
            return any(
                other is not path and other.state is not State.OUT and not self._is_stalled(other)
                for other in self._paths
            )
        slow_ticks = self.now - path.good_tick
        return path.state is State.OPEN and slow_ticks >= self.config.stall_ticks

    def _back_off(self, failures: int) -> int:
        """Ticks until a path is tried again that has failed so often."""
        return self.config.back_off_ticks << min(failures - 1, _BACK_OFF_DOUBLINGS_MAX)

    def _take_out(self, path: _Path) -> tuple[Sending, ...]:
        again = tuple(path.sending)
        path.sending.clear()
        for sending in again:
            del self._sent[sending.number]
        path.state = State.OUT
        path.out_tick = self.now
        path.failures += 1
        path.retry_tick = self.now + self._back_off(path.failures)
        path.tick_bytes, path.tick_s = 0, 0.0
        return again

    def _weigh(self) -> tuple[float, ...]:
        """Each path's share; together 1."""
        paths = self._paths
        weights = [self._rate(path) if path.state is State.OPEN else 0.0 for path in paths]
        total = sum(weights)
        if not total:  # none is known to work: all alike, those that are out only if all are
            usable = [path.state is not State.OUT for path in paths]
            return _normal([float(use or not any(usable)) for use in usable])
        waiting = [path.state is State.TRIAL and not path.sending for path in paths]
        trial = self.config.trial_part / len(paths)
        rest = 1 - trial * sum(waiting)
        return _normal(
            [trial if wait else rest * w / total for wait, w in zip(waiting, weights, strict=True)]
        )


def _normal(weights: list[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
