"""What a snapshot in memory after every step costs, by state size and step time.

::

    python benchmarks/overhead.py [--presets 0.5m 5m 10m 124m] [--rounds 3]

Each size and batch trains with ``snapshot=off`` and with snapshots, in turn; all ranks train and
all cores are busy.  Core time is that of every rank and of the snapshot manager together, beside
memcpy into a memory file and xxh3-128 of the same bytes, measured by the same processes just
before.  Told apart: *lost* is how much longer a step takes, *barrier* is how long optimizer.step
waited for the copy, *blocking* is how much longer the script stands at the boundary.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from common import FTRAIN, ROOT, Record, launched, print_table, write_results

JOB = ROOT / "benchmarks" / "overhead_job.py"
BATCHES = {"0.5m": (2, 8, 32), "5m": (1, 4, 8), "10m": (1, 4, 16), "124m": (1, 4)}
STEPS = {"0.5m": 100, "5m": 40, "10m": 30, "124m": 8}
ARMS = {"off": ("snapshot=off",), "on": ("snapshot=default",)}
LOST_PERCENT_MAX = 5.0


def measure(arm: str, preset: str, batch: int, args: argparse.Namespace) -> Record:
    """One launch; per step, over all ranks."""
    with tempfile.TemporaryDirectory(prefix="ftrain-overhead-", dir=args.dir) as folder:
        own = ("launch", "--nproc-per-node", str(args.ranks), "--run-dir", folder)
        size = ("--preset", preset, "--batch-size", str(batch), "--steps", str(STEPS[preset]))
        places = ("--cache", args.cache, "--out", folder)
        command = (*FTRAIN, *own, *ARMS[arm], "checkpoint=off", JOB, *size, *places)
        threads = str(max(1, (os.cpu_count() or 1) // args.ranks))
        with launched(command, Path(folder), {"OMP_NUM_THREADS": threads}) as launch:
            launch.finish(args.patience_s)
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("rank*.json")]
    return per_step(ranks, STEPS[preset])


def per_step(ranks: Sequence[Record], steps: int) -> Record:
    """Sums over the ranks where they add up, means where they run side by side."""
    windows = [rank["window"] for rank in ranks]

    def total_ms(name: str, unit: float) -> float:
        return float(sum(window.get(name, 0.0) for window in windows)) * unit / steps

    def mean_ms(name: str, unit: float) -> float:
        return total_ms(name, unit) / len(windows)

    return {
        "state_mb": ranks[0]["state_bytes"] / 1e6,
        "step_ms": mean_ms("wall_s", 1e3),
        "boundary_ms": mean_ms("boundary_s", 1e3),
        "barrier_ms": mean_ms("barrier_ns", 1e-6),
        "core_ms": total_ms("process_s", 1e3) + mean_ms("manager_s", 1e3),
        "capture_core_ms": total_ms("capture_thread_s", 1e3),
        "manager_core_ms": mean_ms("manager_s", 1e3),
        "copy_ms": total_ms("copy_ns", 1e-6),
        "hash_ms": total_ms("hash_ns", 1e-6),
        "copied_mb": total_ms("bytes_copied", 1e-6),
        "skipped": total_ms("skipped", 1.0),
        "memcpy_ms_per_mb": fmean(rank["reference"]["memcpy"] for rank in ranks),
        "hash_ms_per_mb": fmean(rank["reference"]["hash"] for rank in ranks),
    }


def compare(runs: dict[str, list[Record]]) -> Record:
    """Medians over the rounds, and what the snapshots added."""
    off, on = (
        {name: median(run[name] for run in runs[arm]) for name in runs[arm][0]} for arm in ARMS
    )
    copied_mb = on["copied_mb"] or float("nan")
    reference = on["memcpy_ms_per_mb"] + on["hash_ms_per_mb"]
    lost_ms = on["step_ms"] - off["step_ms"]
    per_mb = {
        name: on[f"{name}_ms"] / copied_mb
        for name in ("copy", "hash", "capture_core", "manager_core")
    }
    per_mb["added_core"] = (on["core_ms"] - off["core_ms"]) / copied_mb
    return {
        "off": off,
        "on": on,
        "lost_ms": lost_ms,
        "lost_percent": 100 * lost_ms / off["step_ms"],
        "blocking_ms": on["boundary_ms"] - off["boundary_ms"],
        "core_ms_per_mb": per_mb,
        "reference_core_ms_per_mb": reference,
        "capture_to_reference": (per_mb["capture_core"] + per_mb["manager_core"]) / reference,
        "added_to_reference": per_mb["added_core"] / reference,
    }


TIME = ("batch", "step ms", "with L1", "lost ms", "lost %", "barrier ms", "blocking ms", "skipped")
CORE = ("batch", "memcpy", "hash", "our copy*", "our hash*", "capture", "manager", "all added")


def show(preset: str, found: dict[int, Record], ranks: int) -> None:
    """Two tables for one state size: time, and core time by stage."""
    times, cores = [], []
    for batch, run in found.items():
        off, on, per_mb = run["off"], run["on"], run["core_ms_per_mb"]
        lost = (run["lost_ms"], run["lost_percent"], on["barrier_ms"], run["blocking_ms"])
        times.append((batch, off["step_ms"], on["step_ms"], *lost, on["skipped"]))
        ratios = (run["capture_to_reference"], run["added_to_reference"])
        reference = (on["memcpy_ms_per_mb"], on["hash_ms_per_mb"])
        cores.append((batch, *reference, *per_mb.values(), *ratios))
    state_mb = next(iter(found.values()))["on"]["state_mb"]
    title = f"overhead, {state_mb:.0f} MB of state (preset {preset}), {ranks} ranks"
    print_table(f"{title}, {os.cpu_count()} cores: time per step", TIME, times)
    head = (*CORE, "(capture+manager)/(memcpy+hash)", "all added/(memcpy+hash)")
    print_table("core-ms per MB by stage; * wall time inside the capture thread", head, cores)
    good = [r["off"]["step_ms"] for r in found.values() if r["lost_percent"] <= LOST_PERCENT_MAX]
    least = f"{min(good):.0f} ms" if good else "none of these"
    needed_ms = 100 / LOST_PERCENT_MAX * median(max(0.0, r["lost_ms"]) for r in found.values())
    print(
        f"smallest measured step with at most 5 % lost: {least}; from lost ms: {needed_ms:.0f} ms"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--patience-s", type=float, default=600, help="for one launch")
    parser.add_argument(
        "--dir", help="where run directories are made; default: the temporary folder"
    )
    cache = Path(tempfile.gettempdir()) / f"llama-corpus-{os.getuid()}"
    parser.add_argument("--cache", type=Path, default=cache)
    return parser.parse_args()


def main() -> None:
    """Each size and batch: the arms in turn, for some rounds; then tables and the JSON file."""
    args = parse_arguments()
    everything: Record = {}
    for preset in args.presets:
        found: dict[int, Record] = {}
        for batch in BATCHES[preset]:
            runs: dict[str, list[Record]] = {arm: [] for arm in ARMS}
            for _ in range(args.rounds):
                for arm in ARMS:
                    runs[arm].append(measure(arm, preset, batch, args))
            found[batch] = compare(runs)
        show(preset, found, args.ranks)
        everything[preset] = found
    write_results("overhead", {"ranks": args.ranks, "presets": everything})


if __name__ == "__main__":
    main()
