"""How long a state takes to another number of ranks: saved by 4, loaded and saved by 2, then by 3.

::

    python benchmarks/reshard.py [--size 0.3] [--worlds 4 2 3] [--rounds 3]

Ranks are FSDP2's over gloo, on one machine, under plain torchrun's variables; ours is a Session
alone, which writes durable files.  Times are of the slowest rank.  What is loaded has to be what
was saved, bit for bit: digests of the whole tensors are compared outside of the times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

from common import ROOT, Record, print_table, write_results

JOB = ROOT / "benchmarks" / "reshard_job.py"
ARMS = ("ours", "DCP")
SIZES = ("tiny", "0.3", "1.3")


def world(arm: str, size: int, state: str, folder: Path, patience_s: float) -> list[Record]:
    """One group of ranks: loads what is there, then saves; what each rank says."""
    meet = tempfile.mktemp(prefix="meet-", dir=folder)
    processes = []
    threads = max(1, (os.cpu_count() or 1) // size)
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        place |= {"OMP_NUM_THREADS": threads, "TORCHELASTIC_RUN_ID": "benchmark"}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, JOB, "--arm", arm, "--size", state, "--meet", meet]
        processes.append(
            subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE)
        )
    try:
        answers = [process.communicate(timeout=patience_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"{arm} with {size} ranks ended with {codes}")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def measure(arm: str, args: argparse.Namespace) -> Record:
    """One chain; s by what was done."""
    times: Record = {}
    before = None
    with tempfile.TemporaryDirectory(prefix="ftrain-reshard-", dir=args.dir) as folder:
        for number, size in enumerate(args.worlds):
            answers = world(arm, size, args.size, Path(folder), args.patience_s)
            if before is not None:
                if {answer["loaded"] for answer in answers} != {before}:
                    raise RuntimeError(f"{arm} loaded something else with {size} ranks")
                load_s = max(answer["load_s"] for answer in answers)
                times[f"load {args.worlds[number - 1]} -> {size}"] = load_s
            (before,) = {answer["saved"] for answer in answers}
            times[f"save {number}: {size} ranks"] = max(answer["save_s"] for answer in answers)
    return times


def main() -> None:
    """The arms in turn, then the table and the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="0.3")
    parser.add_argument("--worlds", type=int, nargs="+", default=[4, 2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience-s", type=float, default=300, help="for one group of ranks")
    parser.add_argument("--dir", help="where states are saved; default: the temporary folder")
    args = parser.parse_args()
    found: dict[str, list[Record]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in random.sample(ARMS, len(ARMS)):
            found[arm].append(measure(arm, args))
    results = {
        arm: {what: median(record[what] for record in records) for what in records[0]}
        for arm, records in found.items()
    }
    loads = [f"load {before} -> {after}" for before, after in pairwise(args.worlds)]
    saves = [what for what in results["ours"] if what not in loads]
    rows = [
        (
            what,
            results["ours"][what],
            results["DCP"][what],
            results["ours"][what] / results["DCP"][what],
        )
        for what in (*loads, *saves)
    ]
    title = f"reshard, {args.size} GB, FSDP2 over gloo, {os.cpu_count()} cores: s"
    print_table(title, ("", "ours, verified", "DCP", "ours / DCP"), rows)
    write_results("reshard", {"size": args.size, "worlds": args.worlds, "s": results, "all": found})


if __name__ == "__main__":
    main()
