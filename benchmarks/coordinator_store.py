"""The coordinator's store: how long a save takes, and until a killed leader is replaced.

::

    python benchmarks/coordinator_store.py [--etcd host:port ...] [--saves 1000] [--kills 7]

In a directory, and in the etcd cluster whose nodes are given.  The leader is a process that is
killed with SIGKILL while a candidate waits; until it is replaced is from the signal to the
candidate's term.  Leases are of 2 s and 5 s, and at the time of the kill are up to a third used up.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

from common import Columns, Record, print_records, write_results

from ftrain.comms.store.base import CoordinatorStore
from ftrain.comms.store.etcd import EtcdOptions, open_etcd
from ftrain.comms.store.files import FileStore

STATE = b"x" * 4096
WIN_S = 60.0


def open_store(folder: str, etcd: Sequence[str], lease_s: int) -> CoordinatorStore:
    """The store in etcd's nodes, or where there are none in a directory."""
    if not etcd:
        return FileStore(Path(folder))
    options = EtcdOptions(endpoints=tuple(etcd), prefix=f"/bench{folder}", lease_s=lease_s)
    return open_etcd(options)


def lead(folder: str, lease_s: str, *etcd: str) -> None:
    """The process that is killed."""
    store = open_store(folder, etcd, int(lease_s))
    assert store.campaign("leader:1", WIN_S)
    print("leads", flush=True)
    threading.Event().wait()


@contextmanager
def opened(etcd: Sequence[str], lease_s: int) -> Iterator[tuple[CoordinatorStore, str]]:
    """A new store, and its folder."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = open_store(str(Path(folder).resolve()), etcd, lease_s)
        try:
            yield store, str(Path(folder).resolve())
        finally:
            store.close()


def saves_s(etcd: Sequence[str], count: int) -> list[float]:
    """Seconds that each of ``count`` saves of 4 KiB took, one after the other."""
    with opened(etcd, 5) as (store, _):
        term = store.campaign("bench:1", WIN_S)
        assert term is not None
        term.save(STATE)
        times = [time.perf_counter()]
        for _ in range(count):
            term.save(STATE)
            times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)]


def replaced_s(etcd: Sequence[str], lease_s: int, pause_s: float) -> float:
    """Seconds from the SIGKILL of a leader to the term of the candidate that waited."""
    with opened(etcd, lease_s) as (store, folder):
        command = [sys.executable, __file__, "--lead", folder, str(lease_s), *etcd]
        leader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert leader.stdout is not None
        assert leader.stdout.readline() == "leads\n"
        won: list[float] = []

        def campaign() -> None:
            if store.campaign("bench:1", WIN_S) is not None:
                won.append(time.perf_counter())

        candidate = threading.Thread(target=campaign)
        candidate.start()
        time.sleep(pause_s)
        began = time.perf_counter()
        leader.kill()
        leader.wait()
        leader.stdout.close()
        candidate.join()
    return won[0] - began


def measure(arm: str, etcd: Sequence[str], saves: int, kills: int) -> list[Record]:
    """One arm's figures, a record for each lease."""
    took_s = saves_s(etcd, saves)
    rng = random.Random(1)
    records = []
    for lease_s in (2, 5) if etcd else (0,):
        waited = [
            replaced_s(etcd, lease_s, 0.5 + rng.uniform(0, lease_s / 3)) for _ in range(kills)
        ]
        records.append(
            {
                "arm": arm,
                "lease_s": lease_s,
                "save_p50_s": median(took_s),
                "save_p99_s": quantiles(took_s, n=100)[98],
                "replaced_s": waited,
            }
        )
    return records


COLUMNS: Columns = (
    ("", lambda r: r["arm"]),
    ("lease", lambda r: f"{r['lease_s']} s" if r["lease_s"] else "none"),
    ("save p50", lambda r: f"{r['save_p50_s'] * 1e3:.1f} ms"),
    ("p99", lambda r: f"{r['save_p99_s'] * 1e3:.1f} ms"),
    ("replaced, median", lambda r: f"{median(r['replaced_s']):.2f} s"),
    ("longest", lambda r: f"{max(r['replaced_s']):.2f} s"),
)


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--lead"]:
        lead(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--etcd", nargs="+", default=[])
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=7)
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args()
    records = measure("directory", [], options.saves, options.kills)
    if options.etcd:
        nodes = f"etcd, {len(options.etcd)} node(s)"
        records += measure(nodes, options.etcd, options.saves, options.kills)
    print_records(f"coordinator's store, {os.cpu_count()} cores", COLUMNS, records)
    if not options.no_results:
        write_results("coordinator_store", {"records": records})


if __name__ == "__main__":
    main()
