"""Training whose nodes have nothing in common (FSDP2): ``node_loss_job.py STEPS WIDTH OUT``.

Each rank appends a line for every completed step to ``OUT/rank<r>.jsonl``: step, time, epoch, and
the loss, bit by bit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import ftrain

steps, width, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(32, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8)
)
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=steps)
out.mkdir(exist_ok=True)
with (out / f"rank{rank}.jsonl").open("a") as file:
    for step, _ in session.steps():
        draw = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(16, 32, generator=draw)
        loss = (model(x)[:, 0] - x[:, 0]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss)
        epoch = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        line = {
            "step": step,
            "t_ns": time.monotonic_ns(),
            "epoch": epoch,
            "loss": loss.item().hex(),
        }
        print(json.dumps(line), file=file, flush=True)
