"""The training that ``overhead`` measures: one rank's times and costs over a window of steps.

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
from collections.abc import Callable
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


def core_ms_per_mb(work: Callable[[], object], megabytes: float, at_least_s: float = 0.3) -> float:
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
    """CPU time of the node's snapshot manager; 0 without one."""
    context = rank_environment().context
    if context is None:
        return 0.0
    node = read_node_file(Path(context.run_dir) / "state" / f"node{context.node}.json")
    if node is None or not node.smp_pid:
        return 0.0
    fields = Path(f"/proc/{node.smp_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def usage(session: ftrain.Session, boundary_s: float) -> dict[str, Any]:
    """Everything counted so far."""
    return {
        "wall_s": time.monotonic(),
        "process_s": time.process_time(),
        "capture_thread_s": capture_thread_s(),
        "manager_s": manager_s(),
        "boundary_s": boundary_s,
        **dataclasses.asdict(session.statistics()),
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
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="in the measured window")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure the reference, train, and write what the window cost."""
    args = parse_arguments()
    place = example.join()
    torch.manual_seed(0)
    costs = reference(place)
    windows = example.Windows(example.read_corpus("training", args.cache), args.seq)
    sampler = DistributedSampler(windows, place.world_size, place.rank, drop_last=True)
    loader = DataLoader(windows, args.batch_size, sampler=sampler, drop_last=True)
    llama = example.Llama(PRESETS[args.preset]).to(place.device)
    model = DistributedDataParallel(llama) if place.world_size > 1 else llama
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    total = args.warmup + args.steps + 1
    session = ftrain.Session(model=model, optimizer=optimizer, data=loader, total_steps=total)

    boundary_s, left_s, began = 0.0, time.monotonic(), {}
    for step, batch in session.steps():
        boundary_s += time.monotonic() - left_s  # loading the batch included, in every arm
        if step == args.warmup:
            began = usage(session, boundary_s)
        if step == args.warmup + args.steps:
            break
        loss = model(batch.to(place.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss.detach())
        left_s = time.monotonic()
    ended = usage(session, boundary_s)
    window = {
        name: ended[name] - value
        for name, value in began.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    result = {"state_bytes": state_bytes(llama, optimizer), "reference": costs, "window": window}
    (args.out / f"rank{place.rank}.json").write_text(json.dumps(result))
    if place.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
