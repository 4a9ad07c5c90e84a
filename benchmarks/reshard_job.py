"""One rank of ``reshard``: loads what the group before saved, if any, trains a step, saves."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import states
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ftrain

SAVED = Path("dcp")  # in the working directory, which the groups share


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every whole tensor, on every rank."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(states.flat(states.tensors_of(model, optimizer)).items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(name.encode())
        found.update(whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step on random tokens."""
    model(torch.randint(0, 256, (1, 17))).backward()
    optimizer.step()
    optimizer.zero_grad()


def ours(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A Session loads when it is made, and saves at the end of its run."""
    dist.barrier()
    began = time.monotonic()
    session: Any = ftrain.Session(model=model, optimizer=optimizer, total_steps=10**9)
    load_s = time.monotonic() - began
    loaded = digest(model, optimizer) if session.step else ""
    session._total_steps = session.step + 1  # one more than the group before
    steps = session.steps()
    next(steps)
    step(model, optimizer)
    saved = digest(model, optimizer)
    dist.barrier()
    began = time.monotonic()
    for _ in steps:  # its end is the boundary
        pass
    return {"load_s": load_s, "loaded": loaded, "save_s": time.monotonic() - began, "saved": saved}


def peer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """DCP, as its tutorial does it."""
    load_s, loaded = 0.0, ""
    newest = max(SAVED.glob("*"), key=lambda path: int(path.name), default=None)
    dist.barrier()
    if newest is not None:
        began = time.monotonic()
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=newest)
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=state["optimizer"]
        )
        load_s = time.monotonic() - began
        loaded = digest(model, optimizer)
    step(model, optimizer)
    saved = digest(model, optimizer)
    dist.barrier()
    began = time.monotonic()
    weights, moments = get_state_dict(model, optimizer)
    path = SAVED / str(1 + int(newest.name) if newest is not None else 0)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=path)
    return {"load_s": load_s, "loaded": loaded, "save_s": time.monotonic() - began, "saved": saved}


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=("ours", "DCP"), required=True)
    parser.add_argument("--size", choices=states.SIZES, required=True)
    parser.add_argument("--meet", required=True)
    args = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{args.meet}", rank=rank, world_size=size)
    model, _ = states.build(args.size)
    sharded = fully_shard(model)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-4)
    found = (ours if args.arm == "ours" else peer)(sharded, optimizer)
    print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # gloo may abort in a rank whose peers are gone already while it ends


if __name__ == "__main__":
    main()
