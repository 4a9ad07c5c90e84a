"""A coordinator's machine, and nodes that say what a test wants them to say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from ftrain.comms.protocol.effects import Announce, Form
from ftrain.comms.protocol.membership import Membership
from ftrain.comms.protocol.messages import (
    Directive,
    Formation,
    NodeReport,
    NodeState,
    Order,
    RankFailure,
    RestorePlan,
    VersionId,
)
from ftrain.comms.protocol.records import MembershipHard
from ftrain.comms.protocol.transitions import Phase

LEASE = 10
IDLE, STARTING, RUNNING = NodeState.IDLE, NodeState.STARTING, NodeState.RUNNING
STOPPED, DONE = NodeState.STOPPED, NodeState.DONE


class Job:
    """A coordinator, and nodes that say what the test wants them to say."""

    def __init__(
        self, nodes: int = 2, max_restarts: int = 3, spares: int = 0, **options: Any
    ) -> None:
        self.nodes = nodes
        self.spares = spares
        self.options = {"max_restarts": max_restarts, "lease_ticks": LEASE} | options
        self.disk: MembershipHard | None = None
        self.sequence = 0
        self.reports = {
            n: NodeReport(n, 1, 0, 0, IDLE, 1, f"h{n}", f"h{n}:1") for n in range(nodes + spares)
        }
        self.start()

    def start(self, launch: str = "first") -> None:
        """A new coordinator process."""
        size = {"nodes": self.nodes, "spares": self.spares}
        self.machine = Membership(hard=self.disk, launch=launch, **size, **self.options)
        self.directives: dict[int, Directive] = {}
        self.effects: list[Any] = []
        self.take()

    def take(self) -> None:
        """Do what is ready, and check that it comes back from the disk as it was."""
        ready = self.machine.ready()
        if ready.hard_state is not None:
            stored = msgspec.json.encode(ready.hard_state)
            self.disk = msgspec.json.decode(stored, type=MembershipHard)
            assert self.disk == ready.hard_state
        self.directives.update(ready.messages)  # type: ignore[arg-type]
        self.effects += [e for e in ready.effects if not isinstance(e, Announce)]

    def say(self, *nodes: int, **changes: Any) -> None:
        """These nodes report; all members if none is named."""
        for node in nodes or self.machine.members:
            self.sequence += 1
            if "flush" in changes and node in self.directives:  # an answer is to the newest order
                changes["flush_attempt"] = self.directives[node].flush_attempt
            self.reports[node] = replace(self.reports[node], sequence=self.sequence, **changes)
            self.machine.receive(self.reports[node])
            self.take()

    def give(self, message: object) -> None:
        self.machine.receive(message)
        self.take()

    def tick(self, ticks: int = 1) -> None:
        for _ in range(ticks):
            self.machine.tick()
            self.take()

    def form(self, step: int | None = None) -> int:
        """Make the formation that is asked for; returns its epoch."""
        form = self.effects.pop()
        assert isinstance(form, Form)
        version = None if step is None else VersionId(form.epoch - 1, step)
        plan = RestorePlan("fresh" if version is None else "memory", version)
        formation = Formation(form.epoch, form.places, "h", 1, plan, form.restarts)
        self.machine.formed(form.epoch, formation)
        self.take()
        return form.epoch

    def run(self, step: int | None = None) -> int:
        """All members run what was formed."""
        epoch = self.form(step)
        assert self.order is Order.RUN
        self.say(epoch=epoch, state=RUNNING, failures=(), step_max=step or 0)
        assert self.machine.phase is Phase.RUNNING
        return epoch

    def fail(self, epoch: int, rank: int = 1, cause: str = "ValueError: bad shape") -> None:
        """A rank of node 1 raises; all stop."""
        failure = RankFailure(rank, "exception", cause, 5)
        self.say(1, failures=(failure,))
        if self.machine.phase is Phase.STOPPING:
            assert self.directives[0].order is Order.STOP
            self.say(state=STOPPED)

    @property
    def order(self) -> Order:
        """What every member is told."""
        (order,) = {self.directives[node].order for node in self.machine.members}
        return order


def running(**options: Any) -> tuple[Job, int]:
    job = Job(**options)
    job.say()
    return job, job.run()
