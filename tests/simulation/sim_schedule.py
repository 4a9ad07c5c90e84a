"""Fault schedules: plain values, drawn from a seed, that can be printed, replayed and shrunk."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

FAULTY_TICKS = 160
"""Faults begin before this tick; afterwards the world is healed and progress is demanded."""


@dataclass(frozen=True, slots=True)
class Options:
    """What kind of world and weather a seed draws; levels differ by seed (swarm testing)."""

    nodes: int = 2
    spares: int = 0
    local_world: int = 2
    delay_ticks_max: int = 2
    work_ticks_max: int = 4  # of forking, forming, flushing, publishing
    steps_total: int = 10**9
    step_probability: float = 0.7
    sharded: bool = False  # no rank's state is on another one (else every node has a whole copy)
    slots: int = 3
    max_restarts: int = 10**6
    lease_ticks: int = 25
    flush_every_ticks: int = 0
    save_at_end: bool = False
    evaluate_ticks: int = 0  # between a rank's last boundary and its end

    @property
    def all_nodes(self) -> int:
        """Nodes with an agent."""
        return self.nodes + self.spares

    @property
    def world_size(self) -> int:
        """Ranks of the group."""
        return self.nodes * self.local_world


@dataclass(frozen=True, slots=True)
class Fault:
    """Something bad at a tick. ``node`` and ``other`` are taken modulo what there is."""

    at: int
    kind: str
    node: int = 0
    other: int = 0
    ticks: int = 0  # how long, or how late
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that a run of the simulator depends on."""

    seed: int
    options: Options
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.options}"]
        return "\n".join(lines + [f"  {fault}" for fault in self.faults])


KINDS = (
    "rank_dies",
    "rank_raises",
    "node_dies",
    "smp_dies",
    "coordinator_dies",
    "cut",
    "cut_smp",
    "replay",
    "delay",
    "stall",
    "clock_jump",
    "slow_disk",
    "disk_full",
    "torn_write",
    "form_fails",
    "fork_fails",
    "late_order",
    "flush",
    "stop",
    "signal",
    "force",
)
# A stop ends the job: rarely, else schedules are short.
_WEIGHTS = {
    "stop": 0.5,
    "signal": 0.9,
    "force": 0.45,
    "cut_smp": 1.8,
    "flush": 1.5,
    "replay": 1.5,
    "delay": 2.0,
    "disk_full": 2.8,
    "slow_disk": 4.0,
    "torn_write": 1.5,
    "fork_fails": 1.1,
    "form_fails": 1.8,
    "late_order": 1.5,
}
CRASH_POINTS = ("now", "before_persist", "after_persist", "mid_send", "before_effect", "starting")


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(seed)
    options = Options(
        nodes=rng.choice((1, 2, 2, 3, 3)),
        local_world=rng.choice((1, 2)),
        delay_ticks_max=rng.choice((0, 1, 2, 4)),
        work_ticks_max=rng.choice((1, 3, 8)),
        steps_total=rng.choice((10**9, 10**9, 10**9, 30, 1)),
        step_probability=rng.choice((0.5, 0.9)),
        sharded=rng.random() < 0.25,
        slots=rng.choice((2, 3)),
        lease_ticks=rng.choice((15, 30)),
        flush_every_ticks=rng.choice((0, 0, 20)),
        save_at_end=rng.random() < 0.5,
    )
    kinds = [kind for kind in KINDS if rng.random() < 0.6] or list(KINDS)
    weights = [_WEIGHTS.get(kind, 1.0) for kind in kinds]
    faults = []
    at = 0
    for kind in rng.choices(kinds, weights, k=rng.randint(8, 20)):
        # Faults come in bursts: one thing breaks while another is being repaired.
        burst = faults and rng.random() < 0.4
        first = FAULTY_TICKS // 2 if kind in ("stop", "signal", "force") else 5
        at = at + rng.randint(0, 6) if burst else rng.randrange(first, FAULTY_TICKS)
        faults.append(
            Fault(
                at=at,
                kind=kind,
                node=rng.randrange(12),
                other=rng.randrange(12),
                ticks=rng.choice((1, 3, 10, 40, 60)),
                detail=rng.choice(CRASH_POINTS) if kind == "coordinator_dies" else "",
            )
        )
    options = replace(options, evaluate_ticks=rng.choice((0, 40, 120)))
    options = replace(options, max_restarts=rng.choice((10**6,) * 8 + (2, 0)))
    options = replace(options, spares=rng.choice((0, 0, 1, 2)))
    return Schedule(seed, options, tuple(sorted(faults, key=lambda f: f.at)))
