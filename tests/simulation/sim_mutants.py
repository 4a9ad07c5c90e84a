"""Deliberate mistakes: each machine here is wrong in one way, and the simulation has to say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sim_cluster import Machines

from ftrain.checkpoint.protocol.commit import Committed, VersionCommit
from ftrain.comms.driver import Driver
from ftrain.comms.protocol import membership as membership_module
from ftrain.comms.protocol.directives import Outbox
from ftrain.comms.protocol.effects import Form, Obstacle
from ftrain.comms.protocol.flush import FlushRound
from ftrain.comms.protocol.membership import Membership
from ftrain.comms.protocol.messages import (
    Directive,
    Formation,
    Held,
    NodeReport,
    Order,
    RestorePlan,
    VersionId,
)
from ftrain.comms.protocol.node import NodeMember
from ftrain.comms.protocol.node import Phase as NodePhase
from ftrain.comms.protocol.quorum import Tally
from ftrain.comms.protocol.ready import Ready
from ftrain.comms.protocol.records import MembershipHard
from ftrain.comms.protocol.roster import AT_REST, Roster
from ftrain.comms.protocol.transitions import Event
from ftrain.recovery.protocol.plan import choose_restore

# ---------------------------------------------------------------- version commit


class _MajorityTally(Tally):
    def newest(self) -> VersionId | None:
        enough = [v for v in self._votes if 2 * len(self.missing(v)) < len(self.members)]
        return max(enough, default=None)


class _CountingTally(Tally):
    def __init__(self, members: Any) -> None:
        super().__init__(members)
        self.counts: Counter[VersionId] = Counter()

    def vote(self, member: int, version: VersionId) -> None:
        super().vote(member, version)
        self.counts[version] += 1

    def newest(self) -> VersionId | None:
        enough = [v for v in self._votes if self.counts[v] >= len(self.members)]
        return max(enough, default=None)


class MajorityCommits(VersionCommit):
    """A version counts when most members have it."""

    tally = _MajorityTally

    def new_group(self, epoch: int, members: Any, deciders: Any) -> None:
        if epoch > self._epoch:
            mine, self._mine = self._mine, {}
            super().new_group(epoch, members, deciders)
            self._tally = self.tally(members)
            for version, payload in mine.items():
                self.sealed_here(version, payload)


class DuplicatesCount(MajorityCommits):
    """A member that says it twice counts twice."""

    tally = _CountingTally


class OldAnnouncementsCount(VersionCommit):
    """Announcements of groups that have passed count."""

    def _hear(self, message: Any) -> None:
        epoch, self._epoch = self._epoch, message.version.epoch
        super()._hear(message)
        self._epoch = epoch

    def _announce(self, version: VersionId) -> None:
        epoch, self._epoch = self._epoch, version.epoch
        super()._announce(version)
        self._epoch = epoch


class NeverSaysItAgain(VersionCommit):
    """An announcement is sent once."""

    def tick(self) -> None:
        pass

    def _heed(self, message: Any) -> None:
        pass


class CommitsAgain(VersionCommit):
    """What is complete is committed whenever one looks."""

    def _decide(self) -> None:
        complete = self._tally.newest()
        if complete is not None:
            self._newest = complete
            self._effects.append(Committed(complete))


class CountsWhatItDropped(VersionCommit):
    """A version that was given up here still counts."""

    def dropped_here(self, version: VersionId) -> None:
        pass


# ---------------------------------------------------------------- coordinator


class ForgetsEpoch(Membership):
    """The hard state is not stored."""

    def ready(self) -> Ready[MembershipHard]:
        return replace(super().ready(), hard_state=None)


class GrantsEpochAgain(Membership):
    """An epoch that came to nothing is granted again."""

    def _grant(self) -> None:
        before = self._hard
        super()._grant()
        if before.epoch and before.formation is None:
            self._hard = replace(self._hard, epoch=before.epoch)
            form = self._effects.pop()
            assert isinstance(form, Form)
            self._effects.append(replace(form, epoch=before.epoch))


class _Roster(Roster):
    """Asks ``rest`` instead of its own knowledge."""

    rest: Callable[[int], bool]

    def at_rest(self, epoch: int) -> bool:
        return self.rest(epoch)


def _ask_instead(membership: Membership, rest: Callable[[int], bool]) -> None:
    right = membership._roster
    membership._roster = _Roster(right.nodes, right.lease_ticks)
    membership._roster.rest = rest


class DoesNotWaitForStops(Membership):
    """A new epoch is granted while ranks of the old one may be alive."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _ask_instead(self, lambda epoch: True)


class TrustsOldStops(Membership):
    """A node that stopped an older epoch counts as stopped, though an order to run is under way."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _ask_instead(self, lambda epoch: Roster.at_rest(self._roster, 0))


class SeatsNotKept(Membership):
    """The nodes with the lowest numbers get the seats, whoever had them."""

    def _grant(self) -> None:
        self._hard = replace(self._hard, seats=())
        super()._grant()


class ToldLikeMembers(Membership):
    """A node that lost its seat is told what members are told."""

    def _direct(self) -> None:
        directives = membership_module.for_spares
        membership_module.for_spares = lambda directive, *_: directive
        super()._direct()
        membership_module.for_spares = directives


class DoesNotWaitForSpares(Membership):
    """A new epoch is granted while a node that lost its seat still runs ranks of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _ask_instead(self, self._members_rest)

    def _members_rest(self, epoch: int) -> bool:
        there = self._roster.present(self.members)
        return all(r.state in AT_REST and r.epoch >= epoch for r in there)


class DoesNotWaitForPublication(Membership):
    """A new epoch is granted while a version is being published under the old one."""

    def _gathering(self) -> None:
        self._publishing = None
        super()._gathering()


class TakesAnyFormation(Membership):
    """A formation that was made for an older epoch is taken."""

    def formed(self, epoch: int, formation: Formation | Obstacle) -> None:
        super().formed(self._hard.epoch, formation)


class _OneShot(Outbox):
    def tick(self) -> None:
        pass


class OrdersOnce(Membership):
    """A directive is sent once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._outbox = _OneShot(1)


class StopsAtTheLowestBoundary(Membership):
    """A graceful stop ends the ranks at a boundary that one of them has passed."""

    def _pausing(self) -> None:
        undecided = self._hard.stop_step < 0
        super()._pausing()
        if undecided and self._hard.stop_step >= 0:
            lowest = min(b for r in self._roster.reports() for b in (*r.boundaries, r.step_max))
            self._hard = replace(self._hard, stop_step=lowest)


class EndsUnsaved(Membership):
    """A stop that comes after every rank's last step ends the job as it stands."""

    def _enter(self, event: Event, reason: str) -> None:
        if event is Event.ALL_ENDED:
            self._end(0, reason)
        else:
            super()._enter(event, reason)


class GivesUpUnsaved(Membership):
    """A job that fails again and again ends as it stands, whatever memory holds."""

    def _give_up(self, event: Event | None, exit_code: int, reason: str) -> None:
        self._hard = replace(self._hard, giving_up=reason)
        self._end(exit_code, reason)


class CallsItDone(Membership):
    """A run whose end could not be saved is called done."""

    def _end(self, exit_code: int, reason: str) -> None:
        super()._end(0 if "every rank is done" in reason else exit_code, reason)


class SavesWhatItHeardOf(Membership):
    """The last version is saved only if some node has said by then that one is committed."""

    def _finish(self) -> None:
        if self._committed.newest is None:
            self._end(0, "every rank is done")
        else:
            super()._finish()


class CountsTheWithdrawn(Membership):
    """What was published is counted on, also when a rank withdraws it."""

    def _hear(self, report: NodeReport) -> None:
        super()._hear(replace(report, withdrawn=()))


class _LaxRound(FlushRound):
    def hear(self, report: NodeReport) -> None:
        same = {"flush": self.target, "fence": self.fence, "flush_attempt": self.attempt}
        super().hear(replace(report, **same, refused=""))


class CountsOldFiles(Membership):
    """Files written under an older fence count."""

    def _aim_at(self, version: VersionId, margin: int = 0, every: int = 0) -> None:
        super()._aim_at(version, margin, every)
        nodes = range(self._nodes)
        self._round = _LaxRound(version, self._hard.epoch, nodes, margin, self._attempts, every)
        for report in self._roster.reports():
            self._round.hear(report)


class PublishesOnMajority(Membership):
    """A manifest is published when most nodes have written their files."""

    def _watch_flush(self) -> None:
        if self._round is not None and len(self._round.answered) * 2 > self._nodes:
            tally = self._round._tally
            tally.members = frozenset(self._round.answered)
        super()._watch_flush()


# ---------------------------------------------------------------- agent


class ObeysStaleOrders(NodeMember):
    """A directive of an epoch that has passed is followed."""

    def _accepts(self, directive: Directive) -> bool:
        if directive.order is Order.RUN:
            self._wanted = replace(self._wanted, order=Order.RUN)
            self._epoch = min(self._epoch, directive.epoch - 1)
            return self._is_mine(directive.formation) and self._phase is NodePhase.STOPPED
        return directive.order is not Order.WAIT


class TakesAnothersOrders(NodeMember):
    """A formation that names an earlier incarnation of this node is joined."""

    def _is_mine(self, formation: Formation | None) -> bool:
        return formation is not None


class ReportsStopTooEarly(NodeMember):
    """The ranks are called gone when their end has been ordered."""

    def _kill(self) -> None:
        super()._kill()
        self.ranks_gone(self._epoch, self._report.held)


class ReportsOnce(NodeMember):
    """A report is sent when something changed, and never again."""

    def tick(self) -> None:
        if self._changed:
            self._urgent = True


# ---------------------------------------------------------------- driver and plan


class SendsBeforePersisting(Driver[Any]):
    """Messages and effects go out first."""

    def pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        try:
            while ready := self._machine.ready():
                for address, message in ready.messages:
                    self._send(address, message)
                for effect in ready.effects:
                    self._perform(effect)
                if ready.hard_state is not None:
                    self._persist(ready.hard_state)
        finally:
            self._pumping = False


def restores_any_whole(
    held: Any, world_size: int, durable: Any, refused: Any = frozenset()
) -> RestorePlan:
    """Nobody asks whether every rank's small section is there."""
    records: list[Held] = [h for found in held.values() for h in found if h.whole]
    version = max((h.version for h in records), default=None)
    if version is None:
        return choose_restore(held, world_size, durable)
    return RestorePlan("memory", version)


def restores_oldest(
    held: Any, world_size: int, durable: Any, refused: Any = frozenset()
) -> RestorePlan:
    """An older version than need be."""
    plan = choose_restore(held, world_size, durable)
    if plan.level != "memory" or plan.version is None:
        return plan
    older = choose_restore(held, world_size, durable, frozenset({plan.version}))
    return older if older.level == "memory" else plan


def restores_withdrawn(
    held: Any, world_size: int, durable: Any, refused: Any = frozenset()
) -> RestorePlan:
    """Nobody remembers what was withdrawn: another node may hold enough of it."""
    return choose_restore(held, world_size, durable)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One deliberate mistake."""

    name: str
    machines: Machines


def _of(name: str, **machines: Any) -> Mutant:
    return Mutant(name, Machines(**machines))


MUTANTS = (
    _of("commit on majority", commit=MajorityCommits),
    _of("duplicates count", commit=DuplicatesCount),
    _of("old announcements count", commit=OldAnnouncementsCount),
    _of("announcement not resent", commit=NeverSaysItAgain),
    _of("committed more than once", commit=CommitsAgain),
    _of("dropped version counts", commit=CountsWhatItDropped),
    _of("epoch not persisted", membership=ForgetsEpoch),
    _of("epoch granted again", membership=GrantsEpochAgain),
    _of("stop not awaited", membership=DoesNotWaitForStops),
    _of("older stop trusted", membership=TrustsOldStops),
    _of("seats not kept", membership=SeatsNotKept),
    _of("spares told like members", membership=ToldLikeMembers),
    _of("publication not awaited", membership=DoesNotWaitForPublication),
    _of("stale formation taken", membership=TakesAnyFormation),
    _of("directive not resent", membership=OrdersOnce),
    _of("stop at lowest boundary", membership=StopsAtTheLowestBoundary),
    _of("late stop ends unsaved", membership=EndsUnsaved),
    _of("given up unsaved", membership=GivesUpUnsaved),
    _of("unsaved end called done", membership=CallsItDone),
    _of("end saved only if heard of", membership=SavesWhatItHeardOf),
    _of("flush under old fence counts", membership=CountsOldFiles),
    _of("publish on majority", membership=PublishesOnMajority),
    _of("stale epoch accepted", node=ObeysStaleOrders),
    _of("another incarnation's order", node=TakesAnothersOrders),
    _of("stopped reported too early", node=ReportsStopTooEarly),
    _of("report not resent", node=ReportsOnce),
    _of("same identity after restart", same_incarnation=True),
    _of("send before persist", driver=SendsBeforePersisting),
    _of("restore without small sections", choose_restore=restores_any_whole),
    _of("restore an older version", choose_restore=restores_oldest),
)
