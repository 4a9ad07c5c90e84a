"""The peer of ``restart``: the example's training as one writes it for plain torchrun.

Same model, data and step as examples/llama/train.py, without Session: rank 0 saves with torch.save
every ``--save-every`` steps into ``--run-dir``, and every start resumes from the newest file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "llama"))
import train as example


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that is never seen half done."""
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    fresh.replace(path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--preset", choices=example.PRESETS, default="0.5m")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--cache", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Resume, train, save, and write one record per step."""
    args = parse_arguments()
    place = example.join()
    torch.manual_seed(0)
    windows = example.Windows(example.read_corpus("training", args.cache), args.seq)
    sampler = DistributedSampler(windows, place.world_size, place.rank, drop_last=True)
    loader = DataLoader(windows, args.batch_size, sampler=sampler, drop_last=True)
    llama = example.Llama(example.PRESETS[args.preset]).to(place.device)
    model = DistributedDataParallel(llama) if place.world_size > 1 else llama
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    checkpoint, step = args.run_dir / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=place.device, weights_only=True)
        llama.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    records = args.run_dir / "steps" / f"rank{place.rank}.jsonl"
    records.parent.mkdir(parents=True, exist_ok=True)
    start = {"epoch": int(os.environ["TORCHELASTIC_RESTART_COUNT"]), "pid": os.getpid()}
    with records.open("a", buffering=1) as file:
        while step < args.steps:
            epoch, done = divmod(step, len(loader))
            sampler.set_epoch(epoch)
            for batch in itertools.islice(loader, done, done + args.steps - step):
                loss = model(batch.to(place.device))
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                record = {"step": step, "t_ns": time.monotonic_ns(), "loss": loss.item(), **start}
                file.write(json.dumps(record) + "\n")
                step += 1
                if step % args.save_every == 0 and place.rank == 0:
                    state = {"model": llama.state_dict(), "optimizer": optimizer.state_dict()}
                    save(checkpoint, {**state, "step": step})
    if place.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
