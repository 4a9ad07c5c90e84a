"""All-reduce beside gloo: wall time, core time, memory.

::

    python benchmarks/allreduce.py [--ranks 2 3 4] [--mib 4 64 256] [--rounds 9]

Float32 sums in place among processes of one host with one thread each, over TCP (every chunk
checked against corruption at both ends; gloo checks none) and over shared memory; the arms take
turns, in every round.  Time is from the first rank's call to the last one's return; memory is what
comes on top in an operation, so without buffers that a ring has from its beginning.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from common import Columns, Record, print_records, write_results

MIB = 1 << 20
ARMS = ("gloo", "ftrain, TCP", "ftrain, shared memory")


def serve(rank: int, ranks: int, pipe: Connection, folder: str) -> None:
    """One rank: runs what the pipe asks for."""
    import torch
    import torch.distributed as dist

    from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
    from ftrain.comms.collectives.meeting import Meeting, RingSettings
    from ftrain.comms.collectives.work import Work
    from ftrain.comms.protocol.handshake import Identity
    from ftrain.comms.protocol.ring import Kind

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/g", rank=rank, world_size=ranks)
    meetings = [Meeting(Identity("bench", "rank", rank, arm), bytes(32)) for arm in range(2)]
    pipe.send([meeting.place for meeting in meetings])
    places = pipe.recv()
    tcp, shared = (
        meetings[n].join(1, [p[n] for p in places], RingSettings(share_memory=n == 1), timeout_s=30)
        for n in range(2)
    )
    how = Arithmetic(Reduction.SUM, torch.float32)
    while (asked := pipe.recv()) is not None:
        arm, nbytes = asked
        tensor = torch.full((nbytes // 4,), float(rank))
        part = memoryview(tensor.view(torch.uint8).numpy())
        work = Work(Kind.ALL_REDUCE, tensor.numel(), 4, part, part, how)
        pipe.send("ready")
        pipe.recv()
        before_bytes = reset_peak()
        cores_s, began_s = time.process_time(), time.monotonic()
        if arm == "gloo":
            dist.all_reduce(tensor)
        else:
            (tcp if arm == "ftrain, TCP" else shared).begin(work).wait(60)
        ended_s = time.monotonic()
        cores_s = time.process_time() - cores_s
        more_bytes = peak() - before_bytes
        right = bool((tensor == sum(range(ranks))).all())
        pipe.send((began_s, ended_s, cores_s, more_bytes, right))
    for one in (tcp, shared, *meetings):
        one.close()
    dist.destroy_process_group()


def reset_peak() -> int:
    """Bytes resident now, which the next peak is counted from."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Most bytes resident since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Ranks:
    """As many processes."""

    def __init__(self, ranks: int, folder: str) -> None:
        context = get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, ranks, theirs, folder), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        places = [pipe.recv() for pipe in self._pipes]
        for pipe in self._pipes:
            pipe.send(places)

    def run(self, arm: str, nbytes: int) -> Record:
        """One all-reduce."""
        for pipe in self._pipes:
            pipe.send((arm, nbytes))
        for pipe in self._pipes:
            pipe.recv()
        for pipe in self._pipes:
            pipe.send("go")
        found = [pipe.recv() for pipe in self._pipes]
        if not all(each[4] for each in found):
            raise SystemExit(f"{arm}: a sum of {nbytes} bytes is wrong")
        return {
            "wall_s": max(each[1] for each in found) - min(each[0] for each in found),
            "cores_s": sum(each[2] for each in found),
            "memory_bytes": max(each[3] for each in found),
        }

    def close(self) -> None:
        """End them."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)


def measure(ranks: int, sizes: Sequence[int], rounds: int) -> list[Record]:
    """Every arm and size, in turn."""
    rows: dict[tuple[str, int], list[Record]] = {}
    with tempfile.TemporaryDirectory() as folder:
        group = Ranks(ranks, folder)
        try:
            for number in range(rounds + 1):
                for mib in sizes:
                    for arm in ARMS:
                        found = group.run(arm, mib * MIB)
                        if number:  # the first one makes connections and buffers
                            rows.setdefault((arm, mib), []).append(found)
        finally:
            group.close()
    records = []
    for (arm, mib), each in rows.items():
        base = rows["gloo", mib]
        record: Record = {"ranks": ranks, "mib": mib, "arm": arm}
        for name in ("wall_s", "cores_s", "memory_bytes"):
            record[name] = median(row[name] for row in each)
        record["wall_ratio"] = record["wall_s"] / median(row["wall_s"] for row in base)
        record["cores_ratio"] = record["cores_s"] / median(row["cores_s"] for row in base)
        record["walls_s"] = [row["wall_s"] for row in each]
        records.append(record)
    return records


COLUMNS: Columns = (
    ("ranks", lambda r: str(r["ranks"])),
    ("size", lambda r: f"{r['mib']} MiB"),
    ("", lambda r: r["arm"]),
    ("wall", lambda r: f"{r['wall_s'] * 1e3:.1f} ms"),
    ("of gloo's", lambda r: f"{r['wall_ratio']:.2f}"),
    ("core time", lambda r: f"{r['cores_s'] * 1e3:.1f} ms"),
    ("of gloo's ", lambda r: f"{r['cores_ratio']:.2f}"),
    ("memory", lambda r: f"{r['memory_bytes'] / MIB:.0f} MiB more"),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--mib", type=int, nargs="+", default=[4, 64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args()
    records: list[Record] = []
    for ranks in options.ranks:
        records += measure(ranks, options.mib, options.rounds)
        print_records(f"all-reduce, {os.cpu_count()} cores", COLUMNS, records)
    if not options.no_results:
        write_results("allreduce", {"records": records})


if __name__ == "__main__":
    main()
