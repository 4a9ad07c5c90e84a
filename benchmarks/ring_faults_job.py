"""One member of :mod:`ring_faults`: sums for ever, and tells of each."""

from __future__ import annotations

import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from fleets import RUN, SECRET

from ftrain.comms.collectives.meeting import RingSettings
from ftrain.comms.errors import FleetChangedError
from ftrain.comms.fleet.collectives import all_reduce, memory
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.settings import FleetSettings

MODES = ("in place, retried", "in place, told", "apart, retried", "apart, told")


class Data:
    """What members bring, and what comes out; in a file that all of them map.

    Member ``m`` brings random whole numbers, the same ones each time, plus one that belongs to the
    operation and ``m``.  All sums are below 2**24, so float32 is exact in any order.
    """

    def __init__(self, path: Path, members: int, count: int) -> None:
        subsets = 1 << members
        whole = torch.from_file(str(path), shared=True, size=subsets * count)
        self.sums = whole.view(subsets, count)
        self.scratch = torch.empty(count)

    @classmethod
    def make(cls, path: Path, members: int, count: int) -> None:
        """Write the file."""
        with path.open("wb") as file:
            file.truncate((count << members) * 4)
        sums = cls(path, members, count).sums
        for subset in range(1, 1 << members):
            member = subset.bit_length() - 1
            if subset == 1 << member:
                draw = torch.Generator().manual_seed(member)
                sums[subset] = torch.randint(0, 1 << 16, (count,), generator=draw).float()
            else:
                torch.add(sums[1 << member], sums[subset ^ (1 << member)], out=sums[subset])

    def put(self, member: int, number: int, tensor: torch.Tensor) -> None:
        """What a member brings into an operation."""
        torch.add(self.sums[1 << member], _extra(member, number), out=tensor)

    def brought(self, member: int, number: int, tensor: torch.Tensor) -> bool:
        """Whether the tensor still is that."""
        self.put(member, number, self.scratch)
        return torch.equal(tensor, self.scratch)

    def right(self, members: tuple[int, ...], number: int, tensor: torch.Tensor) -> bool:
        """Whether the tensor is the sum of what these brought."""
        extra = sum(_extra(member, number) for member in members)
        torch.add(self.sums[sum(1 << m for m in members)], extra, out=self.scratch)
        return torch.equal(tensor, self.scratch)


def _extra(member: int, number: int) -> float:
    return float((7 * number + 13 * member) % 61)


def serve(
    pipe: Connection,
    address: str,
    member: int,
    incarnation: int,
    host: str,
    shares: bool,
    path: str,
    shape: tuple[int, int],
) -> None:
    """Tells when an operation begins and that it is over, then a record of it, once checked."""
    torch.set_num_threads(1)
    data = Data(Path(path), *shape)
    settings = FleetSettings(ring=RingSettings(share_memory=shares))
    fleet = Fleet(address, RUN, SECRET, member, incarnation, bind=host, settings=settings)
    fleet.wait_for_view(60)
    tensor, out = torch.empty(shape[1]), torch.empty(shape[1])
    while True:
        number = fleet.next_number()
        mode = MODES[number % len(MODES)]
        data.put(member, number, tensor)
        apart = mode.startswith("apart")
        began_s = time.monotonic()
        pipe.send(("began", number, began_s))
        handle = all_reduce(
            fleet, tensor, out=out if apart else None, retry=mode.endswith("retried")
        )
        try:
            handle.wait(60)
            ended_s = time.monotonic()
            pipe.send(("returned", number))
            result = out if apart else tensor
            right = data.right(handle.members, number, result)
            if apart:
                right = right and data.brought(member, number, tensor)
            digest = xxhash.xxh3_64_intdigest(memory(result))
        except FleetChangedError:
            ended_s = time.monotonic()
            pipe.send(("returned", number))
            right, digest = data.brought(member, number, tensor), 0
        record = {
            "number": number,
            "mode": mode,
            "view": handle.view,
            "members": handle.members,
            "digest": digest,
            "right": right and handle.op.number == number,
            "began_s": began_s,
            "ended_s": ended_s,
        }
        pipe.send(("ended", record))


def serve_gloo(pipe: Connection, port: int, shape: tuple[int, int], path: str, member: int) -> None:
    """Sums in one process group after the other, each for as long as the pipe says or it lives."""
    torch.set_num_threads(1)
    data = Data(Path(path), *shape)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    tensor = torch.empty(shape[1])
    while True:
        prefix, members, count = pipe.recv()
        rank, ranks = members.index(member), len(members)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(prefix, store),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=30),
        )
        number = 0
        try:
            while number < count:
                data.put(member, number, tensor)
                began_s = time.monotonic()
                pipe.send(("began", number, began_s))
                dist.all_reduce(tensor)
                ended_s = time.monotonic()
                pipe.send(("returned", number))
                record = {
                    "number": number,
                    "members": members,
                    "right": data.right(members, number, tensor),
                    "began_s": began_s,
                    "ended_s": ended_s,
                }
                pipe.send(("ended", record))
                number += 1
        except RuntimeError:
            pipe.send(("failed", time.monotonic()))
        dist.destroy_process_group()
