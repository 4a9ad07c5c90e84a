"""One member of :mod:`churn`: operations of several tags at once, each in a thread of its own."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import xxhash
from fleets import RUN, SECRET

from ftrain.comms.collectives.meeting import RingSettings
from ftrain.comms.collectives.work import Work
from ftrain.comms.errors import FleetChangedError, FleetLeftError
from ftrain.comms.fleet.collectives import all_reduce, memory
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.operations import FleetHandle
from ftrain.comms.fleet.settings import FleetSettings
from ftrain.comms.protocol.ring import Kind

TAGS = range(3)
KINDS = ("in place", "in place, told", "apart", "apart, told", "broadcast")
_COUNT_MAX = 4 << 20  # float32 of 16 MiB
_STORM_BYTES = 256 << 20
_OVER_S = 60.0


class Member:
    """What its threads share."""

    def __init__(
        self, pipe: Connection, address: str, member: int, life: int, shares: bool
    ) -> None:
        settings = FleetSettings(ring=RingSettings(share_memory=shares))
        self.fleet = Fleet(address, RUN, SECRET, member, life, settings=settings)
        self.member = member
        self.leaving = threading.Event()
        self.pattern = (torch.arange(_COUNT_MAX) % 251).float()
        self._pipe = pipe
        self._lock = threading.Lock()

    def say(self, *words: object) -> None:
        """To the benchmark; any thread may."""
        with self._lock:
            self._pipe.send(words)

    def work(self, tag: int) -> None:
        """One tag's operations, until the member leaves or is out."""
        try:
            while not self.leaving.is_set():
                self.say("ended", tag, *self.operate(tag))
        except FleetLeftError as error:
            self.say("out", str(error))

    def operate(self, tag: int) -> tuple[int, object, bool]:
        """One operation: its number, its outcome, and whether that is right."""
        number = self.fleet.next_number(tag)
        draw = random.Random(f"{tag}-{number}")
        count = min(_COUNT_MAX, round(256 * 2 ** draw.triangular(0, 14.01, 3)))
        kind = draw.choice(KINDS)
        source = self.pattern[:count] + extra(self.member, tag, number)
        apart = kind.startswith("apart")
        out = torch.empty(count) if apart else source
        brought = xxhash.xxh3_64_intdigest(memory(source))
        handle = (
            self._broadcast(source, tag, number)
            if kind == "broadcast"
            else all_reduce(
                self.fleet,
                source,
                out=out if apart else None,
                tag=tag,
                retry=not kind.endswith("told"),
            )
        )
        same = handle.op.number == number
        try:
            handle.wait(_OVER_S)
        except FleetChangedError:
            restored = kind == "broadcast" or xxhash.xxh3_64_intdigest(memory(source)) == brought
            return number, "undone", same and restored
        members = handle.members
        if kind == "broadcast":
            members = (members[number % len(members)],)
        wanted = self.pattern[:count] * len(members)
        wanted += sum(extra(member, tag, number) for member in members)
        outcome = (handle.view, handle.members, xxhash.xxh3_64_intdigest(memory(out)))
        return number, outcome, same and torch.equal(out, wanted)

    def _broadcast(self, tensor: torch.Tensor, tag: int, number: int) -> FleetHandle:
        """From another member each time."""
        data, nothing = memory(tensor), memoryview(b"")

        def make(rank: int, ranks: int) -> Work:
            root = number % ranks
            source, target = (data, nothing) if rank == root else (nothing, data)
            return Work(Kind.BROADCAST, tensor.numel(), 4, source, target, root=root)

        return self.fleet.begin(make, tag=tag, retry=False)


def extra(member: int, tag: int, number: int) -> float:
    """What a member adds to the pattern that all bring."""
    return float((7 * number + 13 * member + 5 * tag) % 61)


def resources() -> tuple[int, int, float]:
    """Descriptors, threads, and MiB resident."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident


def storm() -> None:
    """Memory that is touched for the first time, and dropped."""
    torch.ones(_STORM_BYTES // 4)


def serve(pipe: Connection, address: str, member: int, life: int, shares: bool) -> None:
    """Does what the pipe says: "leave", "resources", "storm"."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    one = Member(pipe, address, member, life, shares)
    one.fleet.wait_for_view(60)
    threads = [threading.Thread(target=one.work, args=(tag,), daemon=True) for tag in TAGS]
    for thread in threads:
        thread.start()
    asked: dict[str, Callable[[], object]] = {
        "resources": lambda: one.say("resources", *resources()),
        "storm": lambda: threading.Thread(target=storm, daemon=True).start(),
    }
    while (what := pipe.recv()) != "leave":
        asked[what]()
    one.leaving.set()
    for thread in threads:
        thread.join()
    one.fleet.leave()
    one.say("left")


def hog(pipe: Connection) -> None:
    """Takes a core."""
    while True:
        pass
