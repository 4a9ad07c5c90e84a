"""A small DDP job whose steps take about 20 ms, and whose slowness and faults can be asked for."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from pathlib import Path

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


def leave(step: int, args: argparse.Namespace) -> None:
    """Rank 1 ends the script well, in the middle of the loop, and rank 0 finds itself alone."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if step < args.leave_at or args.leave_at < 0 or not (first or args.leave_again):
        return
    if dist.get_rank() == 1:
        sys.exit(0)
    if args.alone_in_store:
        dist.new_group([0, 1])  # waits for rank 1 in the store, where no connection breaks


def hold() -> None:
    """Never go on: somebody outside is about to kill this process."""
    Path(f"held{dist.get_rank()}").touch()
    while True:
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--first-s", type=float, default=0.0)
    parser.add_argument("--evaluate-s", type=float, default=0.0)
    parser.add_argument("--save-s", type=float, default=0.0)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--leave-at", type=int, default=-1)
    parser.add_argument("--leave-again", action="store_true")
    parser.add_argument("--alone-in-store", action="store_true")
    parser.add_argument("--hold-at", type=int, default=-1)
    parser.add_argument("--save-at", type=int, nargs="*", default=[])
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(
        torch.nn.Sequential(*[torch.nn.Linear(args.width, args.width) for _ in range(6)])
    )
    optimizer = torch.optim.AdamW(model.parameters())
    session = ftrain.Session(model=model, optimizer=optimizer, total_steps=args.steps)
    for step, _ in session.steps():
        if step == 0:
            busy(args.first_s)  # compiles, say
        leave(step, args)
        x = torch.randn(64, args.width, generator=torch.Generator().manual_seed(step))
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss)
        if step in args.save_at:
            session.save()
        if step == args.hold_at and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            hold()
        if step % args.every == args.every - 1 and dist.get_rank() == 0:
            busy(args.evaluate_s)  # undeclared, on one rank: the other waits in its next all-reduce
            save(model, args.save_s)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
