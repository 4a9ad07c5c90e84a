"""Who may write which slot: the rules that keep a committed version from being overwritten.

No node ever asks another before it writes.  What makes that safe: a node gives up a version only
when a newer one is committed (then every node holds the newer one), or when some node said that it
will never hold that version (then it never becomes complete).

A version is *complete here* when every local rank sealed it, *possible here* while that can still
happen, and *dead* when some node of the group can't complete it any more.  The *anchor* is what the
group would go back to now: the newest committed version of the epoch, or before there is one the
version that the epoch's ranks were restored from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from ftrain.comms.errors import LocalProtocolError
from ftrain.comms.protocol.messages import VersionId


class SlotState(Enum):
    """What a slot holds."""

    EMPTY = "empty"
    WRITING = "writing"  # given to its rank; only the header tells what is in it
    SEALED = "sealed"  # one rank's whole image of `version`


class SlotEvent(Enum):
    """What happens to a slot."""

    GRANT = "grant"  # its rank may write it
    SEAL = "seal"  # its image is complete (or was found complete by a new manager)
    ABANDON = "abandon"  # nobody will complete what is in it
    WITHDRAW = "withdraw"  # its image turned out to be wrong


TRANSITIONS: dict[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.EMPTY, SlotEvent.GRANT): SlotState.WRITING,
    (SlotState.EMPTY, SlotEvent.SEAL): SlotState.SEALED,
    (SlotState.SEALED, SlotEvent.GRANT): SlotState.WRITING,
    (SlotState.WRITING, SlotEvent.GRANT): SlotState.WRITING,
    (SlotState.WRITING, SlotEvent.SEAL): SlotState.SEALED,
    (SlotState.WRITING, SlotEvent.ABANDON): SlotState.EMPTY,
    (SlotState.SEALED, SlotEvent.WITHDRAW): SlotState.EMPTY,
}


@dataclass(slots=True)
class Slot:
    """One slot of one rank."""

    state: SlotState = SlotState.EMPTY
    version: VersionId | None = None  # WRITING: None until the rank says what it writes
    pins: int = 0  # readers, and the flush

    def apply(self, event: SlotEvent, version: VersionId | None = None) -> None:
        """Follow the table; LocalProtocolError for a transition that is not in it."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise LocalProtocolError(f"a slot that is {self.state.value} got {event.value}")
        self.state, self.version = state, version


_BEHIND = "peers behind"


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot to write, or -1 and the reason; ``later``: ask again, nothing is denied yet."""

    slot: int
    reason: str = ""
    later: bool = False


@dataclass(slots=True)
class _PeerStanding:
    floor: VersionId
    possible: tuple[VersionId, ...]


@dataclass(slots=True)
class _RankSlots:
    slots: list[Slot]
    touched: VersionId | None = None  # newest version it began, skipped or sealed


@dataclass(slots=True)
class Custody:
    """The slots of one node. ``slots_per_rank`` is the same for all ranks."""

    slots_per_rank: int
    epoch: int = 0
    local_ranks: tuple[int, ...] = ()
    base: VersionId | None = None
    committed: VersionId | None = None
    _ranks: dict[int, _RankSlots] = field(default_factory=dict)
    _peers: dict[int, _PeerStanding] = field(default_factory=dict)

    # ------------------------------------------------------------ membership and commit

    def set_group(self, epoch: int, local_ranks: Sequence[int], base: VersionId | None) -> bool:
        """A new or repeated membership; False (and nothing done) when it is an older one."""
        if epoch < self.epoch:
            return False
        if epoch > self.epoch:
            self._peers.clear()
        self.epoch, self.local_ranks, self.base = epoch, tuple(local_ranks), base
        return True

    def commit(self, version: VersionId) -> None:
        """Every node of the group holds ``version``. Never goes back."""
        if self.committed is None or version > self.committed:
            self.committed = version

    @property
    def anchor(self) -> VersionId | None:
        """The version the group would go back to now."""
        if self.committed is not None and self.committed.epoch == self.epoch:
            return self.committed
        return self.base

    # ------------------------------------------------------------ one rank's slots

    def slots(self, rank: int) -> list[Slot]:
        """The rank's slots, made when first asked for."""
        return self._of(rank).slots

    def ranks(self) -> list[int]:
        """Every rank with slots here, also of earlier memberships."""
        return sorted(self._ranks)

    def forget(self, rank: int) -> None:
        """The rank's slots are gone."""
        self._ranks.pop(rank, None)

    def grant(self, rank: int, version: VersionId | None, *, patient: bool = False) -> Grant:
        """A slot for ``version`` (None: for whatever comes next). A denied version stays denied;
        with ``patient`` one that only waits for other nodes is not denied."""
        mine = self._of(rank)
        refusal = self._why_not(rank, version) if version is not None else ""
        if refusal:
            return Grant(-1, refusal)
        grant = self._free_slot(mine, rank, version)
        if grant.slot < 0 and patient and grant.later:
            return grant
        if version is not None:
            mine.touched = version
        return replace(grant, later=False)

    def _free_slot(self, mine: _RankSlots, rank: int, version: VersionId | None) -> Grant:
        writing = self.writing(rank)
        if writing >= 0:
            mine.slots[writing].apply(SlotEvent.GRANT, version)
            return Grant(writing)
        kept: list[str] = []
        free: list[tuple[int, VersionId, int]] = []
        for number, slot in enumerate(mine.slots):
            reason = self._why_kept(slot)
            if reason:
                kept.append(reason)
            else:
                free.append(self._preference(slot, number))
        if not free:
            return Grant(-1, _summary(kept), later=_BEHIND in kept)
        slot_number = min(free)[2]
        mine.slots[slot_number].apply(SlotEvent.GRANT, version)
        return Grant(slot_number)

    def spare(self, rank: int, number: int) -> bool:
        """Whether nothing in this slot has to be kept."""
        return not self._why_kept(self.slots(rank)[number])

    def writing(self, rank: int) -> int:
        """Number of the slot that the rank holds for writing, or -1."""
        for number, slot in enumerate(self.slots(rank)):
            if slot.state is SlotState.WRITING:
                return number
        return -1

    def seal(self, rank: int, number: int, version: VersionId) -> None:
        """The rank's image of ``version`` in this slot is complete."""
        mine = self._of(rank)
        mine.slots[number].apply(SlotEvent.SEAL, version)
        self._touch(mine, version)

    def writes(self, rank: int, number: int, version: VersionId | None) -> None:
        """A slot found to be the rank's for writing (by a new manager, from header or rank)."""
        mine = self._of(rank)
        mine.slots[number].apply(SlotEvent.GRANT, version)
        if version is not None:
            self._touch(mine, version)

    def abandon(self, rank: int, number: int) -> None:
        """Nobody will complete what is in this slot."""
        self.slots(rank)[number].apply(SlotEvent.ABANDON)

    def withdraw(self, rank: int, version: VersionId) -> list[int]:
        """The rank's image of ``version`` is wrong; returns the slots that held it.

        If it was committed it stays the anchor: the older version is kept no longer than it would
        have been, and the next one makes up for both.
        """
        numbers = [
            number
            for number, slot in enumerate(self.slots(rank))
            if slot.state is SlotState.SEALED and slot.version == version
        ]
        for number in numbers:
            self.slots(rank)[number].apply(SlotEvent.WITHDRAW)
        return numbers

    # ------------------------------------------------------------ versions

    def sealed(self, version: VersionId) -> list[tuple[int, int]]:
        """``(rank, slot)`` of every sealed image of ``version`` here."""
        return [
            (rank, number)
            for rank in self.ranks()
            for number, slot in enumerate(self._ranks[rank].slots)
            if slot.state is SlotState.SEALED and slot.version == version
        ]

    def sealed_versions(self) -> list[VersionId]:
        """Every version with a sealed image here, oldest first."""
        return sorted(
            {
                slot.version
                for mine in self._ranks.values()
                for slot in mine.slots
                if slot.state is SlotState.SEALED and slot.version is not None
            }
        )

    def complete(self, version: VersionId) -> bool:
        """Whether every local rank sealed ``version``."""
        ranks = {rank for rank, _ in self.sealed(version)}
        return bool(self.local_ranks) and ranks.issuperset(self.local_ranks)

    def may_seal(self, rank: int, version: VersionId) -> bool:
        """Whether the rank sealed ``version``, writes it, or has not come to it yet."""
        mine = self._of(rank)
        if any(s.version == version and s.state is not SlotState.EMPTY for s in mine.slots):
            return True
        return mine.touched is None or mine.touched < version

    def possible(self, version: VersionId) -> bool:
        """Whether every local rank can still seal ``version``, or did."""
        return all(self.may_seal(rank, version) for rank in self.local_ranks)

    def dead(self, version: VersionId) -> bool:
        """Whether some node of the group can't complete ``version``: it never commits."""
        return (
            version.epoch < self.epoch
            or not self.possible(version)
            or any(
                version <= peer.floor and version not in peer.possible
                for peer in self._peers.values()
            )
        )

    def pin(self, places: Sequence[tuple[int, int]]) -> None:
        """Keep these slots as they are until :meth:`unpin`."""
        for rank, number in places:
            self.slots(rank)[number].pins += 1

    def unpin(self, places: Sequence[tuple[int, int]]) -> None:
        """Undo one :meth:`pin`."""
        for rank, number in places:
            if rank in self._ranks:
                self.slots(rank)[number].pins -= 1

    def surplus(self) -> list[int]:
        """Ranks of earlier memberships whose slots nobody needs any more.

        Before a version of this epoch is committed that is whoever has nothing of the base: a node
        that had another seat has room for its new ranks.
        """
        over = self.committed is not None and self.committed.epoch == self.epoch
        needed = None if over else self.base
        return [
            rank
            for rank, mine in self._ranks.items()
            if rank not in self.local_ranks
            and not any(
                slot.pins or (needed is not None and slot.version == needed) for slot in mine.slots
            )
        ]

    # ------------------------------------------------------------ what nodes tell each other

    def standing(self) -> tuple[VersionId, tuple[VersionId, ...]] | None:
        """``(floor, possible)``: of the versions up to ``floor`` only ``possible`` can complete
        here; None while a local rank has not come to any version."""
        floors = [self._of(rank).touched for rank in self.local_ranks]
        known = [version for version in floors if version and version.epoch == self.epoch]
        if not known or len(known) < len(floors):
            return None
        versions = {
            slot.version
            for rank in self.local_ranks
            for slot in self.slots(rank)
            if slot.version is not None and slot.version.epoch == self.epoch
        }
        return min(known), tuple(sorted(v for v in versions if self.possible(v)))

    def hear(self, node: int, floor: VersionId, possible: Sequence[VersionId]) -> None:
        """Another node's standing in this epoch; an older one than known is ignored."""
        known = self._peers.get(node)
        if floor.epoch == self.epoch and (known is None or floor >= known.floor):
            self._peers[node] = _PeerStanding(floor, tuple(possible))

    # ------------------------------------------------------------ inside

    def _of(self, rank: int) -> _RankSlots:
        if rank not in self._ranks:
            self._ranks[rank] = _RankSlots([Slot() for _ in range(self.slots_per_rank)])
        return self._ranks[rank]

    def _touch(self, mine: _RankSlots, version: VersionId) -> None:
        if mine.touched is None or version > mine.touched:
            mine.touched = version

    def _why_not(self, rank: int, version: VersionId) -> str:
        mine = self._of(rank)
        if version.epoch != self.epoch:
            return f"stale: epoch {version.epoch} is over, the group is in epoch {self.epoch}"
        if mine.touched is not None and version <= mine.touched:
            return f"out of order: step {mine.touched.step} came before step {version.step}"
        if self.dead(version):
            mine.touched = version
            return f"skipped elsewhere: another rank passed step {version.step} over"
        return ""

    def _why_kept(self, slot: Slot) -> str:
        """Why a slot must stay as it is; "" when it may be written."""
        if slot.pins:  # also of what was withdrawn: somebody reads it all the same
            return "reader"
        version = slot.version
        if slot.state is not SlotState.SEALED or version is None:
            return ""
        anchor = self.anchor
        if version == anchor:
            return "newest committed"
        if (anchor is None or version > anchor) and not self.dead(version):
            return _BEHIND
        return ""

    def _preference(self, slot: Slot, number: int) -> tuple[int, VersionId, int]:
        """Least is written first: empty slots, then what is dead, then what is oldest; an old
        complete version is the way out when the anchor turns out to be corrupt."""
        version = slot.version
        if slot.state is SlotState.EMPTY or version is None:
            return 0, VersionId(0, 0), number
        anchor = self.anchor
        dead = anchor is not None and version > anchor
        return (1 if dead else 2), version, number


def _summary(kept: Sequence[str]) -> str:
    """One denial out of the reasons for which each slot is kept."""
    for reason, text in (
        (_BEHIND, f"{_BEHIND}: no free slot until every node sealed the last version"),
        ("reader", "reader: no free slot while a version is being read or flushed"),
    ):
        if reason in kept:
            return f"{text} (raise snapshot.slots if this lasts)"
    return "no free slot: raise snapshot.slots"
