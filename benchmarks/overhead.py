"""What a snapshot in memory after every step costs, by state size and step time.

::

    python benchmarks/overhead.py [--presets 0.5m 5m 10m 124m]

Each size and batch is one training that takes snapshots in one block of steps and none in the next,
in turn; all ranks train and all cores are busy.  Core time is that of every rank and of the
snapshot manager together, beside memcpy into a memory file and xxh3-128 of the same bytes, measured
by the same processes between the blocks.  Told apart: *lost* is how much longer a step takes,
*barrier* is how long optimizer.step waited for the copy, *blocking* is how much longer the script
stands at the boundary.  Figures are medians over the rounds; lost ms has its quartiles beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, quantiles

from common import FTRAIN, ROOT, Record, launched, print_table, write_results

JOB = ROOT / "benchmarks" / "overhead_job.py"
BATCHES = {"0.5m": (2, 8), "5m": (1, 2, 4), "10m": (1, 4), "124m": (1,)}
STEPS = {"0.5m": 30, "5m": 12, "10m": 6, "124m": 3}  # counted in each block
ROUNDS = {"0.5m": 8, "5m": 8, "10m": 6, "124m": 4}
LOST_PERCENT_MAX = 5.0


def measure(preset: str, batch: int, args: argparse.Namespace) -> Record:
    """One launch, as medians over its rounds."""
    with tempfile.TemporaryDirectory(prefix="ftrain-overhead-", dir=args.dir) as folder:
        own = ("launch", "--nproc-per-node", str(args.ranks), "--run-dir", folder)
        rounds = args.rounds or ROUNDS[preset]
        size = ("--preset", preset, "--batch-size", str(batch))
        length = ("--steps", str(STEPS[preset]), "--rounds", str(rounds))
        places = ("--cache", args.cache, "--out", folder)
        command = (*FTRAIN, *own, "checkpoint=off", JOB, *size, *length, *places)
        threads = str(max(1, (os.cpu_count() or 1) // args.ranks))
        with launched(command, Path(folder), {"OMP_NUM_THREADS": threads}) as launch:
            launch.finish(args.patience_s)
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("rank*.json")]
    return summary(ranks)


def per_step(blocks: Sequence[Record]) -> Record:
    """One block of every rank: sums over the ranks where they add up, else means."""

    def total_ms(name: str, unit: float) -> float:
        return float(sum(block[name] / block["steps"] for block in blocks)) * unit

    def mean_ms(name: str, unit: float) -> float:
        return total_ms(name, unit) / len(blocks)

    return {
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
    }


def compare(off: Record, on: Record, memcpy: float, hashing: float) -> Record:
    """One round: what the snapshots added, in all and per MB (``memcpy``, ``hashing``: ms)."""
    copied_mb = on["copied_mb"] or float("nan")
    lost_ms = on["step_ms"] - off["step_ms"]
    added_ms = on["core_ms"] - off["core_ms"]
    own_ms = on["capture_core_ms"] + on["manager_core_ms"]
    return {
        "step_ms": off["step_ms"],
        "with_snapshots_ms": on["step_ms"],
        "lost_ms": lost_ms,
        "barrier_ms": on["barrier_ms"],
        "blocking_ms": on["boundary_ms"] - off["boundary_ms"],
        "skipped": on["skipped"],
        "copied_mb": copied_mb,
        "memcpy": memcpy,
        "hash": hashing,
        "our_copy": on["copy_ms"] / copied_mb,
        "our_hash": on["hash_ms"] / copied_mb,
        "capture": on["capture_core_ms"] / copied_mb,
        "manager": on["manager_core_ms"] / copied_mb,
        "all_added": added_ms / copied_mb,
        "capture_to_reference": own_ms / copied_mb / (memcpy + hashing),
        "all_to_reference": added_ms / copied_mb / (memcpy + hashing),
    }


def summary(ranks: Sequence[Record]) -> Record:
    """Medians over the rounds of one launch."""
    rounds = []
    for number in range(len(ranks[0]["reference"])):
        off, on = (
            per_step([b for r in ranks for b in r["blocks"] if (b["arm"], b["round"]) == at])
            for at in (("off", number), ("on", number))
        )
        memcpy, hashing = (
            fmean(rank["reference"][number][name] for rank in ranks) for name in ("memcpy", "hash")
        )
        rounds.append(compare(off, on, memcpy, hashing))
    found: Record = {name: median(r[name] for r in rounds) for name in rounds[0]}
    found["lost_ms_quartiles"] = quartiles([r["lost_ms"] for r in rounds])
    found["lost_percent"] = 100 * found["lost_ms"] / found["step_ms"]
    found["state_mb"] = ranks[0]["state_bytes"] / 1e6
    found["rounds"] = rounds
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


TIME = (
    "batch",
    "step ms",
    "with L1",
    "lost ms",
    "quartiles",
    "lost %",
    "barrier ms",
    "blocking ms",
)
CORE = ("batch", "memcpy", "hash", "our copy*", "our hash*", "capture", "manager", "all added")


def show(preset: str, found: dict[int, Record], ranks: int) -> None:
    """Two tables for one state size: time, and core time by stage."""
    times, cores = [], []
    for batch, run in found.items():
        first, third = run["lost_ms_quartiles"]
        times.append(
            (
                *(batch, run["step_ms"], run["with_snapshots_ms"]),
                *(run["lost_ms"], f"{first:.2g} to {third:.2g}", run["lost_percent"]),
                *(run["barrier_ms"], run["blocking_ms"]),
            )
        )
        stages = ("memcpy", "hash", "our_copy", "our_hash", "capture", "manager", "all_added")
        ratios = (run["capture_to_reference"], run["all_to_reference"])
        cores.append((batch, *(run[stage] for stage in stages), *ratios))
    any_run = next(iter(found.values()))
    title = f"overhead, {any_run['state_mb']:.0f} MB of state (preset {preset}), {ranks} ranks"
    print_table(f"{title}, {os.cpu_count()} cores: time per step", TIME, times)
    head = (*CORE, "(capture+manager)/(memcpy+hash)", "all added/(memcpy+hash)")
    print_table("core-ms per MB by stage; * wall time inside the capture thread", head, cores)
    good = [r["step_ms"] for r in found.values() if r["lost_percent"] <= LOST_PERCENT_MAX]
    least = f"{min(good):.0f} ms" if good else "none of these"
    needed_ms = 100 / LOST_PERCENT_MAX * median(max(0.0, r["lost_ms"]) for r in found.values())
    skipped = sum(r["skipped"] for r in found.values())
    print(
        f"smallest measured step with at most 5 % lost: {least}; from lost ms: {needed_ms:.0f} ms;"
        f" versions skipped per step: {skipped:g}"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=0, help="0: by preset")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--patience-s", type=float, default=600, help="for one launch")
    parser.add_argument(
        "--dir", help="where run directories are made; default: the temporary folder"
    )
    cache = Path(tempfile.gettempdir()) / f"llama-corpus-{os.getuid()}"
    parser.add_argument("--cache", type=Path, default=cache)
    return parser.parse_args()


def main() -> None:
    """Each size and batch is one launch; then tables and the JSON file."""
    args = parse_arguments()
    everything: Record = {}
    for preset in args.presets:
        found = {batch: measure(preset, batch, args) for batch in BATCHES[preset]}
        show(preset, found, args.ranks)
        everything[preset] = found
    write_results("overhead", {"ranks": args.ranks, "presets": everything})


if __name__ == "__main__":
    main()
