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

What lies on a GPU is copied by the GPU, in a stream beside the training's (gpu_streams.py).  The
barrier then waits until the copies are launched, and has the training's stream wait for the rest.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum, auto

import torch

from ftrain.checkpoint.copying import CopyProgram
from ftrain.checkpoint.digest import NO_DIGEST, digest_of
from ftrain.checkpoint.frozen import FrozenChunks
from ftrain.checkpoint.gpu_streams import GpuStreams, Marks, in_cuda_graph, streams_on
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageWriter, resume_writer
from ftrain.checkpoint.image_plan import ImagePlan
from ftrain.checkpoint.slots import FinishRequest, Slots
from ftrain.checkpoint.spot_checks import Fetched, SpotChecks
from ftrain.checkpoint.tensors import Changes, StateTensor, plan_image
from ftrain.comms.errors import FtrainError, MemoryShortError, PeerLostError
from ftrain.comms.process import let_others_run_on
from ftrain.comms.protocol.messages import Share, VersionId

# Without giving up the GIL: to get it back may take longer than it does.
_eventfd_write = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint64)(
    ("eventfd_write", ctypes.pythonapi)
)
_SMALL_BYTES_MIN = 16 * 1024
_WAIT_S_MAX = 1e6  # for ever; a lock can't wait for infinity
_SMALL_GROWTH = 4  # room for the small state of later versions, when it is reserved ahead
_LAZY = (Changes.IN_STEP,)
_LAZY_AND_FROZEN = (Changes.IN_STEP, Changes.NEVER)


@dataclass(slots=True)
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


class _ChangedError(FtrainError):
    """A frozen tensor has other bytes than at the boundary before."""


class _Stage(Enum):
    """How far a version is; changed with the engine's lock held."""

    COPYING = auto()
    LAUNCHED = auto()  # all copies from GPUs are, and what is on the host is copied
    SEALED = auto()
    GIVEN_UP = auto()


@dataclass(slots=True)
class _Job:
    version: VersionId
    tensors: tuple[StateTensor, ...]
    program: CopyProgram
    writer: ImageWriter
    buffer: memoryview
    ready: Marks | None  # the GPUs have made the version; None: it is in the host's memory
    eager: bool  # all of it is copied before the script goes on
    stage: _Stage = _Stage.COPYING

    @property
    def may_change(self) -> bool:
        """Whether what is launched from now on may change the tensors."""
        return self.stage is not _Stage.COPYING

    @property
    def compares(self) -> bool:
        """Whether live memory can be compared with its image, now or when it is sealed."""
        return not self.eager and self.stage in (_Stage.LAUNCHED, _Stage.SEALED)


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
        self._looks = compare
        self._note = on_note
        self._lock = threading.Condition()
        self._job: _Job | None = None  # being captured
        self._live: _Job | None = None  # the live tensors still are this version
        self._plan: ImagePlan | None = None
        self._planned_for: tuple[StateTensor, ...] = ()
        self._program: CopyProgram | None = None
        self._filling = False  # the thread is inside a job, given up or not
        self._boundary: Marks | None = None  # the newest copies launched by the training thread
        self._changing = threading.Lock()  # who has slots reserved or granted; taken before _lock
        self._expected: tuple[StateTensor, ...] | None = None  # room is to be made for them
        self._frozen: FrozenChunks | None = None
        self._streams: GpuStreams | None = None
        self._launched: Marks | None = None  # the newest copies from GPUs, with the last of them
        self._checks: SpotChecks | None = None
        self._fetched: tuple[_Job, Fetched] | None = None  # of which version
        self._closing = False
        self._statistics = CaptureStatistics()
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
        outside the optimizer were seen before: then all is copied when this returns).  What lies on
        a GPU is copied before anything that is launched in its current stream later.  ``wait_s`` is
        for what must not be skipped only because the slots' owner is being replaced.

        Raises MemoryShortError when there is no memory for the first version.
        """
        with self._lock:
            while self._job is not None:  # no step was made since, or it is being hashed
                self._lock.wait()
            self._live = None
            filling = self._filling
        if filling:  # its copy may still land in the slot that this version would get
            self._skip("the copy of a version that was given up has not ended yet")
            return
        try:
            with self._changing:
                job = self._begin(version, tensors, small, collectives, wait_s)
                with self._lock:
                    self._job = self._live = job
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
        _eventfd_write(self._wake, 1)
        if job.eager:
            self.barrier(float("inf"))

    def expect(self, tensors: tuple[StateTensor, ...]) -> None:
        """Have room made for versions of these tensors, which nobody waits for; those that are not
        there yet may be on the device ``meta``.  To be called behind the first :meth:`start`."""
        with self._lock:
            self._expected = tensors
        _eventfd_write(self._wake, 1)

    def barrier(self, wait_s_max: float) -> None:
        """Wait until the live tensors may change; skips the version after ``wait_s_max``.

        On a GPU they may be changed by what is launched in its current stream from now on.
        """
        began = time.monotonic_ns()
        with self._lock:
            if in_cuda_graph():
                self._leave_to_the_graph()
                return
            if not self._lock.wait_for(self._may_change, min(wait_s_max, _WAIT_S_MAX)):
                assert self._job is not None
                self._abandon(self._job, f"not copied within {wait_s_max:g} s")
            if self._live is not None and self._live.compares and self._looks:
                self._look_for_writes(self._live)
            self._live = None
            if self._launched is not None:
                self._launched.hold_back()
        self._statistics.barrier_ns += time.monotonic_ns() - began

    def _may_change(self) -> bool:
        return self._job is None or self._job.may_change

    def drain(self, wait_s: float) -> bool:
        """Wait until nothing is being captured, without letting the tensors change."""
        with self._lock:
            return self._lock.wait_for(lambda: self._job is None, min(wait_s, _WAIT_S_MAX))

    def close(self) -> None:
        """End the thread; what it was capturing stays unsealed."""
        with self._lock:
            self._closing = True
        _eventfd_write(self._wake, 1)
        self._thread.join()
        if self._streams is not None:
            self._streams.close()
        os.close(self._wake)

    def statistics(self) -> CaptureStatistics:
        """What it cost so far."""
        return replace(self._statistics)

    # ---- the capturing thread's side

    def _run(self) -> None:
        let_others_run_on()
        while True:
            self._await_news()
            with self._lock:
                if self._closing:
                    return
                fetched, self._fetched = self._fetched, None
                job = self._job
                self._filling = job is not None
            try:
                self._capture_next(job, fetched)
                self._make_room()
                request = self._poll()
                if request is not None:
                    self._finish(request)
            except Exception as error:  # without this thread every step would wait for it in vain
                self._note(f"capturing goes on after {type(error).__name__}: {error}")

    def _capture_next(self, job: _Job | None, fetched: tuple[_Job, Fetched] | None) -> None:
        try:
            if fetched is not None:
                self._look_at(*fetched)
            if job is None:
                return
            if self._is_doubtful(job):
                self._abandon(job, "writes outside the optimizer were found just before")
            else:
                self._capture(job)
        except _ChangedError as error:
            assert self._frozen is not None
            self._frozen.unsteady()
            self._skip(f"{error}; such tensors are copied at the boundary from now on")
        except (FtrainError, OSError, RuntimeError) as error:
            self._skip(str(error))
        except Exception as error:  # whatever it was: training goes on without this version
            self._skip(f"of {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._filling = False
                if job is not None and self._job is job:
                    self._job = None
                self._lock.notify_all()

    def _make_room(self) -> None:
        """Reserve what is expected, as far as no version has to wait for it."""
        if not self._changing.acquire(blocking=False):
            return  # a version is being begun: by and by
        try:
            with self._lock:
                expected, plan = self._expected, self._plan
                if expected is None or plan is None or self._job is not None:
                    return
                self._expected = None
            room = _SMALL_GROWTH * plan.small_bytes_max
            with suppress(FtrainError, OSError):  # it will be said when they are captured
                wanted = plan_image(expected, self._share_of, room, self._chunk_bytes)
                self._reserve(wanted.total_bytes)
        finally:
            self._changing.release()
        with suppress(FtrainError, OSError):
            while self._job is None and self._slots.enter_more():
                pass

    def _await_news(self) -> None:
        watched = select.poll()  # select knows no descriptors from 1024 on
        for fd in (self._wake, self._slots.fileno()):
            if fd >= 0:
                watched.register(fd, select.POLLIN)
        if any(fd == self._wake for fd, _ in watched.poll(500)):
            os.eventfd_read(self._wake)

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
        writer.prepare(small)
        program = self._program
        assert program is not None
        try:
            copying = self._copy_now(writer)
        except BaseException:  # whatever it was: nothing is copied to a slot that is free again
            Marks(program.gpus).synchronize()
            raise
        ready = self._boundary = Marks(program.gpus) if program.gpus else None
        if not copying:
            writer.declare()
        eager = self._statistics.eager
        return _Job(version, tensors, program, writer, buffer, ready, eager)

    def _copy_now(self, writer: ImageWriter) -> bool:
        """Copy what may change as soon as the script goes on; True: GPUs are still at it, before
        they do anything that the script launches."""
        assert self._frozen is not None
        assert self._program is not None
        kinds = {Changes.ANYTIME}
        if not self._frozen.expect(writer):
            kinds.add(Changes.NEVER)
        if not self._program.has(kinds):
            return False
        began = time.monotonic_ns()
        self._slots.enter()
        for chunk in range(writer.chunks):
            self._program.copy(writer, chunk, kinds)
        self._statistics.copy_ns += time.monotonic_ns() - began
        return self._program.has_on_gpu(kinds)

    def _capture(self, job: _Job) -> None:
        writer = job.writer
        if writer.declared:
            self._slots.begun(job.version)
        if job.ready is not None:
            self._fill_from_gpus(job, job.ready)
        else:
            self._slots.enter()  # here, where nobody waits for it yet
            for chunk in range(writer.chunks):
                if self._job is not job:
                    return  # the barrier gave up on it
                self._fill(writer, chunk, job.program)
        with self._lock:
            if self._job is not job:
                return
            writer.seal()
            job.stage = _Stage.SEALED
            self._statistics.captured += 1
            self._statistics.captured_step = job.version.step
            self._statistics.bytes_copied += writer.plan.layout.data_bytes
            self._lock.notify_all()  # nobody need wait for the manager's answer
        if self._frozen is not None:
            self._frozen.sealed(writer)
        self._slots.sealed(job.version, writer.held())

    def _plan_for(self, tensors: tuple[StateTensor, ...], small: bytes) -> ImagePlan:
        plan = self._plan
        if plan is None or self._planned_for is not tensors or len(small) > plan.small_bytes_max:
            room = max(_SMALL_BYTES_MIN, len(small) * 3 // 2)  # cleared for every version
            plan = plan_image(tensors, self._share_of, room, self._chunk_bytes)
            self._reserve(plan.total_bytes)
            self._plan, self._planned_for = plan, tensors
            self._program = CopyProgram(plan, tensors)
            self._frozen = FrozenChunks(plan, tensors)
            self._checks = SpotChecks(plan, tensors)
        return plan

    def _reserve(self, image_bytes: int) -> None:
        if self._boundary is not None:  # its version may have been given up before it was copied
            self._boundary.synchronize()
        self._slots.reserve(image_bytes)

    def _fill(self, writer: ImageWriter, chunk: int, program: CopyProgram) -> None:
        """Complete a chunk with what is not in it since the boundary.

        Raises :class:`_ChangedError` when it does not have the digest that is expected of it.
        """
        began = time.monotonic_ns()
        self._copy_chunk(writer, chunk, program)
        copied = time.monotonic_ns()
        self._statistics.copy_ns += copied - began
        self._finish_chunk(writer, chunk)
        self._statistics.hash_ns += time.monotonic_ns() - copied

    def _fill_from_gpus(self, job: _Job, ready: Marks) -> None:
        """The same with all chunks, as they land."""
        torch.cuda.set_device(job.program.gpus[0])  # every thread begins with the first one
        self._slots.enter()
        streams = self._streams_on(job.program.gpus)
        began = time.monotonic_ns()
        try:
            landed = streams.launch(
                ready, job.writer, lambda chunk: self._copy_chunk(job.writer, chunk, job.program)
            )
            with self._lock:
                if self._job is not job:
                    return  # the barrier gave up on it
                self._launched = landed[-1] if landed else ready
                job.stage = _Stage.LAUNCHED
                self._lock.notify_all()
            if not job.writer.declared:
                ready.synchronize()  # what was copied at the boundary is there
                with self._lock:
                    if self._job is not job:
                        return
                    job.writer.declare()
                self._slots.begun(job.version)
            landed_ns = self._finish_chunks(streams, landed, job.writer)
            self._statistics.copy_ns += landed_ns - began
            self._statistics.hash_ns += time.monotonic_ns() - landed_ns
        finally:
            streams.synchronize()  # after this the slot may be used for another version

    def _finish_chunks(
        self, streams: GpuStreams, landed: Sequence[Marks], writer: ImageWriter
    ) -> int:
        """Returns when the last chunk had landed."""
        landed_ns = time.monotonic_ns()

        def finish(chunk: int) -> None:
            nonlocal landed_ns
            if chunk == writer.chunks - 1:
                landed_ns = time.monotonic_ns()
            self._finish_chunk(writer, chunk)

        streams.finish(landed, finish)
        return landed_ns

    def _streams_on(self, gpus: Sequence[torch.device]) -> GpuStreams:
        self._streams = streams_on(gpus, self._streams)
        return self._streams

    def _copy_chunk(self, writer: ImageWriter, chunk: int, program: CopyProgram) -> None:
        is_lazy = writer.digest(chunk) == NO_DIGEST
        program.copy(writer, chunk, _LAZY if is_lazy else _LAZY_AND_FROZEN)

    def _finish_chunk(self, writer: ImageWriter, chunk: int) -> None:
        expected = writer.digest(chunk)
        start, stop = writer.chunk_range(chunk)
        digest = digest_of(writer.data[start:stop])
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
            if live is not None and self._is_doubtful(live):
                live = None
            if live is not None and live.version == request.version:
                try:
                    writer = resume_writer(request.buffer)
                    mine = {tensor.name: tensor.share for tensor in live.tensors}
                    if all(mine.get(s.name) == s.share for s in writer.plan.segments):
                        self._fill_missing(writer, live)
                        writer.seal()
                        held = writer.held()
                        self._statistics.finished_for_others += 1
                except (FtrainError, OSError, RuntimeError) as error:
                    self._note(f"can't finish rank {request.rank}'s capture: {error}")
        try:
            self._slots.finished(request.version, request.rank, held)
        except PeerLostError as error:
            self._note(f"can't hand in rank {request.rank}'s capture: {error}")

    def _fill_missing(self, writer: ImageWriter, live: _Job) -> None:
        program = CopyProgram(writer.plan, live.tensors)
        if live.ready is None or not program.gpus:
            for chunk in writer.missing_chunks():
                self._fill(writer, chunk, program)
            return
        with self._streams_on(live.program.gpus).behind(live.ready):
            for chunk in writer.missing_chunks():
                self._copy_chunk(writer, chunk, program)
                Marks(program.gpus).synchronize()
                self._finish_chunk(writer, chunk)

    def _skip(self, reason: str, *, told: bool = False) -> None:
        self._statistics.skipped += 1
        self._statistics.skip_reason = reason
        count = self._statistics.skipped
        if not told and count == 10 ** (len(str(count)) - 1):  # the 1st, the 10th, the 100th, …
            self._note(f"{count} version(s) not captured so far, now because {reason}")

    def _look_for_writes(self, live: _Job) -> None:
        """A version found to differ from live memory is withdrawn, and everybody is told."""
        assert self._checks is not None  # made with the plan of every version
        stretch = self._checks.next()
        if stretch is None:
            return
        if stretch.on_gpu:
            with suppress(RuntimeError):  # no memory to fetch it to: the next one, perhaps
                self._fetched = live, self._checks.fetch(stretch)  # for the capturing thread
                _eventfd_write(self._wake, 1)
        elif live.stage is _Stage.SEALED and not stretch.equals(live.buffer):
            self._lock.wait_for(lambda: self._job is not live)  # its owner knows it by now
            self._withdraw(live, stretch.name)

    def _is_doubtful(self, job: _Job) -> bool:
        """Whether it was begun before writes outside the optimizer were known of."""
        return self._statistics.eager and not job.eager

    def _look_at(self, job: _Job, fetched: Fetched) -> None:
        if job.stage is _Stage.SEALED and not fetched.equals(job.buffer):
            self._withdraw(job, fetched.name)

    def _leave_to_the_graph(self) -> None:
        """An optimizer's step is being recorded: it runs whenever the graph is replayed, and nobody
        calls the barrier then."""
        if self._job is not None and self._job.stage is not _Stage.SEALED:
            self._abandon(self._job, "an optimizer's step is recorded into a CUDA graph")
        self._live = None
        if not self._statistics.eager:
            self._statistics.eager = True
            self._note(
                "an optimizer's step is part of a CUDA graph: versions are copied at the boundary "
                "from now on, before anything else runs in the current stream"
            )

    def _abandon(self, job: _Job, reason: str) -> None:
        """Give a version up that is not sealed."""
        with self._lock:
            if job.stage is _Stage.GIVEN_UP:
                return
            self._skip(reason)
            job.stage = _Stage.GIVEN_UP
            job.writer.abandon()  # nobody shall finish what may be torn
            if self._live is job:  # nor is another's to be finished from it
                self._live = None
            if self._job is job:
                self._job = None
                self._lock.notify_all()

    def _withdraw(self, job: _Job, name: str) -> None:
        self._statistics.eager = True
        job.writer.abandon()  # before anything can go wrong with telling
        self._slots.withdraw(job.version)
        self._note(
            f"{name} changed between a boundary and the next optimizer.step: step "
            f"{job.version.step} will not be restored from, and versions are copied at the "
            "boundary from now on, which stalls the step; write to parameters only inside "
            "optimizer.step, or before the boundary"
        )
