"""How fast parity is made and lost chunks are made good: ours, zfec, pyeclib, reedsolo, memcpy.

::

    python benchmarks/erasure.py [--mib 64] [--data 2 3 4 5 6 7 8] [--threads 1 2]

GB/s of the stripe's data, with all parity made, or one or two chunks of data rebuilt.  In every
round all arms follow each other in random order, and memcpy of the same bytes is one of them: the
ratio is that of a round.  "ours" adds blocks up in place, "ours, as read" goes through the copies
that the snapshot manager makes of what it reads.  Every result is compared with what was lost,
outside of the time.  Reedsolo works on a small piece, which its rate is extrapolated from.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import reedsolo
from common import Record, print_table, write_results

from ftrain.checkpoint.files import page_buffer
from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.snapshot.erasure.code import ErasureCode
from ftrain.snapshot.erasure.engines import Engine, Numpy, engine
from ftrain.snapshot.parity import BLOCK_BYTES
from ftrain.snapshot.stripes import RowChunk, Summer, Term

MEMCPY, OURS, REEDSOLO = "memcpy", "ours", "reedsolo (extrapolated)"
PIECE_BYTES = 2048  # of each chunk, for reedsolo


@dataclass(frozen=True)
class Work:
    """One thread's slice of a stripe; ``lost``: which chunks of data to rebuild, none to encode."""

    code: ErasureCode
    chunks: list[memoryview]  # data, then parity
    lost: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the data."""
        return self.code.data * len(self.chunks[0])

    @property
    def wanted(self) -> list[memoryview]:
        """What has to come out."""
        return (
            self.chunks[self.code.data :] if not self.lost else [self.chunks[n] for n in self.lost]
        )

    @property
    def sources(self) -> list[int]:
        """Numbers of the chunks that are read."""
        left = [number for number in range(self.code.chunks) if number not in self.lost]
        return left[: self.code.data]

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        """The factor of each source in each result."""
        if not self.lost:
            return self.code.parity_rows
        return self.code.recovery_rows(self.lost, self.sources)


@dataclass(frozen=True)
class Job:
    """What is timed, and whether it was right, of what it returned."""

    run: Callable[[], Any]
    right: Callable[[Any], bool]
    nbytes: int  # of data that are worked on


Arm = Callable[[Work], Job]


def room_for(work: Work, count: int) -> list[memoryview]:
    """Memory whose pages are there already."""
    size = len(work.chunks[0])
    found = [page_buffer(size)[:size] for _ in range(count)]
    for view in found:
        np.frombuffer(view, np.uint8)[:] = 0
    return found


def memcpy(work: Work) -> Job:
    """The data, copied."""
    sources = [np.frombuffer(chunk, np.uint8) for chunk in work.chunks[: work.code.data]]
    room = [np.frombuffer(view, np.uint8) for view in room_for(work, work.code.data)]

    def run() -> None:
        for target, source in zip(room, sources, strict=True):
            np.copyto(target, source)

    return Job(run, lambda _: np.array_equal(room[-1], sources[-1]), work.nbytes)


def in_place(kind: Engine) -> Arm:
    """Blocks of the sources added up where they lie."""

    def arm(work: Work) -> Job:
        room = room_for(work, len(work.wanted))
        sources = [work.chunks[number] for number in work.sources]
        rows = tuple(tuple(row) for row in work.rows)

        def run() -> list[memoryview]:
            for start in range(0, len(room[0]), BLOCK_BYTES):
                stop = min(start + BLOCK_BYTES, len(room[0]))
                pieces = [source[start:stop] for source in sources]
                kind.combine(rows, pieces, [target[start:stop] for target in room])
            return room

        return Job(run, lambda found: found == work.wanted, work.nbytes)

    return arm


def as_read(kind: Engine) -> Arm:
    """As the snapshot manager does it with what it reads."""

    def arm(work: Work) -> Job:
        room = room_for(work, len(work.wanted))
        sources = [work.chunks[number] for number in work.sources]
        rows = work.rows
        summer = Summer(kind)

        def run() -> list[memoryview]:
            for target, row in zip(room, rows, strict=True):
                pairs = zip(row, sources, strict=True)
                summer.fill(target, [Term(factor, RowChunk(source)) for factor, source in pairs])
            return room

        return Job(run, lambda found: found == work.wanted, work.nbytes)

    return arm


def reedsolo_arm(work: Work) -> Job:
    """A piece of each chunk, byte by byte."""
    code, size = work.code, min(PIECE_BYTES, len(work.chunks[0]))
    codec = reedsolo.RSCodec(code.parity, nsize=code.chunks)
    words = np.stack([np.frombuffer(chunk[:size], np.uint8) for chunk in work.chunks], axis=1)
    if not work.lost:
        data = words[:, : code.data].tobytes()
        whole = words.tobytes()
        return Job(lambda: codec.encode(data), lambda out: bytes(out) == whole, size * code.data)
    broken = words.copy()
    broken[:, list(work.lost)] = 0
    given, wanted = [word.tobytes() for word in broken], words[:, : code.data].tobytes()

    def run() -> list[bytearray]:
        return [codec.decode(word, erase_pos=list(work.lost))[0] for word in given]

    return Job(run, lambda out: b"".join(out) == wanted, size * code.data)


def zfec_arm(work: Work) -> Job:
    """Its own code: another matrix."""
    import zfec

    code = work.code
    data = tuple(work.chunks[: code.data])
    encoder = zfec.Encoder(code.data, code.chunks)
    numbers = tuple(range(code.data, code.chunks))
    parity = encoder.encode(data, numbers)
    decoder = zfec.Decoder(code.data, code.chunks)
    if not work.lost:
        # A parity chunk is right if a lost chunk comes back by it.
        def right(found: list[bytes]) -> bool:
            used = (code.data, *range(1, code.data))
            return bool(decoder.decode((found[0], *data[1:]), used)[0] == data[0])

        return Job(lambda: encoder.encode(data, numbers), right, work.nbytes)
    # Parity stands where what is lost would: otherwise it reorders the tuples that it is given.
    spare = iter(numbers)
    used = tuple(next(spare) if n in work.lost else n for n in range(code.data))
    given = tuple((*data, *parity)[number] for number in used)
    return Job(
        lambda: decoder.decode(given, used),
        lambda found: [found[number] for number in work.lost] == work.wanted,
        work.nbytes,
    )


def pyeclib_arm(work: Work) -> Job:
    """ISA-L by the interface of the package that brings it."""
    from pyeclib.ec_iface import ECDriver

    code = work.code
    driver = ECDriver(k=code.data, m=code.parity, ec_type="isa_l_rs_vand")
    joined = b"".join(work.chunks[: code.data])
    fragments = driver.encode(joined)
    if not work.lost:
        return Job(
            lambda: driver.encode(joined),
            lambda found: driver.decode(found[code.parity :]) == joined,
            work.nbytes,
        )
    given = [fragment for n, fragment in enumerate(fragments) if n not in work.lost]
    wanted = [fragments[number] for number in work.lost]
    return Job(
        lambda: driver.reconstruct(given, list(work.lost)),
        lambda found: found == wanted,
        work.nbytes,
    )


def arms_of(threads: int) -> dict[str, Arm]:
    """By name."""
    best = engine().engine
    arms = {
        MEMCPY: memcpy,
        OURS: in_place(best),
        "ours, as read": as_read(best),
        "ours, NumPy": in_place(Numpy()),
    }
    peers = {"zfec": zfec_arm, "pyeclib": pyeclib_arm}
    arms |= {name: arm for name, arm in peers.items() if importlib.util.find_spec(name)}
    if threads == 1:  # it never gives up the interpreter lock
        arms[REEDSOLO] = reedsolo_arm
    return arms


def stripe_of(code: ErasureCode, size: int) -> list[memoryview]:
    """Random data, and our parity of them."""
    draw = np.random.default_rng(0)
    data = [memoryview(draw.bytes(size)) for _ in range(code.data)]
    parity = []
    for row in code.parity_rows:
        target = page_buffer(size)[:size]
        Summer(engine().engine).fill(
            target, [Term(factor, RowChunk(chunk)) for factor, chunk in zip(row, data, strict=True)]
        )
        parity.append(target)
    return [*data, *parity]


def timed(jobs: list[Job], pool: ThreadPoolExecutor, name: str) -> float:
    """GB/s of all of them at once; RuntimeError for a wrong result."""
    began = time.monotonic()
    if len(jobs) == 1:
        found = [jobs[0].run()]
    else:
        found = list(pool.map(lambda job: job.run(), jobs))
    seconds = time.monotonic() - began
    if not all(job.right(result) for job, result in zip(jobs, found, strict=True)):
        raise RuntimeError(f"{name} computes wrongly")
    return sum(job.nbytes for job in jobs) / seconds / 1e9


def measure(code: ErasureCode, mib: float, lost: int, threads: int, rounds: int) -> Record:
    """GB/s by arm, and over memcpy's of the same round."""
    part = int(mib * 2**20) // (code.data * threads * PAGE_BYTES) * PAGE_BYTES
    size = max(part, PAGE_BYTES) * threads
    chunks = stripe_of(code, size)
    numbers = tuple(range(lost))
    slices = [slice(at, at + size // threads) for at in range(0, size, size // threads)]
    works = [Work(code, [chunk[cut] for chunk in chunks], numbers) for cut in slices]
    jobs = {name: [arm(work) for work in works] for name, arm in arms_of(threads).items()}
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds + 1):
            for name in random.sample(list(jobs), len(jobs)):
                rate = timed(jobs[name], pool, name)
                if number:  # the first round warms up
                    rates[name].append(rate)
    ratios = {
        name: median(a / b for a, b in zip(values, rates[MEMCPY], strict=True))
        for name, values in rates.items()
    }
    return {
        "data": code.data,
        "parity": code.parity,
        "lost": lost,
        "threads": threads,
        "data_mib": code.data * size / 2**20,
        "gb_per_s": {name: median(values) for name, values in rates.items()},
        "to_memcpy": ratios,
        "all": rates,
    }


def show(found: list[Record], mib: float, threads: int) -> None:
    """The table of one size."""
    arms = list(found[0]["gb_per_s"])
    rows = []
    for case in found:
        what = f"rebuild {case['lost']}" if case["lost"] else "encode"
        cells = [
            f"{case['gb_per_s'][arm]:.3g}"
            + (f" ({case['to_memcpy'][arm]:.2g})" if arm not in (MEMCPY, REEDSOLO) else "")
            for arm in arms
        ]
        rows.append((f"{case['data']}+{case['parity']}", what, *cells))
    where = f"{threads} of {os.cpu_count()} cores"
    title = f"erasure coding of {mib:g} MiB of data, {where}: GB/s of data (over memcpy)"
    print_table(title, ("stripe", "work", *arms), rows)


def main() -> None:
    """Each size and number of threads, then the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=float, nargs="+", default=[64], help="64 to 512 make sense")
    parser.add_argument("--data", type=int, nargs="+", default=list(range(2, 9)))
    parser.add_argument("--parity", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for name in ("zfec", "pyeclib"):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is left out: it is not installed", flush=True)
    kind = engine().engine.name.split(" (")[0]
    print(f"ours is {kind}; reedsolo's piece is {PIECE_BYTES} bytes of each chunk", flush=True)
    everything: list[Record] = []
    for mib in args.mib:
        for threads in args.threads:
            found = [
                measure(ErasureCode(data, parity), mib, lost, threads, args.rounds)
                for data in args.data
                for parity in args.parity
                for lost in range(min(parity, 2, data) + 1)
            ]
            show(found, mib, threads)
            everything += found
    write_results("erasure", {"engine": kind, "piece_bytes": PIECE_BYTES, "cases": everything})


if __name__ == "__main__":
    main()
