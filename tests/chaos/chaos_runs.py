"""Random fault schedules against a real launch, and what must hold after each."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "llama" / "train.py"
STEPS = 48
FAULT_STEPS = range(3, 36, 4)  # the last ones leave time to wait for a short phase
TOPOLOGIES = ((1, 2), (2, 1), (1, 4), (2, 2))  # nodes, ranks per node
IN_RANK = ("sigkill", "segfault", "exit", "exception", "gil_hang", "sigstop", "oom")
PHASES = ("any", "any", "forward_backward", "optimizer", "boundary")


@dataclass(frozen=True)
class Schedule:
    """One launch and its faults, drawn from a seed."""

    seed: int
    nodes: int
    local_world: int
    faults: tuple[dict[str, Any], ...]

    @property
    def world_size(self) -> int:
        return self.nodes * self.local_world

    def __str__(self) -> str:
        faults = "; ".join(
            " ".join(f"{key}={value}" for key, value in fault.items()) for fault in self.faults
        )
        return f"seed {self.seed}: {self.nodes} node(s) x {self.local_world}: {faults}"


def draw(seed: int, *, oom: bool, down_s: float = 3.0) -> Schedule:
    """The schedule of ``seed``: 1 to 5 faults, far enough apart to be told apart, some during the
    recovery from another."""
    chance = random.Random(seed)
    nodes, local_world = TOPOLOGIES[seed % len(TOPOLOGIES)]
    world = nodes * local_world
    count = chance.randint(1, 5)
    steps = sorted(chance.sample(FAULT_STEPS, min(count, 5)))
    kinds = [kind for kind in IN_RANK if oom or kind != "oom"]
    kinds += ["smp", "worker_server", "coordinator", "coordinator_then_kill", "recovery"]
    # A node that is lost takes its memory along; with one node nothing but files would be left.
    kinds += ["node", "agent"] if nodes > 1 else []
    faults: list[dict[str, Any]] = []
    for step in steps:
        kind = chance.choice(kinds)
        rank = chance.randrange(world)
        if kind == "coordinator_then_kill":
            faults.append({"kind": "coordinator", "at_step": step, "down_s": down_s})
            faults.append({"kind": "sigkill", "at_step": step + 1, "rank": rank})
        elif kind == "recovery":
            faults.append({"kind": "sigkill", "at_step": step, "rank": rank})
            faults.append(
                {
                    "kind": "sigkill",
                    "at_step": step,
                    "rank": chance.randrange(world),
                    "phase": "recovery",
                }
            )
        elif kind in IN_RANK:
            fault = {"kind": kind, "at_step": step, "rank": rank, "phase": chance.choice(PHASES)}
            if kind == "sigkill":
                fault["delay_s"] = round(chance.random() * 0.1, 3)
            faults.append(fault)
        elif kind == "coordinator":
            faults.append({"kind": kind, "at_step": step})
        else:
            faults.append({"kind": kind, "at_step": step, "node": chance.randrange(nodes)})
    return Schedule(seed, nodes, local_world, tuple(faults))


def launch(run_dir: Path, schedule: Schedule, timeout_s: float = 240) -> str:
    """Run the example under the schedule's faults; returns its output. Fails unless it exits 0."""
    entries = ",".join(
        "{" + ",".join(f"{key}:{value}" for key, value in fault.items()) + "}"
        for fault in schedule.faults
    )
    command = [
        sys.executable,
        "-m",
        "ftrain.launch.cli",
        "launch",
        "--run-dir",
        str(run_dir),
        "--nproc-per-node",
        str(schedule.local_world),
        *(["--local-nodes", str(schedule.nodes)] if schedule.nodes > 1 else []),
        f"faults.schedule=[{entries}]",
        "launch.max_restarts=10",
        str(EXAMPLE),
        *("--preset", "0.5m", "--steps", str(STEPS), "--batch-size", "2", "--seq", "64"),
    ]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=run_dir.parent,
        env=os.environ,
    )
    output = found.stdout + found.stderr
    assert found.returncode == 0, f"{schedule}\nexit code {found.returncode}\n{output[-6000:]}"
    return output


@dataclass(frozen=True)
class History:
    """What one rank's records say."""

    losses: dict[int, float]
    batches: dict[int, tuple[int, int, str]]  # data epoch, index, digest of the sample indices
    repeated: int  # steps done more than once


def lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # torn by a SIGKILL


def histories(run_dir: Path, world_size: int) -> list[History]:
    """One history per rank; a step done twice has to have the same loss and batch twice."""
    found = []
    for rank in range(world_size):
        losses: dict[int, float] = {}
        batches: dict[int, tuple[int, int, str]] = {}
        repeated = 0
        for record in lines(run_dir / "steps" / f"rank{rank}.jsonl"):
            if record.get("kind") != "step":
                continue
            step, batch = record["step"], record["batch"]
            entry = (batch["epoch"], batch["index"], batch["digest"])
            repeated += step in losses
            assert losses.setdefault(step, record["loss"]) == record["loss"], (rank, step)
            assert batches.setdefault(step, entry) == entry, (rank, step)
        found.append(History(losses, batches, repeated))
    return found


def check(run_dir: Path, schedule: Schedule, undisturbed: list[History]) -> dict[str, Any]:
    """Everything that must hold; returns figures for the table."""
    events = list(lines(run_dir / "events.jsonl"))
    incidents = [event for event in events if event["kind"] == "incident"]
    struck = [e for e in lines(run_dir / "faults.jsonl") if e["kind"] == "fault_end"]
    found = histories(run_dir, schedule.world_size)
    for rank, (mine, reference) in enumerate(zip(found, undisturbed, strict=True)):
        assert mine.losses == reference.losses, f"{schedule}\nlosses of rank {rank} differ"
        assert mine.batches == reference.batches, f"{schedule}\nsamples of rank {rank} differ"
        assert mine.repeated <= len(incidents), f"{schedule}\nrank {rank} redid {mine.repeated}"
    assert all(incident["steps_recomputed"] <= 1 for incident in incidents), (schedule, incidents)
    assert len(struck) == len(schedule.faults), f"{schedule}\nonly {len(struck)} faults struck"
    return {
        "faults": len(struck),
        "incidents": len(incidents),
        "recomputed": sum(incident["steps_recomputed"] for incident in incidents),
        "restart_s": [round(incident["restart_s"], 3) for incident in incidents],
    }
