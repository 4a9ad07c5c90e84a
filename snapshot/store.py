"""Every image a node holds: its own ranks' slots, and small images of other nodes' ranks.

What a slot holds is what its header says; the bookkeeping beside it can always be rebuilt from the
memory, which is how a new snapshot manager takes over from a dead one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ftrain.checkpoint.header import RECORD_BYTES, ImageState, read_record, sealed_header
from ftrain.checkpoint.image import ImageReader, held_of, small_image
from ftrain.comms.errors import CorruptionError, MemoryShortError, RemoteProtocolError, StateError
from ftrain.comms.protocol.messages import Held, Sealed, Share, VersionId
from ftrain.snapshot.memory import Budget, Region, allocate
from ftrain.snapshot.protocol.custody import Custody, Grant, SlotEvent, SlotState
from ftrain.snapshot.protocol.takeover import Takeover

_SMALLS_BYTES_MAX = 6 * 1024 * 1024  # in one gossip message, below the frame limit
_SMALL_VERSIONS_KEPT = 4

Place = tuple[int, int]
"""``(rank, slot)``."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a version; ``view`` stays valid while the version is pinned.

    What was sealed may have been damaged since: who uses it verifies it.
    """

    rank: int
    whole: bool
    view: memoryview
    place: Place | None  # None for a small one


class SlotStore:
    """The memory of one node. Used from the manager's event loop only, except :meth:`allocate`."""

    def __init__(
        self, *, run_id: str, slots: int, memory_share_max: float, taken_bytes: int = 0
    ) -> None:
        self.run_id = run_id
        self.custody = Custody(slots)
        self.takeover = Takeover(self.custody, self.share_keys)
        self.budget = Budget(share_max=memory_share_max, slots=slots, taken_bytes=taken_bytes)
        self._regions: dict[Place, Region] = {}
        self._held: dict[Place, Held] = {}
        self._shares: dict[int, tuple[bytes, tuple[Share, ...]]] = {}  # by rank: of which index
        self._smalls: dict[VersionId, dict[int, tuple[Held, bytes]]] = {}

    # ------------------------------------------------------------ memory

    def adopt(self, rank: int, slot: int, fd: int) -> None:
        """Take over an earlier manager's slot (and its descriptor) with what it holds."""
        if not 0 <= slot < self.custody.slots_per_rank or (rank, slot) in self._regions:
            os.close(fd)
            return
        self._regions[rank, slot] = Region(fd)
        self.reload(rank, slot)

    def region(self, rank: int, slot: int) -> Region:
        """The memory of a slot; KeyError when the rank never reserved any."""
        return self._regions[rank, slot]

    def has_slots(self, rank: int) -> bool:
        """Whether the rank ever had all the memory that it asked for."""
        slots = range(self.custody.slots_per_rank)
        return all((rank, slot) in self._regions for slot in slots)

    def plan_growth(self, rank: int, nbytes: int) -> list[tuple[int, int]]:
        """``(slot, bytes so far)`` of each slot that is too small, counted against the budget.

        MemoryShortError when they do not fit; otherwise :meth:`grow` has to follow.
        """
        sizes = [
            (slot, region.nbytes if (region := self._regions.get((rank, slot))) else 0)
            for slot in range(self.custody.slots_per_rank)
        ]
        short = [(slot, size) for slot, size in sizes if size < nbytes]
        ranks = max(1, len(self.custody.local_ranks))
        all_bytes = nbytes * self.custody.slots_per_rank * ranks
        self.budget.take(rank, sum(nbytes - size for _, size in short), all_bytes=all_bytes)
        return short

    def allocate(self, rank: int, slot: int, nbytes: int) -> int:
        """Allocate a slot's memory; returns its descriptor. Takes long: run it in a thread."""
        region = self._regions.get((rank, slot))
        if region is None:
            fd = os.memfd_create(f"ftrain-rank{rank}-slot{slot}", os.MFD_CLOEXEC)
        else:
            fd = os.dup(region.fd)
        try:
            allocate(fd, nbytes)
        except (MemoryShortError, OSError):
            os.close(fd)
            raise
        return fd

    def grow(self, rank: int, slot: int, fd: int) -> Region:
        """Map what :meth:`allocate` returned; what the slot held stays in it. OSError."""
        try:
            region = Region(fd)
        except OSError:
            os.close(fd)
            raise
        old = self._regions.get((rank, slot))
        if old is not None:
            old.close()
        self._regions[rank, slot] = region
        self.custody.slots(rank)  # a rank that left meanwhile is known again, and so given back
        return region

    @property
    def memory_bytes(self) -> int:
        """What all slots take."""
        return sum(region.nbytes for region in self._regions.values())

    def growth_failed(self, nbytes: int) -> None:
        """``nbytes`` of what :meth:`plan_growth` counted were not allocated."""
        self.budget.give_back(nbytes)

    def drop_surplus(self) -> list[Place]:
        """Give back the memory of ranks that are no longer here; returns which slots."""
        dropped = []
        for rank in self.custody.surplus():
            for place in [place for place in self._regions if place[0] == rank]:
                region = self._regions.pop(place)
                self.budget.give_back(region.nbytes)
                self._held.pop(place, None)
                region.close()
                dropped.append(place)
            self.custody.forget(rank)
        return dropped

    # ------------------------------------------------------------ slots

    def grant(self, rank: int, version: VersionId | None, *, patient: bool = False) -> Grant:
        """See :meth:`Custody.grant`; also refused before the rank reserved memory."""
        if (rank, 0) not in self._regions:
            return Grant(-1, "no memory reserved")
        grant = self.custody.grant(rank, version, patient=patient)
        self._held.pop((rank, grant.slot), None)
        return grant

    def claim(self, rank: int, slot: int, version: VersionId | None) -> bool:
        """A rank says that ``slot`` is its own, writing ``version`` (None: nothing yet).

        False when its image is sealed, or when what is in an unwritten slot has to be kept.
        """
        if (rank, slot) not in self._regions:
            return False
        state = self.custody.slots(rank)[slot]
        if state.state is SlotState.SEALED and (
            state.version == version or (version is None and not self.custody.spare(rank, slot))
        ):
            return False
        self.custody.writes(rank, slot, version)
        self._held.pop((rank, slot), None)
        return True

    def seal(self, rank: int, slot: int, version: VersionId) -> None:
        """The rank says its image is complete; CorruptionError or StateError when it is not."""
        state = self.custody.slots(rank)[slot]
        if state.state is SlotState.SEALED and state.version == version:
            return  # said twice
        held = self._glance(rank, slot)
        if held is None:
            reader = self.reader(rank, slot)
            reader.require(run_id=self.run_id, rank=rank, state=ImageState.SEALED)
            held = held_of(reader)
            self._shares[rank] = (reader.header.index_digest, reader.shares)
        if held.version != version or not held.whole:
            raise StateError(f"slot {slot} of rank {rank} is not a whole image of {version}")
        self.custody.seal(rank, slot, version)
        self._held[rank, slot] = held

    def withdraw(self, rank: int, version: VersionId) -> bool:
        """The rank's image of ``version`` is wrong; False when there is none."""
        slots = self.custody.withdraw(rank, version)
        for slot in slots:
            self._held.pop((rank, slot), None)
        return bool(slots)

    def vacate(self, rank: int) -> int:
        """A slot of the rank in which nothing has to be kept, now empty; StateError."""
        for number, slot in enumerate(self.custody.slots(rank)):
            if slot.state is SlotState.WRITING or not self.custody.spare(rank, number):
                continue
            if slot.state is SlotState.SEALED:
                slot.apply(SlotEvent.WITHDRAW)
                self._held.pop((rank, number), None)
            return number
        raise StateError(f"rank {rank} has no slot that may be written")

    def reload(self, rank: int, slot: int) -> None:
        """Nobody writes this slot any more (that we know of): it holds what its header says."""
        state = self.custody.slots(rank)[slot]
        if state.state is SlotState.SEALED:
            return
        reader = self._readable(rank, slot)
        if reader is None:
            if state.state is SlotState.WRITING:
                self.custody.abandon(rank, slot)
        elif reader.state is ImageState.SEALED:
            self.custody.seal(rank, slot, reader.identity.version)
            self._held[rank, slot] = held_of(reader)
        else:
            self.custody.writes(rank, slot, reader.identity.version)

    def reload_rank(self, rank: int) -> None:
        """Reload every slot that a dead rank was writing."""
        for slot, state in enumerate(self.custody.slots(rank)):
            if state.state is SlotState.WRITING:
                self.reload(rank, slot)

    def give_up(self, rank: int, slot: int) -> None:
        """The rank left this slot for good: what is unfinished in it is worth nothing."""
        self.reload(rank, slot)
        if self.custody.slots(rank)[slot].state is SlotState.WRITING:
            self.custody.abandon(rank, slot)

    def reader(self, rank: int, slot: int) -> ImageReader:
        """The image in a slot; CorruptionError or StateError when there is none."""
        return ImageReader(self._regions[rank, slot].view, where=f"slot {slot} of rank {rank}")

    def share_keys(self, rank: int, slot: int) -> frozenset[str] | None:
        """Which shares the image in a slot holds; None when its header can't be read."""
        reader = self._readable(rank, slot)
        return None if reader is None else frozenset(share.key for share in reader.shares)

    # ------------------------------------------------------------ versions

    def inventory(self) -> tuple[Held, ...]:
        """Every image here, whole and small."""
        whole = [self._held[place] for place in sorted(self._held)]
        own = {(held.version, held.rank) for held in whole}
        small = [
            held
            for version in sorted(self._smalls)
            for rank, (held, _) in sorted(self._smalls[version].items())
            if (version, rank) not in own
        ]
        return (*whole, *small)

    def images(self, version: VersionId, ranks: Iterable[int] = ()) -> list[Image]:
        """Every image of ``version`` here, or those of ``ranks``."""
        images = {
            rank: Image(rank, False, memoryview(data), None)
            for rank, (_, data) in self._smalls.get(version, {}).items()
        }
        for rank, slot in self.custody.sealed(version):
            images[rank] = Image(rank, True, self._raw(rank, slot), (rank, slot))
        wanted = set(ranks)
        return [images[rank] for rank in sorted(images) if not wanted or rank in wanted]

    def announcement(self, version: VersionId, node: int, incarnation: int) -> Sealed:
        """What the other nodes are told about a version that is complete here."""
        places = [place for place in self.custody.sealed(version) if place in self._held]
        smalls = [self._small(*place) for place in places]
        if sum(map(len, smalls)) > _SMALLS_BYTES_MAX:
            smalls = [b""] * len(smalls)  # the others can't keep them; commit goes on
        return Sealed(
            version, node, incarnation, tuple(self._held[place] for place in places), tuple(smalls)
        )

    def records(self, version: VersionId) -> tuple[Held, ...]:
        """The records of the images of ``version`` that are sealed here."""
        return tuple(
            self._held[place] for place in self.custody.sealed(version) if place in self._held
        )

    def keep_smalls(self, sealed: Sealed) -> None:
        """Keep another node's small images; RemoteProtocolError when they are not what they say."""
        if len(sealed.smalls) != len(sealed.held):
            raise RemoteProtocolError(f"node {sealed.node} announced images without small sections")
        kept: dict[int, tuple[Held, bytes]] = {}
        for held, data in zip(sealed.held, sealed.smalls, strict=True):
            if data:
                kept[held.rank] = (self._as_small(held, data, sealed.version), data)
        if kept:
            self._smalls.setdefault(sealed.version, {}).update(kept)
        self._trim_smalls()

    # ------------------------------------------------------------ inside

    def _raw(self, rank: int, slot: int) -> memoryview:
        """The image in a slot, or all of the slot when damage hides where the image ends."""
        view = self._regions[rank, slot].view.toreadonly()
        try:
            header = sealed_header(view, f"slot {slot} of rank {rank}")
        except (CorruptionError, StateError):
            return view
        return view[: header.layout.total_bytes]

    def _small(self, rank: int, slot: int) -> bytes:
        """The small image of a sealed one; b"" when that is damaged."""
        try:
            return small_image(self.reader(rank, slot))
        except (CorruptionError, StateError):
            return b""

    def _glance(self, rank: int, slot: int) -> Held | None:
        """The record of a sealed image from its header alone, if its index is the same as last
        time: reading the index of a large model costs more than all the rest of a step."""
        record = bytes(self._regions[rank, slot].view[RECORD_BYTES : 2 * RECORD_BYTES])
        header = read_record(record, f"slot {slot} of rank {rank}")
        index_digest, shares = self._shares.get(rank, (b"", ()))
        if header is None or header.state is not ImageState.SEALED:
            return None
        who = header.identity
        if header.index_digest != index_digest or (who.run_id, who.rank) != (self.run_id, rank):
            return None
        return Held(who.version, rank, header.digest, shares, header.whole, header.collectives)

    def _as_small(self, held: Held, data: bytes, version: VersionId) -> Held:
        try:
            reader = ImageReader(data, where=f"small image of rank {held.rank}")
            reader.require(run_id=self.run_id, rank=held.rank, state=ImageState.SEALED)
        except (CorruptionError, StateError) as error:
            raise RemoteProtocolError(f"another node's small image is broken: {error}") from None
        if reader.identity.version != version or held.version != version or reader.whole:
            raise RemoteProtocolError(f"another node's small image is not of {version}")
        return replace(held, whole=False, digest=held_of(reader).digest)

    def _trim_smalls(self) -> None:
        anchor = self.custody.anchor
        needed = {anchor, self.custody.base}
        spare = [
            version
            for version in sorted(self._smalls)
            if version not in needed
            and (anchor is None or version < anchor or self.custody.dead(version))
        ]
        for version in spare[:-_SMALL_VERSIONS_KEPT]:
            del self._smalls[version]

    def _readable(self, rank: int, slot: int) -> ImageReader | None:
        """The slot's image if there is one, sealed or begun, of this run and rank."""
        try:
            reader = self.reader(rank, slot)
            reader.require(run_id=self.run_id, rank=rank)
        except (CorruptionError, StateError, KeyError):
            return None
        return reader if reader.whole else None


def places_of(images: Sequence[Image]) -> list[Place]:
    """The slots that have to be pinned while these images are read."""
    return [image.place for image in images if image.place is not None]
