"""Which survivor finishes which dead rank's capture, and when there is nothing left to wait for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.protocol.custody import Custody, SlotState


@dataclass(frozen=True, slots=True)
class Task:
    """``survivor`` shall finish the image of ``version`` in ``slot`` of the dead ``rank``."""

    survivor: int
    version: VersionId
    rank: int
    slot: int


@dataclass(slots=True)
class Takeover:
    """Unfinished captures of one epoch's dead ranks.

    ``keys(rank, slot)`` says which shares an image holds, None when its header can't be read (yet):
    a survivor can finish an image only when it holds the same shares.
    """

    custody: Custody
    keys: Callable[[int, int], frozenset[str] | None]
    dead: set[int] = field(default_factory=set)
    _at_it: dict[tuple[VersionId, int], int] = field(default_factory=dict)
    _failed: set[tuple[VersionId, int, int]] = field(default_factory=set)

    def new_epoch(self) -> None:
        """Ranks of another epoch run now: nothing of the last one is pending."""
        self.dead.clear()
        self._at_it.clear()
        self._failed.clear()

    def died(self, rank: int) -> None:
        """A local rank ended; what it was to finish for others is open again."""
        self.dead.add(rank)
        self.unreachable(rank)

    def unreachable(self, rank: int) -> None:
        """A local rank can't answer any more; it may be asked again when it is back."""
        self._at_it = {what: who for what, who in self._at_it.items() if who != rank}

    def tasks(self, reachable: Collection[int]) -> list[Task]:
        """What to ask of whom now; each dead rank's image is asked of one survivor at a time."""
        tasks = []
        for rank in sorted(self.dead):
            slot = self.custody.writing(rank)
            version = self.custody.slots(rank)[slot].version if slot >= 0 else None
            if version is None or (version, rank) in self._at_it:
                continue
            survivor = self._survivor(version, rank, slot, reachable)
            if survivor is not None:
                self._at_it[version, rank] = survivor
                tasks.append(Task(survivor, version, rank, slot))
        return tasks

    def answered(self, version: VersionId, rank: int, survivor: int) -> bool:
        """The survivor answered; False when it was not its task."""
        if self._at_it.get((version, rank)) != survivor:
            return False
        del self._at_it[version, rank]
        self._failed.add((version, rank, survivor))  # of no meaning when it succeeded
        return True

    def waiting(self) -> bool:
        """Whether a version that is newer than all complete ones can still be completed here."""
        custody = self.custody
        versions = {
            slot.version
            for rank in custody.local_ranks
            for slot in custody.slots(rank)
            if slot.version is not None and slot.version.epoch == custody.epoch
        }
        for version in sorted(versions, reverse=True):
            if custody.complete(version):
                return False
            if self._completable(version):
                return True
        return False

    def _completable(self, version: VersionId) -> bool:
        return all(
            self._recoverable(rank, version)
            if rank in self.dead
            else self.custody.may_seal(rank, version)
            for rank in self.custody.local_ranks
        )

    def _recoverable(self, rank: int, version: VersionId) -> bool:
        """Whether a dead rank's image is sealed, or begun and somebody can still finish it."""
        for slot in self.custody.slots(rank):
            if slot.version == version and slot.state is SlotState.SEALED:
                return True
            if slot.version == version and slot.state is SlotState.WRITING:
                return any(
                    self.custody.may_seal(survivor, version)
                    and (version, rank, survivor) not in self._failed
                    for survivor in self._alive()
                )
        return False

    def _survivor(
        self, version: VersionId, rank: int, slot: int, reachable: Collection[int]
    ) -> int | None:
        wanted = self.keys(rank, slot)
        if wanted is None:
            return None
        busy = list(self._at_it.values())
        able = [
            survivor
            for survivor in self._alive()
            if survivor in reachable
            and (version, rank, survivor) not in self._failed
            and self._holds(survivor, version, wanted)
        ]
        return min(able, key=lambda survivor: (busy.count(survivor), survivor), default=None)

    def _holds(self, survivor: int, version: VersionId, wanted: frozenset[str]) -> bool:
        for number, slot in enumerate(self.custody.slots(survivor)):
            if slot.version == version and slot.state is not SlotState.EMPTY:
                keys = self.keys(survivor, number)
                return keys is not None and keys >= wanted
        return False

    def _alive(self) -> list[int]:
        return [rank for rank in self.custody.local_ranks if rank not in self.dead]
