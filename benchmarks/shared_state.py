"""Shared state of a fleet: a newcomer gets everything, from one to three donors; nothing changed.

::

    python benchmarks/shared_state.py [--donors 1 2 3] [--mib 64 512] [--paced-mb 0 100]

Processes of one host with one thread each, which all call it at the same time; the newcomer
receives in place.  Time is the newcomer's call, so it has everybody's digests in it: on a machine
with fewer cores than processes these take turns.  "unchanged" is the call after it, in which
nothing travels.  With ``--paced-mb`` above 0 the kernel lets each donor send so many MB/s.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median

from common import Columns, Record, print_records, write_results

MIB = 1 << 20
SECRET = bytes(32)
SO_MAX_PACING_RATE = 47  # bytes a second; of Linux, not in Python's socket


def member(address: str, number: int, paced_mb: int, pipe: Connection) -> None:
    """One member: synchronises as the pipe asks for."""
    import torch

    from ftrain.comms.fleet import state_server
    from ftrain.comms.fleet.fleet import Fleet
    from ftrain.comms.fleet.shared_state import Role, synchronise

    def paced(sock: socket.socket, option: int) -> None:
        sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, paced_mb * 1_000_000)

    if paced_mb:
        state_server.limit_window = paced
    torch.set_num_threads(1)
    fleet = Fleet(address, "bench", SECRET, number, 1)
    fleet.wait_for_view(60)
    pipe.send("in")
    while (asked := pipe.recv()) is not None:
        mib, newcomer = asked
        state = {f"layer{n}": torch.full((mib * MIB // 32,), 0.5 + n) for n in range(8)}
        for tensor in state.values():
            tensor += torch.arange(tensor.numel()) % 1001 if not newcomer else 0
        walls = []
        for role in (Role.RECEIVE_ONLY if newcomer else Role.ENFORCE_POPULAR, Role.ENFORCE_POPULAR):
            pipe.send("ready")
            pipe.recv()
            cores_s, began_s = time.process_time(), time.monotonic()
            result = synchronise(fleet, state, 1, role=role)
            wall_s, cores_s = time.monotonic() - began_s, time.process_time() - cores_s
            walls.append((wall_s, cores_s, result.bytes_received, result.donors))
        pipe.send(walls)
    fleet.leave()


@contextmanager
def coordinator(members: int) -> Iterator[str]:
    """Its address."""
    from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator
    from ftrain.comms.fleet.server import FleetServer

    loop, there, found = asyncio.new_event_loop(), threading.Event(), []
    machine = FleetCoordinator(members_expected=members)
    server = FleetServer(machine, "bench", SECRET, save=lambda _: None, announce=lambda _: None)

    def heard(address: str) -> None:
        found.append(address)
        there.set()

    task = loop.create_task(server.run("127.0.0.1:0", heard))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    there.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def measure(donors: int, sizes: list[int], paced_mb: int, rounds: int) -> list[Record]:
    """Every size, in turn."""
    context = get_context("spawn")
    rows: dict[int, list[tuple[float, float, float]]] = {}
    with coordinator(donors + 1) as address:
        pipes, processes = [], []
        for number in range(donors + 1):
            ours, theirs = context.Pipe()
            processes.append(
                context.Process(target=member, args=(address, number, paced_mb, theirs))
            )
            processes[-1].start()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        for number in range(rounds + 1):
            for mib in sizes:
                for index, pipe in enumerate(pipes):
                    pipe.send((mib, index == donors))
                for _ in range(2):
                    for pipe in pipes:
                        pipe.recv()
                    for pipe in pipes:
                        pipe.send("go")
                found = [pipe.recv() for pipe in pipes]
                (wall_s, _, nbytes, parts), (again_s, _, none, _) = found[-1]
                if (nbytes, none, len(parts)) != (mib * MIB, 0, donors):
                    raise SystemExit(f"{nbytes} and {none} bytes from {parts}")
                if number:
                    cores_s = sum(each[0][1] for each in found)
                    rows.setdefault(mib, []).append((wall_s, cores_s, again_s))
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(20)
    return [
        {
            "donors": donors,
            "mib": mib,
            "paced_mb": paced_mb,
            "wall_s": median(row[0] for row in each),
            "walls_s": [row[0] for row in each],
            "cores_s": median(row[1] for row in each),
            "unchanged_s": median(row[2] for row in each),
        }
        for mib, each in rows.items()
    ]


COLUMNS: Columns = (
    ("donors", lambda r: str(r["donors"])),
    ("size", lambda r: f"{r['mib']} MiB"),
    ("each sends", lambda r: f"{r['paced_mb']} MB/s" if r["paced_mb"] else "what it can"),
    ("newcomer", lambda r: f"{r['wall_s']:.3f} s"),
    ("", lambda r: f"{min(r['walls_s']):.3f}-{max(r['walls_s']):.3f}"),
    ("rate", lambda r: f"{r['mib'] * MIB / 1e6 / r['wall_s']:.0f} MB/s"),
    ("core time of all", lambda r: f"{r['cores_s']:.3f} s"),
    ("unchanged", lambda r: f"{r['unchanged_s']:.3f} s"),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--donors", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--paced-mb", type=int, nargs="+", default=[0, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args()
    records: list[Record] = []
    for paced_mb in options.paced_mb:
        for donors in options.donors:
            sizes = options.mib if not paced_mb else options.mib[:1]  # a small one tells enough
            records += measure(donors, sizes, paced_mb, options.rounds)
    print_records(f"shared state, {os.cpu_count()} cores", COLUMNS, records)
    if not options.no_results:
        write_results("shared_state", {"records": records})


if __name__ == "__main__":
    main()
