"""What the machine gives: memcpy, hash, raw direct I/O, and our writing of a version beside them.

Run by checkpoint.py before anything else trains: ``python ceilings.py --size 0.3 --dir FOLDER``
prints one JSON object, in GB/s, each figure the median of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import states
import torch
import xxhash

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.pinned import PageLock
from ftrain.comms.protocol.messages import VersionId

PART_BYTES = 16 * 1024 * 1024
WRITERS = 2


def write_raw(path: Path, memory: memoryview, *, direct: bool) -> None:
    """All of ``memory`` into a new file with its space reserved, until it is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    fd = os.open(path, flags, 0o644)
    try:
        os.posix_fallocate(fd, 0, len(memory))

        def write(at: int) -> None:
            part = memory[at : at + PART_BYTES]
            while part:
                done = os.pwrite(fd, part, at)
                part, at = part[done:], at + done

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, range(0, len(memory), PART_BYTES)))
        os.fsync(fd)
    finally:
        os.close(fd)


def measure(size: str, folder: Path, rounds: int) -> dict[str, float]:
    """GB/s by name."""
    model, optimizer = states.build(size)
    states.add_moments(model, optimizer)
    nbytes = states.state_bytes(states.tensors_of(model, optimizer))
    nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    memory = memoryview(mmap.mmap(-1, nbytes))
    target = torch.frombuffer(memory, dtype=torch.uint8)
    image = states.seal_image(states.state_of(model, optimizer), VersionId(1, 1))
    store = DurableStore(folder / "ours")
    store.begin_fence(1, states.RUN_ID, None)

    def forget() -> None:
        for path in (folder / "raw", *folder.glob("ours/1/1/*")):
            path.unlink(missing_ok=True)

    works: dict[str, Callable[[], object]] = {
        "memcpy": lambda: target.copy_(source),
        "hash": lambda: xxhash.xxh3_128_digest(memory),
        "direct": lambda: write_raw(folder / "raw", memory, direct=True),
        "buffered": lambda: write_raw(folder / "raw", memory, direct=False),
        "ours": lambda: store.write_image(1, VersionId(1, 1), 0, image),
    }
    if size in states.ON_GPU:
        on_gpu, lock = source.cuda(), PageLock(memory)

        def from_gpu() -> None:
            target.copy_(on_gpu, non_blocking=True)
            torch.cuda.synchronize()

        works["from the GPU"] = from_gpu
    torch.set_num_threads(1)
    target.copy_(source)  # touched before it is timed
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name in random.sample(list(works), len(works)):
            forget()
            os.sync()
            began = time.monotonic()
            works[name]()
            found[name].append(nbytes / (time.monotonic() - began) / 1e9)
    forget()
    if size in states.ON_GPU:
        lock.release()
    return {name: median(rates) for name, rates in found.items()} | {"state_bytes": nbytes}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=states.SIZES, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(measure(args.size, args.dir, args.rounds)))


if __name__ == "__main__":
    main()
