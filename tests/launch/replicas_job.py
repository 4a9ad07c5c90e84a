"""A training script for several replica groups, which dies where it is told to, once each.

``--die GROUP:STEP:PLACE``: forward, grad0 (before any bucket is sent), gradN (with N buckets on
their way), optimizer, boundary.  Writes a line of JSON for every step to ``<out>-<group>.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import xxhash

import ftrain

WIDTH = 1700  # two buckets of gradients


def digest(state: Any) -> str:
    hasher = xxhash.xxh3_128()
    for value in state:
        hasher.update(value.detach().numpy().tobytes())
    return hasher.hexdigest()


class Deaths:
    """Kills this process where it is due, and only once."""

    def __init__(self, wanted: list[str], group: int, out: str) -> None:
        self.due = {}
        for text in wanted:
            number, step, place = text.split(":")
            if int(number) == group:
                self.due[int(step), place] = Path(f"{out}-died-{text}")

    def at(self, step: int, place: str) -> None:
        mark = self.due.get((step, place))
        if mark is not None and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", required=True)
    parser.add_argument("--die", action="append", default=[])
    options = parser.parse_args()
    context = json.loads(os.environ["FTRAIN_CONTEXT"])
    group = context["config"]["fleet"]["group"]
    deaths = Deaths(options.die, group, options.out)
    width = 64 if options.small else WIDTH
    torch.manual_seed(group)  # they begin with different weights: the fleet has to see to that
    model = torch.nn.Sequential(
        torch.nn.Linear(16, width),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 4),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 50))
    values = torch.randn(options.samples, 16, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(torch.arange(options.samples), values)
    order = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=order)
    now = 0
    parameters = list(model.parameters())
    for number, parameter in enumerate((parameters[-1], parameters[0])):
        at = f"grad{number}"  # of the last layer before a bucket is full, of the first after that
        parameter.register_post_accumulate_grad_hook(lambda _, at=at: deaths.at(now, at))
    session = ftrain.Session(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        data=loader,
        total_steps=options.steps,
        replicas="sync",
        seed=5,
    )
    optimizer.register_step_pre_hook(lambda *_: deaths.at(now, "optimizer"))
    with Path(f"{options.out}-{group}.jsonl").open("a", buffering=1) as log:
        for step, (index, inputs) in session.steps():
            now = step
            deaths.at(step, "forward")
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            session.log(loss=loss)
            moments = [v for s in optimizer.state.values() for v in s.values()]
            record = {
                "step": step,
                "at_s": time.monotonic(),
                "pid": os.getpid(),
                "samples": index.tolist(),
                "members": session.replica_groups,
                "weights": digest(model.parameters()),
                "moments": digest(moments),
                "rate": scheduler.get_last_lr(),
            }
            log.write(json.dumps(record) + "\n")
            deaths.at(step, "boundary")
            time.sleep(options.pause)


if __name__ == "__main__":
    main()
