"""How long a SIGKILLed rank holds training up: ftrain beside torchrun, in turn, in one run.

::

    python benchmarks/restart.py [--presets 0.5m 10m 124m] [--kills 30]

pause = (SIGKILL -> next completed step of the slowest rank) - median step. The next step counts
from the new start of the ranks, whichever step that is; steps that had to be recomputed are told
apart. The first kill of each launch is told apart from the later ones. A kill "came back at once"
when the very next start of the ranks completed a step; pauses are of those that came back at all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from common import (
    EXAMPLE,
    FTRAIN,
    ROOT,
    TORCHRUN,
    Launch,
    LaunchError,
    Record,
    launched,
    median_step_s,
    print_table,
    write_results,
)

from ftrain.recovery.node_file import read_node_files

PEER = ROOT / "benchmarks" / "peers" / "torchrun_train.py"
STEPS_BETWEEN = {"0.5m": 12, "10m": 8, "124m": 4}  # at least, after a start, before the next kill
BATCH = {"0.5m": 8, "10m": 4, "124m": 1}
BOUND_S = 0.5  # beyond building the model and copying its state
HEAD = ("", "at once", "never", "median", "first", "least", "most", "recomputed", "of ours")
SEQ = {"0.5m": 128, "10m": 128, "124m": 64}


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it."""

    first: bool  # of its launch
    pause_s: float
    at_once: bool  # the first new start of the ranks completed a step
    recomputed: int  # steps
    phases_s: dict[str, float] = field(default_factory=dict)  # ours: from the incident record


@dataclass(frozen=True)
class Arm:
    """One way to run the job."""

    name: str
    command: Callable[[Path, str, int], list[str | Path]]
    environment: dict[str, str]
    pid_of: Callable[[Launch, int], int | None]


def training(preset: str, cache: Path) -> list[str | Path]:
    """The arguments that every arm's script gets."""
    size = ("--batch-size", str(BATCH[preset]), "--seq", str(SEQ[preset]))
    return ["--preset", preset, *size, "--steps", "1000000", "--cache", cache]


def ftrain_arm(cache: Path) -> Arm:
    """`ftrain launch` of the example."""

    def command(run_dir: Path, preset: str, ranks: int) -> list[str | Path]:
        own = ("launch", "--nproc-per-node", str(ranks), "--run-dir", run_dir)
        never = ("--eval-every", "1000000")
        return [*FTRAIN, *own, EXAMPLE, *training(preset, cache), *never]

    def pid_of(launch: Launch, rank: int) -> int | None:
        nodes = read_node_files(launch.run_dir)
        found = [entry.pid for node in nodes for entry in node.ranks if entry.rank == rank]
        return found[0] if found else None

    return Arm("ftrain", command, {}, pid_of)


def torchrun_arm(cache: Path, name: str, environment: dict[str, str]) -> Arm:
    """Plain torchrun of the same training, which resumes from its own torch.save."""

    def command(run_dir: Path, preset: str, ranks: int) -> list[str | Path]:
        own = ("--nproc-per-node", str(ranks), "--max-restarts", "100", "--standalone")
        return [*TORCHRUN, *own, PEER, "--run-dir", run_dir, *training(preset, cache)]

    def pid_of(launch: Launch, rank: int) -> int | None:
        mine = [record for record in launch.records() if record["rank"] == rank]
        return int(mine[-1]["pid"]) if mine else None

    return Arm(name, command, environment, pid_of)


def completed(records: Sequence[Record], epoch_min: int, ranks: int, steps: int) -> bool:
    """Whether every rank completed so many steps in the newest start, if that is new enough."""
    newest = max((record["epoch"] for record in records), default=-1)
    counts = [0] * ranks
    for record in records:
        counts[record["rank"]] += record["epoch"] == newest
    return newest >= epoch_min and min(counts) >= steps


def kill_once(
    launch: Launch, arm: Arm, preset: str, args: argparse.Namespace, chance: random.Random
) -> Kill:
    """Wait for steady training, kill a random rank at a random moment of a step, wait for it."""
    ranks = args.ranks
    before = launch.wait_for(lambda r: completed(r, 0, ranks, STEPS_BETWEEN[preset]), 300)
    step_s = median_step_s(before)
    epoch = before[-1]["epoch"]
    time.sleep(chance.random() * step_s)
    pid = arm.pid_of(launch, chance.randrange(ranks))
    if pid is None:
        raise LaunchError("the process of the rank to kill is not known")
    known = len(incidents(launch.run_dir))
    killed_ns = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    after = launch.wait_for(lambda r: completed(r, epoch + 1, ranks, 1), args.patience_s)
    reached = max(record["step"] for record in after if record["epoch"] <= epoch)
    newest = max(record["epoch"] for record in after)
    firsts = {r["rank"]: r for r in reversed(after) if r["epoch"] == newest}
    resumed_ns = max(record["t_ns"] for record in firsts.values())
    return Kill(
        first=epoch == before[0]["epoch"],
        pause_s=(resumed_ns - killed_ns) / 1e9 - step_s,
        at_once=newest == epoch + 1,
        recomputed=max(0, reached + 1 - min(record["step"] for record in firsts.values())),
        phases_s=phases_of_incident(launch.run_dir, known),
    )


def incidents(run_dir: Path) -> list[Record]:
    """Our own account of what broke; a peer has none."""
    events = run_dir / "events.jsonl"
    lines = events.read_bytes().split(b"\n")[:-1] if events.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "incident"]


def phases_of_incident(run_dir: Path, index: int, patience_s: float = 2.0) -> dict[str, float]:
    """Seconds from the fault to the end of each phase, by our own account."""
    if not (run_dir / "events.jsonl").exists():
        return {}
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if len(found := incidents(run_dir)) > index:
            phases = found[index].get("phases_s", {})
            return {name: float(seconds) for name, seconds in phases.items() if seconds is not None}
        time.sleep(0.05)
    return {}


def measure(arm: Arm, preset: str, args: argparse.Namespace, number: int) -> list[Kill | str]:
    """One launch with its kills; a string is a kill after which training never came back."""
    outcomes: list[Kill | str] = []
    chance = random.Random(f"{args.seed}-{number}")
    with tempfile.TemporaryDirectory(prefix="ftrain-restart-", dir=args.dir) as folder:
        run_dir = Path(folder)
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.ranks))}
        command = arm.command(run_dir, preset, args.ranks)
        with launched(command, run_dir, environment | arm.environment) as launch:
            for _ in range(args.kills_per_launch):
                try:
                    outcomes.append(kill_once(launch, arm, preset, args, chance))
                except LaunchError as error:
                    print(f"{arm.name}, {preset}: {error}", flush=True)
                    outcomes.append(str(error).splitlines()[0])
                    break
    return outcomes


def row(name: str, outcomes: Sequence[Kill | str], reference_s: float | None) -> list[object]:
    """One line of the table."""
    kills = [outcome for outcome in outcomes if isinstance(outcome, Kill)]
    pauses = sorted(kill.pause_s for kill in kills) or [float("nan")]
    firsts = [kill.pause_s for kill in kills if kill.first] or [float("nan")]
    middle = median(pauses)
    return [
        name,
        f"{sum(kill.at_once for kill in kills)} of {len(outcomes)}",
        len(outcomes) - len(kills),
        middle,
        median(firsts),
        pauses[0],
        pauses[-1],
        f"{sum(kill.recomputed for kill in kills) / max(1, len(kills)):.1f}",
        "" if reference_s is None else f"{middle / reference_s:.1f} x",
    ]


def bound(preset: str, ranks: int) -> Record:
    """What building the model and copying its state take here; of the ranks the slowest counts."""
    script = ROOT / "benchmarks" / "restart_bound.py"
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    with tempfile.TemporaryDirectory(prefix="ftrain-restart-") as folder:
        group = ("--world-size", str(ranks), "--meet", f"{folder}/meet")
        processes = [
            subprocess.Popen(
                [sys.executable, script, "--preset", preset, "--rank", str(rank), *group],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        answers = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    found: Record = {name: max(answer[name] for answer in answers) for name in answers[0]}
    found["bound_s"] = BOUND_S + found["construction_s"] + found["memcpy_s"]
    return found


def show(preset: str, results: dict[str, list[Kill | str]], limits: Record, ranks: int) -> None:
    """The table of one preset, our bound, and our phases."""
    ours = [kill for kill in results.get("ftrain", []) if isinstance(kill, Kill)]
    reference_s = median(kill.pause_s for kill in ours) if ours else None
    rows = [row(name, outcomes, reference_s) for name, outcomes in results.items()]
    title = f"restart, preset {preset}, {ranks} ranks, {os.cpu_count()} cores: pause in s"
    print_table(title, HEAD, rows)
    print(
        f"bound for {limits['state_bytes'] / 1e6:.0f} MB of state: {BOUND_S:g} s"
        f" + {limits['construction_s']:.2f} s building the model"
        f" + {limits['memcpy_s']:.2f} s memcpy of the state = {limits['bound_s']:.2f} s"
    )
    names = dict.fromkeys(name for kill in ours for name in kill.phases_s)
    phases = [
        (name, median(kill.phases_s[name] for kill in ours if name in kill.phases_s))
        for name in names
    ]
    if phases:
        print_table("ours by phase, seconds since the fault, median", ("phase", "s"), phases)


def wants_more(outcomes: Sequence[Kill | str], args: argparse.Namespace) -> bool:
    """Whether an arm has kills to go, and hope."""
    lost = sum(isinstance(outcome, str) for outcome in outcomes)
    return len(outcomes) < args.kills and lost < args.lost_max


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--kills", type=int, default=30, help="per arm and preset")
    parser.add_argument("--kills-per-launch", type=int, default=5)
    parser.add_argument("--patience-s", type=float, default=60, help="until a kill counts as lost")
    parser.add_argument("--lost-max", type=int, default=5, help="kills without return, per arm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dir", help="where run directories are made; default: the temporary folder"
    )
    return parser.parse_args()


def main() -> None:
    """Each preset: launches of the arms in turn, then its table; at the end the JSON file."""
    args = parse_arguments()
    cache = Path(tempfile.gettempdir()) / f"llama-corpus-{os.getuid()}"
    arms = [
        ftrain_arm(cache),
        torchrun_arm(cache, "torchrun", {}),
        torchrun_arm(cache, "torchrun, own store", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
    ]
    arms = [arm for arm in arms if args.arms is None or arm.name in args.arms]
    everything: Record = {}
    for preset in args.presets:
        results: dict[str, list[Kill | str]] = {arm.name: [] for arm in arms}
        for number in itertools.count():
            behind = [arm for arm in arms if wants_more(results[arm.name], args)]
            if not behind:
                break
            for arm in behind:
                results[arm.name] += measure(arm, preset, args, number)
        limits = bound(preset, args.ranks)
        show(preset, results, limits, args.ranks)
        everything[preset] = {"bound": limits} | {
            name: [asdict(kill) if isinstance(kill, Kill) else kill for kill in outcomes]
            for name, outcomes in results.items()
        }
    write_results("restart", {"ranks": args.ranks, "kills": everything})


if __name__ == "__main__":
    main()
