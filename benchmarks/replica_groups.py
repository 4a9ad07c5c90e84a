"""Training in replica groups: what a step costs more than plain DDP, and what a killed group costs.

::

    python benchmarks/replica_groups.py [--torchft PYTHON] [--kills 10] [--rounds 3]

*Cost*: two groups of one rank against ``torchrun`` with DDP over gloo (and torchft), one thread
each, in turn in every round; medians of the step time.  *Kills*: three groups; one is SIGKILLed at
a random moment, from that to the end of the survivors' next step, and to the first step in which
the killed one takes part again.  ``--torchft`` is a Python that has torchft installed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from common import FTRAIN, ROOT, TORCHRUN, Columns, Record, print_records, write_results

JOB = ROOT / "benchmarks" / "replica_groups_job.py"
# width, layers, batch: 1 M parameters in steps of about 20 and 200 ms, and 10 M
SIZES = {"1 M, short": (512, 4, 160), "1 M, long": (512, 4, 2000), "10 M": (1826, 3, 64)}
_FIRST = 10  # steps that are not counted


def words(arm: str, size: str, steps: int, out: Path) -> list[str]:
    """The job's arguments."""
    width, depth, batch = SIZES[size]
    sizes = ["--width", str(width), "--depth", str(depth), "--batch", str(batch)]
    return [str(JOB), "--arm", arm, *sizes, "--steps", str(steps), "--out", str(out)]


@contextlib.contextmanager
def running(commands: list[tuple[list[str], dict[str, str]]], log: Path) -> Iterator[list[int]]:
    """Processes for the length of a block."""
    with log.open("ab") as file:
        started = [
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command, environment in commands
        ]
    try:
        yield [process.pid for process in started]
    finally:
        for process in started:
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
                if process.poll() is None:
                    process.send_signal(number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(3)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def commands(
    arm: str, size: str, groups: int, steps: int, folder: Path, torchft: str
) -> list[tuple[list[str], dict[str, str]]]:
    """What starts an arm."""
    job = words(arm, size, steps, folder / "out")
    one_thread = {"OMP_NUM_THREADS": "1"}
    if arm == "ftrain":
        options = ["--replica-groups", str(groups), "--run-dir", str(folder / "run")]
        return [([*FTRAIN, "launch", *options, "checkpoint=off", *job], one_thread)]
    if arm == "ddp":
        return [([*TORCHRUN, "--standalone", "--nproc-per-node", str(groups), *job], one_thread)]
    port = free_port()
    lighthouse = Path(torchft).with_name("torchft_lighthouse")
    found = [
        ([str(lighthouse), "--min_replicas", "1", "--bind", f"127.0.0.1:{port}"], dict[str, str]())
    ]
    for group in range(groups):
        place = {
            "REPLICA_GROUP_ID": str(group),
            "NUM_REPLICA_GROUPS": str(groups),
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}",
            **one_thread,
        }
        runner = [torchft, "-m", "torch.distributed.run", "--master-port", str(free_port())]
        found.append(([*runner, "--nproc-per-node", "1", "--max-restarts", "9", *job], place))
    return found


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rows(folder: Path, rank: int) -> list[Record]:
    """The steps that a rank has written down."""
    path = folder / "out" / f"rank{rank}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for(folder: Path, rank: int, steps: int, timeout_s: float = 120) -> None:
    """Until a rank has made so many."""
    end_s = time.monotonic() + timeout_s
    while len(rows(folder, rank)) < steps:
        if time.monotonic() > end_s:
            log = (folder / "log").read_text(errors="replace")[-2000:]
            raise SystemExit(f"rank {rank} did not make {steps} steps in {timeout_s:g} s:\n{log}")
        time.sleep(0.05)


def step_s(arm: str, size: str, steps: int, torchft: str) -> float:
    """Median step time of two ranks."""
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as name:
        folder = Path(name)
        with running(commands(arm, size, 2, steps, folder, torchft), folder / "log"):
            wait_for(folder, 0, steps - 1)
            found = rows(folder, 0)
    times = [row["at_s"] for row in found if row["members"] == 2][_FIRST:]
    return median(after - before for before, after in itertools.pairwise(times))


def cost(sizes: list[str], arms: list[str], rounds: int, torchft: str) -> list[Record]:
    """Step times side by side."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for size in sizes:
            steps = 60 if "long" in size else 200
            for arm in arms:
                found.setdefault((size, arm), []).append(step_s(arm, size, steps, torchft))
    records: list[Record] = []
    for (size, arm), each in found.items():
        plain = median(found[size, "ddp"])
        record: Record = {"size": size, "arm": arm, "step_s": median(each), "steps_s": each}
        records.append({**record, "ratio": record["step_s"] / plain})
    return records


def kills(arm: str, size: str, count: int, torchft: str) -> Record:
    """Groups that are killed, one after the other."""
    rng = random.Random(count)
    onward: list[float] = []
    healed: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as name:
        folder = Path(name)
        with running(commands(arm, size, 3, 10**6, folder, torchft), folder / "log"):
            for rank in range(3):
                wait_for(folder, rank, 20)
            for _ in range(count):
                victim = rng.randrange(3)
                until_full(folder)
                time.sleep(rng.uniform(0.5, 1.0))
                pid = rows(folder, victim)[-1]["pid"]
                os.kill(pid, signal.SIGKILL)
                killed_s = time.monotonic()
                others = [rank for rank in range(3) if rank != victim]
                onward.append(max(first_after(folder, rank, killed_s) for rank in others))
                healed.append(first_after(folder, victim, killed_s))
            every = [row for rank in range(3) for row in rows(folder, rank)]
    steps = sorted(row["at_s"] for row in every if row["members"] == 3)
    return {
        "arm": arm,
        "size": size,
        "kills": count,
        "onward_s": median(onward),
        "onward_most_s": max(onward),
        "healed_s": median(healed),
        "healed_most_s": max(healed),
        "onwards_s": onward,
        "healeds_s": healed,
        "steps": len(steps),
    }


def until_full(folder: Path) -> None:
    """Until all three take part again."""
    end_s = time.monotonic() + 120
    while any(
        not found or found[-1]["members"] != 3 for found in (rows(folder, r) for r in range(3))
    ):
        if time.monotonic() > end_s:
            raise SystemExit("the groups did not come together again in 120 s")
        time.sleep(0.05)


def first_after(folder: Path, rank: int, killed_s: float) -> float:
    """Seconds from the kill to the end of the first step that ended more than a moment after it."""
    end_s = time.monotonic() + 120
    while time.monotonic() < end_s:
        later = [row["at_s"] for row in rows(folder, rank) if row["at_s"] > killed_s]
        if later:
            return later[0] - killed_s
        time.sleep(0.02)
    raise SystemExit(f"rank {rank} made no step in 120 s after a kill")


COST: Columns = (
    ("", lambda r: r["size"]),
    (" ", lambda r: r["arm"]),
    ("step", lambda r: f"{r['step_s'] * 1e3:.1f} ms"),
    ("of plain DDP's", lambda r: f"{r['ratio']:.3f}"),
)
KILLS: Columns = (
    ("", lambda r: r["size"]),
    (" ", lambda r: r["arm"]),
    ("kills", lambda r: str(r["kills"])),
    ("others' next step", lambda r: f"{r['onward_s']:.3f} s"),
    ("most", lambda r: f"{r['onward_most_s']:.3f} s"),
    ("back in", lambda r: f"{r['healed_s']:.3f} s"),
    ("most ", lambda r: f"{r['healed_most_s']:.3f} s"),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--torchft", default="", help="a Python that has torchft")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args()
    arms = ["ddp", "ftrain", *(["torchft"] if options.torchft else [])]
    killed: list[Record] = []
    for arm in arms[1:]:
        count = options.kills if arm == "ftrain" else max(1, options.kills // 3)
        killed.append(
            kills(arm, "10 M" if arm == "ftrain" else "1 M, short", count, options.torchft)
        )
        print_records(f"a killed group, {os.cpu_count()} cores", KILLS, killed)
    costs = cost(list(SIZES), arms, options.rounds, options.torchft)
    print_records(f"a step, {os.cpu_count()} cores", COST, costs)
    if not options.no_results:
        write_results("replica_groups", {"costs": costs, "kills": killed})


if __name__ == "__main__":
    main()
