"""Shares of simulated paths whose rates change; what a path carries is recorded outside."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from ftrain.comms.errors import ConfigError, LocalProtocolError
from ftrain.comms.traffic.protocol import shares as module
from ftrain.comms.traffic.protocol.shares import Sending, Shares, SharesConfig, State
from ftrain.comms.traffic.protocol.spread import Spread, assign

CONFIG = SharesConfig()
CHUNK = 1 << 21
SECOND = round(1 / CONFIG.tick_s)  # in ticks
MB = 1e6


@dataclass
class World:
    """Paths that carry chunks one after the other, and a sender that keeps them busy."""

    shares: Shares
    rates: list[float]
    on_the_way: int = 12  # chunks for all paths together
    refills: bool = True
    queues: list[list[Sending]] = field(default_factory=list)
    done: list[float] = field(default_factory=list)  # bytes of each path's first chunk
    busy_s: list[float] = field(default_factory=list)  # since the one before it
    carried: Counter[int] = field(default_factory=Counter)  # chunks by path
    given: Counter[int] = field(default_factory=Counter)
    arrived: int = 0
    wanted: int = 0

    def __post_init__(self) -> None:
        self.queues = [[] for _ in self.rates]
        self.done = [0.0 for _ in self.rates]
        self.busy_s = [0.0 for _ in self.rates]

    def send(self) -> None:
        sending = self.shares.send(CHUNK)
        self.given[sending.path] += 1
        self.queues[sending.path].append(sending)
        self.check()

    def check(self) -> None:
        shares, states = self.shares.shares, self.shares.states
        assert math.isclose(sum(shares), 1, abs_tol=1e-9)
        assert min(shares) >= 0
        if any(state is not State.OUT for state in states):
            for share, state in zip(shares, states, strict=True):
                assert state is not State.OUT or share == 0

    def refill(self) -> None:
        while self.refills and sum(map(len, self.queues)) < self.on_the_way:
            self.wanted += 1
            self.send()

    def step(self, refills: bool = True) -> None:
        """One tick: what is wanted is sent, paths carry, the machine hears what arrived."""
        self.refills = refills
        self.refill()
        for path, rate in enumerate(self.rates):
            self.carry(path, rate)
        for sending in self.shares.tick():
            assert sending in self.queues[sending.path], "given back twice, or after it arrived"
            if self.queues[sending.path].index(sending) == 0:
                self.done[sending.path] = self.busy_s[sending.path] = 0.0
            self.queues[sending.path].remove(sending)
            self.send()
        self.check()
        assert self.arrived + sum(map(len, self.queues)) == self.wanted, "chunks went astray"

    def carry(self, path: int, rate: float) -> None:
        left_s = CONFIG.tick_s
        while self.queues[path] and left_s > 0:
            needed_s = (CHUNK - self.done[path]) / rate if rate else math.inf
            spent_s = min(left_s, needed_s)
            left_s -= spent_s
            self.busy_s[path] += spent_s
            self.done[path] += spent_s * rate
            if needed_s <= spent_s:
                self.shares.arrived(self.queues[path].pop(0).number, self.busy_s[path])
                self.done[path] = self.busy_s[path] = 0.0
                self.carried[path] += 1
                self.arrived += 1
                self.refill()

    def run(self, ticks: int) -> World:
        for _ in range(ticks):
            self.step()
        return self

    def ticks_until(self, what: Callable[[], bool], ticks_max: int) -> int:
        for ticks in range(ticks_max + 1):
            if what():
                return ticks
            self.step()
        raise AssertionError(f"not within {ticks_max} ticks: {self.shares.shares}")

    def deserved(self) -> list[float]:
        return [rate / sum(self.rates) for rate in self.rates]

    def near(self, part: float) -> bool:
        """Whether all shares are those that the rates deserve."""
        return all(
            abs(share - due) <= part * due
            for share, due in zip(self.shares.shares, self.deserved(), strict=True)
        )


Machine = Callable[[int], Shares]


def world(machine: Machine, *rates_mb: float) -> World:
    return World(machine(len(rates_mb)), [rate * MB for rate in rates_mb])


def proportional(machine: Machine) -> int:
    """Shares become those of the rates, and the chunks follow them."""
    paths = world(machine, 100, 200, 400, 800)
    ticks = paths.ticks_until(lambda: paths.near(0.02), SECOND)
    paths.given.clear()
    paths.run(100)
    total = sum(paths.given.values())
    for path, due in enumerate(paths.deserved()):
        assert abs(paths.given[path] - due * total) <= 0.03 * due * total + 3
    rates = [100 * MB, 800 * MB, 400 * MB, 200 * MB]
    paths.rates = rates
    return max(ticks, paths.ticks_until(lambda: paths.near(0.02), SECOND))


def noisy(machine: Machine) -> None:
    """Rates that vary by 15 % don't move shares by more than that on the average."""
    rng, off = random.Random(1), []
    paths = world(machine, 200, 400)
    for _ in range(400):
        paths.rates = [rng.uniform(0.85, 1.15) * rate * MB for rate in (200, 400)]
        paths.step()
        off.append(abs(paths.shares.shares[0] - 1 / 3) * 3)
    assert sum(off[50:]) / len(off[50:]) < 0.1


def stalls(machine: Machine) -> int:
    """A path that stands still is out within a second; the others go on with all of its chunks."""
    paths = world(machine, 200, 200, 400).run(50)
    paths.rates[1] = 0.0
    soon = paths.ticks_until(lambda: paths.shares.shares[1] <= 0.13, 4)  # half of what it had
    ticks = soon + paths.ticks_until(lambda: paths.shares.shares[1] == 0, SECOND - soon)
    assert not paths.queues[1]
    before = paths.arrived
    paths.run(SECOND - 2)
    assert paths.arrived - before >= 0.8 * 600 * MB * (SECOND - 2) * CONFIG.tick_s / CHUNK
    return ticks


def becomes_slow(machine: Machine) -> int:
    """A path at a tenth of its rate has no more than twice what it deserves within a second."""
    worst = 0
    for slower in (3, 10, 15):
        paths = world(machine, 200, 200, 400).run(50)
        paths.rates[1] /= slower
        share = paths.deserved()[1]
        ticks = paths.ticks_until(lambda: paths.shares.shares[1] <= 2 * share, SECOND)  # noqa: B023
        worst = max(worst, ticks)
        before = paths.arrived
        paths.run(100)
        assert paths.arrived - before >= 0.7 * sum(paths.rates) * 100 * CONFIG.tick_s / CHUNK
    return worst


def becomes_hopeless(machine: Machine) -> None:
    """A path that moves, but adds nothing, is out; so is one that is so from the beginning."""
    paths = world(machine, 20, 200, 400).run(50)
    paths.rates[1] = 8 * MB
    paths.ticks_until(lambda: paths.shares.states[1] is State.OUT, 2 * SECOND)
    paths = world(machine, 8, 200, 400)
    paths.ticks_until(lambda: paths.shares.states[0] is State.OUT, 2 * SECOND)


def comes_back(machine: Machine) -> int:
    """A path that works again has its share again, at the next try."""
    worst = 0
    for outage in (5, 15, 35, 70):
        paths = world(machine, 200, 200, 400).run(50)
        paths.rates[1] = 0.0
        paths.run(outage)
        paths.rates[1] = 200 * MB
        back_off = max(CONFIG.back_off_ticks, 2 * outage)  # doubled, for each try that failed
        ticks = paths.ticks_until(lambda: paths.near(0.1), back_off + SECOND)  # noqa: B023
        worst = max(worst, ticks - back_off)
    return worst


def never_back(machine: Machine) -> int:
    """A dead path is tried again for ever, with one chunk each time and less and less often."""
    paths = world(machine, 200, 0, 400).run(SECOND)
    paths.given.clear()  # the first ones came while nothing was known
    tries = paths.run(2600).given[1]
    assert 5 <= tries <= 8, tries
    paths.given.clear()
    paths.run(2600)
    assert 1 <= paths.given[1] <= 2, paths.given
    return tries


def flaps(machine: Machine) -> int:
    """A path that comes and goes is trusted less each time."""
    paths, outs, was = world(machine, 200, 200, 400), 0, State.TRIAL
    for tick in range(3000):
        paths.rates[1] = 200 * MB if tick // 25 % 2 == 0 else 0.0
        paths.step()
        state = paths.shares.states[1]
        outs += state is State.OUT and was is not State.OUT
        was = state
    assert 3 <= outs <= 30, outs
    return outs


def small_operations(machine: Machine) -> None:
    """However few chunks an operation has, a slow path gets its share, a dead one is tried."""
    paths = world(machine, 100, 900)
    paths.on_the_way = 2
    for _ in range(300):
        paths.step()
        for _ in range(3):
            paths.step(refills=False)
    total = sum(paths.given.values())
    assert abs(paths.given[0] - total / 10) <= 0.02 * total + 2, paths.given
    paths.rates[0] = 0.0
    for _ in range(20):
        paths.step()
    paths.rates[0] = 100 * MB
    for _ in range(300):
        paths.step()
        paths.step(refills=False)
    assert paths.shares.states[0] is State.OPEN


def peer_stands_still(machine: Machine) -> None:
    """Nothing moves anywhere: no path is to blame, and all goes on as before."""
    for on_the_way in (1, 2, 12):  # with few chunks some path is idle, and might be better
        paths = world(machine, 200, 200, 400)
        paths.on_the_way = on_the_way
        paths.run(50)
        rates, paths.rates = paths.rates, [0.0] * 3
        for _ in range(500):
            paths.step()
            if all(paths.queues):
                assert State.OUT not in paths.shares.states
        paths.rates = rates
        paths.ticks_until(lambda: paths.near(0.02), SECOND)  # noqa: B023


def any_schedule(machine: Machine) -> None:
    """Paths slow down, stand still, come back and are cut; then all is as their rates deserve."""
    for seed in range(10):
        rng = random.Random(seed)
        count = rng.randint(1, 6)
        paths = world(machine, *(rng.uniform(100, 400) for _ in range(count)))
        good = list(paths.rates)
        for _ in range(rng.randint(1, 12)):
            path = rng.randrange(count)
            paths.rates[path] = good[path] * rng.choice([0, 0, 0.01, 0.1, 0.5, 1, 1, 2])
            if rng.random() < 0.1:
                for sending in paths.shares.lost(path):
                    paths.queues[path].remove(sending)
                    paths.send()
                paths.done[path] = paths.busy_s[path] = 0.0
            paths.run(rng.randint(1, 60))
        paths.rates = good
        paths.ticks_until(lambda: paths.near(0.05), 66 * CONFIG.back_off_ticks)  # noqa: B023
        for _ in range(200):
            paths.step(refills=False)
        assert paths.arrived == paths.wanted


CHECKS = (
    proportional,
    noisy,
    stalls,
    becomes_slow,
    becomes_hopeless,
    comes_back,
    never_back,
    flaps,
    small_operations,
    peer_stands_still,
    any_schedule,
)


@pytest.mark.parametrize("check", CHECKS)
def test_shares(check: Callable[[Machine], int | None]) -> None:
    print(check.__name__, check(Shares))


class StalledKeepsItsShare(Shares):
    def _is_bad(self, path: module._Path) -> bool:
        return False


class JudgesAPathAlone(Shares):
    def _is_bad(self, path: module._Path) -> bool:
        return self._is_stalled(path) or super()._is_bad(path)


class SlowIsNeverOut(Shares):
    def _is_bad(self, path: module._Path) -> bool:
        return self._is_stalled(path) and super()._is_bad(path)


class NeverTriesAgain(Shares):
    def _back_off(self, failures: int) -> int:
        return 10**9


class TriesAlways(Shares):
    def _back_off(self, failures: int) -> int:
        return 1


class BackOffStaysTheSame(Shares):
    def _back_off(self, failures: int) -> int:
        return self.config.back_off_ticks


class LosesChunks(Shares):
    def _take_out(self, path: module._Path) -> tuple[Sending, ...]:
        super()._take_out(path)
        return ()


class AllAlike(Shares):
    def _weigh(self) -> tuple[float, ...]:
        return tuple(1 / len(self._paths) for _ in self._paths)


class TrialIsAFullShare(Shares):
    def _weigh(self) -> tuple[float, ...]:
        trials = [path.state is State.TRIAL for path in self._paths]
        each = 1 / len(trials)
        rest = 1 - each * sum(trials)
        opened = [0.0 if path.state is not State.OPEN else self._rate(path) for path in self._paths]
        if not sum(opened):
            return super()._weigh()
        return tuple(
            each if trial else rest * rate / sum(opened)
            for trial, rate in zip(trials, opened, strict=True)
        )


class HearsOnlyWhatArrived(Shares):
    def _rate(self, path: module._Path) -> float:
        return path.rate


class TakesTheFirstSample(Shares):
    def _fold_in(self, path: module._Path) -> None:
        rate, known = path.rate, path.state is State.OPEN
        super()._fold_in(path)
        if known:
            path.rate = rate


class BlamesPathsForThePeer(Shares):
    def _acquit(self) -> None:
        pass


class SpreadsAnewEachTick(Shares):
    def tick(self) -> tuple[Sending, ...]:
        self._spread = Spread(len(self._paths))
        return super().tick()


MUTANTS = {
    StalledKeepsItsShare: stalls,
    JudgesAPathAlone: peer_stands_still,
    SlowIsNeverOut: becomes_hopeless,
    NeverTriesAgain: comes_back,
    TriesAlways: never_back,
    BackOffStaysTheSame: flaps,
    LosesChunks: stalls,
    AllAlike: proportional,
    TrialIsAFullShare: never_back,
    HearsOnlyWhatArrived: stalls,
    TakesTheFirstSample: becomes_slow,
    BlamesPathsForThePeer: peer_stands_still,
    SpreadsAnewEachTick: small_operations,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_rule_is_caught(mutant: type[Shares]) -> None:
    with pytest.raises(AssertionError):
        MUTANTS[mutant](mutant)


def deviations(spread: type[Spread]) -> None:
    """While shares stay, no path is further than stated from its share of any number of chunks."""
    for seed in range(100):
        rng = random.Random(seed)
        count = rng.randint(1, 8)
        weights = [rng.choice([0, 0, 0.01, 1, rng.random()]) for _ in range(count)]
        weights[rng.randrange(count)] = 1
        shares = [weight / sum(weights) for weight in weights]
        machine, sent = spread(count), [0] * count
        for chunk in range(1, 400):
            sent[machine.next(shares)] += 1
            for path, share in enumerate(shares):
                behind = share * chunk - sent[path]
                assert -1 - 1e-9 < behind < max(1, count - 1) + 1e-9, f"seed {seed}"
                assert share or not sent[path]


def closed_paths(spread: type[Spread]) -> None:
    """Only paths with a share are used, and one that has one again isn't kept waiting."""
    for seed in range(100):
        rng = random.Random(seed)
        count = rng.randint(2, 6)
        machine = spread(count)
        for _ in range(200):
            used = rng.sample(range(count), rng.randint(1, count))
            shares = [1 / len(used) if path in used else 0.0 for path in range(count)]
            for _ in range(rng.randint(1, 3)):
                assert machine.next(shares) in used
        alike = [1 / count] * count
        following = {machine.next(alike) for _ in range(3 * count)}
        assert len(following) == count, f"seed {seed}: {following}"


def test_chunks_are_spread_smoothly() -> None:
    deviations(Spread)
    closed_paths(Spread)
    assert assign((0.5, 0.25, 0.25), 8) == (0, 1, 2, 0, 0, 1, 2, 0)
    assert assign((0.0, 1.0), 3) == (1, 1, 1)


class OneAfterTheOther(Spread):
    def next(self, shares: Sequence[float]) -> int:
        self.credit[0] += 1
        place = (self.credit[0] % 100) / 100
        return next((n for n in range(len(shares)) if place < sum(shares[: n + 1])), 0)


class KeepsWhatClosedPathsSaved(Spread):
    def next(self, shares: Sequence[float]) -> int:
        self.credit = [credit + share for credit, share in zip(self.credit, shares, strict=True)]
        chosen = max(range(len(shares)), key=lambda path: (self.credit[path], -path))
        self.credit[chosen] -= 1
        return chosen


@pytest.mark.parametrize(
    ("mutant", "check"),
    [(OneAfterTheOther, deviations), (KeepsWhatClosedPathsSaved, closed_paths)],
)
def test_a_broken_spread_is_caught(
    mutant: type[Spread], check: Callable[[type[Spread]], None]
) -> None:
    with pytest.raises(AssertionError):
        check(mutant)


def test_a_connection_that_ends_is_out_at_once() -> None:
    shares = Shares(2)
    sent = [shares.send(CHUNK) for _ in range(4)]
    again = shares.lost(0)
    assert {sending.number for sending in again} == {0, 2}
    assert shares.shares == (0.0, 1.0)
    shares.arrived(sent[0].number, 0.001)  # too late: it was given back
    shares.tick()
    assert shares.states == (State.OUT, State.TRIAL)
    shares.lost(1)
    assert shares.shares == (0.5, 0.5)  # there is nothing better than what is out
    sending = shares.send(CHUNK)
    shares.arrived(sending.number, 0.001)
    shares.tick()
    assert shares.states[sending.path] is State.OPEN


def test_values_that_make_no_sense_are_refused() -> None:
    for wrong in ({"stall_ticks": 1}, {"newest_part": 0.0}, {"trial_part": 1.0}, {"tick_s": 0.0}):
        with pytest.raises(ConfigError):
            SharesConfig(**wrong)
    with pytest.raises(LocalProtocolError):
        Shares(0)
