"""The training that ``overhead`` measures: one rank's times and costs over blocks of steps.

Run by overhead.py under ``ftrain launch``; each rank writes ``<out>/rank<r>.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import ftrain
from ftrain.comms.environment import rank_environment
from ftrain.recovery.node_file import read_node_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "llama"))
import train as example

PRESETS = {**example.PRESETS, "5m": example.LlamaConfig(256, layers=6, heads=4, hidden=704)}
REFERENCE_BYTES = 64 * 1024 * 1024  # larger than the caches, as training state is


def core_ms_per_mb(work: Callable[[], object], megabytes: float, at_least_s: float = 0.15) -> float:
    """CPU time of this thread that the work takes."""
    work()
    began, rounds = time.thread_time(), 0
    while (spent := time.thread_time() - began) < at_least_s:
        work()
        rounds += 1
    return spent * 1e3 / rounds / megabytes


def reference(place: example.Place) -> dict[str, float]:
    """memcpy into a memory file, and hash, while every rank does the same."""
    fd = os.memfd_create("overhead-reference", os.MFD_CLOEXEC)
    os.ftruncate(fd, REFERENCE_BYTES)
    memory = mmap.mmap(fd, REFERENCE_BYTES)
    os.close(fd)
    target = torch.frombuffer(memory, dtype=torch.uint8)
    source = torch.randint(0, 256, (REFERENCE_BYTES,), dtype=torch.uint8)
    if place.world_size > 1:
        dist.barrier()
    megabytes = REFERENCE_BYTES / 1e6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memcpy = core_ms_per_mb(lambda: target.copy_(source), megabytes)
    torch.set_num_threads(threads)
    digest = core_ms_per_mb(lambda: xxhash.xxh3_128_digest(memory), megabytes)
    return {"memcpy": memcpy, "hash": digest}


def capture_thread_s() -> float:
    """CPU time of the thread that copies and hashes; 0 without one."""
    idents = [t.ident for t in threading.enumerate() if t.name == "ftrain-capture" and t.ident]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in idents)


def manager_s() -> float:
    """CPU time of the node's snapshot manager."""
    context = rank_environment().context
    assert context is not None, "run by overhead.py under ftrain launch"
    node = read_node_file(Path(context.run_dir) / "state" / f"node{context.node}.json")
    assert node is not None
    threads = Path(f"/proc/{node.smp_pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


class Meter:
    """Trains in blocks with and without snapshots, in turn, and counts what each block took."""

    def __init__(self, session: ftrain.Session, place: example.Place, rounds: int) -> None:
        self.session = session
        self.place = place
        self.rounds = rounds
        self.arm = "on"
        self.boundary_s = 0.0
        self.results: list[dict[str, Any]] = []
        self._references: list[dict[str, float]] = []
        capture = session._capture  # a run with snapshots can't be told to leave some out

        def gated(*arguments: Any) -> None:
            if self.arm == "on":
                capture(*arguments)

        session._capture = gated  # type: ignore[method-assign]

    def blocks(self, warmup: int, settle: int, steps: int) -> Iterator[bool]:
        """Once per step: whether the script may go on. Counts the last ``steps`` of each block."""
        for _ in range(warmup):
            yield True
        for number in range(self.rounds):
            self._references.append(reference(self.place))
            for arm in ("off", "on") if number % 2 else ("on", "off"):
                self.arm = arm
                for _ in range(settle):
                    yield True
                before = self._usage()
                for _ in range(steps):
                    yield True
                after = self._usage()
                spent = {name: after[name] - value for name, value in before.items()}
                self.results.append({"arm": arm, "round": number, "steps": steps, **spent})
        yield False

    def report(self) -> dict[str, Any]:
        """Everything, for the parent."""
        return {"reference": self._references, "blocks": self.results}

    def _usage(self) -> dict[str, float]:
        """Everything counted so far."""
        counted = dataclasses.asdict(self.session.statistics())
        return {
            "wall_s": time.monotonic(),
            "process_s": time.process_time(),
            "capture_thread_s": capture_thread_s(),
            "manager_s": manager_s(),
            "boundary_s": self.boundary_s,
            **{name: float(v) for name, v in counted.items() if type(v) is int},
        }


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Parameters and optimizer moments."""
    tensors = list(model.parameters())
    for entry in optimizer.state.values():
        tensors += [value for value in entry.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="0.5m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--settle", type=int, default=2, help="steps at the start of each block")
    parser.add_argument("--steps", type=int, default=10, help="counted in each block")
    parser.add_argument("--rounds", type=int, default=6, help="of one block with, one without")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Train, and write what each block of steps cost."""
    args = parse_arguments()
    place = example.join()
    torch.manual_seed(0)
    windows = example.Windows(example.read_corpus("training", args.cache), args.seq)
    sampler = DistributedSampler(windows, place.world_size, place.rank, drop_last=True)
    loader = DataLoader(windows, args.batch_size, sampler=sampler, drop_last=True)
    llama = example.Llama(PRESETS[args.preset]).to(place.device)
    model = DistributedDataParallel(llama) if place.world_size > 1 else llama
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    session = ftrain.Session(model=model, optimizer=optimizer, data=loader, total_steps=10**6)
    meter = Meter(session, place, args.rounds)
    blocks = meter.blocks(args.warmup, args.settle, args.steps)

    left_s = time.monotonic()
    for _, batch in session.steps():
        meter.boundary_s += time.monotonic() - left_s  # loading the batch included, in both arms
        if not next(blocks):
            break
        loss = model(batch.to(place.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss.detach())
        left_s = time.monotonic()
    result = {"state_bytes": state_bytes(llama, optimizer), **meter.report()}
    (args.out / f"rank{place.rank}.json").write_text(json.dumps(result))
    if place.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
