"""Probing of simulated fleets: what members do is recorded outside the machine, and checked."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from ftrain.comms.errors import ConfigError, RemoteProtocolError
from ftrain.comms.traffic.protocol.probing import (
    Link,
    Member,
    Probe,
    Probing,
    ProbingConfig,
    _Known,
)

SMALL = ProbingConfig(
    bytes_max=1000,
    probe_ticks=4,
    answer_ticks=3,
    window_ticks=20,
    window_bytes=6000,
    ring_ticks=40,
    other_ticks=200,
    retry_ticks=10,
)
PLENTY = ProbingConfig(bytes_max=1000, probe_ticks=1, answer_ticks=2, window_bytes=10**9)


@dataclass
class Running:
    """A probe as its members see it."""

    probe: Probe
    ends: int  # tick at which its members are free again
    answer: int  # tick at which its result comes; later than its members' end if it is slow
    fails: bool


@dataclass
class Fleet:
    """Members, the true rates of their links, and everything that a machine had them do."""

    probing: Probing
    rng: random.Random
    faults: float = 0.0  # share of probes that fail, are disturbed, or whose answer is lost
    members: dict[int, Member] = field(default_factory=dict)
    truth: dict[Link, float] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    begun: list[tuple[int, Probe]] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)  # first, last tick, bytes
    order: list[Member] = field(default_factory=list)

    def join(self, number: int) -> None:
        old = self.members.get(number, Member(number, 0))
        member = Member(number, old.incarnation + 1)
        self.members[number] = member
        for other in self.members.values():
            if other.number != number:
                self.truth[member, other] = self.rng.uniform(1e2, 1e4)
                self.truth[other, member] = self.rng.uniform(1e2, 1e4)
        self.probing.joined(member)
        if self.rng.random() < 0.5:
            self.probing.joined(old)  # late news

    def leave(self, number: int) -> None:
        if member := self.members.pop(number, None):
            self.probing.left(member)

    def ring(self) -> None:
        self.order = self.rng.sample(sorted(self.members.values()), len(self.members))
        self.probing.ring(self.order)

    def begin(self, probe: Probe, now: int) -> None:
        present = set(self.members.values())
        assert {probe.source, probe.target} <= present, f"{probe} of a member that is gone"
        taking_part = [m for r in self.running for m in (r.probe.source, r.probe.target)]
        assert not {probe.source, probe.target} & set(taking_part), f"{probe}: two at once"
        ticks = min(probe.ticks, 1 + int(probe.bytes_max / self.truth[probe.source, probe.target]))
        late = self.rng.random() < self.faults / 3
        answer = now + ticks + (1000 if late else 0)
        fails = self.rng.random() < self.faults / 3
        self.running.append(Running(probe, now + ticks, answer, fails))
        self.spans.append((now, now + ticks, probe.bytes_max))
        self.begun.append((now, probe))

    def step(self) -> None:
        now = self.probing.now + 1
        for run in [run for run in self.running if run.ends <= now]:
            self.running.remove(run)
            number = run.probe.number
            rate = self.truth[run.probe.source, run.probe.target]
            if self.rng.random() < self.faults / 3:
                rate /= 10  # something else used the link
            if run.fails:
                self.probing.failed(number)
            elif run.answer <= now:
                self.probing.measured(number, run.probe.bytes_max, run.probe.bytes_max / rate)
        for probe in self.probing.tick():
            self.begin(probe, now)

    def run(self, ticks: int) -> Fleet:
        for _ in range(ticks):
            self.step()
        return self

    def check_budget(self) -> None:
        config = self.probing.config
        for start in range(self.probing.now):
            stop = start + config.window_ticks
            total = sum(size for first, last, size in self.spans if first < stop and last > start)
            assert total <= config.window_bytes, f"{total} bytes from tick {start} on"

    def check_forgotten(self) -> None:
        present = set(self.members.values())
        known = {member for link in self.probing.rates() for member in link}
        assert known <= present, f"known of who is gone: {known - present}"


def churn(machine: type[Probing], seed: int) -> Fleet:
    """Members come, go and come back; the ring changes; probes fail and answers are lost."""
    fleet = Fleet(machine(SMALL), random.Random(seed), faults=0.3)
    for _ in range(600):
        draw, number = fleet.rng.random(), fleet.rng.randrange(8)
        if draw < 0.03:
            fleet.join(number)
        elif draw < 0.05:
            fleet.leave(number)
        elif draw < 0.07:
            fleet.ring()
        fleet.step()
        fleet.check_forgotten()
    fleet.check_budget()
    return fleet


def all_known(machine: type[Probing], count: int) -> int:
    """Rounds until all links of a new fleet are known, with room for all probes."""
    fleet = Fleet(machine(PLENTY), random.Random(count))
    for number in range(count):
        fleet.join(number)
    fleet.truth = dict.fromkeys(fleet.truth, 1e4)
    rounds = 0
    while len(fleet.probing.rates()) < count * (count - 1):
        rounds += 1
        assert rounds <= 4 * count - 6 + 1, f"{fleet.probing.untried} of {count} members' unknown"
        fleet.step()
    assert len(fleet.begun) == count * (count - 1), "a link was probed twice before others once"
    return rounds - 1  # the last round's results came with the next tick


def estimates(machine: type[Probing]) -> None:
    """One wrong result moves nothing, a lasting change does; broken is 0 till it works."""
    probing = machine(PLENTY)
    a, b = Member(0, 1), Member(1, 1)
    probing.joined(a)
    probing.joined(b)
    results = iter([100, 110, 20, 105, 300, 310, 0, 305, 0, 0, 0, 70, 0, 80])
    expected = iter([100, 110, 100, 105, 105, 300, 300, 305, 305, 0, 0, 70, 70, 80])
    for _ in range(20 * PLENTY.other_ticks):
        for probe in probing.tick():
            if (probe.source, probe.target) != (a, b):
                probing.failed(probe.number)
            elif result := next(results, None):
                probing.measured(probe.number, 1000, 1000 / result)
            elif result == 0:
                probing.failed(probe.number)
            if (probe.source, probe.target) == (a, b) and result is not None:
                assert probing.rates()[a, b] == pytest.approx(next(expected))
    assert next(results, None) is None


def frequencies(machine: type[Probing]) -> None:
    """Links of the ring are probed more often than others, and no link is forgotten."""
    fleet = Fleet(machine(SMALL), random.Random(3))
    for number in range(6):
        fleet.join(number)
    fleet.run(250)
    assert not fleet.probing.untried
    fleet.ring()
    links = set(zip(fleet.order, (*fleet.order[1:], fleet.order[0]), strict=True))
    fleet.begun.clear()
    fleet.run(2000)
    times = Counter((probe.source, probe.target) for _, probe in fleet.begun)
    ring = [times[link] for link in links]
    other = [times[link] for link in fleet.truth if link not in links]
    assert min(ring) >= 2 * max(other), (ring, other)
    assert min(other) >= 2000 // SMALL.other_ticks - 3


def unknown_first(machine: type[Probing]) -> None:
    """A new member's links are probed before those that are merely due again."""
    fleet = Fleet(machine(SMALL), random.Random(4))
    for number in range(5):
        fleet.join(number)
    fleet.run(300)
    fleet.ring()
    fleet.run(SMALL.ring_ticks)
    fleet.begun.clear()
    fleet.join(7)
    new = fleet.members[7]
    fleet.run(100)
    at = [n for n, (_, probe) in enumerate(fleet.begun) if new in (probe.source, probe.target)]
    assert len(at) >= 10
    assert at[:10] == [n for n in at[:10] if n <= 10 + 6], at  # others only while it is busy


def back_off(machine: type[Probing]) -> None:
    """A link that always fails is tried less and less, yet goes on being tried."""
    probing = machine(SMALL)
    probing.joined(Member(0, 1))
    probing.joined(Member(1, 1))
    at = []
    for _ in range(2000):
        for probe in probing.tick():
            at.append(probing.now)
            probing.failed(probe.number)
    assert 12 <= len(at) <= 40, at


def ring_first(machine: type[Probing]) -> None:
    """Of what nobody knows, the ring's links are probed first."""
    fleet = Fleet(machine(PLENTY), random.Random(5))
    for number in range(6):
        fleet.join(number)
    fleet.ring()
    links = set(zip(fleet.order, (*fleet.order[1:], fleet.order[0]), strict=True))
    fleet.truth = dict.fromkeys(fleet.truth, 1e4)
    fleet.run(4)
    assert links <= {(probe.source, probe.target) for _, probe in fleet.begun[:12]}


def answers_lost(machine: type[Probing]) -> None:
    """A probe whose answer never comes is over in time; one that comes after that is not heeded."""
    probing = machine(SMALL)
    probing.joined(Member(0, 1))
    probing.joined(Member(1, 1))
    probes = [probe for _ in range(100) for probe in probing.tick()]
    assert len(probes) >= 4
    for probe in probes[:-1]:
        probing.measured(probe.number, 1000, 1.0)
    assert set(probing.rates().values()) <= {0.0}


def many_churns(machine: type[Probing]) -> None:
    for seed in range(15):
        churn(machine, seed)


def rounds(machine: type[Probing]) -> dict[int, int]:
    return {count: all_known(machine, count) for count in (2, 3, 4, 5, 8, 16, 32)}


CHECKS = (
    many_churns,
    rounds,
    estimates,
    frequencies,
    unknown_first,
    back_off,
    ring_first,
    answers_lost,
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_rules_are_kept(check: Callable[[type[Probing]], object]) -> None:
    check(Probing)


def test_schedules_are_not_polite() -> None:
    begun, gone = 0, 0
    for seed in range(15):
        fleet = churn(Probing, seed)
        begun += len(fleet.begun)
        gone += sum(probe.source not in fleet.members.values() for _, probe in fleet.begun)
    print(f"{begun} probes, {gone} from members that went later")
    assert begun > 1000
    assert gone > 300


def test_rounds_until_all_links_are_known() -> None:
    found = rounds(Probing)
    print(found)
    for count, needed in found.items():
        assert needed <= 4 * count - 6, count
        assert needed >= 2 * (count - 1)  # no schedule needs fewer


def test_a_small_budget_takes_longer_and_ends() -> None:
    """Six probes a window: all of 10 members' links within the rounds that are stated."""
    fleet = Fleet(Probing(SMALL), random.Random(6))
    for number in range(10):
        fleet.join(number)
    fleet.truth = dict.fromkeys(fleet.truth, 1e4)
    round_ticks = SMALL.window_ticks + SMALL.probe_ticks
    fleet.run(round_ticks * (90 // 6 + 4 * 10 - 6))
    assert not fleet.probing.untried
    fleet.check_budget()


class WithoutBudget(Probing):
    def _affords(self) -> bool:
        return True


class BudgetOfWhatRuns(Probing):
    def _affords(self) -> bool:
        running = sum(spent.bytes_max for _, _, spent in self._running.values())
        return running + self.config.bytes_max <= self.config.window_bytes


class WindowFromTheBeginning(Probing):
    def _start(self, link: Link) -> Probe:
        probe = super()._start(link)
        self._spent[-1].until_tick = self.now + self.config.window_ticks
        return probe


class SourcesMayBeBusy(Probing):
    def _both_idle(self, link: Link, idle: set[Member]) -> bool:
        return link[1] in idle


class TargetsMayBeBusy(Probing):
    def _both_idle(self, link: Link, idle: set[Member]) -> bool:
        return link[0] in idle


class FreeWhenTheOtherLeft(Probing):
    def left(self, member: Member) -> None:
        super().left(member)
        for number, (probe, _, _) in list(self._running.items()):
            if member in (probe.source, probe.target):
                self._over(number)


class ForgetsOneDirection(Probing):
    def left(self, member: Member) -> None:
        known = {link: k for link, k in self._links.items() if link[1] == member}
        super().left(member)
        self._links.update(known)


class BelievesOldNews(Probing):
    def joined(self, member: Member) -> None:
        self._newest.pop(member.number, None)
        super().joined(member)


class WaitsForEver(Probing):
    def _start(self, link: Link) -> Probe:
        probe = super()._start(link)
        _, _, spent = self._running[probe.number]
        self._running[probe.number] = probe, 10**9, spent
        return probe


class NewestOnly(Probing):
    def _estimate(self, known: _Known) -> float | None:
        found = super()._estimate(known)
        return known.results[-1] if found else found


class Mean(Probing):
    def _estimate(self, known: _Known) -> float | None:
        found = super()._estimate(known)
        return sum(known.results) / len(known.results) if found else found


class BrokenAtOnce(Probing):
    def _estimate(self, known: _Known) -> float | None:
        return 0.0 if known.failures else super()._estimate(known)


class RingLikeOthers(Probing):
    def _interval_ticks(self, link: Link, known: _Known) -> int:
        return self.config.other_ticks


class RetriesAtOnce(Probing):
    def _interval_ticks(self, link: Link, known: _Known) -> int:
        return 1 if known.failures else super()._interval_ticks(link, known)


class StaleFirst(Probing):
    def _turn(self, link: Link, known: _Known) -> tuple[int, int, int]:
        unknown, first, second = super()._turn(link, known)
        return 1 - unknown, first, second


class RingNotFirst(Probing):
    def _turn(self, link: Link, known: _Known) -> tuple[int, int, int]:
        unknown, first, second = super()._turn(link, known)
        return unknown, first if unknown else 0, second


class OneAtATime(Probing):
    def _affords(self) -> bool:
        return not self._running


MUTANTS = {
    WithoutBudget: many_churns,
    BudgetOfWhatRuns: many_churns,
    WindowFromTheBeginning: many_churns,
    SourcesMayBeBusy: many_churns,
    TargetsMayBeBusy: many_churns,
    FreeWhenTheOtherLeft: many_churns,
    ForgetsOneDirection: many_churns,
    BelievesOldNews: many_churns,
    WaitsForEver: answers_lost,
    NewestOnly: estimates,
    Mean: estimates,
    BrokenAtOnce: estimates,
    RingLikeOthers: frequencies,
    RetriesAtOnce: back_off,
    StaleFirst: unknown_first,
    RingNotFirst: ring_first,
    OneAtATime: rounds,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_rule_is_caught(mutant: type[Probing]) -> None:
    with pytest.raises(AssertionError):
        MUTANTS[mutant](mutant)


def test_results_that_can_not_be_are_refused() -> None:
    probing = Probing(PLENTY)
    probing.joined(Member(0, 1))
    probing.joined(Member(1, 1))
    (probe,) = probing.tick()
    for sent, seconds in ((0, 1.0), (1001, 1.0), (10, 0.0), (10, float("nan")), (10, float("inf"))):
        with pytest.raises(RemoteProtocolError, match="probe 0 claims"):
            probing.measured(probe.number, sent, seconds)
    probing.measured(probe.number, 1000, 1.0)
    probing.measured(probe.number, 1000, 2.0)  # twice: not heeded
    probing.failed(99)
    assert list(probing.rates().values()) == [1000.0]


def test_limits_under_which_nothing_could_be_probed_are_refused() -> None:
    with pytest.raises(ConfigError, match="raise window_bytes"):
        ProbingConfig(window_bytes=1)
    with pytest.raises(ConfigError, match="probe_ticks is 0"):
        ProbingConfig(probe_ticks=0)
