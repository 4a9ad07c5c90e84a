"""The peer of ``memory_loss``: one rank under lm-resiliency's checkpoint manager.

``train`` loads what its manager finds and trains, with a save every ``--interval`` steps; ``rate``
saves a state of ``--mib`` again and again and waits for each to be with the peer.  Each rank has a
disk of its own, as it would on a node of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from lm_resiliency.checkpointing.config import InMemoryCkptConfig
from lm_resiliency.experimental import InMemoryCheckpointManager

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory_loss_job import Records, Training, arguments

_WARM = 4  # saves until each of its buffers was written once


def join(meet: Path) -> int:
    """Form the process group; this process' rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size)
    return rank


def manager_of(args: argparse.Namespace, rank: int) -> InMemoryCheckpointManager:
    """Its settings are its defaults, but for those that are arguments; ranks next to each other
    are a pair, as each is a node."""
    config = InMemoryCkptConfig(
        interval=args.interval,
        disk_flush_interval=args.flush,
        disk_folder=str(args.out / "disks" / f"node{rank}"),
        run_id="benchmark",
        replication_jump=1,
    )
    return InMemoryCheckpointManager(config)


def train(args: argparse.Namespace) -> None:
    """Load, then train until killed."""
    manager = manager_of(args, join(args.meet))
    training = Training(args.width, args.pace_s)
    records = Records(args.out, args.epoch)
    step = 0
    if manager.find_latest() > 0 and (loaded := manager.load()) is not None:
        state, step = loaded
        training.fill()
        for name, shard in training.shards().items():
            shard.copy_(state[name])
    records.write("loaded", step, training.shards())
    while step < args.steps:
        training.step(step)
        step += 1
        records.write("done", step, training.shards())
        if step % args.interval == 0:
            manager.save(training.shards(), step)
            manager.maybe_wait()
    dist.barrier()
    manager.close()


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rate(args: argparse.Namespace) -> None:
    """Save and replicate; seconds of each, and what it took in memory."""
    rank = join(args.meet)
    manager = manager_of(args, rank)
    state = {"weight": torch.randn(args.mib << 18)}
    before = resident_bytes()
    rows = []
    for step in range(1, _WARM + args.rounds + 1):
        state["weight"].add_(1.0)
        dist.barrier()
        began_s = time.monotonic()
        manager.save(state, step)
        saved_s = time.monotonic()
        if not manager.finalize_replication():
            raise RuntimeError("the peer did not get it")
        rows.append({"save_s": saved_s - began_s, "replicate_s": time.monotonic() - began_s})
    found = {"rows": rows[_WARM:], "resident_bytes": resident_bytes() - before}
    (args.out / f"rate{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    manager.close()


def main() -> None:
    """Do what is told."""
    parser = arguments()
    parser.add_argument("what", choices=("train", "rate"))
    parser.add_argument("--meet", type=Path, required=True, help="where the ranks find each other")
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--flush", type=int, default=100)
    parser.add_argument("--mib", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    (train if args.what == "train" else rate)(args)


if __name__ == "__main__":
    main()
