"""The training that ``checkpoint`` measures: one process, all cores, one way to save.

Run by checkpoint.py, ours under ``ftrain launch``; writes ``--out`` as JSON.  Every ``--every``
steps a checkpoint is due, at the boundary before the step; those of the first ``--every`` steps are
not counted, because the optimizer's moments come with the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import savers
import states
import torch
from torch import nn

import ftrain

VOCABULARY = 256
SEQUENCE_MAX = {"cpu": 128, "cuda": 1024}
MICRO_TOKENS = 16384  # on a GPU, of one forward and backward; larger batches are accumulated


def batch_of(tokens: int, device: torch.device) -> torch.Tensor:
    """Random tokens, so many of which are predicted."""
    length = min(tokens, SEQUENCE_MAX[device.type])
    return torch.randint(0, VOCABULARY, (max(1, tokens // length), length + 1), device=device)


def settle(device: torch.device) -> None:
    """Return when the kernels of the training, and no others, have run."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def forward_backward(model: nn.Module, batch: torch.Tensor) -> float:
    """One; how long it took, in s."""
    began = time.monotonic()
    if batch.is_cuda:
        for micro in batch.split(max(1, MICRO_TOKENS // batch.shape[1])):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(micro)
            loss.backward()
    else:
        model(batch).backward()
    settle(batch.device)
    return time.monotonic() - began


def calibrate(size: str, sweep: list[int]) -> dict[str, Any]:
    """How long forward and backward take, by number of tokens."""
    model, _ = states.build(size)
    found = {}
    for tokens in sweep:
        batch = batch_of(tokens, states.device_of(size))
        times = [forward_backward(model, batch) for _ in range(4)][1:]
        found[str(tokens)] = sorted(times)[1]
    return {"forward_backward_s": found}


class Steps:
    """The boundaries of one arm, and what happened at each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.last = args.every * (args.checkpoints + 1)
        self.every = args.every
        self.rows: list[dict[str, int]] = []
        self.barrier_ns = 0

    def run(
        self, entries: Iterator[object], model: nn.Module, optimizer: Any, batch: torch.Tensor
    ) -> int:
        """Train; ``entries`` gives one item per boundary. Returns when the last step was done."""
        for step in range(self.last):
            left = time.monotonic_ns()
            next(entries)
            settle(batch.device)
            entered = time.monotonic_ns()
            forward_backward(model, batch)
            computed = time.monotonic_ns()
            before = self.barrier_ns
            optimizer.step()
            settle(batch.device)
            stepped = time.monotonic_ns()
            optimizer.zero_grad()
            row = {"step": step, "boundary_ns": left, "held_ns": entered - left}
            row |= {"compute_ns": computed - entered, "barrier_ns": self.barrier_ns - before}
            self.rows.append(row | {"optimizer_ns": stepped - computed})
        return time.monotonic_ns()


def train_peer(args: argparse.Namespace) -> dict[str, Any]:
    """A run that saves as a peer does."""
    kind = savers.PEERS[args.arm]
    args.dir.mkdir(parents=True, exist_ok=True)
    if kind.needs_group:
        savers.form_group(args.dir)
    saver = kind(args.dir, on_gpu=args.size in states.ON_GPU)
    model, optimizer = states.build(args.size)
    steps = Steps(args)

    def wait(*_: object) -> None:
        began = time.monotonic_ns()
        saver.barrier()
        steps.barrier_ns += time.monotonic_ns() - began

    optimizer.register_step_pre_hook(wait)

    def boundaries() -> Iterator[None]:
        for step in range(steps.last):
            if step and step % args.every == 0:
                saver.save(step, states.tensors_of(model, optimizer))
            yield None

    done_ns = steps.run(
        boundaries(), model, optimizer, batch_of(args.tokens, states.device_of(args.size))
    )
    saver.finish()
    ended_ns = time.monotonic_ns() if saver.records else done_ns
    saver.close()
    return {"rows": steps.rows, "done_ns": done_ns, "ended_ns": ended_ns, "saved": saver.records}


def train_ours(args: argparse.Namespace) -> dict[str, Any]:
    """A run under ``ftrain launch``; when versions became durable is in the events."""
    model, optimizer = states.build(args.size)
    session = ftrain.Session(model=model, optimizer=optimizer, total_steps=10**9)
    steps = Steps(args)
    before = [0, 0]
    captures: list[dict[str, int]] = []

    def note(*_: object) -> None:
        """After the optimizer: the version of this step's boundary was captured or skipped."""
        found = session.statistics()
        steps.barrier_ns = found.barrier_ns
        spent = found.copy_ns + found.hash_ns
        if found.captured > before[0]:
            captures.append({"step": found.captured_step, "capture_ns": spent - before[1]})
        before[:] = [found.captured, spent]

    optimizer.register_step_post_hook(note)
    entries = session.steps()
    done_ns = steps.run(
        entries, model, optimizer, batch_of(args.tokens, states.device_of(args.size))
    )
    entries.close()  # type: ignore[attr-defined]
    skipped = session.statistics().skipped
    return {"rows": steps.rows, "done_ns": done_ns, "captures": captures, "skipped": skipped}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", required=True, help="a peer, ours, or calibrate")
    parser.add_argument("--size", choices=states.SIZES, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--dir", type=Path, help="where a peer saves")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Do what was asked for."""
    args = parse_arguments()
    if args.arm == "calibrate":
        result = calibrate(args.size, args.tokens)
    else:
        (args.tokens,) = args.tokens
        result = train_ours(args) if args.arm == "ours" else train_peer(args)
    fresh = args.out.with_suffix(".new")
    fresh.write_text(json.dumps(result | {"pid": os.getpid()}))
    fresh.replace(args.out)


if __name__ == "__main__":
    main()
