"""Directives are said again until they are followed: when to say them, and what following is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ftrain.comms.protocol.flush import FlushRound
from ftrain.comms.protocol.messages import Directive, Formation, NodeReport, NodeState, Order
from ftrain.comms.protocol.records import MembershipHard
from ftrain.comms.protocol.roster import AT_REST
from ftrain.comms.protocol.transitions import Phase

_FOLLOWED_PACE = 10  # a directive that is followed is said again this much more rarely


class Outbox:
    """Remembers what each node was told, and how long ago."""

    def __init__(self, resend_ticks: int) -> None:
        self._resend_ticks = resend_ticks
        self._sent: dict[int, tuple[int, Directive]] = {}  # incarnation, what
        self._ticks_ago: dict[int, int] = {}

    def tick(self) -> None:
        """One unit of logical time has passed."""
        for node in self._ticks_ago:
            self._ticks_ago[node] += 1

    def due(
        self, told: Sequence[tuple[NodeReport, Directive]], *, flush_answered: set[int]
    ) -> Iterator[tuple[int, Directive]]:
        """Who has to be told what now, for the first time or again, of all that is to be told."""
        for report, directive in told:
            node = report.node
            if directive.order is Order.WAIT:
                continue
            if self._sent.get(node) == (report.incarnation, directive):
                done = followed(report, directive, flush_answered=node in flush_answered)
                pace = _FOLLOWED_PACE if done else 1
                if self._ticks_ago[node] < self._resend_ticks * pace:
                    continue
            self._sent[node] = (report.incarnation, directive)
            self._ticks_ago[node] = 0
            yield node, directive


def directive_of(
    phase: Phase,
    hard: MembershipHard,
    reports: Sequence[NodeReport],
    flush: FlushRound | None,
    reason: str,
) -> Directive:
    """What every member is to do while the coordinator is in ``phase``."""
    if phase is Phase.FINISHED:
        return Directive(hard.epoch, Order.FINISH, exit_code=hard.ended, reason=reason)
    if phase in (Phase.GATHERING, Phase.STOPPING):
        newest = max((r.epoch for r in reports), default=0)
        return Directive(max(hard.epoch, newest), Order.STOP, reason=reason)
    if phase is Phase.PAUSING:
        order = Order.PAUSE if hard.stop_step < 0 else Order.STOP_AT
        return Directive(hard.epoch, order, stop_step=hard.stop_step, reason=reason)
    if phase in (Phase.SAVING, Phase.RUNNING) and flush is not None:
        # What is to be written may wait for managers that do not know of each other yet.
        return Directive(
            hard.epoch,
            Order.FLUSH,
            hard.formation and with_addresses(hard.formation, reports),
            flush=flush.target,
            flush_attempt=flush.attempt,
            fence=flush.fence,
        )
    if phase in (Phase.STARTING, Phase.RUNNING) and hard.formation is not None:
        return Directive(hard.epoch, Order.RUN, with_addresses(hard.formation, reports))
    return Directive(hard.epoch, Order.WAIT, reason=reason)


def for_spares(
    directive: Directive, hard: MembershipHard, reports: Sequence[NodeReport]
) -> Directive:
    """What nodes without a seat are told while members are told ``directive``.

    To be at rest, which a spare is; a node whose seat was taken while it was silent may not be.
    """
    if directive.order in (Order.STOP, Order.FINISH):
        return directive
    newest = max((r.epoch for r in reports), default=0)
    return Directive(max(hard.epoch, newest), Order.STOP, reason="it waits as a spare")


def followed(report: NodeReport, directive: Directive, *, flush_answered: bool) -> bool:
    """Whether a node's report shows that it does what the directive says."""
    order = directive.order
    if order is Order.STOP:
        return report.state in AT_REST and report.epoch >= directive.epoch
    if report.epoch != directive.epoch:
        return False
    if order is Order.PAUSE:
        return report.pausing
    if order is Order.STOP_AT:
        return report.state is NodeState.DONE
    if order is Order.FLUSH:
        return flush_answered
    return order is Order.RUN


def with_addresses(formation: Formation, reports: Sequence[NodeReport]) -> Formation:
    """The formation with the snapshot managers' present addresses: one may be a new one."""
    now = {r.node: r.smp_address for r in reports}
    if all(now.get(p.node) in (None, "", p.smp_address) for p in formation.places):
        return formation
    places = (replace(p, smp_address=now.get(p.node) or p.smp_address) for p in formation.places)
    return replace(formation, places=tuple(places))
