"""One page of shared 64-bit words per rank, readable from outside the rank.

The agent creates the page (a memfd), the rank writes it, and the agent, the observer and nobody
else read it.  An aligned 8-byte store is atomic on every platform torch runs on, so a reader never
sees half a word; nothing here waits for anybody.  Times are CLOCK_MONOTONIC nanoseconds.

The page is 64 KiB: the words below take its first 2 KiB, the boundary ring the next 2 KiB; the
rest is reserved for per-collective records.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum

from ftrain.comms.protocol.phases import Phase as Phase
from ftrain.comms.protocol.phases import Where as Where

PAGE_BYTES = 64 * 1024
_MAGIC = 0x3147455441525446  # "FTRATEG1"
_RING_OFFSET = 2048
_RING_ENTRIES = 64  # (boundary step, collectives enqueued, time ns, reserved)


class Word(IntEnum):
    """Index of each 64-bit word in the page."""

    MAGIC = 0
    PID = 1
    INCARNATION = 2
    EPOCH = 3
    PHASE = 4
    PHASE_SINCE_NS = 5
    STEP = 6  # last boundary reached: number of completed steps
    STEP_BEGAN_NS = 7
    GIL_BEAT = 8  # counted up by a Python thread: stands still when the GIL is held
    GIL_BEAT_NS = 9
    COLLECTIVES = 10  # enqueued so far in the default group; -1 unknown
    WHERE = 11
    STEPS_DONE = 12  # completed by this process
    LOSS_BITS = 13  # float64 bits of the newest logged loss
    PAUSE = 14  # agent -> rank: 1 = hold at your next boundary
    STOP_AT = 15  # agent -> rank: boundary to end at, plus one; 0 = none
    HELD_AT = 16  # boundary the rank holds at, plus one; 0 = not holding
    SCRIPT_NS = 17
    FORMED_NS = 18
    RESTORED_NS = 19
    FIRST_STEP_NS = 20
    CAPTURED_STEP = 21  # newest version sealed by this rank, plus one; 0 = none
    CAPTURES_SKIPPED = 22
    STEP_MEDIAN_NS = 23
    TOTAL_STEPS = 24
    BARRIER_NS = 25  # total time the optimizer waited for a capture
    CAPTURE_NS = 26  # total time spent copying and hashing
    CAPTURE_BYTES = 27
    STALL_WARNED_NS = 28
    OPTIMIZER_STEPS = 29
    SAVE_STEP = 30  # boundary of the newest session.save(), plus one
    SAMPLES = 31  # batches consumed by this process
    SESSION_NS = 32  # the Session was constructed
    FAULT_KIND = 33  # injector -> rank: recovery.faults.FaultKind to commit; 0 = none
    FAULT_STEP = 34  # injector -> rank: not before this boundary
    FAULT_PHASE = 35  # injector -> rank: in this Phase, plus one; 0 = in any
    FAULT_ARG = 36  # injector -> rank: exit code, seconds or bytes, as the kind has it
    FAULT_FIRED_NS = 37  # the rank committed a fault; these three outlive clear()
    FAULT_FIRED_STEP = 38
    FAULT_FIRED_PHASE = 39
    KEPT_STEP = 40  # boundary of the newest version that this rank set out to keep


_OUTLIVING = (Word.FAULT_FIRED_NS, Word.FAULT_FIRED_STEP, Word.FAULT_FIRED_PHASE)


class TelemetryPage:
    """Reader and writer of one rank's page over an open descriptor (kept open by the caller).

    Raises :class:`ValueError` when the descriptor is shorter than a page.
    """

    __slots__ = ("_map", "_words")

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size < PAGE_BYTES:
            raise ValueError(f"telemetry page is shorter than {PAGE_BYTES} bytes")
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("q")

    @staticmethod
    def create() -> int:
        """A new zeroed page as a memfd; returns the descriptor."""
        fd = os.memfd_create("ftrain-telemetry", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE_BYTES)
        return fd

    def clear(self) -> None:
        """Zero the page, but for what the last process broke, for the next one in its place."""
        kept = {word: self._words[word] for word in _OUTLIVING}
        self._map[:] = bytes(PAGE_BYTES)
        for word, value in kept.items():
            self._words[word] = value
        self._words[Word.MAGIC] = _MAGIC

    def __getitem__(self, word: Word) -> int:
        return self._words[word]

    def __setitem__(self, word: Word, value: int) -> None:
        self._words[word] = value

    @property
    def loss(self) -> float:
        """The newest logged loss."""
        return float(struct.unpack("<d", struct.pack("<q", self._words[Word.LOSS_BITS]))[0])

    @loss.setter
    def loss(self, value: float) -> None:
        self._words[Word.LOSS_BITS] = struct.unpack("<q", struct.pack("<d", value))[0]

    def set_phase(self, phase: Phase, now_ns: int) -> None:
        """Say what the main thread does from now on."""
        self._words[Word.PHASE_SINCE_NS] = now_ns
        self._words[Word.PHASE] = phase

    def record_boundary(self, step: int, collectives: int, now_ns: int) -> None:
        """Remember how many collectives the rank had enqueued when it reached boundary ``step``."""
        base = (_RING_OFFSET // 8) + (step % _RING_ENTRIES) * 4
        self._words[base] = -1  # a reader between the stores sees no entry rather than a mixed one
        self._words[base + 1] = collectives
        self._words[base + 2] = now_ns
        self._words[base] = step + 1

    def boundary(self, step: int) -> tuple[int, int] | None:
        """``(collectives, time_ns)`` at boundary ``step``, or None when it is not in the ring."""
        base = (_RING_OFFSET // 8) + (step % _RING_ENTRIES) * 4
        if self._words[base] != step + 1:
            return None
        found = (self._words[base + 1], self._words[base + 2])
        return found if self._words[base] == step + 1 else None

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self._map.close()
