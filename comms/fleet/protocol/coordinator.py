"""The fleet coordinator's machine: which replica groups are in, and what becomes of operations.

While nothing changes it hears and says nothing.  Theory of operation:

* A **view** is one membership, under a number that is never used twice: whatever number is said to
  anybody is in ``hard`` before.
* **A failure.**  A peer tells that it lost a neighbour, or somebody that a process ended.  All are
  told to HALT; when all that are not gone have said what they had under way, the next view is
  granted without the gone, together with the decisions (:mod:`.verdicts`).
* **Silence.**  Peers whose operations stand still say so; then everybody is pinged, and who does
  not answer for ``silence_ticks`` is gone.  If all answer and it stands still all the same, all
  connections are made anew; of two peers that can't connect the later one in the ring goes.
* **Who comes or leaves in order** stops nobody: the next ring is built beside the present one
  (PREPARE), then all say what they have begun (HOLD), and the new view holds from the first
  operation that nobody has begun.  What disturbs that only puts it off.
* A member that was in a view never comes back in the same life (``incarnation``): a process that
  was stopped and wakes is told to LEAVE.
* A coordinator that is new waits for the peers' word; where they all stand in the view of ``hard``
  nothing happens, else everybody halts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from ftrain.comms.fleet.protocol.messages import (
    AHEAD_MAX,
    FleetDirective,
    FleetHard,
    Member,
    Order,
    PeerGone,
    PeerStatus,
    Stage,
    Stall,
    View,
)
from ftrain.comms.fleet.protocol.peers import Limits, Peers
from ftrain.comms.fleet.protocol.plausible import NUMBER_MAX, ahead, needed
from ftrain.comms.fleet.protocol.suspicion import Suspicion
from ftrain.comms.fleet.protocol.verdicts import decide, first_of
from ftrain.comms.protocol.effects import Announce
from ftrain.comms.protocol.messages import Notice
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ready import Address, Ready


class Phase(Enum):
    """What the coordinator is busy with."""

    RECOVERING = "recovering"  # it is new, and waits for the peers' word
    GATHERING = "gathering"  # there is no view yet
    STEADY = "steady"
    PREPARING = "preparing"
    HOLDING = "holding"
    HALTING = "halting"
    INSTALLING = "installing"  # a view is granted, and not everybody uses it yet


Arrange = Callable[[Sequence[int]], Sequence[int]]


class FleetCoordinator:
    """Decides for a fleet of replica groups with ``width`` ranks each.

    Args:
        hard: what an earlier coordinator of the fleet stored.
        members_min: with fewer no operation begins.
        members_expected: so many are waited for (``gather_ticks`` at most) before the first view.
        joint: the lanes' operations of one number are done in all lanes or in none.
        arrange: members in the order of their ring; by default those that stay keep their places.

    Receives :class:`PeerStatus` and :class:`PeerGone`; sends :class:`FleetDirective` to peer
    numbers; its effects are :class:`Announce`.
    """

    def __init__(
        self,
        *,
        hard: FleetHard | None = None,
        width: int = 1,
        members_min: int = 1,
        members_expected: int = 1,
        gather_ticks: int = 100,
        joint: bool = False,
        limits: Limits | None = None,
        resend_ticks: int = 5,
        arrange: Arrange | None = None,
    ) -> None:
        self._hard = hard or FleetHard()
        self._stored = hard
        self._width = width
        self._members_min = members_min
        self._members_expected = members_expected
        self._gather_ticks = gather_ticks
        self._joint = joint
        self._limits = limits or Limits()
        self._resend_ticks = resend_ticks
        self._arrange = arrange
        self._peers = Peers(width, self._limits)
        self._phase = Phase.RECOVERING if self._hard.view.number else Phase.GATHERING
        self._next = View()  # that is being prepared
        self._ticks = 0  # in this phase
        self._stuck_ticks = 0
        self._due: set[int] = set()  # peers to be told what is wanted of them
        self._pinged = 0
        self._since: dict[int, int] = {}  # peer that has to do something: tick in which it was told
        self._age_ticks = 0
        self._checked_ticks = 0  # when it was looked up last who has to be told again
        self._unheeded = False  # something came that :meth:`ready` has to look at
        self._sets: dict[int, frozenset[Member]] = {}  # by view
        self._suspicion = Suspicion()
        self._lanes: tuple[View, dict[int, tuple[Any, ...]]] = (View(), {})
        self._effects: list[object] = []

    @property
    def phase(self) -> Phase:
        """What it is busy with."""
        return self._phase

    @property
    def hard(self) -> FleetHard:
        """The newest hard state (persisted once :meth:`ready` was taken and done)."""
        return self._hard

    # ------------------------------------------------------------------ inputs

    def tick(self) -> None:
        """One unit of logical time has passed."""
        self._ticks += 1
        self._age_ticks += 1
        self._peers.tick()
        self._peers.forget(self._concerns)
        members = self._hard.view.members
        self._stuck_ticks += any(s.stall is Stall.STUCK for s in self._peers.of(members))
        self._advance()

    def receive(self, message: object) -> None:
        """A peer's status, or news of a process's end."""
        if isinstance(message, PeerStatus):
            if self._peers.accept(message):
                self._due.add(message.peer)
                self._check_number(message)
        elif isinstance(message, PeerGone):
            self._peers.gone(message)
        self._unheeded = True

    def refuse(self, peer: int, incarnation: int, why: str) -> None:
        """A peer said what it can't: it is in no view any more, and never will be again."""
        self._peers.give_up(peer, incarnation, f"it is broken: {why}")
        self._unheeded = True

    def connected(self, peer: int, incarnation: int) -> None:
        """There is a connection to a peer."""
        self._peers.connected(peer, incarnation)
        self._due.add(peer)

    def disconnected(self, peer: int, incarnation: int) -> None:
        """There is none any more."""
        self._peers.disconnected(peer, incarnation)
        self._unheeded = True

    def ready(self) -> Ready[FleetHard]:
        """What has to be done now."""
        if self._unheeded:  # once for all that came: each costs a look at every member
            self._advance()
        messages = tuple(self._messages())
        hard = self._hard if self._hard != self._stored else None
        self._stored = self._hard
        effects, self._effects = tuple(self._effects), []
        return Ready(hard, messages, effects)

    # ------------------------------------------------------------------ phases

    def _check_number(self, status: PeerStatus) -> None:
        """Whatever number is said to anybody is stored before, so a higher one is of a fleet whose
        store was lost: the first view gets a higher one.  Later it can only be a mistake."""
        claimed = (status.number, status.view, *(lost.number for lost in status.lost))
        if max(claimed) <= self._hard.number:
            return
        if self._hard.view.number or self._phase is not Phase.GATHERING:
            self.refuse(status.peer, status.incarnation, "it speaks of a change that never was")
        else:
            self._hard = replace(self._hard, number=min(max(claimed), NUMBER_MAX // 2))

    def _concerns(self, member: Member) -> bool:
        """Whether it matters that a member is gone."""
        return any(
            self._is_in(member, view) for view in (self._hard.view, self._hard.before, self._next)
        )

    def _is_in(self, member: Member, view: View) -> bool:
        found = self._sets.get(view.number)
        if found is None:
            found = self._sets[view.number] = frozenset(view.members)
        return member in found

    def _advance(self) -> None:
        self._unheeded = False
        handlers = {
            Phase.RECOVERING: self._recovering,
            Phase.GATHERING: self._gathering,
            Phase.STEADY: self._steady,
            Phase.PREPARING: self._preparing,
            Phase.HOLDING: self._holding,
            Phase.HALTING: self._halting,
            Phase.INSTALLING: self._installing,
        }
        for _ in handlers:  # as many as one input may pass through
            before = self._phase
            handlers[before]()
            if self._phase is before:
                return

    def _enter(self, phase: Phase, why: str = "") -> None:
        self._phase, self._ticks, self._stuck_ticks = phase, 0, 0
        self._sets.clear()
        if phase is not Phase.HALTING:  # who was silent before is silent still
            self._peers.rest()
        self._peers.accuse(set())
        self._due.update(status.peer for status in self._peers.statuses())
        if why:
            self._say("fleet", why, view=self._hard.view.number)

    def _recovering(self) -> None:
        view = self._hard.view
        self._peers.ask()
        if len(self._peers.of(view.members)) < len(self._present(view.members)) * self._width:
            return
        if why := self._failure(view):
            self._halt(why)
        elif self._hard.before.number or self._behind(view.members):
            self._halt("the coordinator is new, and a change was under way")
        else:
            self._enter(Phase.STEADY, "the coordinator is new, the fleet stands as it left it")

    def _gathering(self) -> None:
        joiners = self._joiners()
        late = self._ticks >= self._gather_ticks
        enough = self._members_min if late else max(self._members_min, self._members_expected)
        if len(joiners) >= enough:
            self._prepare(joiners)
        elif not joiners:
            self._ticks = 0

    def _steady(self) -> None:
        members = self._hard.view.members
        if why := self._failure(self._hard.view) or self._stands_still(members):
            self._halt(why)
            return
        if not members:
            self._enter(Phase.GATHERING)
            return
        stays = tuple(member for member in members if not self._leaves(member))
        joiners = self._joiners()
        if joiners or len(stays) < len(members):
            self._prepare((*stays, *joiners))

    def _preparing(self) -> None:
        if not self._put_off() and self._all_at(self._next.members, Stage.BUILT, Stage.HELD):
            self._enter(Phase.HOLDING)

    def _holding(self) -> None:
        holders = tuple({*self._hard.view.members, *self._next.members})
        if not self._put_off() and self._all_at(holders, Stage.HELD):
            if liars := ahead(self._peers.of(self._hard.view.members)):
                why = f"it has begun more than {AHEAD_MAX} operations before the others"
                self.refuse(liars[0].peer, liars[0].incarnation, why)
                return
            first = first_of(self._peers.of(holders))
            self._grant(replace(self._next, first=first), before=self._hard.view)

    def _halting(self) -> None:
        self._peers.ask()
        base = self._base()
        reports = self._peers.of(base.members)
        self._peers.accuse({lost.peer for report in reports for lost in report.lost})
        survivors = tuple(m for m in self._present(base.members) if not self._leaves(m))
        if not self._all_at(survivors, Stage.HALTED):
            self._give_up_unstoppable(survivors)
            return
        trusted = True
        if len(survivors) == len(base.members):
            links = self._garbled_links(survivors)
            trusted = not links
            survivors = self._reachable(self._orderly(survivors, links))
        reports = self._peers.of(survivors)
        view = View(
            self._hard.number,
            survivors,
            tuple(report.place for report in reports),
            first=self._hard.view.first,
            halted=True,
            decisions=decide(reports, self._width, joint=self._joint, trusted=trusted),
        )
        self._grant(view, before=View())

    def _installing(self) -> None:
        view, before = self._hard.view, self._hard.before
        goers = (member for member in before.members if not self._is_in(member, view))
        movers = (*view.members, *goers)
        stayers = (member for member in before.members if self._is_in(member, view))
        late = [m for m in stayers if self._leaves(m) and self._behind((m,))]
        if why := self._failure(view) or self._failure(before):
            self._halt(why)
        elif late:  # it begins nothing more, and so never comes to where the view begins
            self._halt(f"replica group {late[0].member} leaves")
        elif not self._behind(self._present(movers)):
            self._hard = replace(self._hard, before=View())
            self._enter(Phase.STEADY)
        else:
            self._peers.ask()
            if self._ticks > self._limits.change_ticks:
                self._halt("a new membership does not come about though every member answers")

    # ------------------------------------------------------------------ changes

    def _prepare(self, members: Sequence[Member]) -> None:
        number = self._hard.number + 1
        self._hard = replace(self._hard, number=number)
        ordered = self._ordered(members)
        places = tuple(status.place for status in self._peers.of(ordered))
        self._next = View(number, ordered, places)
        self._enter(Phase.PREPARING)

    def _put_off(self) -> bool:
        """Whether the change that is being prepared had to be given up."""
        self._peers.ask()
        if why := self._failure(self._hard.view):
            self._halt(why)
            return True
        view = self._hard.view
        joiners = [member for member in self._next.members if not self._is_in(member, view)]
        broken = [joiner for joiner in joiners if not self._present((joiner,))]
        late = self._ticks > self._limits.change_ticks or self._complaints(self._next)
        leaves = any(self._leaves(member) for member in self._next.members)
        if not (broken or late or leaves):
            return False
        for joiner in broken or (
            joiners if late else ()
        ):  # who is refused has to come again, in another life
            for peer in self._of(joiner):
                why = "it could not be connected with the others: it has to join again"
                self._peers.give_up(peer, joiner.incarnation, why)
        self._next = View()
        self._hard = replace(self._hard, number=self._hard.number + 1)
        self._enter(Phase.STEADY if self._hard.view.number else Phase.GATHERING)
        return True

    def _halt(self, why: str) -> None:
        self._hard = replace(self._hard, number=self._hard.number + 1)
        self._next = View()
        self._enter(Phase.HALTING, why)

    def _grant(self, view: View, before: View) -> None:
        old = self._hard.view
        seen = {m.member: m for m in (*self._hard.seen, *view.members)}
        gone = sorted(member.member for member in {*old.members} - {*view.members})
        come = sorted(member.member for member in {*view.members} - {*old.members})
        self._hard = FleetHard(view.number, view, before, tuple(seen.values()))
        self._next = View()
        self._enter(Phase.INSTALLING)
        text = f"the fleet is {_listed(sorted(view.numbers))}"
        text += f"; joined: {_listed(come)}" if come else ""
        text += f"; left: {_listed(gone)}" if gone else ""
        if len(view.members) < self._members_min:
            text += f"; it waits, because it takes {self._members_min}"
        self._say("fleet", text, view=view.number, members=view.numbers, come=come, gone=gone)

    def _ordered(self, members: Sequence[Member]) -> tuple[Member, ...]:
        if self._arrange is None:
            return tuple(members)
        by_number = {member.member: member for member in members}
        return tuple(by_number[number] for number in self._arrange(tuple(by_number)))

    def _base(self) -> View:
        """The view that the survivors go on from; before all have switched, the old one."""
        view, before = self._hard.view, self._hard.before
        staying = self._present([one for one in before.members if self._is_in(one, view)])
        return before if before.number and self._behind(staying) else view

    def _give_up_unstoppable(self, members: Sequence[Member]) -> None:
        if self._ticks <= self._limits.halt_ticks:
            return
        for status in self._peers.of(members):
            if self._stage_of(status.peer) is not Stage.HALTED:
                why = "it answers, but its ring does not stop"
                self._peers.give_up(status.peer, status.incarnation, why)

    def _garbled_links(self, members: Sequence[Member]) -> list[tuple[int, int]]:
        """Who heard garbage from whom, in the present view."""
        return [
            (status.peer, lost.peer)
            for status in self._peers.of(members)
            for lost in status.lost
            if lost.garbled and lost.number == self._hard.view.number
        ]

    def _orderly(
        self, members: tuple[Member, ...], links: Sequence[tuple[int, int]]
    ) -> tuple[Member, ...]:
        """Without who is to blame for garbage on the ring's links."""
        worst = self._suspicion.worst(links)
        for member in members:
            if worst is not None and worst in self._of(member):
                why = "what it and its neighbours said to each other made no sense, again"
                self._peers.give_up(worst, member.incarnation, why)
        return self._present(members)

    def _reachable(self, members: tuple[Member, ...]) -> tuple[Member, ...]:
        """Without the later one of any two that are there and can't connect to each other."""
        places = {peer: n for n, member in enumerate(members) for peer in self._of(member)}
        out: set[int] = set()
        for pair in sorted(
            sorted((places[status.peer], places[lost.peer]))
            for status in self._peers.of(members)
            for lost in status.lost
            if not lost.reached and lost.number >= self._hard.view.number and lost.peer in places
        ):
            if pair[0] not in out:
                out.add(pair[1])
        return tuple(member for n, member in enumerate(members) if n not in out)

    # ------------------------------------------------------------------ who is there

    def _failure(self, view: View) -> str:
        """Why a view can't go on as it is; empty: it can."""
        gone = (self._peers.why_gone(member) for member in view.members)
        return next(filter(None, gone), "") or self._complaints(view)

    def _complaints(self, view: View) -> str:
        for status in self._peers.of(view.members):
            for lost in status.lost:
                if lost.number == view.number:  # not one that was only prepared
                    return f"peer {status.peer} lost peer {lost.peer}: {lost.why}"
        return ""

    def _stands_still(self, members: Sequence[Member]) -> str:
        """Ask who is there while operations make no progress; why nothing helps but a halt."""
        stalls = {status.stall for status in self._peers.of(members)}
        if stalls <= {Stall.NO}:
            self._stuck_ticks = 0
            self._peers.rest()
            return ""
        self._peers.ask(patiently=Stall.STUCK not in stalls)
        if why := next(filter(None, map(self._peers.why_gone, members)), ""):
            return why
        if self._stuck_ticks > self._limits.link_ticks:
            return "operations stand still though every member answers"
        return ""

    def _present(self, members: Sequence[Member]) -> tuple[Member, ...]:
        return tuple(member for member in members if not self._peers.why_gone(member))

    def _joiners(self) -> tuple[Member, ...]:
        newest = {member.member: member.incarnation for member in self._hard.seen}
        return tuple(
            member
            for member in self._peers.complete()
            if member.incarnation > newest.get(member.member, -1) and not self._leaves(member)
        )

    def _leaves(self, member: Member) -> bool:
        statuses = self._peers.of((member,))
        return bool(statuses) and all(status.leaving for status in statuses)

    def _behind(self, members: Sequence[Member]) -> bool:
        """Whether some of them do not use the newest view yet."""
        return any(s.view < self._hard.view.number for s in self._peers.of(members))

    def _all_at(self, members: Sequence[Member], *stages: Stage) -> bool:
        return all(self._stage_of(peer) in stages for m in members for peer in self._of(m))

    def _stage_of(self, peer: int) -> Stage:
        status = self._peers.newest(peer)
        if status is None or status.number != self._hard.number:
            return Stage.NONE
        return status.stage

    def _of(self, member: Member) -> range:
        return range(member.member * self._width, (member.member + 1) * self._width)

    # ------------------------------------------------------------------ what is said

    def _messages(self) -> list[tuple[Address, object]]:
        if self._pinged < self._peers.ping:
            self._pinged = self._peers.ping
            self._due.update(status.peer for status in self._peers.statuses())
        late: set[int] = set()
        if self._checked_ticks < self._age_ticks:
            self._checked_ticks = self._age_ticks
            before = self._age_ticks - self._resend_ticks
            late = {peer for peer, told in self._since.items() if told <= before}
        said: list[tuple[Address, object]] = []
        for peer in sorted(self._due | late):
            status = self._peers.linked(peer)
            directive = self._directive(status) if status is not None else None
            if status is None or directive is None or _followed(status, directive):
                self._since.pop(peer, None)  # its next word is looked at anyhow
            else:
                self._since[peer] = self._age_ticks
            if directive is not None and (peer in self._due or peer in self._since):
                said.append((peer, directive))
        self._due.clear()
        return said

    def _directive(self, status: PeerStatus) -> FleetDirective:
        member = Member(status.peer // self._width, status.incarnation)
        view, coming = self._hard.view, self._is_in(member, self._next)
        in_view = self._is_in(member, view)
        in_before = self._is_in(member, self._hard.before)
        base = FleetDirective(
            status.peer,
            status.incarnation,
            Order.WAIT,
            self._hard.number,
            ping=self._peers.ping,
            heard=status.sequence,
        )
        if self._phase is Phase.HALTING and (in_view or in_before):
            return replace(base, order=Order.HALT)
        if in_view or coming:
            if self._phase is Phase.PREPARING:
                return self._in_ring(base, Order.PREPARE, self._next, status)
            if self._phase is Phase.HOLDING:
                return self._in_ring(base, Order.HOLD, self._next, status)
        if in_view or in_before:
            return self._in_ring(base, Order.RUN, view, status)
        newest = (m.incarnation for m in self._hard.seen if m.member == member.member)
        why = self._peers.why_ended(status.peer, status.incarnation)
        was_in = status.view or status.incarnation <= next(newest, -1)
        if why or was_in or self._leaves(member):
            reason = why or "the fleet goes on without it: it has to join again"
            number = max(self._hard.number, status.number)  # it must not take this for stale
            return replace(base, order=Order.LEAVE, number=number, reason=reason)
        return base

    def _in_ring(
        self, base: FleetDirective, order: Order, view: View, status: PeerStatus
    ) -> FleetDirective:
        lane = status.peer % self._width
        if self._lanes[0] is not view:
            self._lanes = view, {}
        known = self._lanes[1]
        if lane not in known:
            places: dict[int, Place] = {place.node: place for place in view.places}
            known[lane] = (
                tuple(m.member * self._width + lane for m in view.members),
                places,
                view.numbers,
                tuple(d for d in view.decisions if d.lane == lane),
            )
        ring, places, numbers, decisions = known[lane]
        if not self._builds(status, order, view):
            ring, decisions = (), ()  # by far the longest, and of no use
        return replace(
            base,
            order=order,
            view=view.number,
            ring=ring,
            places=tuple(places[peer] for peer in needed(status.peer, ring, new=not status.view)),
            members=numbers,
            first=view.first,
            halted=view.halted,
            decisions=decisions,
            waiting=len(view.members) < self._members_min,
        )

    def _builds(self, status: PeerStatus, order: Order, view: View) -> bool:
        """Whether a peer has yet to make the ring of a view when it is told to do this."""
        if order is Order.RUN:
            return view.halted and status.view < view.number
        return self._stage_of(status.peer) is Stage.NONE

    def _say(self, kind: str, text: str, **data: object) -> None:
        self._effects.append(Announce(Notice(kind, text, data)))


def _followed(status: PeerStatus, directive: FleetDirective) -> bool:
    """Whether a peer has done what it is told."""
    if directive.order is Order.LEAVE:  # it was told, and is stopped, gone or broken
        return True
    if directive.ping > status.pong:
        return False
    wanted = {Order.PREPARE: Stage.BUILT, Order.HOLD: Stage.HELD, Order.HALT: Stage.HALTED}
    if directive.order in wanted:
        return status.number == directive.number and status.stage is wanted[directive.order]
    if directive.order is Order.RUN:
        follows = status.view >= directive.view and status.number >= directive.number
        return follows and status.stage is Stage.NONE
    return True


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "empty"
