"""All-reduces while members are killed, stopped or cut off: until the rest goes on.

::

    python benchmarks/ring_faults.py [--trials 50] [--mib 64] [--members 3] [--arms ...]

Members in processes do all-reduces of random float32 without pause, in place and apart, retried or
told of a change in turn.  At a random moment of an operation one of them is killed (SIGKILL),
stopped (SIGSTOP), or no packet gets to it or from it any more (each member is in a network
namespace; that takes root and iproute2).  Afterwards another process takes its place.

*Until the rest goes on* is from the fault to the last survivor's return from the first operation
without the lost member, less an undisturbed operation of as many members (median), and less what
the survivors' own checks between two operations took.  The coordinator is a process, too, and keeps
its state in a directory.

Every outcome is compared: all members that returned from an operation have the same membership and
digest of it, its result is that of the members' inputs, and who was told of a change has its input
back, bit for bit.

Gloo beside it is killed only: its survivors raise, are told the rest by the benchmark and begin a
new process group.  Nobody there agrees on an operation's outcome, nor restores an input.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from common import Columns, Record, print_records, write_results
from fleets import (
    Coordinator,
    Network,
    StuckError,
    Worker,
    coordinated,
    hear,
    networked,
    networks_work,
)
from ring_faults_job import Data, serve, serve_gloo

MIB = 1 << 20
ARMS = (
    "kill, shared memory",
    "kill, TCP",
    "stop, shared memory",
    "stop, TCP",
    "partition, TCP",
    "kill, gloo",
)
LIMITS_S = {"kill": 0.15, "stop": 1.0, "partition": 1.0}
_FULL_MIN, _REST_MIN = 3, 4  # operations before the fault, and after it
_TRIAL_S = 60.0


@dataclass(eq=False)
class Member:
    """One life of a member."""

    number: int
    worker: Worker
    began: tuple[int, float] = (-1, 0.0)  # the newest operation, and when
    returned: int = -1  # the newest that it returned from
    ended: list[Record] = field(default_factory=list)
    failed_s: float = 0.0

    def heard(self, said: Any) -> None:
        """A line of its pipe."""
        if said[0] == "began":
            self.began, self.returned = said[1:], -1
        elif said[0] == "returned":
            self.returned = said[1]
        elif said[0] == "ended":
            self.ended.append(said[1])
        else:
            self.failed_s = said[1]

    def busy(self) -> bool:
        """Whether it is in the middle of an operation, as far as was heard."""
        return self.began[0] != self.returned


class Trials:
    """Members that take turns in being lost."""

    def __init__(self, members: int, draw: random.Random) -> None:
        self.members: list[Member] = []
        self.draw = draw
        self.numbers = range(members)
        self.full_s: list[float] = []  # operations of all
        self.rest_s: list[float] = []  # of one less
        self.wrong: list[str] = []
        self.coordinator: Coordinator | None = None

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Listen until something is so."""
        deadline_s = time.monotonic() + _TRIAL_S
        owners = {member.worker: member for member in self.members}
        workers = list(owners)
        if self.coordinator is not None:
            workers.append(self.coordinator.worker)

        def heard(worker: Worker, said: Any) -> None:
            if worker in owners:
                owners[worker].heard(said)
            elif self.coordinator is not None:
                self.coordinator.heard(said)

        while not condition():
            hear(workers, heard, 1.0)
            if time.monotonic() > deadline_s:
                last = [(m.number, m.began, m.ended[-1:]) for m in self.members]
                news = self.coordinator.news[-6:] if self.coordinator else []
                raise StuckError(f"{what} did not happen: {last}, {news}")

    def strike(self, victim: Member, fault: Callable[[], None]) -> float:
        """Let the fault happen in the middle of an operation; when it did."""
        self.until(lambda: not victim.busy(), "the end of an operation")
        self.until(victim.busy, "an operation")
        at_s = victim.began[1] + self.draw.uniform(0, 0.95) * median(self.full_s)
        time.sleep(max(0.0, at_s - time.monotonic()))
        before_s = time.monotonic()
        fault()
        return before_s

    def settle(self, victim: Member, rest: list[Member], struck_s: float, **more: Any) -> Record:
        """What became of a fault."""
        numbers = [m.number for m in rest]
        firsts = [
            next(n for n, one in enumerate(m.ended) if sorted(one["members"]) == numbers)
            for m in rest
        ]
        slowest, first = max(
            zip(rest, firsts, strict=True), key=lambda pair: pair[0].ended[pair[1]]["ended_s"]
        )
        end = slowest.ended[first]
        between_s = sum(
            max(0.0, after["began_s"] - max(struck_s, before["ended_s"]))
            for before, after in pairwise(slowest.ended[: first + 1])
        )
        struck = [one for m in rest for one in m.ended if one["number"] == victim.began[0]]
        spans_s = [(one["began_s"] - struck_s, one["ended_s"] - struck_s) for one in struck]
        inside = victim.busy() and all(began_s < 0 < ended_s for began_s, ended_s in spans_s)
        return {
            "raw_s": end["ended_s"] - struck_s,
            "between_s": between_s,
            "inside": inside,
            "struck_s": struck_s - victim.began[1],
            "spans_s": spans_s,
            "undone": all(len(one["members"]) != len(rest) + 1 for one in struck),
            "mode": end.get("mode", ""),
            **more,
        }

    def walls_s(self, members: list[Member]) -> list[float]:
        """Of the operations that all of these returned from with nobody else: from the last one's
        beginning to the last one's return."""
        ends: dict[int, list[Record]] = {}
        for member in members:
            for one in member.ended:
                if len(one["members"]) == len(members):
                    ends.setdefault(one["number"], []).append(one)
        return [
            max(one["ended_s"] for one in each) - max(one["began_s"] for one in each)
            for each in ends.values()
            if len(each) == len(members)
        ][1:]

    def compare(self, members: list[Member]) -> None:
        """All outcomes are right, and the same for all; forget them."""
        outcomes: dict[int, tuple[Any, ...]] = {}
        for member in members:
            for one in member.ended:
                if not one["right"]:
                    self.wrong.append(f"member {member.number}: {one}")
                outcome = (one.get("view"), tuple(one["members"]), one.get("digest"))
                if outcomes.setdefault(one["number"], outcome) != outcome:
                    self.wrong.append(f"member {member.number}: {one} is {outcomes} elsewhere")
            numbers = [one["number"] for one in member.ended]
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                self.wrong.append(f"member {member.number}: operations {numbers}")
        for member in members:
            member.ended.clear()


class FleetTrials(Trials):
    """Of ftrain."""

    def __init__(self, arm: str, members: int, draw: random.Random, data: Record) -> None:
        super().__init__(members, draw)
        self.kind, self.link = arm.split(", ")
        self.data = data
        self.network: Network | None = None
        self.lives = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """With a coordinator and all members."""
        count = len(self.numbers)
        with ExitStack() as undo:
            host, space = "127.0.0.1", ""
            if self.kind == "partition":
                self.network = undo.enter_context(networked(count + 1))
                host, space = self.network.hosts[0], self.network.names[0]
            options = {"members_expected": count}
            self.coordinator = undo.enter_context(coordinated(host, space, **options))
            undo.callback(lambda: [member.worker.kill() for member in self.members])
            for number in self.numbers:
                self.begin(number)
            yield

    def begin(self, number: int) -> None:
        """A new life of a member."""
        assert self.coordinator is not None
        self.lives += 1
        host, space = "127.0.0.1", ""
        if self.network is not None:
            host, space = self.network.hosts[number + 1], self.network.names[number + 1]
        shares = self.link == "shared memory"
        args = (self.coordinator.address, number, self.lives, host, shares)
        worker = Worker(serve, *args, self.data["path"], self.data["shape"], space=space)
        self.members.append(Member(number, worker))

    def trial(self) -> Record:
        """One fault, from all members to all members."""
        everybody = list(self.members)
        self.until(lambda: all(_ops_of(m, len(everybody)) > _FULL_MIN for m in everybody), "all")
        self.full_s += self.walls_s(everybody)
        victim = self.draw.choice(everybody)
        rest = sorted((m for m in everybody if m is not victim), key=lambda m: m.number)
        struck_s = self.strike(victim, lambda: self.lose(victim))
        self.until(lambda: all(_ops_of(m, len(rest)) >= _REST_MIN for m in rest), "the rest")
        self.rest_s += self.walls_s(rest)
        assert self.coordinator is not None
        news = [(s - struck_s, text) for s, text in self.coordinator.news if s > struck_s]
        record = self.settle(victim, rest, struck_s, news=news)
        victim.worker.kill()
        if self.network is not None:
            self.network.join(victim.number + 1)
        self.compare(everybody)
        self.members.remove(victim)
        self.begin(victim.number)
        return record

    def lose(self, victim: Member) -> None:
        """The fault."""
        if self.network is not None:
            self.network.cut(victim.number + 1)
        else:
            victim.worker.signal(signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)


class GlooTrials(Trials):
    """Of gloo, whose launcher this benchmark is."""

    def __init__(self, members: int, draw: random.Random, data: Record) -> None:
        super().__init__(members, draw)
        self.data = data
        self.groups = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """With all members."""
        import torch.distributed as dist

        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            for number in self.numbers:
                self.begin(number)
            yield
        finally:
            for member in self.members:
                member.worker.kill()

    def begin(self, number: int) -> None:
        """A new process."""
        data = (self.data["shape"], self.data["path"])
        worker = Worker(serve_gloo, self.store.port, *data, number)
        self.members.append(Member(number, worker))

    def group(self, members: list[Member], count: int) -> None:
        """Tell members to be a group for so many operations."""
        self.groups += 1
        numbers = [member.number for member in members]
        for member in members:
            member.worker.pipe.send((f"group{self.groups}", numbers, count))

    def trial(self) -> Record:
        """One fault."""
        everybody = sorted(self.members, key=lambda member: member.number)
        self.group(everybody, 1 << 30)
        self.until(lambda: all(len(m.ended) > _FULL_MIN for m in everybody), "all")
        self.full_s += self.walls_s(everybody)
        victim = self.draw.choice(everybody)
        rest = [member for member in everybody if member is not victim]
        struck_s = self.strike(victim, victim.worker.process.kill)
        self.until(lambda: all(member.failed_s for member in rest), "an error")
        raised_s = max(member.failed_s for member in rest) - struck_s
        inside = victim.busy()
        self.compare(everybody)
        self.group(rest, _REST_MIN)
        self.until(lambda: all(len(m.ended) >= _REST_MIN for m in rest), "the rest")
        self.rest_s += self.walls_s(rest)
        record = self.settle(victim, rest, struck_s, raised_s=raised_s)
        record["inside"] = inside
        self.compare(rest)
        for member in rest:
            member.failed_s = 0.0
        victim.worker.kill()
        self.members.remove(victim)
        self.begin(victim.number)
        return record


def _ops_of(member: Member, count: int) -> int:
    return sum(len(one["members"]) == count for one in member.ended)


def measure(arm: str, options: argparse.Namespace, data: Record) -> Record:
    """All trials of an arm."""
    draw = random.Random(options.seed)
    trials = (
        GlooTrials(options.members, draw, data)
        if arm.endswith("gloo")
        else FleetTrials(arm, options.members, draw, data)
    )
    found: list[Record] = []
    with trials.running():
        while sum(one["inside"] for one in found) < options.trials:
            found.append(trials.trial())
    for wrong in trials.wrong[:5]:
        print(f"WRONG {wrong}")
    rest_s = median(trials.rest_s)
    for one in found:
        one["took_s"] = one["raw_s"] - one["between_s"] - rest_s
    limit_s = LIMITS_S[arm.split(",")[0]]
    took_s = [one["took_s"] for one in found if one["inside"]]
    return {
        "arm": arm,
        "members": options.members,
        "mib": options.mib,
        "full_s": median(trials.full_s),
        "rest_s": rest_s,
        "took_s": took_s,
        "limit_s": limit_s,
        "within": sum(one <= limit_s for one in took_s),
        "outside_s": [one["took_s"] for one in found if not one["inside"]],
        "wrong": len(trials.wrong),
        "trials": found,
    }


def _columns(gloo_s: float) -> Columns:
    return (
        ("", lambda r: r["arm"]),
        ("trials", lambda r: str(len(r["took_s"]))),
        ("undisturbed", lambda r: f"{r['full_s'] * 1e3:.0f}, then {r['rest_s'] * 1e3:.0f} ms"),
        ("goes on after", lambda r: f"{median(r['took_s']) * 1e3:.0f} ms"),
        ("9 of 10", lambda r: f"{_ninth(r['took_s']) * 1e3:.0f} ms"),
        ("longest", lambda r: f"{max(r['took_s']) * 1e3:.0f} ms"),
        ("within", lambda r: f"{r['within']} in {r['limit_s'] * 1e3:.0f} ms"),
        ("between operations", _outside),
        ("of gloo's", lambda r: f"{median(r['took_s']) / gloo_s:.2f}" if gloo_s else "-"),
        ("wrong", lambda r: str(r["wrong"])),
    )


def _outside(record: Record) -> str:
    late_s = record["outside_s"]
    return f"{len(late_s)}, {max(late_s) * 1e3:.0f} ms" if late_s else "-"


def _ninth(values: list[float]) -> float:
    return quantiles(values, n=10)[8] if len(values) > 1 else values[0]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--mib", type=float, default=64)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args()
    why = networks_work() if any(arm.startswith("partition") for arm in options.arms) else ""
    if why:
        print(f"left out: partition, TCP (it takes root and iproute2: {why})")
    shape = (options.members, round(options.mib * MIB) // 4)
    records: list[Record] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "data"
        Data.make(path, *shape)
        records += [
            measure(arm, options, {"path": str(path), "shape": shape})
            for arm in options.arms
            if not (why and arm.startswith("partition"))
        ]
    gloo = [record for record in records if record["arm"] == "kill, gloo"]
    gloo_s = median(gloo[0]["took_s"]) if gloo else 0.0
    title = f"a member of {options.members} is lost, {options.mib:g} MiB, {os.cpu_count()} cores"
    print_records(title, _columns(gloo_s), records)
    if not options.no_results:
        write_results("ring_faults", {"records": records})
    if wrong := sum(record["wrong"] for record in records):
        raise SystemExit(f"{wrong} outcomes were wrong")


if __name__ == "__main__":
    main()
