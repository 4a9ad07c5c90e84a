"""What no restart of the training can do without: building the model, copying the state in.

Run by restart.py, once per rank and all at the same time; prints one JSON line.  The state comes
out of a memory file that is mapped anew, as a snapshot does; the moments are fresh memory.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "llama"))
import train as example


def build(preset: str) -> tuple[DistributedDataParallel, float]:
    """The model as the script makes it, and the seconds that takes."""
    dist.barrier()
    began = time.monotonic()
    model = DistributedDataParallel(example.Llama(example.PRESETS[preset]))
    torch.optim.AdamW(model.parameters(), fused=True)
    return model, time.monotonic() - began


def copy_in(parameters: list[torch.Tensor], fd: int, nbytes: int) -> float:
    """Seconds to fill parameters and as many bytes of two fresh moments each."""
    dist.barrier()
    began = time.monotonic()
    source = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.float32)
    at = 0
    for parameter in parameters:
        size = parameter.numel()
        for target in (parameter.view(-1), torch.empty(size), torch.empty(size)):
            target.copy_(source[at : at + size])
            at += size
    return time.monotonic() - began


def main() -> None:
    """Three times each; the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=example.PRESETS, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--meet", required=True, help="path of a file that does not exist yet")
    args = parser.parse_args()
    where = {"init_method": f"file://{args.meet}", "rank": args.rank}
    dist.init_process_group("gloo", world_size=args.world_size, **where)
    built = [build(args.preset) for _ in range(3)]
    parameters = [p.detach() for p in built[-1][0].parameters()]
    nbytes = 3 * sum(p.numel() * p.element_size() for p in parameters)
    fd = os.memfd_create("restart-bound", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    mmap.mmap(fd, nbytes)[:] = bytes(nbytes)
    copies = [copy_in(parameters, fd, nbytes) for _ in range(3)]
    found = {
        "state_bytes": nbytes,
        "construction_s": median(seconds for _, seconds in built),
        "memcpy_s": median(copies),
    }
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
