"""Vote arithmetic, apart from everything that votes: a version counts when *all* members say so.

Never a majority: a version that lacks one rank's share can't be restored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ftrain.comms.protocol.messages import VersionId


class Tally:
    """Which members announced which version. A member counts once, however often it says it."""

    __slots__ = ("_votes", "members")

    def __init__(self, members: Sequence[int]) -> None:
        self.members = frozenset(members)
        self._votes: dict[VersionId, set[int]] = {}

    def vote(self, member: int, version: VersionId) -> None:
        """``member`` announced ``version``; votes of strangers are not counted."""
        if member in self.members:
            self._votes.setdefault(version, set()).add(member)

    def withdraw(self, member: int, version: VersionId) -> None:
        """``member`` has ``version`` no more."""
        self._votes.get(version, set()).discard(member)

    def missing(self, version: VersionId) -> tuple[int, ...]:
        """The members that have not announced ``version``."""
        return tuple(sorted(self.members - self._votes.get(version, set())))

    def newest(self) -> VersionId | None:
        """The newest version that every member announced."""
        if not self.members:
            return None
        return max((v for v in self._votes if not self.missing(v)), default=None)

    def versions_of(self, member: int) -> tuple[VersionId, ...]:
        """What ``member`` announced, oldest first."""
        return tuple(sorted(v for v, members in self._votes.items() if member in members))

    def keep(self, needed: Collection[VersionId], window: int) -> None:
        """Forget all versions but the ``needed`` and the ``window`` newest ones."""
        kept = {*needed, *sorted(self._votes)[-window:]}
        self._votes = {v: votes for v, votes in self._votes.items() if v in kept}
