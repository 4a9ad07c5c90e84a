"""What a checkpoint costs a DeepSpeed ZeRO-1 training, by the engine that saves it.

::

    python benchmarks/deepspeed_saves.py [--width 1024 --layers 9 --rounds 3]

The same job on two gloo ranks with DeepSpeed's own engines and with ftrain's, one after the other
in every round.  In each run a block of steps without a checkpoint and one with a save at its begin
take turns.  *Blocking* is how long ``save_checkpoint`` and the commit in the next ``step`` take,
*lost* how much longer the block with the save takes until all is written; *durable* is measured
apart, with nothing else to do, until every file would survive a power cut: DeepSpeed's own files
are synced by the job for that, as nobody else does it.  Medians, of the slower rank; lost ms has
its quartiles beside it.  An engine that does not run here is told with its reason.

This file can't be called deepspeed.py: its job would import it in DeepSpeed's place.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from common import ROOT, TORCHRUN, LaunchError, Record, launched, print_table, write_results

JOB = ROOT / "benchmarks" / "deepspeed_saves_job.py"
ARMS = ("torch", "fast", "python, decoupled", "fast, decoupled", "ftrain")


def measure(arm: str, args: argparse.Namespace) -> Record:
    """One run: of the slower rank each."""
    with tempfile.TemporaryDirectory(prefix="ftrain-deepspeed-", dir=args.dir) as folder:
        size = ("--width", str(args.width), "--layers", str(args.layers))
        length = ("--batch-size", str(args.batch_size), "--steps", str(args.steps))
        own = (JOB, "--arm", arm, "--blocks", str(args.blocks), "--out", folder)
        environment = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CROSS_RANK": "0",  # as DeepSpeed's launcher sets them; its other engines look
            "CROSS_SIZE": "1",
            "LOCAL_SIZE": "2",
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
    return {
        "durable_s": max(rank["durable_s"] for rank in ranks),
        "checkpoint_bytes": ranks[0]["checkpoint_bytes"],
        "blocks": [
            {name: max(block[name] for block in blocks) for name in blocks[0]}
            for blocks in zip(*(rank["blocks"] for rank in ranks), strict=True)
        ],
    }


def summary(runs: Sequence[Record]) -> Record:
    """What a save costs, in milliseconds."""
    pairs = [
        pair for run in runs for pair in zip(run["blocks"][::2], run["blocks"][1::2], strict=True)
    ]
    lost = [(saving["total_s"] - bare["total_s"]) * 1e3 for bare, saving in pairs]
    low, middle, high = quantiles(lost, n=4, method="inclusive")
    return {
        "blocking_ms": median(saving["blocked_s"] * 1e3 for _, saving in pairs),
        "lost_ms": middle,
        "lost_ms_quartiles": [low, high],
        "durable_ms": median(run["durable_s"] * 1e3 for run in runs),
        "checkpoint_mb": runs[0]["checkpoint_bytes"] / 1e6,
        "block_ms": median(bare["total_s"] * 1e3 for bare, _ in pairs),
        "saves": len(pairs),
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run all arms, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="in a block")
    parser.add_argument("--blocks", type=int, default=6, help="of each kind in a run")
    parser.add_argument("--dir", default=None, help="where checkpoints are written")
    parser.add_argument("--patience-s", type=float, default=600.0)
    parser.add_argument("--no-results", action="store_true", help="keep no figures")
    args = parser.parse_args(argv)

    runs: dict[str, list[Record]] = {arm: [] for arm in args.arms}
    absent: dict[str, str] = {}
    for _ in range(args.rounds):
        for arm in runs:
            if arm not in absent:
                try:
                    runs[arm].append(measure(arm, args))
                except LaunchError as error:
                    if arm == "ftrain":
                        raise
                    absent[arm] = str(error)
    found = {arm: summary(runs[arm]) for arm in args.arms if arm not in absent}
    head = ("arm", "blocking ms", "lost ms", "quartiles", "durable ms", "block without, ms", "MB")
    rows = [
        (
            arm,
            figures["blocking_ms"],
            figures["lost_ms"],
            " to ".join(f"{edge:.3g}" for edge in figures["lost_ms_quartiles"]),
            figures["durable_ms"],
            figures["block_ms"],
            figures["checkpoint_mb"],
        )
        for arm, figures in found.items()
    ]
    print_table(f"each save; {args.steps} steps in a block", head, rows)
    for arm, reason in absent.items():
        print(f"{arm}: does not run here: {reason}")
    results = {"steps_in_block": args.steps, "arms": found, "absent": absent}
    if not args.no_results:
        write_results("deepspeed_saves", results)
    return results


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
