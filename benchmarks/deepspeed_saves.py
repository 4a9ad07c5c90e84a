"""What a checkpoint costs a DeepSpeed ZeRO-1 training, by the engine that saves it.

::

    python benchmarks/deepspeed_saves.py [--width 1024 --layers 9 --rounds 3]

The same job on two gloo ranks without checkpoints, with DeepSpeed's own engines and with ftrain's,
one after the other in every round.  *Blocking* is how long ``save_checkpoint`` and the commit in
the next ``step`` take, *lost* how much longer the whole training takes; *durable* is measured
apart, with nothing else to do, until every file would survive a power cut: DeepSpeed's own files
are synced by the job, as nobody else does it.  Medians over the rounds, of the slower rank.  An
engine that does not run here is told with its reason.

This file can't be called deepspeed.py: its job would import it in DeepSpeed's place.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from common import ROOT, TORCHRUN, LaunchError, Record, launched, print_table, write_results

JOB = ROOT / "benchmarks" / "deepspeed_saves_job.py"
ARMS = ("none", "torch", "fast", "python, decoupled", "fast, decoupled", "ftrain")


def measure(arm: str, args: argparse.Namespace) -> Record:
    """One run: of the slower rank each."""
    with tempfile.TemporaryDirectory(prefix="ftrain-deepspeed-", dir=args.dir) as folder:
        size = ("--width", str(args.width), "--layers", str(args.layers))
        length = ("--batch-size", str(args.batch_size), "--steps", str(args.steps))
        own = (JOB, "--arm", arm, "--every", str(args.every), "--out", folder)
        environment = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            # A build that was killed leaves a lock on which everybody after it waits for ever.
            "TORCH_EXTENSIONS_DIR": str(Path(folder) / "extensions"),
        }
        command = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", *own, *size, *length)
        with launched(command, Path(folder), environment) as launch:
            try:
                launch.finish(args.patience_s)
            except LaunchError as error:
                lines = [line for line in launch.log.read_text().splitlines() if "Error: " in line]
                raise LaunchError(lines[0] if lines else str(error)) from None
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("rank*.json")]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def summary(arm: Sequence[Record], bare: Sequence[Record]) -> Record:
    """What a save costs, in milliseconds; both as measured, round by round."""
    lost = [
        (with_saves["total_s"] - without["total_s"]) / with_saves["saves"] * 1e3
        for with_saves, without in zip(arm, bare, strict=True)
    ]
    blocking = [run["blocked_s"] / run["saves"] * 1e3 for run in arm]
    durable = [run["durable_s"] * 1e3 for run in arm]
    return {
        "blocking_ms": median(blocking),
        "lost_ms": median(lost),
        "lost_ms_of_rounds": lost,
        "durable_ms": median(durable),
        "checkpoint_mb": arm[0]["checkpoint_bytes"] / 1e6,
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run all arms, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS[1:], default=ARMS[1:])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=4, help="steps from one save to the next")
    parser.add_argument("--dir", default=None, help="where checkpoints are written")
    parser.add_argument("--patience-s", type=float, default=600.0)
    parser.add_argument("--no-results", action="store_true", help="keep no figures")
    args = parser.parse_args(argv)

    runs: dict[str, list[Record]] = {arm: [] for arm in ("none", *args.arms)}
    absent: dict[str, str] = {}
    for _ in range(args.rounds):
        for arm in runs:
            if arm not in absent:
                try:
                    runs[arm].append(measure(arm, args))
                except LaunchError as error:
                    if arm in ("none", "ftrain"):
                        raise
                    absent[arm] = str(error)
    found = {arm: summary(runs[arm], runs["none"]) for arm in args.arms if arm not in absent}
    step_ms = median(run["total_s"] for run in runs["none"]) / args.steps * 1e3
    head = ("arm", "blocking ms", "lost ms", "durable ms", "checkpoint MB")
    keys = ("blocking_ms", "lost_ms", "durable_ms", "checkpoint_mb")
    rows = [(arm, *(figures[key] for key in keys)) for arm, figures in found.items()]
    print_table(f"each save; a step takes {step_ms:.0f} ms, a save every {args.every}", head, rows)
    for arm, reason in absent.items():
        print(f"{arm}: does not run here: {reason}")
    results = {"step_ms": step_ms, "every": args.every, "arms": found, "absent": absent}
    if not args.no_results:
        write_results("deepspeed_saves", results)
    return results


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
