"""A DeepSpeed script as a user writes it: trains, saves, resumes; writes down its losses."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


class Count(torch.nn.Module):
    """A buffer that changes in forward, and the loss with it."""

    forwards: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards.add_(1)
        return x * (1 + self.forwards / 64).to(x.dtype)


class Model(torch.nn.Module):
    """With such a buffer and with a frozen layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, width)
        self.count = Count()
        self.middle = torch.nn.Linear(width, width)
        self.frozen = torch.nn.Linear(width, 16)
        self.frozen.requires_grad_(False)
        self.last = torch.nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.middle(torch.relu(self.count(self.first(x)))))
        return self.last(self.frozen(hidden))


def config(arguments: argparse.Namespace) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": arguments.accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # In ZeRO-3, some parameters are kept whole and some are not.
        "zero_optimization": {
            "stage": arguments.stage,
            "stage3_param_persistence_threshold": 1000,
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "steps_per_print": 1_000_000,
    }
    if arguments.precision != "fp32":
        settings[arguments.precision] = {"enabled": True}
    return settings


def batch(step: int, micro: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step * 1000 + micro * 100 + dist.get_rank())
    x = torch.randn(8, 16, generator=generator)
    return x.to(dtype), x.sum(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("ftrain", "deepspeed"), default="ftrain")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--tag", default="")
    parser.add_argument("--bytes-per-s", type=float, default=0.0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wait-at", type=int, default=-1, help="for the files, at this step")
    parser.add_argument("--timings", action="store_true")
    parser.add_argument("--just-end", action="store_true", help="without destroying the engine")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    if arguments.engine == "ftrain":
        import ftrain.runtime.deepspeed

        ftrain.runtime.deepspeed.use(bytes_per_s=arguments.bytes_per_s)
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(1)
    model = Model(arguments.width)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=config(arguments)
    )
    train(engine, arguments)
    engine.destroy()
    dist.destroy_process_group()


def train(engine: Any, arguments: argparse.Namespace) -> None:
    dtype = next(engine.module.parameters()).dtype
    rank = dist.get_rank()
    out = arguments.out.with_suffix(f".{rank}.jsonl").open("a", buffering=1)
    loaded, client = engine.load_checkpoint(str(arguments.folder))
    start = client["step"] if loaded else 0
    out.write(json.dumps({"start": start, "loaded": str(loaded)}) + "\n")
    for step in range(start, arguments.steps):
        began = time.monotonic()
        for micro in range(arguments.accumulate):
            x, y = batch(step, micro, dtype)
            loss = torch.nn.functional.mse_loss(engine(x).float(), y)
            engine.backward(loss)
            engine.step()
        record: dict[str, Any] = {"step": step, "loss": loss.item().hex(), "pid": os.getpid()}
        if arguments.timings:
            record["step_s"] = time.monotonic() - began
        out.write(json.dumps(record) + "\n")
        if (step + 1) % arguments.save_every == 0:
            began = time.monotonic()
            state = {"step": step + 1, "arguments": argparse.Namespace(width=arguments.width)}
            state["history"] = torch.full((3,), float(step))
            engine.save_checkpoint(
                str(arguments.folder), tag=arguments.tag or f"step{step + 1}", client_state=state
            )
            if arguments.timings:
                out.write(json.dumps({"save_s": time.monotonic() - began}) + "\n")
            state["history"].fill_(-1.0)  # after the save, as a script may
        if step + 1 == arguments.wait_at:
            engine.checkpoint_engine.wait()
            out.write(json.dumps({"waited": step + 1}) + "\n")
    if arguments.just_end:
        sys.exit()
    if arguments.engine == "ftrain":
        engine.checkpoint_engine.wait()
        statistics = engine.checkpoint_engine.statistics()
        failures = engine.checkpoint_engine.failures
        out.write(json.dumps({"durable": statistics.durable, "failures": failures}) + "\n")
    out.close()


if __name__ == "__main__":
    main()
