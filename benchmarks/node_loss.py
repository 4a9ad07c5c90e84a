"""Nodes are killed at random moments while spares wait: pause, steps recomputed, lag of protection.

::

    python benchmarks/node_loss.py [--parity 1] [--kills 20] [--width 3100]

FSDP2 over four nodes on this machine, so that no node's state is on another one; each kill is a
SIGKILL of every process of a node (with ``--parity 2`` of two nodes at once), whose memory is gone.
Before and after it, every loss of every rank has to be that of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import FTRAIN, Record, print_table, write_results

from ftrain.comms.events import read_events

JOB = Path(__file__).with_name("node_loss_job.py")
NODES = 4
_LINE = re.compile(r"^step (\d+)/\d+ .*\(parity (\d+)\)")


def run(folder: Path, steps: int, width: int, options: list[str]) -> str:
    """One launch to its end; what it showed."""
    folder.mkdir()
    command = [*FTRAIN, "launch", "--run-dir", "run", f"--local-nodes={NODES}"]
    place = ["--nproc-per-node=1", "events.progress_piped_every_s=1"]
    script = [str(JOB), str(steps), str(width), str(folder / "steps")]
    done = subprocess.run(
        [*command, *place, *options, *script], cwd=folder, capture_output=True, text=True
    )
    shown = done.stdout + done.stderr
    if done.returncode:
        sys.exit(f"the launch ended with {done.returncode}:\n{shown}")
    return shown


def records(folder: Path) -> list[Record]:
    """Every completed step of every rank, in order of time."""
    files = {rank: folder / "steps" / f"rank{rank}.jsonl" for rank in range(NODES)}
    found = [
        {**json.loads(line), "rank": rank}
        for rank, path in files.items()
        for line in path.read_text().splitlines()
    ]
    return sorted(found, key=lambda record: record["t_ns"])


def losses(found: list[Record]) -> dict[tuple[int, int], set[str]]:
    """By rank and step, every loss that was seen there."""
    seen: dict[tuple[int, int], set[str]] = {}
    for record in found:
        seen.setdefault((record["rank"], record["step"]), set()).add(record["loss"])
    return seen


def schedule(kills: int, parity: int, apart: int, draw: random.Random) -> str:
    """The faults; the node of rank 0, which leads, at least every fourth time."""
    faults = []
    for number in range(kills):
        first = 0 if number % 4 == 0 else draw.randrange(NODES)
        others = draw.sample([rank for rank in range(NODES) if rank != first], parity - 1)
        step, delay_s = apart * (number + 1), draw.uniform(0, 0.5)
        when = f"at_step:{step},delay_s:{delay_s:.3f}"
        faults += [f"{{kind:node,rank:{rank},{when}}}" for rank in (first, *others)]
    return f"faults.schedule=[{','.join(faults)}]"


def pauses(found: list[Record]) -> list[float]:
    """Of each restart: from the last step before it to the first one after it that all ranks have
    done, less one step."""
    epochs = sorted({record["epoch"] for record in found})
    times = {e: [r["t_ns"] for r in found if r["epoch"] == e and r["rank"] == 0] for e in epochs}
    gaps = [b - a for ts in times.values() for a, b in itertools.pairwise(ts)]
    step_ns = median(gaps)
    every = itertools.pairwise(epochs)
    return [(min(times[b]) - max(times[a]) - step_ns) / 1e9 for a, b in every]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parity", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--width", type=int, default=3100)
    parser.add_argument("--apart", type=int, default=20, help="steps from one kill to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args()
    steps = options.apart * (options.kills + 1)
    faults = schedule(options.kills, options.parity, options.apart, random.Random(options.seed))
    parity = [f"snapshot.parity={options.parity}", f"--spares={options.parity}"]
    with tempfile.TemporaryDirectory() as folder:
        plain, broken = Path(folder, "plain"), Path(folder, "broken")
        run(plain, steps, options.width, parity)
        shown = run(broken, steps, options.width, [*parity, faults])
        expected, found = losses(records(plain)), records(broken)
        wrong = [place for place, seen in losses(found).items() if seen != expected[place]]
        every: list[dict[str, Any]] = list(read_events(broken / "run" / "events.jsonl"))
    incidents = [event for event in every if event["kind"] == "incident"]
    exposed = [e["data"]["exposed_s"] for e in every if e["kind"] == "protected"]
    lags = [int(m[1]) - int(m[2]) for m in map(_LINE.match, shown.splitlines()) if m]
    paused = pauses(found)
    again = [incident["steps_recomputed"] for incident in incidents]
    result: Record = {
        "parameters": options.width**2 + 41 * options.width + 8,
        "parity": options.parity,
        "kills": options.kills,
        "incidents": len(incidents),
        "levels": sorted({incident["restore"]["level"] for incident in incidents}),
        "steps_with_other_losses": len(wrong),
        "pause_s": {"median": median(paused), "max": max(paused), "each": paused},
        "steps_recomputed": {"median": median(again), "max": max(again), "each": again},
        "lag_steps": {"median": median(lags), "max": max(lags), "looks": len(lags)},
        "exposed_s": {"median": median(exposed), "max": max(exposed)} if exposed else {},
    }
    rows = [
        ["pause less one step, s", median(paused), max(paused)],
        ["steps recomputed", median(again), max(again)],
        ["lag of protection, steps", median(lags), max(lags)],
        ["without parity, s", median(exposed or [0.0]), max(exposed or [0.0])],
    ]
    title = (
        f"{options.kills} times {options.parity} of {NODES} nodes killed, "
        f"{result['parameters'] / 1e6:.1f} M parameters: {len(incidents)} incidents, restored from "
        f"{', '.join(result['levels'])}; {len(wrong)} losses differ from the undisturbed run's"
    )
    print_table(title, ["", "median", "most"], rows)
    if not options.no_results:
        write_results(f"node_loss-{options.parity}", result)


if __name__ == "__main__":
    main()
