"""A few simulated ranks for the watchdog to watch, second by second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ftrain.comms.protocol.phases import Phase
from ftrain.configs.schema import DetectionConfig
from ftrain.recovery.protocol.watchdog import RankSample, Verdict, Watchdog

SECOND_NS = 1_000_000_000
COLLECTIVES_PER_STEP = 2


@dataclass
class World:
    """Ranks in the middle of step 10, that only do what they are told."""

    ranks: int = 2
    config: DetectionConfig = field(default_factory=DetectionConfig)
    group: Iterable[int] | None = None  # all ranks, when others are on other nodes
    median_s: float = 0.1

    def __post_init__(self) -> None:
        self.now_ns = 17 * SECOND_NS
        group = range(self.ranks) if self.group is None else self.group
        self.watchdog = Watchdog(self.config, group)
        self.samples = {
            rank: RankSample(
                rank=rank,
                phase=Phase.STEP,
                step=10,
                steps_done=10,
                gil_beat=1,
                collectives=20,
                boundaries=((9, 18), (10, 20)),
                step_median_ns=int(self.median_s * SECOND_NS),
            )
            for rank in range(self.ranks)
        }
        self.beating = dict.fromkeys(self.samples, True)
        self.busy = dict.fromkeys(self.samples, 0.0)  # share of a core, main thread
        self.busy_elsewhere = dict.fromkeys(self.samples, 0.0)  # other threads
        self.writing = dict.fromkeys(self.samples, 0)  # bytes per second
        self.verdicts: list[tuple[float, Verdict]] = []
        self.began_ns = self.now_ns

    def set(self, rank: int, **changes: object) -> None:
        self.samples[rank] = replace(self.samples[rank], **changes)  # type: ignore[arg-type]

    def step(self, rank: int, collectives: int = COLLECTIVES_PER_STEP) -> None:
        """The rank completes a step."""
        old = self.samples[rank]
        step, count = old.step + 1, old.collectives + collectives
        self.set(
            rank,
            step=step,
            steps_done=old.steps_done + 1,
            collectives=count,
            boundaries=(*old.boundaries, (step, count))[-8:],
        )

    def run(self, seconds: float, each: Callable[[], None] | None = None) -> list[Verdict]:
        """Let time pass, observing every ``poll_s``; returns what was said meanwhile."""
        said: list[Verdict] = []
        poll_s = self.config.poll_s
        for _ in range(round(seconds / poll_s)):
            self.jump(poll_s)
            if each is not None:
                each()
            said += self.look()
        return said

    def jump(self, seconds: float) -> None:
        """Time passes unobserved; ranks beat, burn and write as they are set to."""
        self.now_ns += int(seconds * SECOND_NS)
        for rank, sample in self.samples.items():
            stopped = sample.state in "Tt"
            main_ns = 0 if stopped else int(self.busy[rank] * seconds * SECOND_NS)
            other_ns = 0 if stopped else int(self.busy_elsewhere[rank] * seconds * SECOND_NS)
            self.set(
                rank,
                gil_beat=sample.gil_beat + (self.beating[rank] and not stopped),
                main_cpu_ns=sample.main_cpu_ns + main_ns,
                process_cpu_ns=sample.process_cpu_ns + main_ns + other_ns,
                io_bytes=sample.io_bytes + (0 if stopped else int(self.writing[rank] * seconds)),
            )

    def look(self) -> list[Verdict]:
        said = self.watchdog.observe(self.now_ns, list(self.samples.values()))
        elapsed_s = (self.now_ns - self.began_ns) / SECOND_NS
        self.verdicts += [(elapsed_s, verdict) for verdict in said]
        return said


def named(verdicts: Iterable[Verdict]) -> list[tuple[int, str, str]]:
    return [(verdict.rank, verdict.kind, verdict.action) for verdict in verdicts]
