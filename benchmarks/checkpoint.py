"""What a checkpoint costs training, ours beside others, by length of forward and backward.

::

    python benchmarks/checkpoint.py [--sizes 0.3 1.3] [--ratios 0.25 0.5 1 2 4] [--rounds 3]

Each run trains the example's model on all cores, with one way to save; runs follow each other in
random order, and every round has one without checkpoints.  A ratio is forward + backward of that
run over our capture (copy and hash) of the same round.  Told apart:

* *blocking*: how long the training thread (on a GPU: the training's stream) is held for a
  checkpoint: by the call, by the barrier in front of the optimizer, by a checkpoint before that is
  still being written;
* *lost*: the whole run until its last checkpoint is durable, minus the one without, per checkpoint;
* *staged*, *durable*: from the boundary until the copy is complete, until it is on the disk;
* *memory*: how much less the system had available at worst than before the run.

States of 4 and 15 GB want a GPU (bf16 autocast, fused AdamW); the training's stream, and no other,
is waited for before each time is taken.

Ours is the product: a Session under ``ftrain launch``, captured to memory with its hash, written by
the snapshot manager and published by the coordinator.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from checkpoint_curve import draw
from common import FTRAIN, ROOT, LaunchError, Record, launched, print_table, write_results

JOB = ROOT / "benchmarks" / "checkpoint_job.py"
CEILINGS = ROOT / "benchmarks" / "ceilings.py"
SIZES = ("tiny", "0.3", "1.3", "4", "15")
ON_GPU = ("4", "15")
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
SWEEP = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens
GPU_SWEEP = (1024, 2048, 4096, 8192, 16384, 32768)
DCP = ("DCP", "DCP async thread", "DCP async process")
DEEPSPEED = ("DeepSpeed torch",)
OURS_EVERY_STEP = "ours, every step"
NONE = "none"


def arm_names(every: int) -> list[str]:
    """All ways to save; the last two are ours."""
    peers = [NONE, "torch.save", *DCP, *DEEPSPEED]
    return [*peers, OURS_EVERY_STEP, ours_at(every)]


def ours_at(every: int) -> str:
    """Our arm that saves as often as the peers."""
    return f"ours, every {every} steps"


@contextmanager
def memory_watched() -> Iterator[dict[str, float]]:
    """How many GB less were available at worst than at first: everybody's, so keep it quiet."""
    found = {"gb": 0.0}
    first, done = available_gb(), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            found["gb"] = max(found["gb"], first - available_gb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def available_gb() -> float:
    """What the system could still give."""
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 / 1e9


@dataclass(frozen=True)
class Setting:
    """One state, one length of forward and backward."""

    size: str
    tokens: int
    every: int
    checkpoints: int

    @property
    def words(self) -> list[str]:
        """For the job."""
        times = ["--every", str(self.every), "--checkpoints", str(self.checkpoints)]
        return ["--size", self.size, "--tokens", str(self.tokens), *times]


def run(arm: str, setting: Setting, args: argparse.Namespace) -> Record:
    """One run of one arm; LaunchError when it fails."""
    with (
        tempfile.TemporaryDirectory(prefix="ftrain-checkpoint-", dir=args.dir) as folder,
        memory_watched() as memory,
    ):
        out = Path(folder) / "result.json"
        words = [*setting.words, "--out", str(out)]
        ours = arm.startswith("ours")
        command: list[str | Path] = [sys.executable, JOB, "--arm", arm, "--dir", f"{folder}/saved"]
        if ours:
            every = 1 if arm == OURS_EVERY_STEP else setting.every
            often = (f"snapshot.every_steps={every}", f"checkpoint.durable_every_steps={every}")
            own = ("launch", "--nproc-per-node", "1", "--run-dir", f"{folder}/run", *often)
            command = [*FTRAIN, *own, JOB, "--arm", "ours"]
        # A build of DeepSpeed's that is interrupted hangs everybody who has the same folder.
        extensions = {"TORCH_EXTENSIONS_DIR": f"{folder}/extensions"}
        environment = {"OMP_NUM_THREADS": str(os.cpu_count())} | extensions
        with launched([*command, *words], Path(folder), environment) as launch:
            launch.finish(args.patience_s)
        result: Record = json.loads(out.read_text())
        if ours:
            result |= durable_times(Path(folder) / "run" / "events.jsonl", result)
    return result | {"memory_gb": memory["gb"]}


def durable_times(events: Path, result: Record) -> Record:
    """Our versions as the peers state theirs: when each was published, until the run's end."""
    last = result["rows"][-1]["step"]
    captures = {c["step"]: c["capture_ns"] for c in result["captures"]}
    begun = {row["step"]: row["boundary_ns"] for row in result["rows"]}
    saved = []
    for line in events.read_bytes().split(b"\n")[:-1]:
        event = json.loads(line)
        if event["kind"] == "published" and (step := event["version"]["step"]) <= last:
            staged = begun[step] + captures.get(step, 0)
            times = {"staged_ns": staged, "durable_ns": event["monotonic_ns"]}
            saved.append({"step": step, **times})
    ended = max([result["done_ns"], *(record["durable_ns"] for record in saved)])
    return {"saved": saved, "ended_ns": ended}


def optimizer_ns(result: Record) -> float:
    """How long the optimizer takes, with all that it has to wait for."""
    return float(median(row["optimizer_ns"] for row in result["rows"]))


def account(result: Record, setting: Setting, arm: str, free_ns: float) -> Record:
    """What one run says by itself; times in ms, but for the wall's.

    ``free_ns`` is how long the optimizer takes without checkpoints: on a GPU it is the optimizer's
    kernels that wait.
    """
    every = setting.every
    interval = 1 if arm == OURS_EVERY_STEP else every
    counted = [row for row in result["rows"] if row["step"] >= every]
    due = [row for row in counted if row["step"] % interval == 0]
    begun = {row["step"]: row["boundary_ns"] for row in counted}
    saved = [record for record in result["saved"] if record["step"] in begun]
    if setting.size in ON_GPU:
        barriers = [max(0.0, row["optimizer_ns"] - free_ns) for row in due]
    else:
        barriers = [row["barrier_ns"] for row in due]
    held = [row["held_ns"] for row in due]
    blocking = [sum(both) / 1e6 for both in zip(held, barriers, strict=True)]
    durable = [(r["durable_ns"] - begun[r["step"]]) / 1e6 for r in saved]
    staged = [(r["staged_ns"] - begun[r["step"]]) / 1e6 for r in saved]
    found = {
        "wall_s": (result["ended_ns"] - counted[0]["boundary_ns"]) / 1e9,
        "compute_ms": median(row["compute_ns"] for row in counted) / 1e6,
        "checkpoints": len(due),
        "blocking_ms": median(blocking[1:]),
        "blocking_mean_ms": sum(blocking[1:]) / max(1, len(blocking) - 1),
        "blocking_first_ms": blocking[0],
        "memory_gb": result["memory_gb"],
        "durable": len(saved),
        "skipped": result.get("skipped", 0),
    }
    if saved:
        found |= {"staged_ms": median(staged[1:] or staged), "staged_first_ms": staged[0]}
        found |= {"durable_ms": median(durable[1:] or durable), "durable_first_ms": durable[0]}
    captures = [c["capture_ns"] / 1e6 for c in result.get("captures", []) if c["step"] in begun]
    return found | ({"capture_ms": median(captures)} if captures else {})


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Record]:
    """All arms in random order, round after round; medians over the rounds."""
    chance = random.Random(f"{args.seed}-{setting}")
    names = [name for name in arm_names(setting.every) if chosen(name, args)]
    rounds: dict[str, list[Record]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for _ in range(args.rounds):
        results: dict[str, Record] = {}
        for name in chance.sample(names, len(names)):
            if name in failures:
                continue
            print(f"{setting.size} GB, {name} ...", file=sys.stderr, flush=True)
            try:
                results[name] = run(name, setting, args)
            except LaunchError as error:
                failures[name] = str(error)
                print(f"{name} is left out: {error}", flush=True)
        free_ns = optimizer_ns(results[NONE])
        found = {name: account(r, setting, name, free_ns) for name, r in results.items()}
        for name, record in found.items():
            record["lost_s"] = record["wall_s"] - found[NONE]["wall_s"]
            rounds[name].append(record)
    arms = {name: over_rounds(records) for name, records in rounds.items() if records}
    return arms | {name: {"failed": why} for name, why in failures.items() if name not in arms}


def chosen(name: str, args: argparse.Namespace) -> bool:
    """Whether an arm was asked for; ``ours`` stands for both of ours."""
    short = "ours" if name.startswith("ours") else name
    return args.arms is None or short in args.arms or name == NONE


def over_rounds(records: Sequence[Record]) -> Record:
    """Medians, and what was lost per checkpoint; the extremes of that are kept."""
    names = set.intersection(*(set(record) for record in records))
    found: Record = {name: median(record[name] for record in records) for name in names}
    lost = [1e3 * r["lost_s"] / r["checkpoints"] for r in records]
    return found | {"lost_ms": median(lost), "lost_ms_all": lost, "rounds": len(records)}


HEAD = (
    "arm",
    "blocking ms",
    "first",
    "/ best DCP",
    "lost ms",
    "least to most",
    "/ torch.save",
    "/ best DCP",
    "staged ms",
    "durable s",
    "first",
    "durable of",
    "GB",
)

DURABLE = ("durable_ms", "durable_first_ms")


def best(arms: dict[str, Record], figure: str, among: Sequence[str]) -> float:
    """The lowest figure of some arms."""
    values = [arms[name][figure] for name in among if figure in arms.get(name, {})]
    return min(values, default=float("nan"))


def compare(arms: dict[str, Record]) -> None:
    """Add the ratios that the targets are about."""
    blocking = best(arms, "blocking_ms", DCP)
    lost_dcp, lost_torch = best(arms, "lost_ms", DCP), best(arms, "lost_ms", ["torch.save"])
    for record in arms.values():
        if "failed" not in record:
            record["blocking_to_dcp"] = record["blocking_ms"] / blocking
            record["lost_to_torch"] = record["lost_ms"] / lost_torch
            record["lost_to_dcp"] = record["lost_ms"] / lost_dcp


def show(setting: Setting, wanted: float, arms: dict[str, Record], gb: float) -> float:
    """The table of one ratio; returns the ratio that it really was."""
    capture = arms.get(ours_at(setting.every), {}).get("capture_ms", float("nan"))
    compute = arms[NONE]["compute_ms"]
    ratio = compute / capture
    rows: list[list[object]] = []
    for name, arm in arms.items():
        if name == NONE or "failed" in arm:
            continue
        lost = arm["lost_ms_all"]
        saved = f"{arm['durable']:.0f}/{arm['checkpoints']:.0f}"
        durable = [f"{arm.get(key, float('nan')) / 1e3:.2f}" for key in DURABLE]
        rows.append(
            [
                *(name, arm["blocking_ms"], arm["blocking_first_ms"], arm["blocking_to_dcp"]),
                *(arm["lost_ms"], f"{min(lost):.0f} to {max(lost):.0f}"),
                *(arm["lost_to_torch"], arm["lost_to_dcp"], arm.get("staged_ms", float("nan"))),
                *(*durable, saved, f"{arm['memory_gb']:.1f}"),
            ]
        )
    title = (
        f"checkpoint, {gb:.2f} GB, {os.cpu_count()} cores: forward + backward {compute:.0f} ms ="
        f" {ratio:.2f} x our capture ({capture:.0f} ms; {wanted:g} was aimed at), a checkpoint"
        f" every {setting.every} steps"
    )
    print_table(title, HEAD, rows)
    return ratio


def ceilings(size: str, args: argparse.Namespace) -> Record:
    """What the machine gives, printed."""
    with tempfile.TemporaryDirectory(prefix="ftrain-checkpoint-", dir=args.dir) as folder:
        command = [sys.executable, CEILINGS, "--size", size, "--dir", folder]
        command += ["--rounds", "2" if size in ON_GPU else "5"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: Record = json.loads(output)
    ratio = found["ours"] / found["direct"]
    names = ("memcpy", "hash", "from the GPU", "direct", "buffered")
    rows = [(name, found[name]) for name in names if name in found]
    rows += [("our version, durable", found["ours"]), ("ours / direct", ratio)]
    print_table(f"ceilings, {found['state_bytes'] / 1e9:.2f} GB, idle cores", ("", "GB/s"), rows)
    return found


def calibrate(size: str, args: argparse.Namespace) -> tuple[list[tuple[float, int]], float]:
    """Forward + backward in ms by tokens, and our capture in ms beside training."""
    with tempfile.TemporaryDirectory(prefix="ftrain-checkpoint-", dir=args.dir) as folder:
        out = Path(folder) / "result.json"
        sweep = [str(tokens) for tokens in (GPU_SWEEP if size in ON_GPU else SWEEP)]
        words = ("--arm", "calibrate", "--size", size, "--tokens", *sweep, "--out", out)
        environment = {"OMP_NUM_THREADS": str(os.cpu_count())}
        with launched([sys.executable, JOB, *words], Path(folder), environment) as launch:
            launch.finish(args.patience_s)
        times = json.loads(out.read_text())["forward_backward_s"]
    compute = sorted((1e3 * seconds, int(tokens)) for tokens, seconds in times.items())
    setting = Setting(size, 4096 if size in ON_GPU else 256, 3, 4)
    capture = account(run(ours_at(3), setting, args), setting, ours_at(3), 0.0)["capture_ms"]
    return compute, capture


def tokens_for(compute: Sequence[tuple[float, int]], wanted_ms: float) -> int:
    """How many tokens take so long, between the two nearest that were measured."""
    for (low, fewer), (high, more) in pairwise(compute):
        if wanted_ms <= high:
            share = max(0.0, (wanted_ms - low) / (high - low))
            tokens = round(fewer + share * (more - fewer))
            return tokens if tokens < 128 else round(tokens / 128) * 128
    ms, tokens = compute[-1]
    return round(tokens * wanted_ms / ms / 128) * 128


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.3", "1.3"])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--checkpoints", type=int, default=20, help="counted in each run")
    parser.add_argument("--arms", nargs="+", help="peers, or ours; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience-s", type=float, default=1800, help="for one run")
    parser.add_argument("--dir", help="where states are saved; default: the temporary folder")
    parser.add_argument("--name", default="checkpoint", help="of the files with the results")
    return parser.parse_args()


def main() -> None:
    """Each size: ceilings, calibration, the ratios; then the curve and the JSON file."""
    args = parse_arguments()
    everything: Record = {}
    for size in args.sizes:
        limits = ceilings(size, args)
        compute, capture = calibrate(size, args)
        found = []
        for wanted in args.ratios:
            tokens = tokens_for(compute, wanted * capture)
            setting = Setting(size, tokens, args.every, args.checkpoints)
            arms = measure(setting, args)
            compare(arms)
            ratio = show(setting, wanted, arms, limits["state_bytes"] / 1e9)
            found.append({"aimed_at": wanted, "ratio": ratio, "tokens": tokens, "arms": arms})
        everything[size] = {"ceilings": limits, "ratios": found, "ours": ours_at(args.every)}
    path = write_results(args.name, {"every": args.every, "states": everything})
    for line in draw(everything, path.with_suffix(".png")):
        print(line)


if __name__ == "__main__":
    main()
