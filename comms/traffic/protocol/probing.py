"""Which link is probed when, so that the order of a ring rests on measured rates.

A probe is a short transfer from one member to another, limited in bytes and time.  Rules:

* No member takes part in two probes at once: they would measure each other.
* All probes that touch any ``window_ticks`` ticks in a row carry at most ``window_bytes`` together,
  over the whole fleet.
* Links that nobody knows come first, those of the present ring before others; then whichever link
  is due longest.  A link of the ring is due again sooner than others, and as the order is by when
  they were due, neither kind can keep the other from its turn.
* A link's rate is the median of its last results, of an even number the higher middle: what
  disturbs a probe makes it slower.  Several failures in a row make it 0: broken.
* A link is forgotten with the incarnation of either member.

As long as the budget allows every pair of idle members a probe, all links of n members have been
tried after 4n - 6 rounds of probes: what keeps a link waiting for a round is another untried link
of one of its members, and there are 4n - 7 of those (2n - 2 rounds are needed in any case).  Where
the budget allows c probes a round, it takes at most n (n - 1) / c rounds more.

One entry is kept for each ordered pair, so a large fleet is probed between hosts, by one member of
each, not between all ranks.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median_high

from ftrain.comms.errors import ConfigError, RemoteProtocolError

_BACK_OFF_DOUBLINGS_MAX = 6


@dataclass(frozen=True, slots=True)
class ProbingConfig:
    """Limits of probing.

    Args:
        bytes_max: of one probe.
        probe_ticks: after so many a probe ends with what it has sent by then.
        answer_ticks: what its order and its result may take on top of that; then it has failed.
        window_ticks: any so many ticks in a row ...
        window_bytes: ... are touched only by probes that carry this much together.
        ring_ticks: after so many a link of the ring is probed again.
        other_ticks: the same for other links.
        results_kept: of one link, for the median.
        failures_max: so many in a row make a link broken.
        retry_ticks: after a failure, doubled with each further one in a row.

    Raises ConfigError for limits under which nothing could be probed.
    """

    bytes_max: int = 8 << 20
    probe_ticks: int = 20
    answer_ticks: int = 20
    window_ticks: int = 100
    window_bytes: int = 64 << 20
    ring_ticks: int = 600
    other_ticks: int = 6000
    results_kept: int = 3
    failures_max: int = 2
    retry_ticks: int = 100

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"probing: {name} is {getattr(self, name)}, and has to be 1 or more"
                )
        if self.window_bytes < self.bytes_max:
            raise ConfigError(
                f"probing: one probe of {self.bytes_max:,} bytes is more than the"
                f" {self.window_bytes:,} of a window: raise window_bytes or lower bytes_max"
            )


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One start of a member; ``incarnation`` grows with each."""

    number: int
    incarnation: int


Link = tuple[Member, Member]  # from, to


@dataclass(frozen=True, slots=True)
class Probe:
    """An order to send ``bytes_max`` bytes from ``source`` to ``target``, for ``ticks`` at most."""

    number: int
    source: Member
    target: Member
    bytes_max: int
    ticks: int


@dataclass(slots=True)
class _Known:
    """What is known of one link, and since when it waits."""

    place: int  # links with the same place have no member in common (but for both directions)
    results: deque[float]
    tried: bool = False
    failures: int = 0  # in a row
    last_tick: int = 0
    due_tick: int = 0
    entry: int = -1  # number of its valid entry in a queue; -1 while it is probed


@dataclass(slots=True)
class _Spent:
    """Bytes of a probe, for as long as some window touches it."""

    bytes_max: int
    until_tick: int


@dataclass(slots=True)
class Probing:
    """Decides for a whole fleet; ``tick`` gives the probes to begin.

    Answers come as :meth:`measured` and :meth:`failed`; those of probes that are over, or of
    members that are gone, are not heeded.
    """

    config: ProbingConfig = field(default_factory=ProbingConfig)
    now: int = 0
    _members: dict[int, Member] = field(default_factory=dict)
    _seats: dict[Member, int] = field(default_factory=dict)
    _links: dict[Link, _Known] = field(default_factory=dict)
    _ring: frozenset[Link] = frozenset()
    _waiting: list[tuple[int, int, Link]] = field(default_factory=list)  # due later
    _ready: list[tuple[int, int, int, int, Link]] = field(default_factory=list)
    _entries: int = 0
    _running: dict[int, tuple[Probe, int, _Spent]] = field(default_factory=dict)
    _spent: deque[_Spent] = field(default_factory=deque)
    _probes: int = 0
    _newest: dict[int, int] = field(default_factory=dict)  # incarnation by member's number

    def joined(self, member: Member) -> None:
        """A member has come; one with the same number and a lower incarnation is gone."""
        if member.incarnation <= self._newest.get(member.number, -1):
            return
        if old := self._members.get(member.number):
            self.left(old)
        self._newest[member.number] = member.incarnation
        taken = set(self._seats.values())
        seat = next(n for n in range(len(taken) + 1) if n not in taken)
        others = list(self._seats.items())
        self._members[member.number] = member
        self._seats[member] = seat
        for other, other_seat in others:
            for link, back in (((member, other), False), ((other, member), True)):
                place = 2 * (seat + other_seat) + ((seat < other_seat) ^ back)
                known = _Known(place, deque(maxlen=self.config.results_kept), due_tick=self.now)
                self._links[link] = known
                self._queue(link, known)

    def left(self, member: Member) -> None:
        """A member has gone, and with it all that was known of its links."""
        if self._members.get(member.number) != member:
            return
        del self._members[member.number]
        del self._seats[member]
        for other in self._seats:
            self._links.pop((member, other), None)
            self._links.pop((other, member), None)

    def ring(self, order: Sequence[Member]) -> None:
        """The ring has this order now; each sends to the next, the last one to the first."""
        new = frozenset(zip(order, (*order[1:], *order[:1]), strict=True))
        changed, self._ring = new ^ self._ring, new
        for link in sorted(changed & self._links.keys()):
            known = self._links[link]
            if known.entry >= 0:
                self._set_due(link, known)
                self._queue(link, known)

    def tick(self) -> tuple[Probe, ...]:
        """One unit of time has passed: the probes to begin now."""
        self.now += 1
        for number, (_, deadline, _) in list(self._running.items()):
            if self.now >= deadline:
                self.failed(number)
        self._spent = deque(spent for spent in self._spent if spent.until_tick > self.now)
        while self._waiting and self._waiting[0][0] <= self.now:
            _, entry, link = heapq.heappop(self._waiting)
            if (known := self._links.get(link)) and known.entry == entry:
                self._queue(link, known)
        return tuple(self._begin())

    def measured(self, number: int, sent_bytes: int, seconds: float) -> None:
        """A probe ended: so many bytes arrived in so many seconds.

        Raises RemoteProtocolError for numbers that can't be.
        """
        if number not in self._running:
            return
        probe, _, spent = self._running[number]
        if not 0 < sent_bytes <= probe.bytes_max or not 0 < seconds < math.inf:
            raise RemoteProtocolError(
                f"probe {number} claims {sent_bytes} bytes in {seconds} s, and was to send from 1"
                f" to {probe.bytes_max}: its members run another version, or something is broken"
            )
        spent.bytes_max = sent_bytes
        if known := self._over(number):
            if known.failures >= self.config.failures_max:
                known.results.clear()  # how fast it was before it broke says nothing
            known.failures = 0
            known.results.append(sent_bytes / seconds)
            self._retire(probe, known)

    def failed(self, number: int) -> None:
        """A probe could not be made, or nothing arrived."""
        if number not in self._running:
            return
        probe = self._running[number][0]
        if known := self._over(number):
            known.failures += 1
            self._retire(probe, known)

    def rates(self) -> dict[Link, float]:
        """Bytes/s of each link that is known; 0 where it is broken."""
        found = {link: self._estimate(known) for link, known in self._links.items()}
        return {link: rate for link, rate in found.items() if rate is not None}

    @property
    def untried(self) -> int:
        """Links of which no probe has ended."""
        return sum(not known.tried for known in self._links.values())

    def _estimate(self, known: _Known) -> float | None:
        if known.failures >= self.config.failures_max:
            return 0.0
        return median_high(known.results) if known.results else None

    def _begin(self) -> Iterator[Probe]:
        busy = {m for probe, _, _ in self._running.values() for m in (probe.source, probe.target)}
        kept = []
        idle = self._seats.keys() - busy
        while self._ready and self._affords() and len(idle) >= 2:
            ready = heapq.heappop(self._ready)
            *_, entry, link = ready
            known = self._links.get(link)
            if known is None or known.entry != entry:
                continue
            if not self._both_idle(link, idle):
                kept.append(ready)
                continue
            idle.difference_update(link)
            known.entry = -1
            yield self._start(link)
        for ready in kept:
            heapq.heappush(self._ready, ready)

    def _start(self, link: Link) -> Probe:
        config = self.config
        probe = Probe(self._probes, *link, config.bytes_max, config.probe_ticks)
        self._probes += 1
        deadline = self.now + config.probe_ticks + config.answer_ticks
        spent = _Spent(config.bytes_max, deadline + config.window_ticks)
        self._running[probe.number] = probe, deadline, spent
        self._spent.append(spent)
        return probe

    def _over(self, number: int) -> _Known | None:
        """A probe has ended; what is known of its link, unless that is forgotten."""
        probe, _, spent = self._running.pop(number)
        spent.until_tick = min(spent.until_tick, self.now + self.config.window_ticks)
        return self._links.get((probe.source, probe.target))

    def _retire(self, probe: Probe, known: _Known) -> None:
        """A link was probed: when it will be the next time."""
        link = probe.source, probe.target
        known.tried, known.last_tick = True, self.now
        self._set_due(link, known)
        self._queue(link, known)

    def _affords(self) -> bool:
        """Whether one more probe keeps within the budget of every window that it touches."""
        spent = sum(spent.bytes_max for spent in self._spent)
        return spent + self.config.bytes_max <= self.config.window_bytes

    def _both_idle(self, link: Link, idle: set[Member]) -> bool:
        return idle.issuperset(link)

    def _set_due(self, link: Link, known: _Known) -> None:
        if known.tried:
            known.due_tick = known.last_tick + self._interval_ticks(link, known)

    def _interval_ticks(self, link: Link, known: _Known) -> int:
        """How long what is known of a link is good for."""
        config = self.config
        normal = config.ring_ticks if link in self._ring else config.other_ticks
        if not known.failures:
            return normal
        doublings = min(known.failures - 1, _BACK_OFF_DOUBLINGS_MAX)
        return min(config.retry_ticks << doublings, max(normal, config.retry_ticks))

    def _queue(self, link: Link, known: _Known) -> None:
        """Put a link where it waits; entries that it had before are void."""
        self._entries += 1
        known.entry = self._entries
        if known.due_tick > self.now:
            heapq.heappush(self._waiting, (known.due_tick, known.entry, link))
        else:
            heapq.heappush(self._ready, (*self._turn(link, known), known.entry, link))

    def _turn(self, link: Link, known: _Known) -> tuple[int, int, int]:
        """What decides which link comes first: whichever has the least."""
        if not known.results and known.failures < self.config.failures_max:
            return 0, link not in self._ring, known.place
        return 1, known.due_tick, known.place
