"""Ranks that save and load through torch's Distributed Checkpoint on our store.

What they do is the name of a function below.  Rank 0 writes what it saw, as whole tensors, to a
file of that name.
"""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ftrain.runtime.dcp import FtrainReader, FtrainWriter

ROWS = 12


class Model(nn.Module):
    """Sizes that no number of ranks divides; bfloat16, a scalar, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 37)
        self.last = nn.Linear(37, 5, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.last(torch.tanh(self.first(x)).bfloat16()).float() * self.scale


class Job:
    """A model and its optimizer, trained for some steps."""

    def __init__(self, seed: int, steps: int, *, sharded: bool) -> None:
        torch.manual_seed(seed)
        self.model = Model()
        if sharded:
            fully_shard(self.model.last)  # another type than the rest
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01 * (1 + seed))
        self.extra: dict[str, Any] = {
            "empty": torch.zeros(0, 3),
            "bits": torch.full((3, 5), seed, dtype=torch.uint8),
            "name": f"seed {seed}",
            "when": (seed, 2.5, None, True),
            "list": [1, "two", {"three": 3.0}],
        }
        for step in range(steps):
            self.train(step)

    def train(self, step: int) -> None:
        batch = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(step))
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "extra": self.extra}

    def load(self, reader: FtrainReader) -> None:
        state = self.state()
        dcp.load(state, storage_reader=reader)
        self.extra = state["extra"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def whole(tree: Any) -> Any:
    """The same with every tensor whole."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().clone()
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def save(folder: Path, rank: int) -> Any:
    """Two versions by one writer; the newer one's state."""
    writer = FtrainWriter(folder / "store")
    job = Job(1, 2, sharded=True)
    dcp.save(job.state(), storage_writer=writer, checkpoint_id="2")
    job.train(2)
    dcp.save(job.state(), storage_writer=writer, checkpoint_id="3")
    return whole(job.state())


def load_sharded(folder: Path, rank: int) -> Any:
    job = Job(5, 1, sharded=True)
    job.load(FtrainReader(folder / "store"))
    return whole(job.state())


def load_plain(folder: Path, rank: int) -> Any:
    job = Job(6, 1, sharded=False)
    job.load(FtrainReader(folder / "store"))
    return whole(job.state())


def save_behind(folder: Path, rank: int) -> Any:
    """``async_save``, the next step while it goes on."""
    writer = FtrainWriter(folder / "store", keep_last=1)
    behind = dist.new_group(backend="gloo")  # collectives beside those of the training
    job = Job(2, 1, sharded=True)
    for step in (1, 2):
        before = whole(job.state())
        done = dcp.async_save(
            job.state(), storage_writer=writer, checkpoint_id=str(step), process_group=behind
        )
        job.train(step)
        done.result()
    return before


def refuse(folder: Path, rank: int) -> Any:
    """What can't be saved as plain values: rank 1's part of the failure, as every rank sees it."""
    state = {"w": torch.ones(3), "odd": {"object": Path("x")}}
    try:
        dcp.save(state, storage_writer=FtrainWriter(folder / "store"), checkpoint_id="9")
    except CheckpointException as error:  # a BaseException
        return {"failures": {r: str(cause[0]) for r, cause in error.failures.items()}}
    return None


class _Dies(DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            os._exit(7)
        return super().resolve_data(write_item)


def die(folder: Path, rank: int) -> Any:
    """Rank 1 dies in the middle of its file."""
    job = Job(3, 1, sharded=True)
    writer = FtrainWriter(folder / "store")
    dcp.save(job.state(), storage_writer=writer, checkpoint_id="8", planner=_Dies())


def run(rank: int, what: str, folder: str, ranks: int) -> None:
    """One of the ranks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = Path(folder)
    meet = f"file://{place}/meet-{what}-{ranks}"
    limit = timedelta(seconds=40)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks, timeout=limit)
    seen = globals()[what](place, rank)
    if rank == 0:
        torch.save(seen, place / f"{what}.pt")
    dist.barrier()
    os._exit(0)  # gloo may abort in a rank whose peers are gone already while it ends
