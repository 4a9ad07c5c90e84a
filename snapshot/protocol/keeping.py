"""Which rounds of parity a node keeps, and until when.

Parity is worth something only with what all other nodes keep of the same round, so a node gives a
round up only when it knows that nobody needs it:

* when a later round of a version that is no older is over, for then every node has all of that one
  (a leader that starts again may open a round for an older version than was protected before);
* when a round was given up by the leader that had opened it, and it opened a later one;
* when a new group begins and the plan names another round: whoever made the plan had seen what all
  nodes hold.

What is whole here may be over elsewhere, and is kept until one of these is known.  What is not
whole is over nowhere.

From the moment at which a node said for the last time what it holds, until the next group begins,
nothing changes (:meth:`Keeping.freeze`): the plan is made of what was said.
"""

from __future__ import annotations

from collections.abc import Iterable

from ftrain.comms.protocol.messages import RoundId, VersionId


class Keeping:
    """The rounds of one node.  What each call returns is given up: nothing need be kept of it."""

    def __init__(self) -> None:
        self._epoch = 0
        self._frozen = False
        self._versions: dict[RoundId, VersionId] = {}
        self._whole: set[RoundId] = set()

    @property
    def frozen(self) -> bool:
        """Whether no round may begin or end."""
        return self._frozen

    @property
    def rounds(self) -> dict[RoundId, VersionId]:
        """Every round that something is kept of, and the version that it protects."""
        return dict(self._versions)

    def found(self, round_: RoundId, version: VersionId) -> None:
        """An earlier process of this node left all of its parity of a round."""
        self._versions[round_] = version
        self._whole.add(round_)

    def new_group(self, epoch: int, kept: RoundId | None) -> list[RoundId]:
        """The group of ``epoch`` began (or is told of again); of rounds before it only ``kept``
        stays."""
        if epoch < self._epoch:
            return []
        if epoch > self._epoch:
            self._epoch, self._frozen = epoch, False
        return self._give_up(r for r in self._versions if r.epoch < epoch and r != kept)

    def freeze(self) -> None:
        """What this node holds was said for the last time."""
        self._frozen = True

    def begin(self, number: int, version: VersionId, first: int, over: int) -> list[RoundId]:
        """A round begins, as :class:`~ftrain.snapshot.protocol.protection.Begin` says."""
        new, newest_over = RoundId(self._epoch, number), RoundId(self._epoch, over)
        # Behind the new one only: a node that starts again may hear of a round that is long past.
        needless = [r for r in self._versions if r < new and self._is_given_up(r, first, over)]
        if newest_over in self._whole:
            needless += self._replaced_by(newest_over)
        given_up = self._give_up(needless)
        self._versions[new] = version
        return given_up

    def whole(self, number: int) -> None:
        """All parity that this node keeps of the round is there."""
        round_ = RoundId(self._epoch, number)
        if round_ in self._versions:
            self._whole.add(round_)

    def is_whole(self, round_: RoundId) -> bool:
        """Whether all of this node's parity of the round is there."""
        return round_ in self._whole

    def over(self, number: int) -> list[RoundId]:
        """Every node has all of its parity of the round."""
        round_ = RoundId(self._epoch, number)
        if self._frozen or round_ not in self._whole:
            return []
        return self._give_up(self._replaced_by(round_))

    def _replaced_by(self, over: RoundId) -> list[RoundId]:
        version = self._versions[over]
        return [r for r, protected in self._versions.items() if r < over and protected <= version]

    def _is_given_up(self, round_: RoundId, first: int, over: int) -> bool:
        if round_.epoch < self._epoch:
            return False
        return round_ not in self._whole or (round_.number >= first and round_.number > over)

    def _give_up(self, rounds: Iterable[RoundId]) -> list[RoundId]:
        found = sorted(set(rounds))
        for round_ in found:
            del self._versions[round_]
            self._whole.discard(round_)
        return found
