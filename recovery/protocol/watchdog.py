"""Which rank hangs, decided from samples taken outside the ranks; pure.

A rank is restarted on positive evidence only.  Being slow, silent or long is no evidence: an
evaluation, a compile or a user's own save may take minutes.  The evidence, each held for three
quarters of the limit (the rest is for sampling and for the restart itself):

``stopped``  the process is in state T or t.
``gil``      no Python thread ran (the beat stands still) while the process used neither CPU time
             nor I/O: a C call sleeps with the GIL.  With CPU or I/O only after ``gil_busy_s``.
``desync``   at one boundary a rank had enqueued another number of collectives than the rest (at
             once); or all others wait in a collective which this rank has passed or left for ever.
``stall``    all ranks wait in collectives that each of them joined; or user code that took
             ``user_stall_s``, warned about with action ``warn`` after ``user_warn_s``.

The limit is ``max(hang_s, hang_steps x median step)``.  Time counts only while it is watched: a
gap between two observations (a suspended machine, a starved agent) is cut to four polls, so that
nobody is blamed for what the observer slept through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ftrain.comms.protocol.phases import Phase, Where
from ftrain.configs.schema import DetectionConfig

RESTART = "restart"
WARN = "warn"

_SECOND_NS = 1_000_000_000
_PATIENCE = 0.75  # share of the limit for which evidence must hold
_GAP_POLLS = 4  # longest gap between two observations that counts in full, in polls
_BEAT_FRESH_NS = _SECOND_NS  # `where` is believed only if sampled by a beat this young
_IDLE_SHARE = 0.05  # of a core: threads that wait for the GIL wake 200 times a second
_IDLE_NS = 20_000_000  # and two ticks of the kernel's CPU accounting
_BOUNDARIES_KEPT = 64

_STOPPED_STATES = frozenset("Tt")
_BUSY_STATES = frozenset("RD")  # wants a core, or waits for a disk
_LOOP_PHASES = frozenset((Phase.STEP, Phase.OPTIMIZER, Phase.BOUNDARY))
_QUIET_PHASES = frozenset((Phase.DECLARED, Phase.HOLDING, Phase.STOPPED, Phase.FINISHED))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSample:
    """One look at one rank, from outside."""

    rank: int
    alive: bool = True  # False: the process ended; the words below are its last
    state: str = "S"  # of the main thread, as in /proc/<pid>/stat
    main_cpu_ns: int = 0  # user + system time of the main thread
    process_cpu_ns: int = 0  # of all threads
    io_bytes: int = 0  # read and written by the process so far
    phase: Phase = Phase.STARTING
    step: int = 0  # last boundary reached
    steps_done: int = 0  # completed by this process
    gil_beat: int = 0  # 0: the beat has not begun
    where: Where = Where.USER
    collectives: int = -1  # enqueued so far; -1 unknown
    boundaries: tuple[tuple[int, int], ...] = ()  # recent (step, collectives at that boundary)
    step_median_ns: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with one rank."""

    rank: int
    kind: str  # stopped | gil | desync | stall, as in RankFailure.kind
    evidence: str  # plain words
    action: str  # RESTART: stop the group and start it again; WARN: say so, with its stack


class _Stillness:
    """Since when something used next to no CPU time and did no I/O.

    A leaky bucket: CPU time fills it, the idle share drains it, and what overflows is movement.
    """

    __slots__ = ("_cpu_ns", "_filled_ns", "_io_bytes", "_seen_ns", "since_ns")

    def __init__(self) -> None:
        self._cpu_ns = self._io_bytes = self._seen_ns = self.since_ns = -1
        self._filled_ns = 0.0

    def update(self, now_ns: int, cpu_ns: int, io_bytes: int, state: str) -> None:
        drained_ns = _IDLE_SHARE * (now_ns - self._seen_ns)
        self._filled_ns = max(0.0, self._filled_ns + cpu_ns - self._cpu_ns - drained_ns)
        if (
            self.since_ns < 0
            or state in _BUSY_STATES
            or io_bytes != self._io_bytes
            or self._filled_ns > _IDLE_NS
        ):
            self.since_ns, self._filled_ns = now_ns, 0.0
        self._seen_ns, self._cpu_ns, self._io_bytes = now_ns, cpu_ns, io_bytes


class _Track:
    """What was seen of one rank over time, in watched nanoseconds."""

    __slots__ = ("_spot", "beat_since_ns", "main", "process", "sample", "since_ns", "stopped_ns")

    def __init__(self, sample: RankSample, now_ns: int) -> None:
        self.sample = sample
        self.main = _Stillness()
        self.process = _Stillness()
        self._spot: tuple[object, ...] = ()
        self.stopped_ns = -1  # since when it is stopped; -1: it is not
        self.beat_since_ns = now_ns
        self.since_ns = now_ns  # since when it is at this spot

    def update(self, sample: RankSample, now_ns: int) -> bool:
        """Take a sample in; returns whether the rank moved on since the one before."""
        stopped = sample.alive and sample.state in _STOPPED_STATES
        if not stopped:
            self.stopped_ns = -1
        elif self.stopped_ns < 0:
            self.stopped_ns = now_ns
        if stopped or sample.gil_beat != self.sample.gil_beat:
            self.beat_since_ns = now_ns
        # While stopped, everything stands still for that one reason: no evidence of another.
        state = "R" if stopped else sample.state
        self.main.update(now_ns, sample.main_cpu_ns, 0, state)
        self.process.update(now_ns, sample.process_cpu_ns, sample.io_bytes, state)
        in_collective = sample.where is not Where.USER
        spot = (sample.phase, sample.step, sample.collectives, in_collective, stopped)
        moved = spot != self._spot
        if moved:
            self._spot = spot
            self.since_ns = now_ns
        self.sample = sample
        return moved

    def beat_frozen_ns(self, now_ns: int) -> int:
        """How long no Python thread of the rank ran; 0 where that says nothing."""
        sample = self.sample
        if not sample.alive or sample.gil_beat == 0 or sample.phase in _QUIET_PHASES:
            return 0
        return now_ns - self.beat_since_ns

    def waits(self, now_ns: int, patience_ns: float) -> bool:
        """Whether the main thread has been asleep in a collective, or in backward, for so long."""
        sample = self.sample
        return (
            sample.alive
            and sample.phase in _LOOP_PHASES
            and sample.where is not Where.USER
            and now_ns - self.beat_since_ns < _BEAT_FRESH_NS
            and now_ns - max(self.main.since_ns, self.since_ns) > patience_ns
        )

    @property
    def joined(self) -> bool:
        """Whether it is known to have enqueued a collective since its last boundary."""
        counts = dict(self.sample.boundaries)
        before = counts.get(self.sample.step, -1)
        return 0 <= before < self.sample.collectives


class Watchdog:
    """Judges the ranks of one group in one epoch; make a new one for the next formation.

    ``ranks`` are all ranks of the group.  Every node's agent has its own watchdog, fed with samples
    of its own ranks, and, where it can get them, with samples (:meth:`observe`) or boundary counts
    (:meth:`record_boundary`) of the others'.  Without those, rules that need to know the whole
    group stay silent; none of them guesses.
    """

    def __init__(self, config: DetectionConfig, ranks: Iterable[int]) -> None:
        self._config = config
        self._ranks = frozenset(ranks)
        self._now_ns = 0  # watched time
        self._last_ns: int | None = None
        self._tracks: dict[int, _Track] = {}
        self._counts: dict[int, dict[int, int]] = {}  # boundary step -> rank -> collectives
        self._counting: set[int] = set()  # ranks that ever told a count
        self._said: set[tuple[int, str, str]] = set()

    def record_boundary(self, rank: int, step: int, collectives: int) -> None:
        """Another node's ``rank`` had enqueued so many collectives at boundary ``step``."""
        if collectives < 0:
            return
        self._counting.add(rank)
        self._counts.setdefault(step, {})[rank] = collectives
        while len(self._counts) > _BOUNDARIES_KEPT:
            del self._counts[min(self._counts)]

    def observe(self, now_ns: int, samples: Sequence[RankSample]) -> list[Verdict]:
        """Take samples in, all taken at about ``now_ns``; returns what is new to say."""
        if not self._config.enabled:
            return []
        self._advance(now_ns)
        for sample in samples:
            self._take(sample)
        verdicts = list(self._judge())
        fresh = [v for v in verdicts if (v.rank, v.kind, v.action) not in self._said]
        self._said.update((v.rank, v.kind, v.action) for v in fresh)
        return fresh

    def _advance(self, now_ns: int) -> None:
        gap_ns = int(_GAP_POLLS * self._config.poll_s * _SECOND_NS)
        if self._last_ns is not None:
            self._now_ns += min(max(now_ns - self._last_ns, 0), gap_ns)
        self._last_ns = now_ns

    def _take(self, sample: RankSample) -> None:
        track = self._tracks.get(sample.rank)
        if track is None:
            track = self._tracks[sample.rank] = _Track(sample, self._now_ns)
        if track.update(sample, self._now_ns):
            # What it does next is a new case; a count that differed stays the old one.
            self._said = {s for s in self._said if s[0] != sample.rank or s[1] == "desync"}
        for step, collectives in sample.boundaries:
            self.record_boundary(sample.rank, step, collectives)

    @property
    def limit_ns(self) -> float:
        """How long a hang may last, from the slowest rank's median step."""
        median_ns = max((t.sample.step_median_ns for t in self._tracks.values()), default=0)
        return max(self._config.hang_s * _SECOND_NS, self._config.hang_steps * median_ns)

    def _judge(self) -> Iterator[Verdict]:
        patience_ns = _PATIENCE * self.limit_ns
        obstructed = False  # a rank that can't run explains what the others wait for
        for track in self._tracks.values():
            frozen = track.beat_frozen_ns(self._now_ns) > _BEAT_FRESH_NS
            obstructed = obstructed or frozen or track.stopped_ns >= 0
            yield from self._judge_stopped(track, patience_ns)
            yield from self._judge_gil(track, patience_ns)
            yield from self._judge_user(track)
        yield from self._judge_counts()
        if not obstructed:
            yield from self._judge_waiting(patience_ns)

    def _judge_stopped(self, track: _Track, patience_ns: float) -> Iterator[Verdict]:
        held_ns = self._now_ns - track.stopped_ns
        if track.stopped_ns >= 0 and held_ns > patience_ns:
            state = track.sample.state
            how = f"the process has been stopped (state {state}) for {_seconds(held_ns)}"
            yield Verdict(track.sample.rank, "stopped", how, RESTART)

    def _judge_gil(self, track: _Track, patience_ns: float) -> Iterator[Verdict]:
        frozen_ns = track.beat_frozen_ns(self._now_ns)
        still_ns = min(frozen_ns, self._now_ns - track.process.since_ns)
        if still_ns > patience_ns:
            how = f"the GIL has been held for {_seconds(frozen_ns)} without CPU time or I/O"
        elif frozen_ns > self._config.gil_busy_s * _SECOND_NS:
            how = f"the GIL has been held for {_seconds(frozen_ns)}, with CPU time or I/O going on"
        else:
            return
        yield Verdict(track.sample.rank, "gil", how, RESTART)

    def _judge_user(self, track: _Track) -> Iterator[Verdict]:
        """User code that merely takes long (also imports, compiles, downloads, data loading)."""
        sample = track.sample
        if not sample.alive or sample.phase in _QUIET_PHASES or track.stopped_ns >= 0:
            return
        if sample.phase in _LOOP_PHASES and sample.where is not Where.USER:
            return  # whoever it waits for is to blame, or nobody
        held_ns = self._now_ns - track.since_ns
        phase = sample.phase.name.lower()
        how = f"no progress in phase {phase} after step {sample.step} for {_seconds(held_ns)}"
        if held_ns > self._config.user_stall_s * _SECOND_NS:
            yield Verdict(sample.rank, "stall", how, RESTART)
        elif held_ns > self._config.user_warn_s * _SECOND_NS:
            yield Verdict(sample.rank, "stall", how, WARN)

    def _judge_counts(self) -> Iterator[Verdict]:
        """Ranks that had enqueued another number of collectives than most at the same boundary."""
        # All ranks of the group, or, where other nodes' counts never come, all that do tell.
        wanted = self._ranks if self._ranks <= self._counting else self._counting
        for step in sorted(self._counts):
            counts = self._counts[step]
            if len(wanted) < 2 or not wanted <= counts.keys():
                continue
            told = Counter(counts[rank] for rank in wanted)
            if len(told) == 1:
                continue
            # Most votes win; between equals the higher count, for leaving out is the usual fault.
            usual = max(told, key=lambda count: (told[count], count))
            for rank in sorted(rank for rank in wanted if counts[rank] != usual):
                how = f"{counts[rank]} collectives up to boundary {step}, other ranks {usual}"
                yield Verdict(rank, "desync", how, RESTART)
            return

    def _judge_waiting(self, patience_ns: float) -> Iterator[Verdict]:
        """Ranks that are missing from a collective in which all others wait."""
        tracks = self._tracks
        config = self._config
        if not all(track.sample.steps_done for track in tracks.values()):
            patience_ns = config.user_stall_s * _SECOND_NS  # compiling, downloading, connecting
        waiting = {r: t for r, t in tracks.items() if t.waits(self._now_ns, patience_ns)}
        if not waiting or len(tracks) < 2:
            return
        least = min(track.sample.step for track in waiting.values())
        ahead = [r for r, t in tracks.items() if _left(t.sample) or t.sample.step > least]
        if waiting.keys() | set(ahead) != tracks.keys():
            return  # somebody still works: slowness, no evidence
        if ahead:
            how = f"the other ranks have waited in a collective of step {least} for"
            yield from self._blame(ahead, f"{how} {_seconds(patience_ns)}; this rank left it out")
        elif self._ranks <= tracks.keys():
            yield from self._judge_all_waiting(patience_ns)

    def _judge_all_waiting(self, patience_ns: float) -> Iterator[Verdict]:
        """All ranks of the group wait in collectives of one step."""
        tracks = self._tracks
        counts = {rank: track.sample.collectives for rank, track in tracks.items()}
        if min(counts.values()) >= 0 and len(set(counts.values())) > 1:
            least = min(counts.values())
            behind = [rank for rank, count in counts.items() if count == least]
            how = f"waits in collective {least} while others wait in {max(counts.values())}"
            yield from self._blame(behind, how)
            return
        # Nobody is missing.  Where it is not known that all did join (a compile inside backward
        # looks the same), give them longer.
        if not all(track.joined for track in tracks.values()):
            patience_ns = max(patience_ns, self._config.user_warn_s * _SECOND_NS)
        since_ns = max(max(t.process.since_ns, t.since_ns) for t in tracks.values())
        if self._now_ns - since_ns > patience_ns:
            how = f"every rank has waited in the same collective for {_seconds(patience_ns)}"
            yield from (Verdict(rank, "stall", how, RESTART) for rank in sorted(tracks))

    def _blame(self, ranks: Iterable[int], how: str) -> Iterator[Verdict]:
        for rank in sorted(ranks):
            yield Verdict(rank, "desync", how, RESTART)


def _left(sample: RankSample) -> bool:
    """Whether the rank will join no further collective of the loop."""
    return not sample.alive or sample.phase is Phase.FINISHED


def _seconds(duration_ns: float) -> str:
    return f"{duration_ns / _SECOND_NS:.1f} s"
