"""One rank of what replica_groups.py compares: ftrain's replica groups, plain DDP, torchft.

Writes a line with the time of each step's end to ``<out>/rank<n>.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def layers(width: int, depth: int) -> nn.Sequential:
    """A multilayer perceptron."""
    found: list[nn.Module] = []
    for _ in range(depth):
        found += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*found)


def main() -> None:
    """Train; the arm decides who averages."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", choices=["ftrain", "ddp", "torchft"], required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    model = layers(options.width, options.depth)
    inputs = torch.randn(options.batch, options.width)

    def step(run: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        run(inputs).square().mean().backward()
        optimizer.step()

    {"ftrain": by_ftrain, "ddp": by_ddp, "torchft": by_torchft}[options.arm](model, options, step)


Step = Callable[[nn.Module, Any], None]


def recorder(out: Path, rank: int) -> Callable[[int, int], None]:
    """Writes one step's end; ``members`` took part."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / f"rank{rank}.jsonl").open("a", buffering=1)

    def record(step: int, members: int) -> None:
        row = {"step": step, "at_s": time.monotonic(), "members": members, "pid": os.getpid()}
        file.write(json.dumps(row) + "\n")

    return record


def by_ftrain(model: nn.Module, options: argparse.Namespace, step: Step) -> None:
    """``ftrain launch --replica-groups``."""
    import ftrain

    optimizer = torch.optim.AdamW(model.parameters())
    group = json.loads(os.environ["FTRAIN_CONTEXT"])["config"]["fleet"]["group"]
    session = ftrain.Session(
        model=model, optimizer=optimizer, total_steps=options.steps, replicas="sync"
    )
    record = recorder(options.out, group)
    for number, _ in session.steps():
        step(model, optimizer)
        record(number, len(session.replica_groups))


def by_ddp(model: nn.Module, options: argparse.Namespace, step: Step) -> None:
    """``torchrun``, DistributedDataParallel over gloo."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    optimizer = torch.optim.AdamW(model.parameters())
    wrapped = nn.parallel.DistributedDataParallel(model)
    record = recorder(options.out, dist.get_rank())
    for number in range(options.steps):
        step(wrapped, optimizer)
        record(number, dist.get_world_size())
    dist.destroy_process_group()


def by_torchft(model: nn.Module, options: argparse.Namespace, step: Step) -> None:
    """``torchrun`` for each group, torchft's manager, DDP and optimizer as its README has them."""
    from torchft import (  # type: ignore[import-not-found]
        DistributedDataParallel,
        Manager,
        Optimizer,
        ProcessGroupGloo,
    )

    inner = torch.optim.AdamW(model.parameters())

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    group = int(os.environ["REPLICA_GROUP_ID"])
    manager = Manager(
        pg=ProcessGroupGloo(),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        replica_id=f"group_{group}_",
    )
    wrapped, optimizer = DistributedDataParallel(manager, model), Optimizer(manager, inner)
    record = recorder(options.out, group)
    while manager.current_step() < options.steps:
        step(wrapped, optimizer)
        record(manager.current_step(), manager.num_participants())
    manager.shutdown()


if __name__ == "__main__":
    main()
