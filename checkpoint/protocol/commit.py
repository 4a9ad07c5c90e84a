"""Version commit: a version counts when every member of the group has announced it.

One machine for every level; who decides is a parameter.  At L1 and L2 every snapshot manager is a
member and a decider: each announces to all, each decides by itself, and no central message is
needed.  With one decider that is no member it is a central commit.

Theory of operation:

* An announcement (:class:`Sealed`) names a version, the version its epoch, and only those of the
  group's epoch count.  A member counts once per version, however often its message arrives.
* It is sent until the decider's list of what it has (:class:`SealedSeen`) names it.  The list is
  the whole truth, not an increment: a decider that lost its memory sends a shorter one and is told
  again.
* The newest committed version only ever grows.  One that is overtaken (a later one is complete
  first) is not committed any more; nobody needs it.
* A member without a free slot passes a version over and says so; the others then drop their share of
  it.  Else members that passed over different versions would fill their slots with versions that
  can never be complete, and wait for each other for ever.
* Everything kept is bounded: the versions from the newest committed one on, at most ``window``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftrain.comms.protocol.messages import Sealed, SealedSeen, VersionId
from ftrain.comms.protocol.quorum import Tally
from ftrain.comms.protocol.ready import Address, Ready


@dataclass(frozen=True, slots=True)
class Committed:
    """Effect: every member sealed this version; once per version, in growing order."""

    version: VersionId


class VersionCommit:
    """One side of the commit: a member (``me`` is its node number), a decider, or both.

    Receives and sends :class:`Sealed` and :class:`SealedSeen`; its only effect is
    :class:`Committed`, at deciders.  A process that starts again over memory that survived calls
    :meth:`began_here` and :meth:`sealed_here` for what it finds there, and then :meth:`new_group`.
    """

    def __init__(self, *, me: Address, resend_ticks: int = 3, window: int = 8) -> None:
        self._me = me
        self._resend_ticks = resend_ticks
        self._window = window
        self._epoch = 0
        self._deciders: tuple[Address, ...] = ()
        self._tally = Tally(())
        self._mine: dict[VersionId, Sealed] = {}
        self._pending: set[VersionId] = set()  # begun here, neither sealed nor passed over yet
        self._reached: VersionId | None = None  # newest begun, sealed or passed over here
        self._others: dict[Address, SealedSeen] = {}  # the newest list of each member
        self._unseen: dict[Address, set[VersionId]] = {}  # by decider: mine that it does not list
        self._ticks = 0
        self._newest: VersionId | None = None
        self._messages: list[tuple[Address, object]] = []
        self._effects: list[object] = []

    @property
    def newest(self) -> VersionId | None:
        """The newest version that is known here to be committed; never goes backward."""
        return self._newest

    @property
    def epoch(self) -> int:
        """Epoch of the present group; 0 before the first."""
        return self._epoch

    def droppable(self, version: VersionId) -> bool:
        """Whether ``version`` is needed no more.

        It is older than the newest committed one, or some member of its group has passed it over,
        so that it can never be committed anywhere.
        """
        if self._newest is not None and version < self._newest:
            return True
        if version.epoch != self._epoch:
            return False
        mine = version in self._mine or version in self._pending
        if self._reached is not None and version <= self._reached and not mine:
            return True
        return any(
            other.reached is not None and version <= other.reached and version not in other.own
            for other in self._others.values()
        )

    def new_group(self, epoch: int, members: Sequence[int], deciders: Sequence[Address]) -> None:
        """The group of ``epoch`` began; one that is not newer than the present is ignored."""
        if epoch <= self._epoch:
            return
        self._epoch = epoch
        self._tally = Tally(members)
        self._deciders = tuple(d for d in deciders if d != self._me)
        self._others = {}
        self._unseen = {d: set() for d in self._deciders}
        if self._me in deciders:
            self._send_lists()  # an earlier process may have had more: make the others tell again
        for version in sorted(self._mine):
            self._announce(version)

    def began_here(self, version: VersionId) -> None:
        """A rank of this member began to capture ``version``."""
        if not self.droppable(version) and version not in self._mine:
            self._pending.add(version)
            self._reach(version)

    def passed_here(self, version: VersionId) -> None:
        """This member will never seal ``version``: no free slot, or a rank died in its capture."""
        self._reach(version)
        self._pending.discard(version)
        if version not in self._mine and version.epoch == self._epoch:
            self._send_lists()

    def sealed_here(self, version: VersionId, payload: Sealed) -> None:
        """All ranks of this member sealed ``version``; ``payload`` is what the others get."""
        if version in self._mine or self.droppable(version):
            return
        self._pending.discard(version)
        self._reach(version)
        self._mine[version] = payload
        for old in sorted(self._mine)[: -self._window]:
            self._forget(old)
        self._announce(version)

    def tick(self) -> None:
        """One unit of logical time has passed: repeat what was not answered."""
        self._ticks += 1
        if self._ticks % self._resend_ticks:
            return
        for decider, unseen in self._unseen.items():
            self._messages += [(decider, self._mine[v]) for v in sorted(unseen)]
        waiting = any(self._newest is None or v > self._newest for v in self._mine)
        if waiting or self._me not in self._tally.members:
            self._send_lists()  # tell the others what is missing here

    def receive(self, message: object) -> None:
        """A member's announcement, or a decider's list of what it has."""
        if isinstance(message, Sealed):
            self._hear(message)
        elif isinstance(message, SealedSeen) and message.epoch == self._epoch:
            self._heed(message)

    def ready(self) -> Ready[None]:
        """What has to be done now."""
        ready: Ready[None] = Ready(None, tuple(self._messages), tuple(self._effects))
        self._messages, self._effects = [], []
        return ready

    def _hear(self, message: Sealed) -> None:
        if message.version.epoch != self._epoch or message.node not in self._tally.members:
            return  # of a group that has passed, or of one that this process has not heard of yet
        if not self.droppable(message.version):
            self._tally.vote(message.node, message.version)
            self._decide()
        self._send_list(message.node)

    def _heed(self, message: SealedSeen) -> None:
        if message.node in self._tally.members:
            known = self._others.get(message.node)
            if known is None or _extent(message) >= _extent(known):
                self._others[message.node] = message
                for dead in [v for v in self._mine if self.droppable(v)]:
                    self._forget(dead)
            if any(self.droppable(v) for v in message.own):
                self._send_list(message.node)  # it may wait for what was passed over here
        if message.node not in self._unseen:
            return
        mine = {v for v in self._mine if v.epoch == self._epoch}
        lacking = {
            v for v in mine - set(message.versions) if message.newest is None or v >= message.newest
        }
        fresh = lacking - self._unseen[message.node]
        self._unseen[message.node] = lacking
        self._messages += [(message.node, self._mine[v]) for v in sorted(fresh)]

    def _reach(self, version: VersionId) -> None:
        self._reached = max(version, self._reached or version)

    def _announce(self, version: VersionId) -> None:
        if version.epoch != self._epoch:
            return
        for decider in self._deciders:
            self._unseen[decider].add(version)
            self._messages.append((decider, self._mine[version]))
        if isinstance(self._me, int):
            self._tally.vote(self._me, version)
            self._decide()

    def _decide(self) -> None:
        complete = self._tally.newest()
        if complete is not None and (self._newest is None or complete > self._newest):
            self._newest = complete
            self._effects.append(Committed(complete))
            for version in [v for v in self._mine if v < complete]:
                self._forget(version)
        self._tally.keep(self._newest, self._window)

    def _forget(self, version: VersionId) -> None:
        del self._mine[version]
        for unseen in self._unseen.values():
            unseen.discard(version)

    def _send_lists(self) -> None:
        for node in sorted(self._tally.members):
            self._send_list(node)

    def _send_list(self, node: int) -> None:
        if node != self._me and isinstance(self._me, (int, str)):
            has = self._tally.versions_of(node)
            own = tuple(sorted({v for v in (*self._mine, *self._pending) if v.epoch == self._epoch}))
            reached = self._reached if self._reached and self._reached.epoch == self._epoch else None
            seen = SealedSeen(self._epoch, self._me, has, self._newest, reached, own)
            self._messages.append((node, seen))


def _extent(message: SealedSeen) -> VersionId:
    """How far a list reaches: one that reaches less far is an older one, come late."""
    return message.reached or VersionId(message.epoch, -1)
