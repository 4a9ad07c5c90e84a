"""A small job for the tests of resharding: any number of ranks, DDP or FSDP2, saved and resumed.

``torchrun layouts_job.py --steps N --layout ddp|fsdp|tp|plain --out FILE``: rank 0 writes the
losses and the global state at the beginning and at the end, bit by bit.  With ``--from FILE``
nothing of ftrain is used: torch's own functions lay the state in that file over the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import ftrain

ROWS = 24  # of every batch, over all ranks: divisible by 1, 2, 3 and 4


class Model(nn.Module):
    """Sizes that 3 and 4 ranks do not divide evenly, a scalar, a frozen part and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 38)
        self.frozen = nn.Linear(38, 38)
        self.last = nn.Linear(38, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return self.last(self.frozen(torch.tanh(self.first(x)))) * self.scale


def lay_out(model: nn.Module, layout: str, world_size: int) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp":
        return fully_shard(model)
    if layout == "tp":
        tensor_parallel = 2
        mesh = init_device_mesh(
            "cpu", (world_size // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp")
        )
        plan = {"first": ColwiseParallel(), "frozen": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        return fully_shard(model, mesh=mesh["dp"]) if world_size > 2 else model
    return model


def whole(tensor: torch.Tensor) -> list[int]:
    """The bits of the global tensor."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
    found = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = whole(value)
    for name, buffer in model.named_buffers():
        found[name.removeprefix("module.")] = whole(buffer)
    return found


def numbers(bits: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.uint8).view(like.dtype).reshape(like.shape)


def load_with_torch(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put back the end of another run, given as whole tensors; returns its number of steps."""
    saved = json.loads(path.read_text())
    plain = Model()
    state = {name: numbers(saved["after"][name], t) for name, t in plain.state_dict().items()}
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state, options=options)
    moments = {}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            moments[name] = {k: numbers(saved["after"][f"{name}/{k}"], t) for k, t in like.items()}
    (group,) = optimizer.state_dict()["param_groups"]
    group = {**group, "params": list(moments), "lr": saved["rate"][0], "initial_lr": saved["base"]}
    both = {"state": moments, "param_groups": [group]}
    set_optimizer_state_dict(model, optimizer, both, options=options)
    return 1 + max(map(int, saved["losses"]))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.StepLR,
    step: int,
    rows: slice,
) -> float:
    batch = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(step))[rows]
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    return float(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--layout", default="ddp")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="start", type=Path)
    args = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = lay_out(Model(), args.layout, world_size)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    share = ROWS // world_size if args.layout in ("ddp", "fsdp") else ROWS
    rows = slice(rank * share, (rank + 1) * share) if share < ROWS else slice(None)
    losses = {}
    if args.start is not None:
        first = load_with_torch(args.start, model, optimizer)
        scheduler.last_epoch = first
        before = everything(model, optimizer)
        for step in range(first, args.steps):
            losses[step] = train(model, optimizer, scheduler, step, rows)
    else:
        session = ftrain.Session(
            model=model, optimizer=optimizer, scheduler=scheduler, total_steps=args.steps
        )
        before = everything(model, optimizer)
        for step, _ in session.steps():
            losses[step] = train(model, optimizer, scheduler, step, rows)
    after = everything(model, optimizer)
    if rank == 0:
        rate = scheduler.get_last_lr()
        result = {"losses": losses, "before": before, "after": after, "rate": rate, "base": 0.01}
        args.out.write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)  # gloo may abort in a rank whose peers are gone already while it ends


if __name__ == "__main__":
    sys.exit(main())
