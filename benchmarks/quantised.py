"""Quantised all-reduces beside plain ones: error, its bound, bytes, wall and core time.

::

    python benchmarks/quantised.py [--ranks 2 4] [--mib 64] [--rounds 5] [--memory]

Float32 sums of N(0, 1) among processes of one host with one thread each, over TCP or shared memory,
in chunks of 1 MiB; the arms take turns, in every round.  Loopback moves bytes about as fast as a
core packs them, so it shows what quantising costs, not what it saves on a slow network.  The error
is the largest of all elements, against the sum in float64; the bound is the largest of all chunks;
bytes are those of the chunks that a rank receives.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from itertools import accumulate, product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median

import torch
from common import Columns, Record, print_records, write_results

from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
from ftrain.comms.collectives.meeting import Meeting, RingSettings
from ftrain.comms.collectives.quantise import Quantisation, Scheme, error_bound
from ftrain.comms.collectives.ring import Work
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.ring import ChunkId, Kind, Layout

MIB = 1 << 20
ARMS = {
    "plain": None,
    "min-max, 8 bits": Quantisation(Scheme.MIN_MAX, 8),
    "zero-point, 8 bits": Quantisation(Scheme.ZERO_POINT, 8),
    "min-max, 4 bits": Quantisation(Scheme.MIN_MAX, 4),
    "zero-point, 4 bits": Quantisation(Scheme.ZERO_POINT, 4),
}


def values(rank: int, count: int) -> torch.Tensor:
    """What a rank brings."""
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def serve(rank: int, pipe: Connection, shares: bool) -> None:
    """One rank: runs what the pipe asks for."""
    torch.set_num_threads(1)
    meeting = Meeting(Identity("bench", "rank", rank, 1), bytes(32))
    pipe.send(meeting.place)
    ring = meeting.join(1, pipe.recv(), RingSettings(share_memory=shares), timeout_s=30)
    how = Arithmetic(Reduction.SUM, torch.float32)
    while (asked := pipe.recv()) is not None:
        arm, count = asked
        tensor = values(rank, count)
        part = memoryview(tensor.view(torch.uint8).numpy())
        work = Work(Kind.ALL_REDUCE, count, 4, part, part, how, quantise=ARMS[arm])
        pipe.send("ready")
        pipe.recv()
        cores_s, began_s = time.process_time(), time.monotonic()
        ring.begin(work).wait(60)
        ended_s, cores_s = time.monotonic(), time.process_time() - cores_s
        pipe.send((began_s, ended_s, cores_s, tensor.numpy()))
    ring.close()
    meeting.close()


def judged(arm: str, ranks: int, result: torch.Tensor) -> tuple[float, float, float]:
    """Largest error, largest bound, bytes for each rank."""
    how, found = ARMS[arm], []
    sources = [values(rank, len(result)).double() for rank in range(ranks)]
    layout = Layout(len(result), ranks, MIB // 4)
    for segment, index in product(range(ranks), range(layout.chunks)):
        start, stop = layout.chunk(ChunkId(segment, index))
        if start == stop:
            continue
        ordered = [sources[(segment + 1 + n) % ranks][start:stop] for n in range(ranks)]
        sums = list(accumulate(ordered))
        worst = (result[start:stop].double() - sums[-1]).abs().max().item()
        ranges = [(each.min().item(), each.max().item()) for each in sums]
        bound = error_bound(how, ranges, average=False) if how else 0.0
        size = how.packed_bytes(stop - start) if how else 4 * (stop - start)
        found.append((worst, bound, 2 * (ranks - 1) / ranks * size))
    worsts, bounds, sizes = zip(*found, strict=True)
    return max(worsts), max(bounds), sum(sizes)


def measure(ranks: int, mib: int, rounds: int, shares: bool) -> list[Record]:
    """Every arm, in turn."""
    context, pipes, processes = get_context("spawn"), [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(rank, theirs, shares), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    places = [pipe.recv() for pipe in pipes]
    records: dict[str, Record] = {}
    rows: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for message in (places, *((arm, mib * MIB // 4) for _ in range(rounds + 1) for arm in ARMS)):
        for pipe in pipes:
            pipe.send(message)
        if message is places:
            continue
        arm = message[0]
        for step in ("ready", "go"):
            _ = [pipe.recv() if step == "ready" else pipe.send(step) for pipe in pipes]
        found = [pipe.recv() for pipe in pipes]
        if any(bytes(each[3]) != bytes(found[0][3]) for each in found):
            raise SystemExit(f"{arm}: the ranks have unequal results")
        if arm not in records:  # the first one makes connections and buffers
            error, bound, nbytes = judged(arm, ranks, torch.from_numpy(found[0][3]))
            records[arm] = {"ranks": ranks, "mib": mib, "memory": shares, "arm": arm}
            records[arm] |= {"error": error, "bound": bound, "bytes": nbytes}
            continue
        wall_s = max(each[1] for each in found) - min(each[0] for each in found)
        rows[arm].append((wall_s, sum(each[2] for each in found)))
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(20)
    for arm, record in records.items():
        record["wall_s"], record["cores_s"] = (
            median(each) for each in zip(*rows[arm], strict=True)
        )
    return list(records.values())


COLUMNS: Columns = (
    ("ranks", lambda r: str(r["ranks"])),
    ("size", lambda r: f"{r['mib']} MiB"),
    ("over", lambda r: "memory" if r["memory"] else "TCP"),
    ("", lambda r: r["arm"]),
    ("error", lambda r: f"{r['error']:.3g}"),
    ("bound", lambda r: f"{r['bound']:.3g}"),
    ("bytes a rank", lambda r: f"{r['bytes'] / MIB:.2f} MiB"),
    ("wall", lambda r: f"{r['wall_s'] * 1e3:.0f} ms"),
    ("core time", lambda r: f"{r['cores_s'] * 1e3:.0f} ms"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mib", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="share memory, not TCP")
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args(arguments)
    records: list[Record] = []
    for ranks, mib in product(options.ranks, options.mib):
        records += measure(ranks, mib, options.rounds, options.memory)
    print_records(f"quantised all-reduce, {os.cpu_count()} cores", COLUMNS, records)
    if not options.no_results:
        write_results("quantised", {"records": records})


if __name__ == "__main__":
    main()
