"""Members come, go, die and stand still while they work: nothing may be wrong, late or left over.

::

    python benchmarks/churn.py --minutes 10 [--tcp] [--hog [--pulses]] [--storms] [--seed 1]

Two to six members do all-reduces and broadcasts of 1 KiB to 16 MiB of three tags at once.  At
random one is killed, stopped for a moment (0.1 to 0.45 s: it has to stay) or for 2 s (it has to
go), leaves in order or joins, and the coordinator is killed and started again.  Members 0 and 1
live through all of it.  With ``--hog`` three processes for each core do nothing but compute, with
``--pulses`` half a second on, half a second off; with ``--storms`` members touch 256 MiB of new
memory at random.

Checked all the time: every result, that all members have the same one (membership, digest, or that
it was undone), that numbers have no gaps in a life, that nobody is evicted who was not stopped for
long, that something ends at least every 20 s; at the end, that the two have no more descriptors,
threads and memory than early on.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from churn_job import hog, serve
from common import Record, print_table, write_results
from fleets import Coordinator, StuckError, Worker, coordinated, hear

STEADY, MEMBERS_MAX = 2, 6
QUIET_S = 20.0  # without any operation that ends
_EARLY_S, _CALM_S, _REST_S = 10.0, 4.0, 1.5
_MORE_DESCRIPTORS, _MORE_THREADS, _MORE_MIB = 4, 4, 192
_OUTCOMES = 20_000  # that are remembered


class Member(Worker):
    """One life."""

    def __init__(self, address: str, number: int, life: int, shares: bool) -> None:
        super().__init__(serve, address, number, life, shares)
        self.number, self.life = number, life
        self.next: dict[int, int] = {}
        self.done = 0
        self.may_go = False  # it was stopped for long, or asked to leave
        self.stopped_until = 0.0
        self.resources: list[tuple[int, int, float]] = []


class Churn:
    """One run."""

    def __init__(self, coordinator: Coordinator, options: argparse.Namespace) -> None:
        self.coordinator = coordinator
        self.options = options
        self.draw = random.Random(options.seed)
        self.members: list[Member] = []
        self.outcomes: dict[tuple[int, int], object] = {}
        self.wrong: list[str] = []
        self.faults: Counter[str] = Counter()
        self.ended = self.undone = 0
        self.lives = 0
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.last_s = time.monotonic()
        self.coordinated = True
        for number in range(3):
            self.join(number)

    # ------------------------------------------------------------------ what happens

    def join(self, number: int) -> None:
        """A new life of a member."""
        self.lives += 1
        address, shares = self.coordinator.address, not self.options.tcp
        self.members.append(Member(address, number, self.lives, shares))

    def happen(self) -> None:
        """One thing at random."""
        now, draw = time.monotonic(), self.draw
        awake = [m for m in self.members if not m.may_go and now > m.stopped_until + _REST_S]
        mortal = [m for m in awake if m.number >= STEADY and m.done]
        absent = set(range(MEMBERS_MAX)) - {member.number for member in self.members}
        what = draw.choice(("kill", "moment", "moment", "long", "leave", "join", "join", "lead"))
        if what == "join" and absent:
            self.join(draw.choice(sorted(absent)))
        elif what == "lead" and self.coordinated:
            self.coordinator.kill()
            self.coordinated = False
            self.later.append((now + draw.uniform(0, 1), self.lead))
        elif what == "moment" and awake:
            self.stop(draw.choice(awake), draw.uniform(0.1, 0.45))
        elif what in ("kill", "long", "leave") and mortal:
            victim = draw.choice(mortal)
            victim.may_go = True
            if what == "kill":
                self.remove(victim)
            elif what == "long":
                self.stop(victim, 2.0)
            else:
                victim.pipe.send("leave")
        else:
            return
        self.faults[what] += 1
        stormy = [member for member in awake if not member.may_go]
        if self.options.storms and stormy:
            draw.choice(stormy).pipe.send("storm")

    def lead(self) -> None:
        """The coordinator comes back."""
        self.coordinator.start()
        self.coordinated = True

    def stop(self, member: Member, seconds: float) -> None:
        """For a while."""
        member.signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
        member.stopped_until = stopped_s + seconds

        def go_on() -> None:
            if member in self.members:
                member.signal(signal.SIGCONT)
                late_s = time.monotonic() - stopped_s
                member.may_go = member.may_go or late_s >= 0.5  # this benchmark stood still

        self.later.append((member.stopped_until, go_on))

    def remove(self, member: Member) -> None:
        """It is no more."""
        member.kill()
        self.members.remove(member)

    # ------------------------------------------------------------------ what is checked

    def heard(self, worker: Worker, said: Any) -> None:
        """What a process says."""
        if worker is self.coordinator.worker:
            self.coordinator.heard(said)
            return
        assert isinstance(worker, Member)
        if said[0] == "ended":
            self.compare(worker, *said[1:])
        elif said[0] == "resources":
            worker.resources.append(said[1:])
        elif said[0] == "out" and not worker.may_go:
            worker.may_go = True
            news = [text for _, text in self.coordinator.news[-4:]]
            self.wrong.append(f"member {worker.number} was evicted for nothing: {news}")

    def compare(self, member: Member, tag: int, number: int, outcome: Any, right: bool) -> None:
        """One operation's end."""
        self.last_s = time.monotonic()
        self.ended += 1
        self.undone += outcome == "undone"
        member.done += 1
        known = self.outcomes.setdefault((tag, number), outcome)
        if not right or known != outcome:
            why = f"is {outcome}, {'right' if right else 'wrong'}; elsewhere {known}"
            self.wrong.append(f"member {member.number}: {tag}, {number} {why}")
        if number != member.next.get(tag, number):
            self.wrong.append(f"member {member.number}: {number} after {member.next[tag] - 1}")
        member.next[tag] = number + 1
        while len(self.outcomes) > _OUTCOMES:
            del self.outcomes[next(iter(self.outcomes))]

    def look_after(self, seconds: float) -> None:
        """Listen for a while, and do what is due."""
        until_s = time.monotonic() + seconds
        while (now := time.monotonic()) < until_s:
            for due in [one for one in self.later if one[0] <= now]:
                self.later.remove(due)
                due[1]()
            workers: list[Worker] = [*self.members]
            workers += [self.coordinator.worker] if self.coordinated else []
            hear(workers, self.heard, 0.02)
            for member in [member for member in self.members if member.over]:
                if not member.may_go:
                    self.wrong.append(f"member {member.number} ended")
                self.remove(member)
            if now - self.last_s > QUIET_S:
                self.give_up()

    def give_up(self) -> None:
        """Nothing ends any more: have everybody say where it stands."""
        for member in self.members:
            member.signal(signal.SIGCONT)
            member.signal(signal.SIGUSR1)
            time.sleep(0.5)  # one stack trace after the other
        news = "\n".join(text for _, text in self.coordinator.news[-8:])
        raise StuckError(f"nothing has ended for {QUIET_S:g} s; stacks are above.\n{news}")

    def measure(self) -> None:
        """Ask the steady members what they use."""
        steady = [member for member in self.members if member.number < STEADY]
        for member in steady:
            member.pipe.send("resources")
        count = len(steady[0].resources)
        while any(len(member.resources) == count for member in steady):
            self.look_after(0.1)

    def leaks(self) -> list[str]:
        """What the steady members have more of than early on."""
        limits = (_MORE_DESCRIPTORS, _MORE_THREADS, _MORE_MIB)
        names = ("descriptors", "threads", "MiB")
        return [
            f"member {member.number}: {before:.0f} {name}, later {after:.0f}"
            for member in self.members
            if len(member.resources) > 1
            for name, before, after, limit in zip(
                names, member.resources[0], member.resources[-1], limits, strict=True
            )
            if after > before + limit
        ]

    def summary(self) -> str:
        """One line."""
        faults = ", ".join(f"{what} {count}" for what, count in sorted(self.faults.items()))
        here = len(self.members)
        return f"{self.ended} ends, {self.undone} undone, {here} here, {faults or 'no faults'}"


def run(options: argparse.Namespace, churn: Churn, hogs: list[Worker]) -> None:
    """Until the time is over."""
    began_s = said_s = pulsed_s = time.monotonic()
    end_s = began_s + 60 * options.minutes
    running = True
    churn.look_after(min(_EARLY_S, 15 * options.minutes))
    churn.measure()
    while (now := time.monotonic()) < end_s and not churn.wrong:
        churn.happen()
        pause_s = churn.draw.uniform(0.2, 1.2)
        churn.look_after(pause_s)
        if options.pulses and now - pulsed_s > 0.5:
            running, pulsed_s = not running, now
            for one in hogs:
                one.signal(signal.SIGCONT if running else signal.SIGSTOP)
        if now - said_s >= 10:
            said_s = now
            print(f"{now - began_s:.0f} s: {churn.summary()}", flush=True)
    for one in hogs:
        one.kill()
    churn.look_after(_CALM_S)  # whatever was begun comes to its end
    churn.measure()
    churn.wrong += churn.leaks()


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--hog", action="store_true")
    parser.add_argument("--pulses", action="store_true")
    parser.add_argument("--storms", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-results", action="store_true")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    with coordinated(members_expected=3) as coordinator:
        churn = Churn(coordinator, options)
        hogs = [Worker(hog) for _ in range(3 * cores if options.hog else 0)]
        try:
            run(options, churn, hogs)
            used = {m.number: m.resources for m in churn.members if m.resources}
        finally:
            for worker in (*churn.members, *hogs):
                if not worker.over:
                    worker.kill()
    record: Record = {
        "minutes": options.minutes,
        "ended": churn.ended,
        "undone": churn.undone,
        "lives": churn.lives,
        "faults": dict(churn.faults),
        "resources": used,
        "wrong": churn.wrong,
    }
    rows = [
        ["operations that ended", churn.ended],
        ["of those undone", churn.undone],
        ["lives of members", churn.lives],
        *sorted(churn.faults.items()),
        *([f"descriptors, threads, MiB of member {n}", each] for n, each in used.items()),
        ["wrong", len(churn.wrong)],
    ]
    print_table(f"churn for {options.minutes:g} minutes, {cores} cores", ("", ""), rows)
    if not options.no_results:
        write_results("churn", record)
    if churn.wrong:
        sys.exit("\n".join(churn.wrong[:10]))


if __name__ == "__main__":
    main()
