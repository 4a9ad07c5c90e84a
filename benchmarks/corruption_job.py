"""The small training whose versions ``corruption`` damages; run by it under ``ftrain launch``."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn

import ftrain


def objects() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer: 3.2 MB of state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    return model, torch.optim.AdamW(model.parameters())


def main() -> None:
    """Train, and ask for a durable version in each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--reference", required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    model, optimizer = objects()
    replica = nn.parallel.DistributedDataParallel(model)
    session = ftrain.Session(model=replica, optimizer=optimizer, total_steps=args.steps)
    for step, _ in session.steps():
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        replica(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.save()
    if dist.get_rank() == 0:
        torch.save(list(model.parameters()), args.reference)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
