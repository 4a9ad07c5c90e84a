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
* Everything kept is bounded: the ``window`` newest versions sealed here and announced by others.
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
    :meth:`sealed_here` for what it finds there, and :meth:`new_group`.
    """

    def __init__(self, *, me: int | str, resend_ticks: int = 3, window: int = 8) -> None:
        self._me = me
        self._resend_ticks = resend_ticks
        self._window = window
        self._epoch = 0
        self._decides = False
        self._tally = Tally(())
        self._mine: dict[VersionId, Sealed] = {}
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
        """Whether ``version`` is needed no more: it is older than the newest committed one."""
        return self._newest is not None and version < self._newest

    def new_group(self, epoch: int, members: Sequence[int], deciders: Sequence[Address]) -> None:
        """The group of ``epoch`` began; one that is not newer than the present is ignored."""
        if epoch <= self._epoch:
            return
        self._epoch = epoch
        self._tally = Tally(members)
        self._decides = self._me in deciders
        self._unseen = {d: set() for d in deciders if d != self._me}
        self._send_lists()  # an earlier process may have had more: make the others tell again
        for version in sorted(self._mine):
            self._announce(version)

    def sealed_here(self, version: VersionId, payload: Sealed) -> None:
        """All ranks of this member sealed ``version``; ``payload`` is what the others get."""
        if version in self._mine or self.droppable(version):
            return
        self._mine[version] = payload
        for old in sorted(self._mine)[: -self._window]:
            self._forget(old)
        self._announce(version)

    def dropped_here(self, version: VersionId) -> None:
        """This member gave ``version`` up: it must not count here any more, should it get complete.

        A member gives up only what can't be committed, what is older than something committed
        somewhere, or what nobody may restore from, so what others heard of it does no harm.
        """
        if self._mine.pop(version, None) is not None and isinstance(self._me, int):
            self._tally.withdraw(self._me, version)
            for unseen in self._unseen.values():
                unseen.discard(version)

    def tick(self) -> None:
        """One unit of logical time has passed: repeat what was not answered."""
        self._ticks += 1
        if self._ticks % self._resend_ticks:
            return
        for decider, unseen in self._unseen.items():
            self._messages += [(decider, self._mine[v]) for v in sorted(unseen)]
        if self._waits():
            self._send_lists()  # tell the others what is missing here

    def receive(self, message: object) -> None:
        """A member's announcement, or a decider's list of what it has."""
        if isinstance(message, Sealed):
            self._hear(message)
        elif isinstance(message, SealedSeen):
            self._heed(message)

    def ready(self) -> Ready[None]:
        """What has to be done now."""
        ready: Ready[None] = Ready(None, tuple(self._messages), tuple(self._effects))
        self._messages, self._effects = [], []
        return ready

    def _hear(self, message: Sealed) -> None:
        if message.version.epoch != self._epoch or message.node not in self._tally.members:
            return  # of a group that has passed, or that this process has not heard of yet
        if not self.droppable(message.version):
            self._tally.vote(message.node, message.version)
            self._decide()
        self._send_list(message.node)

    def _heed(self, message: SealedSeen) -> None:
        if message.epoch != self._epoch or message.node not in self._unseen:
            return
        floor = message.newest or VersionId(0, 0)
        mine = {v for v in self._mine if v.epoch == self._epoch and v >= floor}
        lacking = mine - set(message.versions)
        fresh = lacking - self._unseen[message.node]  # what it had, and has lost
        self._unseen[message.node] = lacking
        self._messages += [(message.node, self._mine[v]) for v in sorted(fresh)]

    def _waits(self) -> bool:
        if self._me not in self._tally.members:
            return True
        return any(
            v.epoch == self._epoch and (self._newest is None or v > self._newest)
            for v in self._mine
        )

    def _announce(self, version: VersionId) -> None:
        if version.epoch != self._epoch:
            return
        for decider, unseen in self._unseen.items():
            unseen.add(version)
            self._messages.append((decider, self._mine[version]))
        if isinstance(self._me, int):
            self._tally.vote(self._me, version)
            self._decide()

    def _decide(self) -> None:
        complete = self._tally.newest() if self._decides else None
        if complete is not None and (self._newest is None or complete > self._newest):
            self._newest = complete
            self._effects.append(Committed(complete))
            for version in [v for v in self._mine if v < complete]:
                self._forget(version)  # overtaken
        self._tally.keep(self._mine.keys(), self._window)

    def _forget(self, version: VersionId) -> None:
        del self._mine[version]
        for unseen in self._unseen.values():
            unseen.discard(version)

    def _send_lists(self) -> None:
        for node in sorted(self._tally.members):
            self._send_list(node)

    def _send_list(self, node: int) -> None:
        if self._decides and node != self._me:
            has = self._tally.versions_of(node)
            self._messages.append((node, SealedSeen(self._epoch, self._me, has, self._newest)))
