"""One ZeRO-1 training of benchmarks/deepspeed_saves.py: one rank, one way of saving."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

WRITERS: dict[str, dict[str, Any]] = {
    "fast": {"type": "FAST", "decoupled": False},
    "python, decoupled": {"type": "PYTHON", "decoupled": True},
    "fast, decoupled": {"type": "FAST", "decoupled": True},
}


def engine_of(arm: str, width: int, layers: int) -> Any:
    """A DeepSpeed engine that saves in this way."""
    if arm == "ftrain":
        import ftrain.runtime.deepspeed

        ftrain.runtime.deepspeed.use()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to build
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1_000_000,
    }
    if arm in WRITERS:
        # With any other unit, or none, some ranks' optimizer states are left out, or it fails.
        config["checkpoint"] = {"writer": WRITERS[arm] | {"data_parallel": "replica"}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


class Stopwatch:
    """How long DeepSpeed's commits, which come inside ``step``, keep it."""

    def __init__(self, engine: Any) -> None:
        self.total_s = 0.0
        self._commit = engine._commit_decoupled_checkpoint
        engine._commit_decoupled_checkpoint = self.commit

    def commit(self) -> None:
        began = time.monotonic()
        self._commit()
        self.total_s += time.monotonic() - began


def train(engine: Any, args: argparse.Namespace) -> list[dict[str, float]]:
    """Blocks of steps, of which every second one begins with a save and ends when that is written:
    how long each takes, and how long saves block."""
    x = torch.randn(args.batch_size, args.width)
    stopwatch = Stopwatch(engine)
    blocks = []
    for number in range(2 * args.blocks + 2):
        saves = number % 2 == 1
        dist.barrier()
        stopwatch.total_s = 0.0
        began = saved = time.monotonic()
        if saves:
            engine.save_checkpoint(str(args.out / "checkpoints"), tag=f"t{number // 2 % 2}")
            saved = time.monotonic()
        for _ in range(args.steps):
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
        if saves and args.arm == "ftrain":
            engine.checkpoint_engine.wait()
        dist.barrier()
        block = {"total_s": time.monotonic() - began}
        blocks.append(block | {"blocked_s": saved - began + stopwatch.total_s})
    return blocks[2:]  # the first ones fill caches


def until_durable(engine: Any, args: argparse.Namespace) -> tuple[float, int]:
    """One save, with nothing else to do, until its files would survive a power cut; its size."""
    save_dir = args.out / "alone"
    dist.barrier()
    began = time.monotonic()
    engine.save_checkpoint(str(save_dir), tag="t")
    if args.arm == "ftrain":
        engine.checkpoint_engine.wait()
    else:
        if engine.checkpoint_engine.is_decoupled():
            engine._commit_decoupled_checkpoint()
        if dist.get_rank() == 0:
            for path in (*(save_dir / "t").iterdir(), save_dir / "t", save_dir / "latest"):
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
    dist.barrier()
    seconds = time.monotonic() - began
    nbytes = sum(path.stat().st_size for path in (save_dir / "t").iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(save_dir)
    dist.barrier()
    return seconds, nbytes


def main() -> None:
    """Train, and write down what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = engine_of(args.arm, args.width, args.layers)
    found: dict[str, Any] = {"blocks": train(engine, args)}
    alone = [until_durable(engine, args) for _ in range(4)][1:]
    found["durable_s"] = sorted(seconds for seconds, _ in alone)[1]
    found["checkpoint_bytes"] = alone[-1][1]
    failures = getattr(engine.checkpoint_engine, "failures", [])
    engine.destroy()
    if failures:
        raise SystemExit(failures[0])
    (args.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
