"""A small DDP job whose steps take about 20 ms, and whose slowness can be asked for."""

from __future__ import annotations

import argparse
import io
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import ftrain


def busy(seconds: float) -> None:
    """Work on one core."""
    end = time.monotonic() + seconds
    x = torch.randn(200, 200)
    while time.monotonic() < end:
        x = torch.tanh(x @ x)


def save(model: torch.nn.Module, seconds: float) -> None:
    """Save to memory again and again, as a big model's torch.save would go on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.save(model.state_dict(), io.BytesIO())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--first-s", type=float, default=0.0)
    parser.add_argument("--evaluate-s", type=float, default=0.0)
    parser.add_argument("--save-s", type=float, default=0.0)
    parser.add_argument("--every", type=int, default=50)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(
        torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(6)])
    )
    optimizer = torch.optim.AdamW(model.parameters())
    session = ftrain.Session(model=model, optimizer=optimizer, total_steps=args.steps)
    for step, _ in session.steps():
        if step == 0:
            busy(args.first_s)  # compiles, say
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step))
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss)
        if step % args.every == args.every - 1 and dist.get_rank() == 0:
            busy(args.evaluate_s)  # undeclared, on one rank: the other waits in its next all-reduce
            save(model, args.save_s)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
