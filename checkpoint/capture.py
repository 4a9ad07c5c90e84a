"""Lazy capture of a version: copied behind forward and backward, complete before the optimizer.

Three kinds of tensors (:class:`Changes`):

* What a registered optimizer owns does not change between one ``optimizer.step`` and the next.  It
  is copied by a thread of its own while the step computes; only the barrier in front of the
  optimizer waits for what is left.
* What no registered optimizer owns may be written by the script at any moment (an EMA copy).  It is
  copied at the boundary, before the script goes on.
* Frozen parameters most likely never change.  They are copied behind the step too, into chunks of
  their own, and each chunk has to have the digest that it had in the version before: then nothing
  changed since that version's boundary, so the copy is what this boundary's would have been.  A
  version in which a digest differs is given up, and from then on they are copied at the boundary.
  The first copy is made there anyway, and so is one after a change that torch counted.

The first kind's treatment is after DataStates-LLM (Maurya et al., HPDC 2024).

A chunk is copied and hashed by two calls that release the GIL; chunks are large because every
return to Python may wait for the interpreter's switch interval.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from ftrain.checkpoint.copying import CopyProgram
from ftrain.checkpoint.digest import NO_DIGEST, digest_of
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageWriter, resume_writer
from ftrain.checkpoint.image_plan import ImagePlan
from ftrain.checkpoint.tensors import Changes, StateTensor, plan_image
from ftrain.comms.errors import FtrainError, MemoryShortError, PeerLostError
from ftrain.comms.process import let_others_run_on
from ftrain.comms.protocol.messages import Held, Share, VersionId

# Without giving up the GIL: to get it back may take longer than they do.
_memcmp = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memcmp", ctypes.pythonapi)
)
_eventfd_write = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint64)(
    ("eventfd_write", ctypes.pythonapi)
)
_COMPARED_BYTES = 256 * 1024  # of live memory against the capture, at each barrier
_SMALL_BYTES_MIN = 16 * 1024
_SMALL_GROWTH = 4  # room for the small state of later versions, when it is reserved ahead
_LAZY = (Changes.IN_STEP,)
_LAZY_AND_FROZEN = (Changes.IN_STEP, Changes.NEVER)


class FinishRequest(Protocol):
    """A dead rank's image that a survivor shall finish."""

    @property
    def version(self) -> VersionId: ...
    @property
    def rank(self) -> int: ...
    @property
    def buffer(self) -> memoryview: ...


class Slots(Protocol):
    """Where images are written to: the snapshot manager's memory, or this process's own."""

    denied: str

    def reserve(self, image_bytes: int) -> None: ...
    def begin(self, version: VersionId, wait_s: float | None = None) -> memoryview | None: ...
    def enter(self) -> None: ...
    def enter_more(self) -> bool: ...
    def begun(self, version: VersionId) -> None: ...
    def sealed(self, version: VersionId, held: Held) -> None: ...
    def withdraw(self, version: VersionId) -> None: ...
    def fileno(self) -> int: ...
    def poll(self) -> FinishRequest | None: ...
    def finished(self, version: VersionId, rank: int, held: Held | None) -> None: ...


@dataclass(frozen=True, slots=True)
class CaptureStatistics:
    """What capturing cost this process so far; times in ns."""

    captured: int = 0
    captured_step: int = -1  # of the newest version
    bytes_copied: int = 0
    copy_ns: int = 0
    hash_ns: int = 0
    barrier_ns: int = 0
    skipped: int = 0
    skip_reason: str = ""
    finished_for_others: int = 0
    eager: bool = False


class FrozenChunks:
    """The chunks of frozen tensors, and which digests they had in the version before."""

    def __init__(self, plan: ImagePlan, tensors: Sequence[StateTensor]) -> None:
        frozen = {t.name: t.tensor for t in tensors if t.changes is Changes.NEVER}
        places = [s.offset // plan.chunk_bytes for s in plan.segments if s.name in frozen]
        self._chunks = range(min(places, default=0), plan.layout.chunks if places else 0)
        self._tensors = list(frozen.values())
        self._digests: list[bytes] = []
        self._writes = 0  # that torch counted: not all of them, so this is only a hint
        self._steady = True

    def expect(self, writer: ImageWriter) -> bool:
        """Let the chunks in this image have the digests of before; False: nothing is known."""
        writes = sum(t._version for t in self._tensors if not t.is_inference())
        if writes != self._writes:
            self._digests = []
        self._writes = writes
        if not (self._steady and self._digests):
            return False
        for chunk, digest in zip(self._chunks, self._digests, strict=True):
            writer.expect(chunk, digest)
        return True

    def sealed(self, writer: ImageWriter) -> None:
        """The next version is compared with this one."""
        self._digests = [writer.digest(chunk) for chunk in self._chunks]

    def unsteady(self) -> None:
        """They do change: nothing is expected of them any more."""
        self._steady = False


class _ChangedError(FtrainError):
    """A frozen tensor has other bytes than at the boundary before."""


@dataclass(slots=True)
class _Job:
    version: VersionId
    tensors: tuple[StateTensor, ...]
    program: CopyProgram
    writer: ImageWriter
    buffer: memoryview
    ready: torch.cuda.Event | None


class CaptureEngine:
    """Captures one version at a time, in a thread of its own.

    ``start`` is called at a boundary, ``barrier`` before any write to the captured tensors; both
    from the training thread.  A version that can't be captured is skipped and counted with its
    reason; training fails only if there is no memory for the first one.
    """

    def __init__(
        self,
        slots: Slots,
        identity_of: Callable[[VersionId, int], ImageIdentity],
        share_of: Callable[[str], Share],
        *,
        rank: int,
        chunk_bytes: int,
        compare: bool = True,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._slots = slots
        self._identity_of = identity_of
        self._share_of = share_of
        self._rank = rank
        self._chunk_bytes = chunk_bytes
        self._compare = compare
        self._note = on_note
        self._lock = threading.Condition()
        self._job: _Job | None = None  # being captured
        self._live: _Job | None = None  # the live tensors still are this version
        self._written: memoryview | None = None  # its sealed image, for the comparison
        self._plan: ImagePlan | None = None
        self._planned_for: tuple[StateTensor, ...] = ()
        self._program: CopyProgram | None = None
        self._filling = False  # the thread is inside a job, given up or not
        self._expected: tuple[StateTensor, ...] | None = None  # room is to be made for them
        self._offsets: list[int] = []  # of the plan's segments that change in the step only
        self._frozen: FrozenChunks | None = None
        self._cursor = 0
        self._closing = False
        self._statistics = _Counters()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="ftrain-capture", daemon=True)
        self._thread.start()

    # ---- the training thread's side

    def start(
        self,
        version: VersionId,
        tensors: tuple[StateTensor, ...],
        small: bytes,
        collectives: int = -1,
        *,
        wait_s: float | None = None,
    ) -> None:
        """Begin to capture ``version``: when this returns, ``small`` is in the image and so is
        every tensor that may change at any time; the others follow behind the step (unless writes
        outside the optimizer were seen before: then all is copied when this returns).  ``wait_s``
        is for what must not be skipped only because the slots' owner is being replaced.

        Raises MemoryShortError when there is no memory for the first version.
        """
        with self._lock:
            while self._job is not None:  # the version before was not waited for: no step was made
                self._lock.wait()
            self._live, self._written = None, None
            filling = self._filling
        if filling:  # its copy may still land in the slot that this version would get
            self._skip("the copy of a version that was given up has not ended yet")
            return
        try:
            job = self._begin(version, tensors, small, collectives, wait_s)
        except MemoryShortError as error:
            if self._plan is None and version.step == 0:
                raise  # it never was enough
            self._skip(str(error), told=self._plan is not None)  # by who has no more, once for all
            return
        except (FtrainError, OSError, RuntimeError) as error:
            self._skip(str(error))
            return
        if job is None:
            self._skip(self._slots.denied)
            return
        with self._lock:
            self._job = self._live = job
        _eventfd_write(self._wake, 1)
        if self._statistics.eager:
            self.barrier(float("inf"))

    def expect(self, tensors: tuple[StateTensor, ...]) -> None:
        """Have room made for versions of these tensors, which nobody waits for; those that are not
        there yet may be on the device ``meta``.  To be called behind the first :meth:`start`."""
        with self._lock:
            self._expected = tensors
        _eventfd_write(self._wake, 1)

    def barrier(self, wait_s_max: float) -> None:
        """Wait until the live tensors may change; skips the version after ``wait_s_max``."""
        began = time.monotonic_ns()
        with self._lock:
            done = self._lock.wait_for(lambda: self._job is None, min(wait_s_max, 1e6))
            if not done:
                self._skip(f"not copied within {wait_s_max:g} s")
                self._job = None
            if self._compare and not self._statistics.eager:
                self._look_for_writes()
            self._live, self._written = None, None
        self._statistics.barrier_ns += time.monotonic_ns() - began

    def drain(self, wait_s: float) -> bool:
        """Wait until nothing is being captured, without letting the tensors change."""
        with self._lock:
            return self._lock.wait_for(lambda: self._job is None, wait_s)

    def close(self) -> None:
        """End the thread; what it was capturing stays unsealed."""
        with self._lock:
            self._closing = True
        _eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def statistics(self) -> CaptureStatistics:
        """What it cost so far."""
        return self._statistics.frozen()

    # ---- the capturing thread's side

    def _run(self) -> None:
        let_others_run_on()
        while True:
            self._await_news()
            with self._lock:
                if self._closing:
                    return
                job = self._job
                self._filling = job is not None
            if job is not None:
                self._attempt(job)
                with self._lock:
                    self._filling = False
                    if self._job is job:
                        self._job = None
                    self._lock.notify_all()
            self._make_room()
            request = self._poll()
            if request is not None:
                self._finish(request)

    def _make_room(self) -> None:
        """Reserve what is expected, as far as no version has to wait for it."""
        with self._lock:
            expected, self._expected = self._expected, None
            plan = self._plan
        if expected is None or plan is None:
            return
        room = _SMALL_GROWTH * plan.small_bytes_max
        with suppress(FtrainError, OSError):  # it will be said when they are captured
            wanted = plan_image(expected, self._share_of, room, self._chunk_bytes)
            self._slots.reserve(wanted.total_bytes)
            while self._job is None and self._slots.enter_more():
                pass

    def _await_news(self) -> None:
        watched = select.poll()  # select knows no descriptors from 1024 on
        for fd in (self._wake, self._slots.fileno()):
            if fd >= 0:
                watched.register(fd, select.POLLIN)
        if any(fd == self._wake for fd, _ in watched.poll(500)):
            os.eventfd_read(self._wake)

    def _attempt(self, job: _Job) -> None:
        try:
            self._capture(job)
        except _ChangedError as error:
            assert self._frozen is not None
            self._frozen.unsteady()
            self._skip(f"{error}; such tensors are copied at the boundary from now on")
        except (FtrainError, OSError, RuntimeError) as error:
            self._skip(str(error))

    def _begin(
        self,
        version: VersionId,
        tensors: tuple[StateTensor, ...],
        small: bytes,
        collectives: int,
        wait_s: float | None = None,
    ) -> _Job | None:
        """Write all that may change, so that from here on a survivor can finish the image."""
        plan = self._plan_for(tensors, small)
        buffer = self._slots.begin(version, wait_s)
        if buffer is None:
            return None
        writer = ImageWriter(buffer, plan, self._identity_of(version, self._rank), collectives)
        writer.begin(small, lambda: self._copy_now(writer))
        ready = None
        assert self._program is not None
        if self._program.on_gpu:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        return _Job(version, tensors, self._program, writer, buffer, ready)

    def _copy_now(self, writer: ImageWriter) -> None:
        """Copy what may change as soon as the script goes on."""
        assert self._frozen is not None
        assert self._program is not None
        kinds = {Changes.ANYTIME}
        if not self._frozen.expect(writer):
            kinds.add(Changes.NEVER)
        if not self._program.has(kinds):
            return
        began = time.monotonic_ns()
        self._slots.enter()
        for chunk in range(writer.chunks):
            self._program.copy(writer, chunk, kinds)
        self._statistics.copy_ns += time.monotonic_ns() - began

    def _capture(self, job: _Job) -> None:
        writer = job.writer
        self._slots.begun(job.version)
        self._slots.enter()  # here, where nobody waits for it yet
        if job.ready is not None:
            job.ready.synchronize()
        for chunk in range(writer.chunks):
            if self._job is not job:
                return  # the barrier gave up on it
            self._fill(writer, chunk, job.program)
        with self._lock:
            if self._job is not job:
                return
            writer.seal()
        if self._frozen is not None:
            self._frozen.sealed(writer)
        self._slots.sealed(job.version, writer.held())
        self._statistics.captured += 1
        self._statistics.captured_step = job.version.step
        self._statistics.bytes_copied += writer.plan.layout.data_bytes
        self._written = job.buffer

    def _plan_for(self, tensors: tuple[StateTensor, ...], small: bytes) -> ImagePlan:
        plan = self._plan
        if plan is None or self._planned_for is not tensors or len(small) > plan.small_bytes_max:
            room = max(_SMALL_BYTES_MIN, len(small) * 3 // 2)  # cleared for every version
            plan = plan_image(tensors, self._share_of, room, self._chunk_bytes)
            self._slots.reserve(plan.total_bytes)
            self._plan, self._planned_for = plan, tensors
            self._program = CopyProgram(plan, tensors)
            self._frozen = FrozenChunks(plan, tensors)
            lazy = {tensor.name for tensor in tensors if tensor.changes is Changes.IN_STEP}
            self._offsets = [s.offset for s in plan.segments if s.name in lazy]  # the first ones
        return plan

    def _fill(self, writer: ImageWriter, chunk: int, program: CopyProgram) -> None:
        """Complete a chunk with what is not in it since the boundary.

        Raises :class:`_ChangedError` when it does not have the digest that is expected of it.
        """
        began = time.monotonic_ns()
        expected = writer.digest(chunk)
        program.copy(writer, chunk, _LAZY if expected == NO_DIGEST else _LAZY_AND_FROZEN)
        copied = time.monotonic_ns()
        start, stop = writer.chunk_range(chunk)
        digest = digest_of(writer.data[start:stop])
        self._statistics.copy_ns += copied - began
        self._statistics.hash_ns += time.monotonic_ns() - copied
        if expected not in (NO_DIGEST, digest):
            names = sorted({piece.segment.name for piece in writer.plan.pieces(chunk)})
            raise _ChangedError(f"{names[0]} or one behind it changed though it is frozen")
        writer.finish_chunk(chunk, digest)

    def _poll(self) -> FinishRequest | None:
        try:
            return self._slots.poll()
        except (FtrainError, OSError):
            return None

    def _finish(self, request: FinishRequest) -> None:
        """Complete a dead rank's image from this rank's equal bytes, while they still are equal."""
        held = None
        with self._lock:
            live = self._live
            if live is not None and live.version == request.version:
                try:
                    writer = resume_writer(request.buffer)
                    mine = {tensor.name: tensor.share for tensor in live.tensors}
                    if all(mine.get(s.name) == s.share for s in writer.plan.segments):
                        program = CopyProgram(writer.plan, live.tensors)
                        for chunk in writer.missing_chunks():
                            self._fill(writer, chunk, program)
                        writer.seal()
                        held = writer.held()
                        self._statistics.finished_for_others += 1
                except (FtrainError, OSError, RuntimeError) as error:
                    self._note(f"can't finish rank {request.rank}'s capture: {error}")
        try:
            self._slots.finished(request.version, request.rank, held)
        except PeerLostError as error:
            self._note(f"can't hand in rank {request.rank}'s capture: {error}")

    def _skip(self, reason: str, *, told: bool = False) -> None:
        self._statistics.skipped += 1
        self._statistics.skip_reason = reason
        count = self._statistics.skipped
        if not told and count == 10 ** (len(str(count)) - 1):  # the 1st, the 10th, the 100th, …
            self._note(f"{count} version(s) not captured so far, now because {reason}")

    def _look_for_writes(self) -> None:
        """Compare a rotating stretch of live memory with what was captured of it.

        Writes outside ``optimizer.step`` (an EMA swap, ``.data``, an optimizer inside backward)
        can't be seen in ``Tensor._version``; fused updates do not count it up.  A version found to
        differ is withdrawn: its image goes, then everybody is told.
        """
        live, written, plan = self._live, self._written, self._plan
        if live is None or written is None or plan is None or not self._offsets:
            return
        last = plan.segments[len(self._offsets) - 1]
        end = last.offset + last.nbytes
        place = self._cursor * _COMPARED_BYTES % end
        self._cursor += 1
        segment = plan.segments[bisect_right(self._offsets, place) - 1]
        source = next((t.tensor for t in live.tensors if t.name == segment.name), None)
        if source is None or source.is_cuda or not source.is_contiguous():
            return
        size = min(segment.nbytes, _COMPARED_BYTES)
        skip = min(place - segment.offset, segment.nbytes - size)
        at = plan.layout.data_offset + segment.offset + skip
        copy = ctypes.addressof(ctypes.c_char.from_buffer(written, at))
        if _memcmp(copy, source.data_ptr() + segment.start + skip, size):
            self._statistics.eager = True
            live.writer.abandon()  # before anything can go wrong with telling
            self._slots.withdraw(live.version)
            self._note(
                f"{segment.name} changed between a boundary and the next optimizer.step: step "
                f"{live.version.step} will not be restored from, and versions are copied at the "
                "boundary from now on, which stalls the step; write to parameters only inside "
                "optimizer.step, or before the boundary"
            )


@dataclass(slots=True)
class _Counters:
    captured: int = 0
    captured_step: int = -1  # of the newest version
    bytes_copied: int = 0
    copy_ns: int = 0
    hash_ns: int = 0
    barrier_ns: int = 0
    skipped: int = 0
    skip_reason: str = ""
    finished_for_others: int = 0
    eager: bool = False

    def frozen(self) -> CaptureStatistics:
        return CaptureStatistics(**{name: getattr(self, name) for name in self.__slots__})
