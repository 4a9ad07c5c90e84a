"""What it takes from a captured version to one that other nodes' parity protects.

::

    python benchmarks/protect.py [--mib 6 120 1500] [--nodes 4] [--parity 1] [--rounds 7]

Real snapshot managers, one for each node, with one rank each whose state of random bytes is on no
other node.  In each repetition the same bytes are moved in turn by plain sockets, between as many
processes in the same pattern (the ceiling), and by the product: from the moment at which the last
rank has sealed its image until every node has said that all have their parity.  Core times are
those that the kernel counts of all processes that take part.  Plain sockets have the system's
buffers; another set of them has as small ones as the product's.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
from common import Columns, Record, print_records, write_results
from nodes import GROUP_SLOTS, Group

from ftrain.checkpoint.digest import digest_of
from ftrain.comms.bulk import WINDOW_BYTES
from ftrain.snapshot.erasure.engines import engine

MIB = 1 << 20
_BLOCK = MIB


class RawTransport:
    """As many processes as nodes; each receives from every other one what its parity is made of."""

    def __init__(self, nodes: int, nbytes: int, window_bytes: int = 0) -> None:
        """``nbytes``: that each node receives from each other one; ``window_bytes``: of each
        socket's buffers, 0 for the system's."""
        context = get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(nodes)]
        ports = [listener.getsockname()[1] for listener in listeners]
        for node in range(nodes):
            ours, theirs = context.Pipe()
            arguments = (node, listeners, ports, nbytes, window_bytes, theirs)
            process = context.Process(target=_serve_raw, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for listener in listeners:
            listener.close()

    def run(self) -> tuple[float, float]:
        """Seconds, and seconds of all cores."""
        began_s = time.monotonic()
        for pipe in self._pipes:
            pipe.send("go")
        cores_s = sum(pipe.recv() for pipe in self._pipes)
        return time.monotonic() - began_s, cores_s

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:  # each holds ends of the others' pipes
            process.terminate()
            process.join()


def _serve_raw(
    node: int,
    listeners: list[socket.socket],
    ports: list[int],
    nbytes: int,
    window_bytes: int,
    pipe: Connection,
) -> None:
    from threading import Thread

    outgoing = [
        socket.create_connection(("127.0.0.1", p)) for n, p in enumerate(ports) if n != node
    ]
    incoming = [listeners[node].accept()[0] for _ in outgoing]
    if window_bytes:
        for sock in (*outgoing, *incoming):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, window_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
    # A part of its own for each, as chunks are: the same one again would be in the cache.
    data = memoryview(np.random.default_rng(node).bytes(nbytes * len(outgoing)))
    room = memoryview(bytearray(_BLOCK))

    def send(number: int, sock: socket.socket) -> None:
        sock.sendall(data[number * nbytes : (number + 1) * nbytes])

    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        before_s = time.process_time()
        senders = [Thread(target=send, args=peer) for peer in enumerate(outgoing)]
        for sender in senders:
            sender.start()
        left = dict.fromkeys(incoming, nbytes)
        while left:  # block by block from each, as sums are made
            for sock in list(left):
                want = min(_BLOCK, left[sock])
                got = 0
                while got < want:
                    got += sock.recv_into(room[got:want])
                left[sock] -= want
                if not left[sock]:
                    del left[sock]
        for sender in senders:
            sender.join()
        pipe.send(time.process_time() - before_s)


@contextmanager
def closing_all(*things: RawTransport | Group) -> Iterator[None]:
    """Close them in the end."""
    try:
        yield
    finally:
        for thing in things:
            thing.close()


def local_cost(nbytes: int) -> tuple[float, float]:
    """Core seconds of copying and hashing so many bytes, and of adding them up for parity."""
    source = memoryview(bytearray(np.random.default_rng(0).bytes(min(nbytes, 64 * MIB))))
    target = memoryview(bytearray(len(source)))
    target[:] = source  # touched
    add, times = engine().engine.add, max(1, nbytes // len(source))
    before_s = time.thread_time()
    for _ in range(times):
        for start in range(0, len(source), 16 * MIB):
            target[start : start + 16 * MIB] = source[start : start + 16 * MIB]
            digest_of(target[start : start + 16 * MIB])
    copied_s = time.thread_time()
    block = target[:_BLOCK]
    for _ in range(times):
        for start in range(0, len(source) - _BLOCK + 1, _BLOCK):
            add(1, source[start : start + _BLOCK], block)
    return copied_s - before_s, time.thread_time() - copied_s


def measure(mib: int, nodes: int, parity: int, rounds: int, folder: Path) -> Record:
    """One size of the whole state, spread over the nodes."""
    each = mib * MIB // nodes
    data = nodes - parity
    per_pair = parity * each // (nodes - 1)  # each node sends its bytes `parity` times in all
    raw = RawTransport(nodes, per_pair)  # first: it is forked, and would hold the nodes' sockets
    small = RawTransport(nodes, per_pair, WINDOW_BYTES)
    group = Group(folder, nodes, parity, each)
    rows = []
    with closing_all(raw, small, group):
        for step in range(1, GROUP_SLOTS + 2):  # until every slot was written and read once
            group.protect(step)
        raw.run()
        small.run()
        for step in range(GROUP_SLOTS + 2, GROUP_SLOTS + 2 + rounds):
            raw_s, raw_cores_s = raw.run()
            small_s, _ = small.run()
            copy_s, encode_s = local_cost(each)
            ours = group.protect(step)
            rows.append(
                {
                    "raw_s": raw_s,
                    "raw_cores_s": raw_cores_s,
                    "raw_small_s": small_s,
                    "local_cores_s": nodes * (copy_s + parity * encode_s),
                    "protect_s": ours.protect_s,
                    "capture_s": ours.capture_s,
                    "cores_s": ours.cores_s,
                }
            )
        memory = group.memory_bytes()
        fetched = group.fetched_bytes()
    cores = os.cpu_count() or 1
    ratio = median(row["raw_s"] / row["protect_s"] for row in rows)
    bound = median(r["cores_s"] / (r["local_cores_s"] + r["raw_cores_s"]) for r in rows)
    cost_s = median(row["cores_s"] for row in rows) / cores
    slots = GROUP_SLOTS
    return {
        "mib": mib,
        "nodes": nodes,
        "parity": parity,
        "gb_per_s": median(mib * MIB / 1e9 / row["protect_s"] for row in rows),
        "raw_gb_per_s": median(mib * MIB / 1e9 / row["raw_s"] for row in rows),
        "raw_small_gb_per_s": median(mib * MIB / 1e9 / row["raw_small_s"] for row in rows),
        "ratio_to_raw": ratio,
        "core_ms_per_mb": median(row["cores_s"] for row in rows) * 1e9 / (mib * MIB),
        "core_ratio": bound,
        "sent_bytes_per_byte": fetched / (mib * MIB),
        "memory_multiple": memory / (mib * MIB),
        "memory_bound": slots * nodes / data,
        "step_s_for_5_percent": 20 * cost_s,
        "rows": rows,
    }


COLUMNS: Columns = (
    ("state", lambda r: f"{r['mib']} MiB"),
    ("nodes", lambda r: f"{r['nodes']}, {r['parity']} may be lost"),
    ("protected", lambda r: f"{r['gb_per_s']:.2f} GB/s"),
    ("raw sockets", lambda r: f"{r['raw_gb_per_s']:.2f} GB/s"),
    ("with small buffers", lambda r: f"{r['raw_small_gb_per_s']:.2f} GB/s"),
    ("ratio", lambda r: f"{r['ratio_to_raw']:.2f}"),
    ("core time", lambda r: f"{r['core_ms_per_mb']:.2f} ms/MB"),
    ("over its parts", lambda r: f"{r['core_ratio']:.2f}"),
    ("sent", lambda r: f"{r['sent_bytes_per_byte']:.2f} x state"),
    ("memory", lambda r: f"{r['memory_multiple']:.2f} of at most {r['memory_bound']:.2f} x state"),
    ("5 % of a step of", lambda r: f"{r['step_s_for_5_percent']:.2f} s"),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, nargs="+", default=[6, 120, 1500])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--parity", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args()
    records = []
    for mib in options.mib:
        for parity in options.parity:
            with tempfile.TemporaryDirectory() as folder:
                records.append(measure(mib, options.nodes, parity, options.rounds, Path(folder)))
            print_records("capture to parity", COLUMNS, records)
    if not options.no_results:
        write_results("protect", {"records": records})


if __name__ == "__main__":
    main()
