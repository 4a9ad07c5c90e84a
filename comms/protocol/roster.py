"""What the coordinator knows of the nodes: newest reports, leases, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ftrain.comms.protocol.messages import (
    NodeGone,
    NodePlace,
    NodeReport,
    NodeState,
    RankFailure,
)

# What a rank says when another rank has gone: a consequence, not the fault.
_CONSEQUENCE = re.compile(
    r"gloo|nccl|Connection (?:reset|closed|refused)|Broken pipe|DistBackendError|DistNetworkError"
    r"|DistStoreError|TCPStore|process group",
    re.IGNORECASE,
)
AT_REST = (NodeState.IDLE, NodeState.STOPPED)
_PATIENCE_LEASES = 5  # how long a graceful stop waits for a silent node's memory


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a formation can't go on; false when it can."""

    failures: tuple[RankFailure, ...] = ()
    nodes: tuple[tuple[int, str], ...] = ()  # nodes that were lost or broke the rules, and how

    def __bool__(self) -> bool:
        return bool(self.failures or self.nodes)

    def telling(self) -> Trouble:
        """Without what only follows from the rest: that a rank lost its peer, or that a node has
        stopped, says nothing once it is known who went, and how."""
        roots = tuple(f for f in self.failures if not is_consequence(f))
        lost = self.losses().nodes
        return Trouble(roots, lost) if roots or lost else self

    def losses(self) -> Trouble:
        """Without nodes that merely do what a stopping group is told to."""
        return replace(self, nodes=tuple((n, why) for n, why in self.nodes if "lost" in why))

    def mistakes(self) -> Trouble:
        """Only what comes again however often the ranks are started: what the script does wrongly,
        and an end that no disk took."""
        return Trouble(tuple(f for f in self.failures if f.kind in ("usage", "unsaved")))

    @property
    def exit_code(self) -> int:
        """Of a job that ends because of :meth:`mistakes`."""
        return 2 if any(f.kind == "usage" for f in self.failures) else 1

    def joined(self, later: Trouble) -> Trouble:
        """With what became known since: each failure once, of each node the newest word."""
        failures = tuple(f for f in later.failures if f not in self.failures)
        nodes = dict(self.nodes) | dict(later.nodes)
        return Trouble(self.failures + failures, tuple(sorted(nodes.items())))

    def nature(self) -> str:
        """What happened, apart from the rank that it happened to: equal when a bug comes back."""
        telling = self.telling()
        kinds = sorted({f"{f.kind}: {f.cause}" for f in telling.failures})
        return "; ".join([*kinds, *(f"node {n} {why}" for n, why in telling.nodes)])

    def words(self, places: tuple[NodePlace, ...]) -> str:
        """One line: what happened to whom. ``places`` says where the ranks live."""
        telling, where = self.telling(), ranks_to_nodes(places)
        ranks: dict[str, dict[int, None]] = {}  # who it happened to, in order, each once
        for f in telling.failures:
            ranks.setdefault(f"{_verb(f)} {f.cause}", {})[f.rank] = None
        said = []
        for what, who in ranks.items():
            victims = ", ".join(
                f"rank {rank} (node {where[rank]})" if rank in where else f"rank {rank}"
                for rank in who
            )
            said.append(f"{victims} {what}")
        said += [f"node {node} {cause}" for node, cause in telling.nodes]
        return "; ".join(said)


def is_consequence(failure: RankFailure) -> bool:
    """Whether a rank only says that it lost another one."""
    return failure.kind == "exception" and bool(_CONSEQUENCE.search(failure.cause))


def _verb(failure: RankFailure) -> str:
    if failure.kind in ("signal", "exit", "oom"):
        return "died:"
    if failure.kind in ("usage", "unsaved"):
        return "can't go on:" if failure.kind == "usage" else "ended:"
    return "raised" if failure.kind == "exception" else "failed:"


def places_of(reports: Iterable[NodeReport]) -> tuple[NodePlace, ...]:
    """Every node's place in a formation of all of them, in this order."""
    places: list[NodePlace] = []
    first_rank = 0
    for r in reports:
        places.append(
            NodePlace(
                r.node, r.incarnation, first_rank, r.local_world, r.host, r.smp_address, r.rack
            )
        )
        first_rank += r.local_world
    return tuple(places)


def ranks_to_nodes(places: Iterable[NodePlace]) -> dict[int, int]:
    """Which node each rank of a formation lives on."""
    return {
        place.first_rank + local: place.node
        for place in places
        for local in range(place.local_world)
    }


@dataclass(slots=True)
class _Entry:
    report: NodeReport | None = None
    silent_ticks: int = 0
    gone_incarnation: int = -1  # this incarnation and every earlier one is dead
    gone_cause: str = ""


@dataclass(slots=True)
class Roster:
    """The nodes 0 to ``nodes`` - 1, as their reports describe them."""

    nodes: int
    lease_ticks: int
    _entries: list[_Entry] = field(init=False)

    def __post_init__(self) -> None:
        self._entries = [_Entry() for _ in range(self.nodes)]

    def tick(self) -> None:
        """One tick of silence for every node."""
        for entry in self._entries:
            entry.silent_ticks += 1

    def accept(self, report: NodeReport) -> bool:
        """Take a report unless a newer one is known; the one place where the stale is dropped."""
        if not 0 <= report.node < self.nodes:
            return False
        entry = self._entries[report.node]
        if report.incarnation <= entry.gone_incarnation:
            return False
        known = entry.report
        if known is not None and (report.incarnation, report.sequence) <= (
            known.incarnation,
            known.sequence,
        ):
            return False
        entry.report = report
        entry.silent_ticks = 0
        return True

    def gone(self, message: NodeGone) -> None:
        """A node's agent ended; nothing that this incarnation sent counts from now on."""
        if not 0 <= message.node < self.nodes:
            return
        entry = self._entries[message.node]
        if message.incarnation > entry.gone_incarnation:
            entry.gone_incarnation = message.incarnation
            entry.gone_cause = message.cause

    def report(self, node: int) -> NodeReport | None:
        """A node's newest report, even of one that is absent now."""
        return self._entries[node].report

    def reports(self, nodes: Iterable[int] | None = None) -> tuple[NodeReport, ...]:
        """The newest reports of all nodes ever heard of, by node; or of ``nodes``, in order."""
        asked = range(self.nodes) if nodes is None else nodes
        return tuple(r for n in asked if (r := self._entries[n].report) is not None)

    def absence(self, node: int) -> str:
        """Why a node does not count as present, in words; empty when it is present."""
        entry = self._entries[node]
        if entry.report is None:
            return f"was lost: {entry.gone_cause}" if entry.gone_cause else "has not reported yet"
        if entry.report.incarnation <= entry.gone_incarnation:
            return f"was lost: {entry.gone_cause}"
        if entry.silent_ticks > self.lease_ticks:
            return "was lost: it is silent for longer than its lease"
        return ""

    def may_return(self) -> tuple[int, ...]:
        """Nodes that are silent, yet not known to be dead, and not for very long."""
        return tuple(
            n
            for n, e in enumerate(self._entries)
            if e.report is not None
            and e.report.incarnation > e.gone_incarnation
            and self.lease_ticks < e.silent_ticks <= _PATIENCE_LEASES * self.lease_ticks
        )

    def unheard(self, *, for_ever: bool = False) -> tuple[int, ...]:
        """Nodes that never reported and whose lease, counted from the start, still runs; or
        (``for_ever``) has run out since."""
        return tuple(
            n
            for n, e in enumerate(self._entries)
            if e.report is None
            and not e.gone_cause
            and (for_ever or e.silent_ticks <= self.lease_ticks)
        )

    def present(self, nodes: Iterable[int] | None = None) -> tuple[NodeReport, ...]:
        """The newest reports of the nodes that are present, by node; or of ``nodes``, in order."""
        return tuple(r for r in self.reports(nodes) if not self.absence(r.node))

    def at_rest(self, epoch: int) -> bool:
        """No present node has a rank, nor will it start one of an epoch up to ``epoch``."""
        return all(r.state in AT_REST and r.epoch >= epoch for r in self.present())

    def _replaced(self, place: NodePlace) -> str:
        """How a node was lost whose next agent is there already."""
        entry = self._entries[place.node]
        known = entry.gone_incarnation >= place.incarnation
        return f"was lost: {entry.gone_cause if known else 'its agent was started anew'}"

    def trouble(self, places: tuple[NodePlace, ...], epoch: int, *, started: bool) -> Trouble:
        """What keeps ``places`` from running ``epoch``; ``started``: each was in it already."""
        failures: list[RankFailure] = []
        nodes: list[tuple[int, str]] = []
        for place in places:
            report = self.report(place.node)
            absence = self.absence(place.node)
            if report is None or absence:
                nodes.append((place.node, absence))
                continue
            if report.epoch == epoch:
                failures += report.failures
            fault = _place_fault(place, report, epoch, started=started)
            if report.incarnation != place.incarnation:
                fault = self._replaced(place)
            if fault:
                nodes.append((place.node, fault))
        return Trouble(tuple(sorted(failures, key=lambda f: f.noticed_ns)), tuple(nodes))


def _place_fault(place: NodePlace, report: NodeReport, epoch: int, *, started: bool) -> str:
    if report.epoch > epoch or (started and report.epoch < epoch):
        return f"runs epoch {report.epoch}, not {epoch}"
    if report.epoch == epoch and not report.failures and report.state is NodeState.STOPPED:
        return f"has stopped epoch {epoch}"
    return ""
