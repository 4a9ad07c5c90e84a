"""A node's slots for parity: memory that outlives the snapshot manager, one round in each."""

from __future__ import annotations

import os
from collections.abc import Callable

from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.comms.errors import CorruptionError, MemoryShortError, StateError
from ftrain.comms.protocol.messages import HeldParity, ProtectedNode, RoundId
from ftrain.snapshot.memory import Budget, Region, allocate, in_words
from ftrain.snapshot.parity import ParityReader, ParityRecord, ParityWriter

_SLOTS_MAX = 4  # kept, being made, and two more after deaths of the manager that leads
_BLANK = bytes(PAGE_BYTES)


class ParitySlots:
    """Used by the manager's event loop; only :meth:`write` is called by the thread that fills what
    it gives, one after the other.

    Args:
        budget: of the node's snapshot memory.
        hold: keep this slot's descriptor for the next manager: slot, descriptor, bytes.
    """

    def __init__(self, run_id: str, budget: Budget, hold: Callable[[int, int, int], None]) -> None:
        self._run_id = run_id
        self._budget = budget
        self._hold = hold
        self._regions: dict[int, Region] = {}
        self._slots: dict[RoundId, int] = {}  # rounds that something is kept of
        self._readers: dict[RoundId, ParityReader] = {}  # whole ones

    def adopt(self, slot: int, fd: int) -> None:
        """Take over an earlier manager's slot, and its descriptor, with what it holds."""
        if not 0 <= slot < _SLOTS_MAX or slot in self._regions:
            os.close(fd)
            return
        self._regions[slot] = region = Region(fd)
        try:
            reader = ParityReader(region.view, self._name(slot))
        except CorruptionError:
            return  # empty, or not finished
        record = reader.record
        if record.run_id == self._run_id:
            round_ = RoundId(record.epoch, record.round)
            self._slots[round_], self._readers[round_] = slot, reader

    @property
    def memory_bytes(self) -> int:
        """What all slots take."""
        return sum(region.nbytes for region in list(self._regions.values()))

    def held(self) -> tuple[HeldParity, ...]:
        """Every round whose parity is whole here, oldest first."""
        return tuple(_held(self._readers[round_].record) for round_ in sorted(self._readers))

    def reader(self, round_: RoundId) -> ParityReader:
        """The parity of a round; StateError if it is not whole here."""
        reader = self._readers.get(round_)
        if reader is None:
            raise StateError(f"there is no parity of round {round_.number} of {round_.epoch} here")
        return reader

    def writable(self, round_: RoundId, number: int) -> memoryview:
        """A row of a round's parity, to be mended in place; StateError."""
        record = self.reader(round_).record
        first = record.data_offset + number * record.chunk_bytes
        return self._regions[self._slots[round_]].view[first : first + record.chunk_bytes]

    def take(self, round_: RoundId) -> None:
        """A slot is the round's until :meth:`drop`; MemoryShortError."""
        self._readers.pop(round_, None)
        if round_ in self._slots:
            return
        taken = set(self._slots.values())
        free = [number for number in range(_SLOTS_MAX) if number not in taken]
        if not free:
            raise MemoryShortError(f"all {_SLOTS_MAX} slots of parity are in use")
        # The largest one that is there, rather than memory for another one.
        self._slots[round_] = min(free, key=lambda number: -self._nbytes(number))

    def write(self, record: ParityRecord) -> ParityWriter:
        """Begin to write a round's parity; it counts once :meth:`sealed` is called.

        Raises MemoryShortError, or StateError when the round has been dropped.
        """
        round_ = RoundId(record.epoch, record.round)
        slot = self._slots.get(round_)
        if slot is not None:
            self._grow(slot, record.without_digests().total_bytes, record)
        if slot is None or self._slots.get(round_) != slot:  # taking memory takes long
            raise StateError("the round is over")
        return ParityWriter(self._regions[slot].view, record)

    def sealed(self, record: ParityRecord) -> None:
        """A writer's record is there: the round's parity is whole."""
        round_ = RoundId(record.epoch, record.round)
        slot = self._slots[round_]
        self._readers[round_] = ParityReader(self._regions[slot].view, self._name(slot))

    def drop(self, round_: RoundId) -> None:
        """Nothing need be kept of a round any more."""
        self._readers.pop(round_, None)
        region = self._regions.get(self._slots.pop(round_, -1))
        if region is not None:
            region.view[:PAGE_BYTES] = _BLANK

    def _nbytes(self, slot: int) -> int:
        region = self._regions.get(slot)
        return region.nbytes if region is not None else 0

    def _grow(self, slot: int, nbytes: int, record: ParityRecord) -> None:
        before = self._nbytes(slot)
        if before >= nbytes:
            return
        try:
            self._budget.count(nbytes - before)
        except MemoryShortError as error:
            why = f"{_asked(record, nbytes)}, but {error}: {_fits(record)}"
            raise MemoryShortError(why) from None
        old = self._regions.get(slot)
        fd = os.dup(old.fd) if old else os.memfd_create(f"ftrain-parity{slot}", os.MFD_CLOEXEC)
        try:
            allocate(fd, nbytes)
            region = Region(fd)
        except (MemoryShortError, OSError) as error:
            os.close(fd)
            self._budget.give_back(nbytes - before)
            raise MemoryShortError(f"{_asked(record, nbytes)}: {error}; {_fits(record)}") from None
        if old is not None:
            old.close()
        self._regions[slot] = region
        self._hold(slot, region.fd, region.nbytes)

    def _name(self, slot: int) -> str:
        return f"slot {slot} of parity"


def _held(record: ParityRecord) -> HeldParity:
    nodes = tuple(
        ProtectedNode(row.node, tuple(image.rank for image in row.images), row.nbytes)
        for row in record.nodes
    )
    round_ = RoundId(record.epoch, record.round)
    return HeldParity(round_, record.version, record.parity, nodes)


def _asked(record: ParityRecord, nbytes: int) -> str:
    nodes = len(record.nodes)
    return (
        f"parity that stands the loss of {record.parity} of {nodes} nodes takes {in_words(nbytes)} "
        f"for each version, {_SLOTS_KEPT} versions at a time"
    )


_SLOTS_KEPT = 2


def _fits(record: ParityRecord) -> str:
    """What would take less."""
    if record.parity > 1:
        fewer = record.parity - 1
        share = fewer / (len(record.nodes) - fewer)
        less = int(share * max(row.nbytes for row in record.nodes))
        return (
            f"snapshot.parity={fewer} would take {in_words(less)} each, as would a larger "
            "snapshot.group less; or raise snapshot.memory_share_max"
        )
    return (
        "a larger snapshot.group takes less, as does a smaller snapshot.slots; or raise "
        "snapshot.memory_share_max, or do without parity (snapshot.parity=0)"
    )
