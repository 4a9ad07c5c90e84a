"""A job whose moments are spread over the ranks (ZeRO-1); run by ``ftrain launch``."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import ftrain

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(5)])
module = DistributedDataParallel(model)
optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
session = ftrain.Session(model=module, optimizer=optimizer, scheduler=scheduler, total_steps=24)
for step, _ in session.steps():
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))
    loss = module(inputs).square().mean()
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    session.log(loss=loss)
    if step == 15 and rank == 1 and os.environ.get("KILL") and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), 9)
    if step == int(os.environ.get("END", "99")):
        raise SystemExit(3)
