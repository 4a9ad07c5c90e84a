"""Training of ``memory_loss``, whose ranks have nothing in common (FSDP2), and its run by ftrain.

Every rank appends to ``OUT/states/rank<r>.jsonl`` a line when it starts, with the step that it
loaded and a digest of what it loaded, and a line for every completed step with the digest of the
state after it.  ``peers/lm_resiliency_job.py`` runs the same training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.detach()
    return whole.to_local() if isinstance(whole, DTensor) else whole


class Training:
    """A sharded model with AdamW that steps at a given pace."""

    def __init__(self, width: int, pace_s: float) -> None:
        """``pace_s``: what a step takes at least; a real one would compute for longer."""
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(32, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8)
        )
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.pace_s = pace_s

    def step(self, step: int) -> None:
        """One step."""
        end_s = time.monotonic() + self.pace_s
        draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(16, 32, generator=draw)
        (self.model(x)[:, 0] - x[:, 0]).square().mean().backward()
        time.sleep(max(0.0, end_s - time.monotonic()))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fill(self) -> None:
        """Make the moments, for a load to write into."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shards(self) -> dict[str, torch.Tensor]:
        """What this rank has of the state, by name; nothing is copied."""
        found = {name: _local(tensor) for name, tensor in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = _local(value)
        return found


class Records:
    """A rank's lines."""

    def __init__(self, out: Path, epoch: int) -> None:
        path = out / "states" / f"rank{dist.get_rank()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._who = {"epoch": epoch, "pid": os.getpid()}

    def write(self, kind: str, step: int, shards: dict[str, torch.Tensor]) -> None:
        """``kind``: ``loaded`` or ``done``; ``step``: how many are in the state."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(shards):
            digest.update(shards[name].contiguous().view(-1).view(torch.uint8).numpy())
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in shards.values())
        line = {"kind": kind, "done": step, "t_ns": time.monotonic_ns(), "bytes": nbytes}
        line |= {"digest": digest.hexdigest(), **self._who}
        self._file.write(json.dumps(line) + "\n")


def arguments() -> argparse.ArgumentParser:
    """What both jobs are told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--pace-s", type=float, default=0.05)
    return parser


def main() -> None:
    """Train until killed."""
    import ftrain

    args = arguments().parse_args()
    dist.init_process_group("gloo")
    training = Training(args.width, args.pace_s)
    session = ftrain.Session(
        model=training.model, optimizer=training.optimizer, total_steps=args.steps
    )
    records = Records(args.out, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    started = False
    for step, _ in session.steps():
        if not started:
            records.write("loaded", step, training.shards())
            started = True
        training.step(step)
        records.write("done", step + 1, training.shards())


if __name__ == "__main__":
    main()
