"""Incidents as records and lines, and the account of where a run's time went."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftrain.checkpoint.retention import VersionKey
from ftrain.comms.events import read_events
from ftrain.comms.protocol.effects import Incident
from ftrain.comms.protocol.messages import Phases, RankFailure, RestorePlan
from ftrain.comms.protocol.records import MembershipHard
from ftrain.comms.protocol.roster import Trouble, is_consequence
from ftrain.comms.protocol.transitions import Phase

_SECOND_NS = 1_000_000_000
_PARTS = ("stopped", "forked", "script", "formed", "restored", "stepped")


@dataclass(frozen=True, slots=True)
class IncidentRecord:
    """Everything about one incident, as it stands in the event log."""

    step: int  # highest boundary that a rank had reached
    cause: str
    failures: tuple[RankFailure, ...]
    nodes: tuple[tuple[int, str], ...]
    epoch: int
    new_epoch: int
    restore: RestorePlan
    steps_recomputed: int
    samples_lost: int
    restart_s: float  # noticed -> every rank completed its first step
    noticed_ns: int  # CLOCK_MONOTONIC of the coordinator's host
    phases_s: dict[str, float]  # end of each phase, in seconds after the fault was noticed

    @property
    def line(self) -> str:
        """The incident in one plain line."""
        cause = self.cause.rstrip(".")
        return (
            f"step {self.step}: {cause}. Restarted {_source(self.restore)} in "
            f"{self.restart_s:.2f} s; {_count(self.steps_recomputed, 'step')} recomputed, "
            f"{_count(self.samples_lost, 'sample')} lost."
        )


def make_record(
    incident: Incident, *, heard_ns: int, closed_ns: int, one_host: bool
) -> IncidentRecord:
    """The record of an incident that is over.

    Args:
        heard_ns: when the coordinator heard of it.
        closed_ns: when the coordinator heard that every node runs again.
        one_host: all nodes share this host's clock, so their own times are used.
    """
    noticed = [failure.noticed_ns for failure in incident.failures]
    noticed += [phases.noticed_ns for _, phases in incident.phases if phases.noticed_ns]
    # Of an older incident that was still open the failures may be long past.
    begin_ns = min([n for n in noticed if n > 0] + [heard_ns]) if one_host else heard_ns
    ends = _latest(phases for _, phases in incident.phases) if one_host else {}
    phases_s = {
        part: (end_ns - begin_ns) / _SECOND_NS for part, end_ns in ends.items() if end_ns > begin_ns
    }
    end_s = phases_s.get("stepped", (closed_ns - begin_ns) / _SECOND_NS)
    return IncidentRecord(
        step=incident.step,
        cause=incident.cause,
        failures=incident.failures,
        nodes=incident.nodes,
        epoch=incident.epoch,
        new_epoch=incident.new_epoch,
        restore=incident.restore,
        steps_recomputed=incident.steps_recomputed,
        samples_lost=0,
        restart_s=end_s,
        noticed_ns=begin_ns,
        phases_s=phases_s,
    )


def _latest(phases: Iterable[Phases]) -> dict[str, int]:
    """When the last node was done with each part."""
    ends: dict[str, int] = {}
    for each in phases:
        for part in _PARTS:
            ends[part] = max(ends.get(part, 0), getattr(each, f"{part}_ns"))
    return ends


@dataclass(slots=True)
class FailedStarts:
    """Finds the starts that failed: no incident's line tells them, because its incident goes on."""

    max_restarts: int
    _before: MembershipHard = field(default_factory=MembershipHard)
    _starting: bool = False
    _pending: MembershipHard | None = None  # before the start that failed

    def begin(self, hard: MembershipHard, phase: Phase) -> None:
        """The machine is about to be told something."""
        self._before, self._starting = hard, phase in (Phase.FORMING, Phase.STARTING)

    def end(self, hard: MembershipHard, phase: Phase) -> str:
        """It was told: a start that failed, as a line, once all ranks of it have had their say."""
        if self._starting and hard.counted_epoch != self._before.counted_epoch:
            self._pending = self._before
        self._before = hard
        if self._pending is None or phase is Phase.STOPPING:
            return ""
        before, self._pending = self._pending, None
        what = "the restart" if before.failures_in_row or before.formations > 1 else "the start"
        said = f"{what} failed: {_new_trouble(before, hard) or hard.last_cause}"
        number = hard.failures_in_row
        if number > self.max_restarts or hard.stop_cause:
            return said
        return f"{said}; trying again (restart {number} of {self.max_restarts})"


def _new_trouble(before: MembershipHard, hard: MembershipHard) -> str:
    """What the open incident has more than before, in words."""
    if hard.incident is None:
        return ""
    known = before.incident
    failures = () if known is None else known.failures
    nodes = () if known is None else known.nodes
    trouble = Trouble(
        tuple(f for f in hard.incident.failures if f not in failures),
        tuple(n for n in hard.incident.nodes if n not in nodes),
    )
    return trouble.words(hard.formation.places if hard.formation is not None else ())


def begins(restore: RestorePlan, published: VersionKey | None = None) -> str:
    """Where a launch starts, in words; ``published``: the newest durable version ever."""
    if restore.version is None and published is not None:
        return f"starts at step 0: step {published[1]} was durable once, and no version is left"
    if restore.version is None:
        return "starts at step 0"
    return f"resumes at step {restore.version.step} from the durable version"


def complete_at(hard: MembershipHard, total_steps: int) -> int:
    """The last step, when the launch found it done already; 0 when there was something to do."""
    version = hard.formation.restore.version if hard.formation is not None else None
    if version is None or hard.formations > 1 or not 0 < total_steps <= version.step:
        return 0
    return version.step


def _source(restore: RestorePlan) -> str:
    if restore.level == "memory":
        return "from memory"
    if restore.level == "parity":
        return "from memory, rebuilt from other nodes' parity"
    if restore.level == "durable" and restore.version is not None:
        return f"from the durable version of step {restore.version.step}"
    return "from the beginning"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(slots=True)
class Tracebacks:
    """Says each distinct traceback once, with every rank that raised it."""

    _pending: dict[int, dict[int, RankFailure]] = field(default_factory=dict)  # epoch -> rank
    _shown: set[str] = field(default_factory=set)

    def add(self, epoch: int, failures: Iterable[RankFailure]) -> bool:
        """Take failures of an epoch; whether one of them is new."""
        known = self._pending.setdefault(epoch, {})
        before = len(known)
        for failure in failures:
            known.setdefault(failure.rank, failure)
        return len(known) > before

    def take(self, epoch: int, nodes: Mapping[int, int]) -> list[str]:
        """What to show of an epoch, now that its ranks are gone; ``nodes``: each rank's node.

        Only exceptions that can be the fault are shown: not those that followed from a rank that
        was killed, nor those about a peer that went away.
        """
        failures = sorted(self._pending.pop(epoch, {}).values(), key=_blame)
        if not failures or failures[0].kind != "exception":
            return []
        raised: dict[str, list[int]] = {}
        for failure in failures:
            if failure.kind == "exception" and _blame(failure)[0] == _blame(failures[0])[0]:
                raised.setdefault(failure.traceback, []).append(failure.rank)
        texts = []
        for text, ranks in raised.items():
            where = ", ".join(f"rank {rank}{_on_node(nodes.get(rank))}" for rank in ranks)
            if text in self._shown:
                continue  # the incident's line says what it was
            self._shown.add(text)
            texts.append(f"{where} raised:\n{text.rstrip()}")
        return texts


def _on_node(node: int | None) -> str:
    return "" if node is None else f" (node {node})"


def _blame(failure: RankFailure) -> tuple[bool, int]:
    """Sorts failures: what can be the fault first, and then what came first."""
    return is_consequence(failure), failure.noticed_ns


@dataclass(slots=True)
class Account:
    """Where the time of one launch went; kept in the event log, so it survives the coordinator."""

    began_s: float  # wall clock
    running_s: float = 0.0  # when every rank first had done a step; 0: not yet
    first_step: int = 0  # boundary that the launch began with
    step: int = 0  # boundary reached
    step_s: float = 0.0  # median step time
    incidents: int = 0
    failed_starts: int = 0
    restart_s: float = 0.0  # sum over the incidents
    restart_before_s: float = 0.0  # ... that began before every rank first had done a step
    steps_recomputed: int = 0

    @classmethod
    def read(cls, path: str | os.PathLike[str], launch: str, now_s: float) -> Account:
        """The account so far of ``launch``, or a new one that begins now."""
        account = cls(now_s)
        for event in read_events(path):
            if event.get("launch") != launch:
                continue
            if event["kind"] == "launch":
                account.began_s = event["wall_s"]
            elif event["kind"] == "running" and account.running_s == 0:
                account.ran(event["wall_s"], int(event["first_step"]))
            elif event["kind"] == "failed_start":
                account.failed_starts += 1
            elif event["kind"] == "incident":
                account.count(float(event["restart_s"]), int(event["steps_recomputed"]))
        return account

    def ran(self, now_s: float, first_step: int) -> None:
        """Every rank has done its first step."""
        self.running_s, self.first_step = now_s, first_step
        self.restart_before_s = self.restart_s

    def count(self, restart_s: float, steps_recomputed: int) -> None:
        """One incident is over."""
        self.incidents += 1
        self.restart_s += restart_s
        self.steps_recomputed += steps_recomputed

    def rows(self, now_s: float, restarts: int) -> dict[str, Any]:
        """The summary, one figure a row; ``restarts``: formations after the first."""
        elapsed_s = max(now_s - self.began_s, 1e-9)
        restart_before_s = self.restart_before_s if self.running_s else self.restart_s
        start_s = max(0.0, (self.running_s or now_s) - self.began_s - restart_before_s)
        failed = f" ({self.failed_starts} of the starts failed)" if self.failed_starts else ""
        done = max(0, self.step - self.first_step) if self.running_s else 0
        recompute_s = self.steps_recomputed * self.step_s
        lost_s = min(elapsed_s, start_s + self.restart_s + recompute_s)
        return {
            "steps": f"{self.step} ({done} in this launch)",
            "incidents": self.incidents,
            "restarts": f"{restarts}{failed}",
            "steps recomputed": self.steps_recomputed,
            "time": f"{elapsed_s:.1f} s",
            "goodput": f"{100 * (1 - lost_s / elapsed_s):.1f} %",
            "time lost": (
                f"{lost_s:.2f} s: start {start_s:.2f}, restarts {self.restart_s:.2f}, "
                f"recomputing {recompute_s:.2f}"
            ),
        }
