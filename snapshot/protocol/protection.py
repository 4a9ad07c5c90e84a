"""Which version the group protects with parity, one after the other, and when one is protected.

Theory of operation:

* Versions are protected in *rounds*.  The node with the lowest number leads: it opens a round for
  the newest version that all nodes hold, and the next one when that is over.  Nobody else picks
  versions, so that all encode the same one.  A process numbers its rounds from a number on that no
  earlier process of its node has reached, so a leader that starts again need not know anything.
* In a round every node keeps its images of the version, and those that hold parity fetch what they
  need from the others.  A node that has all its parity says so, and a round is *over* once every
  node said it: the version is protected, everywhere, before anybody gives up the one before.
* A node that can't take part (it holds the version no more) says that, and the leader opens another
  round as soon as there is a newer version.
* What is said is said again until it has its effect, so that any message may be lost, and rounds
  only grow, so that any may come late or twice.
* A node that starts again may keep two rounds, and not know that the newer one is over: without a
  slot for a newer version it would never hear of a newer round either.  So the leader says now and
  then which one was over last; and it tries again, as long as there is nothing newer, what was
  given up, for that may have stood in the way of what is newer.

The commit itself is :class:`~ftrain.checkpoint.protocol.commit.VersionCommit`, as at the other
levels, with a round in the place of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ftrain.checkpoint.protocol.commit import Committed, VersionCommit
from ftrain.comms.protocol.messages import Sealed, SealedSeen, VersionId
from ftrain.comms.protocol.ready import Address, Ready

_REPEAT_TICKS = 3
_REMIND_TICKS = 21  # of what is settled


@dataclass(frozen=True, slots=True)
class Protect:
    """The leader's word: this round is for this version.

    Of the rounds from ``first`` on, which its process opened, ``over`` is the newest that was over
    (0: none of them), so that those behind it were given up; of earlier ones it does not know.
    """

    epoch: int
    round: int
    version: VersionId
    first: int
    over: int


@dataclass(frozen=True, slots=True)
class Unable:
    """To the leader: one node takes no part in this round."""

    epoch: int
    round: int


@dataclass(frozen=True, slots=True)
class ParityMade:
    """One node has all of its parity of a round; ``step`` in its version is the round's number."""

    message: Sealed


@dataclass(frozen=True, slots=True)
class ParitySeen:
    """Which :class:`ParityMade` of the receiver's the sender has."""

    message: SealedSeen


@dataclass(frozen=True, slots=True)
class Begin:
    """Effect: keep the images of ``version``, fetch its parity, then :meth:`Protection.done`; what
    a round before had begun is given up, but not what it may have protected: see ``first`` and
    ``over`` of :class:`Protect`."""

    round: int
    version: VersionId
    first: int
    over: int


@dataclass(frozen=True, slots=True)
class Protected:
    """Effect: every node has its parity of this version; what is older need not be kept."""

    round: int
    version: VersionId


MESSAGES: tuple[type, ...] = (Protect, Unable, ParityMade, ParitySeen)


class _Stage(Enum):
    """How far the newest round is here."""

    OPEN = "open"
    REFUSED = "this node takes no part"
    OVER = "over"


class Protection:
    """One node's part; receives and sends :class:`Protect`, :class:`Unable`,
    :class:`ParityMade` and :class:`ParitySeen`.

    Its inputs besides messages are :meth:`new_group`, :meth:`held_by_all`, :meth:`done` and
    :meth:`unable`; its effects :class:`Begin` and :class:`Protected`.
    """

    def __init__(self, me: int, first_round: int) -> None:
        self._me = me
        self._first_round = first_round
        self._epoch = 0
        self._nodes: tuple[int, ...] = ()
        self._incarnation = 0
        self._commit = VersionCommit(me=me)
        self._round = 0  # the newest that this node knows of
        self._version: VersionId | None = None  # of it
        self._stage = _Stage.OVER
        self._newest: VersionId | None = None  # that all nodes hold
        self._settled: VersionId | None = None  # protected or given up: next is a newer one
        self._made: set[int] = set()  # nodes that have their parity of it
        self._over = 0  # newest round of this epoch that was over, as far as is known here
        self._ticks = 0
        self._messages: list[tuple[Address, object]] = []
        self._effects: list[object] = []

    @property
    def leads(self) -> bool:
        """Whether this node opens the rounds."""
        return len(self._nodes) > 1 and self._me == self._nodes[0]

    def new_group(
        self, epoch: int, nodes: Sequence[int], incarnation: int, base: VersionId | None
    ) -> None:
        """The group of ``epoch`` began, whose nodes all hold ``base``; older ones are ignored."""
        if epoch <= self._epoch:
            return
        self._epoch, self._nodes, self._incarnation = epoch, tuple(sorted(nodes)), incarnation
        self._commit.new_group(epoch, self._nodes, self._nodes)
        self._round, self._version, self._stage, self._over = 0, None, _Stage.OVER, 0
        self._newest, self._settled = base, None
        self._open()

    def held_by_all(self, version: VersionId) -> None:
        """Every node of the group holds ``version``."""
        if self._newest is None or version > self._newest:
            self._newest = version
            self._open()

    def done(self, round_: int) -> None:
        """Answer to :class:`Begin`: all parity that this node keeps is there."""
        if round_ == self._round and self._stage is _Stage.OPEN:
            self._made.add(self._me)
            self._announce()

    def unable(self, round_: int) -> None:
        """Answer to :class:`Begin`: the version is here no more, or there is no memory for it."""
        if round_ == self._round and self._stage is _Stage.OPEN:
            self._stage = _Stage.REFUSED
            self._say_unable()

    def tick(self) -> None:
        """One unit of logical time has passed: say again what has had no effect yet."""
        self._ticks += 1
        self._commit.tick()
        if self._ticks % _REPEAT_TICKS:
            return
        if self.leads and self._stage is _Stage.OPEN:
            self._propose()
        elif self._stage is _Stage.REFUSED:
            self._say_unable()
        elif self.leads and self._ticks % _REMIND_TICKS == 0:
            self._remind()

    def receive(self, message: object) -> None:
        """Another node's word."""
        if isinstance(message, Protect) and message.epoch == self._epoch:
            self._follow(message)
        elif isinstance(message, Unable) and message.epoch == self._epoch:
            self._heed(message)
        elif isinstance(message, ParityMade | ParitySeen):
            self._commit.receive(message.message)
            if isinstance(message, ParityMade):
                self._hear(message.message)

    def ready(self) -> Ready[None]:
        """What has to be done now."""
        commit = self._commit.ready()
        self._messages += [(to, _wrapped(message)) for to, message in commit.messages]
        for effect in commit.effects:
            if isinstance(effect, Committed):
                self._end(effect.version.step)
        ready: Ready[None] = Ready(None, tuple(self._messages), tuple(self._effects))
        self._messages, self._effects = [], []
        return ready

    # ---- the leader

    def _open(self) -> None:
        """Open a round if there is something to protect and no round is under way."""
        version = self._newest
        if not self.leads or self._stage is not _Stage.OVER or version is None:
            return
        if self._settled is not None and version <= self._settled:
            return
        number = max(self._round + 1, self._first_round)
        self._begin(Protect(self._epoch, number, version, self._first_round, self._over))
        self._propose()

    def _propose(self) -> None:
        if self._version is not None:
            first, over = self._first_round, self._over
            word = Protect(self._epoch, self._round, self._version, first, over)
            self._messages += [(node, word) for node in self._nodes if node != self._me]

    def _remind(self) -> None:
        if self._over == self._round:
            self._propose()
        else:
            self._settled = None
            self._open()

    def _heed(self, message: Unable) -> None:
        if self.leads and message.round == self._round and not self._made.issuperset(self._nodes):
            self._settle()  # else it is old, for that node has its parity now

    # ---- everybody

    def _hear(self, made: Sealed) -> None:
        if made.version == VersionId(self._epoch, self._round):
            self._made.add(made.node)
            self._announce()

    def _announce(self) -> None:
        """Say that the parity is here.

        The leader is the last to say so: a round that it gave up is over nowhere, even if the node
        that was unable starts again and is not any more.
        """
        if self._stage is not _Stage.OPEN or self._me not in self._made:
            return
        if not self.leads or self._made.issuperset(self._nodes):
            version = VersionId(self._epoch, self._round)
            self._commit.sealed_here(version, Sealed(version, self._me, self._incarnation, (), ()))

    def _begin(self, word: Protect) -> None:
        self._made.clear()
        self._round, self._version, self._stage = word.round, word.version, _Stage.OPEN
        self._effects.append(Begin(word.round, word.version, word.first, word.over))

    def _follow(self, message: Protect) -> None:
        if not self.leads and message.round > self._round:
            self._begin(message)

    def _say_unable(self) -> None:
        word = Unable(self._epoch, self._round)
        if self.leads:
            self._heed(word)
        else:
            self._messages.append((self._nodes[0], word))

    def _end(self, round_: int) -> None:
        if round_ == self._round and self._version and self._stage is not _Stage.OVER:
            self._over = round_
            self._effects.append(Protected(round_, self._version))
            self._settle()

    def _settle(self) -> None:
        """The round is over, whichever way."""
        if self._stage is not _Stage.OVER:
            self._stage, self._settled = _Stage.OVER, self._version
            self._open()


def _wrapped(message: object) -> ParityMade | ParitySeen:
    """A message of the commit, told apart from those of versions in memory."""
    if isinstance(message, Sealed):
        return ParityMade(message)
    assert isinstance(message, SealedSeen)
    return ParitySeen(message)
