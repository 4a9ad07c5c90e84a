"""A ring of ranks that moves and adds up chunks: the engine of :class:`RingOperation`.

One thread serves what comes from the left neighbour, chunk by chunk: it is added to or kept, and
sent on.  Chunks of several operations share the ring; none waits for another one's end.

Not built yet: a limit on how long a neighbour that is silent but there is waited for, and the vote
that settles what becomes of an operation when a rank dies in it.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import xxhash

from ftrain.comms.collectives.arithmetic import Arithmetic
from ftrain.comms.collectives.lanes import InLane, OutLane
from ftrain.comms.errors import (
    FtrainError,
    PeerLostError,
    RemoteProtocolError,
    StateError,
    UsageError,
)
from ftrain.comms.protocol.chunk_frames import Head, Word
from ftrain.comms.protocol.ring import ChunkId, Do, Kind, Layout, Phase, RingOperation
from ftrain.comms.protocol.ring_barrier import RingBarrier

_AHEAD_MAX = 65536  # operations that a neighbour may have begun before this rank
_UNEQUAL = (
    "the ranks do not mean the same by a collective: kind, number of elements, dtype, reduction, "
    "root and size of chunks have to be equal on all of them"
)


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank brings into a collective.

    ``source`` and ``target`` are bytes: of all elements, or of the rank's own segment where a
    collective takes or leaves only that.  They may be the same memory.  The root of a broadcast
    gives a source only, the others a target.
    """

    kind: Kind
    count: int  # elements of the whole
    itemsize: int
    source: memoryview
    target: memoryview
    arithmetic: Arithmetic | None = None
    root: int = 0


class Handle:
    """A collective that is under way."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.error: FtrainError | None = None  # that :meth:`wait` raises

    @property
    def over(self) -> bool:
        """Whether :meth:`wait` would return or raise at once."""
        return self._over.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return once every rank has the result.

        Raises what ended the collective, or TimeoutError, after which one may wait again.
        """
        if not self._over.wait(timeout_s):
            raise TimeoutError(f"the collective is not over after {timeout_s} s")
        if self.error is not None:
            raise type(self.error)(*self.error.args)

    def end(self, error: FtrainError | None = None) -> None:
        """The collective is over."""
        self.error = error
        self._over.set()


@dataclass(slots=True)
class _Running:
    work: Work
    plan: RingOperation
    digest: int
    handle: Handle = field(default_factory=Handle)


@dataclass(slots=True)
class _Barriers:
    """Of one operation; words may come before it is begun here."""

    begun: RingBarrier
    done: RingBarrier
    digest: int = 0  # that the left neighbour says


class Ring:
    """One rank's place in a ring.

    Every rank begins the same operations in the same order.

    Args:
        rank: in the ring.
        lanes_in: from the left neighbour; empty with ``lanes_out`` when the ring has one rank.
        chunk_bytes: at most; the same on all ranks.
        starts: chunks that this rank may have put in and not yet seen taken out.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        lanes_in: Sequence[InLane],
        lanes_out: Sequence[OutLane],
        *,
        chunk_bytes: int,
        starts: int,
    ) -> None:
        self._rank, self._ranks = rank, ranks
        self._in = {lane.fileno(): lane for lane in lanes_in}
        self._out = list(lanes_out)
        self._chunk_bytes = chunk_bytes
        self._startable = starts
        self._right_over = False  # it has hung up, which it may once it needs nothing more
        self._lock = threading.Lock()  # of what follows, which :meth:`begin` changes as well
        self._running: dict[int, _Running] = {}
        self._barriers: dict[int, _Barriers] = {}
        self._begun = 0
        self._error: FtrainError | None = None
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="ftrain-ring", daemon=True)
        self._thread.start()

    def begin(self, work: Work) -> Handle:
        """Begin a collective; the memory is the ring's until the handle is over.

        Raises UsageError for what can't be one.
        """
        layout = Layout(work.count, self._ranks, max(1, self._chunk_bytes // work.itemsize))
        self._check(work, layout)
        plan = RingOperation(work.kind, self._rank, layout, work.root)
        words = (work.kind, work.count, work.itemsize, work.root, work.arithmetic)
        digest = xxhash.xxh3_64_intdigest(repr((words, self._chunk_bytes)).encode())
        running = _Running(work, plan, digest)
        with self._lock:
            if self._error is not None:
                running.handle.end(self._error)
                return running.handle
            number, self._begun = self._begun, self._begun + 1
            self._keep_own(running)
            if self._ranks == 1:
                running.handle.end()
                return running.handle
            self._running[number] = running
            self._barrier(number).begun.reach()
            os.eventfd_write(self._wake, 1)
        return running.handle

    def close(self) -> None:
        """Leave the ring; what is under way here ends with PeerLostError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            in_order = not self._running and self._error is None
            self._error = self._error or PeerLostError("the ring was closed here")
            os.eventfd_write(self._wake, 1)
        if not in_order:
            self._shut()
        self._thread.join()
        for lane_out in self._out:
            lane_out.close(in_order)
        for lane_in in self._in.values():
            lane_in.close()
        os.close(self._wake)

    # ------------------------------------------------------------ the thread

    def _serve(self) -> None:
        error: FtrainError
        try:
            self._serve_all()
            assert self._error is not None
            error = self._error
        except FtrainError as raised:
            error = raised
        except BaseException as raised:  # whatever it is, nobody may wait for this thread for ever
            error = StateError(f"the ring's thread failed: {raised!r}")
        with self._lock:
            self._error = self._error or error
            running, self._running = list(self._running.values()), {}
            in_order = self._closed and not running
        with suppress(FtrainError):
            if isinstance(error, UsageError):
                self._out[0].say(Head(Word.HALT, 0))
            elif in_order:
                for lane in self._out:
                    lane.say(Head(Word.LEAVE, 0))
        if not in_order:
            self._shut()
        for one in running:
            one.handle.end(error)

    def _serve_all(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for fd in self._in:
            poll.register(fd, select.POLLIN)
        outs = {lane.fileno(): lane for lane in self._out}
        while self._error is None:
            for fd, lane in outs.items():
                wants = select.POLLOUT if lane.behind else 0
                poll.register(fd, select.POLLRDHUP | wants)
            for fd, event in poll.poll():
                if fd == self._wake:
                    with suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                    self._go_on()
                elif fd in self._in:
                    if not self._take(self._in[fd], self._in[fd].next()):
                        poll.unregister(fd)
                        del self._in[fd]
                elif event & ~select.POLLOUT:
                    self._right_is_over()
                    poll.unregister(fd)
                    del outs[fd]
                else:
                    outs[fd].catch_up()

    def _take(self, lane: InLane, head: Head) -> bool:
        """False when nothing follows on this lane."""
        if head.word is Word.CHUNK:
            self._take_chunk(lane, head)
            return True
        if head.word is Word.LEAVE:
            self._raise_if_undone("the left neighbour left in the middle of a collective")
            lane.close()
            return False
        if head.word is Word.HALT:
            raise UsageError(_UNEQUAL)
        if head.word not in (Word.BEGUN, Word.DONE):
            raise RemoteProtocolError(f"{head.word.name} came in the middle of a ring's life")
        self._hear(head)
        self._start()
        self._speak(head.operation)
        return True

    def _hear(self, head: Head) -> None:
        number = head.operation
        with self._lock:
            over = number < self._begun and number not in self._running
            if over or number >= self._begun + _AHEAD_MAX:
                raise RemoteProtocolError(f"a word about operation {number} came at {self._begun}")
            barriers = self._barrier(number)
            if head.word is Word.BEGUN:
                barriers.digest = head.value
                barriers.begun.heard(head.number)
            else:
                barriers.done.heard(head.number)

    def _take_chunk(self, lane: InLane, head: Head) -> None:
        with self._lock:
            running = self._running.get(head.operation)
        if running is None:
            raise RemoteProtocolError(f"a chunk came of operation {head.operation}, which is over")
        phase, chunk = Phase(head.phase), ChunkId(head.segment, head.number)
        do = running.plan.arrived(phase, chunk)
        self._do(lane, head, running, do, chunk)
        self._startable += running.plan.takes_out(phase, chunk)
        self._start()
        if running.plan.done:
            self._speak(head.operation)

    def _do(self, lane: InLane, head: Head, running: _Running, do: Do, chunk: ChunkId) -> None:
        work, out = running.work, self._lane(chunk)
        target, own = self._target(running, chunk), self._source(running, chunk)
        keeps = do in (Do.KEEP, Do.KEEP_AND_SEND, Do.KEEP_AND_TELL)
        expected = 0 if do is Do.NOTHING else (target if keeps else own).nbytes
        if head.nbytes != expected:
            raise RemoteProtocolError(f"a chunk of {head.nbytes} bytes came instead of {expected}")
        if do is Do.NOTHING:
            return
        if keeps:
            lane.take(target)
            if do is Do.KEEP_AND_SEND:
                out.send(head, target)  # the same chunk has the same checksum
            elif do is Do.KEEP_AND_TELL:
                out.say(_head(head.operation, Phase.SPENT, chunk, target[:0]))
            return
        assert work.arithmetic is not None
        if do is Do.ADD_AND_SEND and not own.nbytes:
            out.send(_head(head.operation, Phase.REDUCE, chunk, own), own)
            return
        came = lane.borrow()
        if do is Do.ADD_AND_SEND:
            room = out.room()
            work.arithmetic.combine(came, own, room[: own.nbytes])
            lane.give_back()
            out.send_room(_head(head.operation, Phase.REDUCE, chunk, own), room)
            return
        work.arithmetic.combine(came, own, target)
        lane.give_back()
        work.arithmetic.finish(target, self._ranks)
        if do is Do.ADD_KEEP_AND_SEND:
            out.send(_head(head.operation, Phase.GATHER, chunk, target), target)

    def _go_on(self) -> None:
        """Operations were begun: start and say what can be."""
        if not self._in or self._right_over:
            self._raise_if_undone("a neighbour has left the ring")
        self._start()
        with self._lock:
            numbers = list(self._running)
        for number in numbers:
            self._speak(number)

    def _start(self) -> None:
        """Put as much of one's own into the ring as may be."""
        while self._startable > 0:
            with self._lock:
                number = next((n for n in self._running if self._may_start(n)), None)
                if number is None:
                    return
                running = self._running[number]
            self._startable -= 1
            phase, chunk = running.plan.start()
            own = self._source(running, chunk)
            self._lane(chunk).send(_head(number, phase, chunk, own), own)
            if running.plan.done:
                self._speak(number)

    def _may_start(self, number: int) -> bool:
        return bool(
            self._running[number].plan.left_to_start and self._barriers[number].begun.passed
        )

    def _speak(self, number: int) -> None:
        """Say to the right what there is to say about an operation, and end it when it is over."""
        words: list[Head] = []
        with self._lock:
            running = self._running.get(number)
            if running is None:  # not begun here, or over since
                return
            barriers = self._barriers[number]
            if barriers.digest not in (0, running.digest):
                raise UsageError(_UNEQUAL)
            if running.plan.done:
                barriers.done.reach()
            if ranks := barriers.begun.to_say():
                words.append(Head(Word.BEGUN, number, ranks, value=running.digest))
            if ranks := barriers.done.to_say():
                words.append(Head(Word.DONE, number, ranks))
            over = barriers.done.passed
            if over:
                del self._barriers[number], self._running[number]
        if not self._right_over:
            for word in words:
                self._out[0].say(word)
        if over:
            running.handle.end()

    def _right_is_over(self) -> None:
        """It hung up: it may, once this rank has nothing more for it."""
        self._raise_if_undone("the right neighbour closed the connection")
        self._right_over = True

    def _raise_if_undone(self, why: str) -> None:
        with self._lock:
            if any(not running.plan.done for running in self._running.values()):
                raise PeerLostError(why)

    # ------------------------------------------------------------ inside

    def _barrier(self, number: int) -> _Barriers:
        found = self._barriers.get(number)
        if found is None:
            found = _Barriers(RingBarrier(self._ranks), RingBarrier(self._ranks))
            self._barriers[number] = found
        return found

    def _shut(self) -> None:
        """Wake whoever waits in a lane; descriptors stay until the thread is gone."""
        for lane_out in self._out:
            lane_out.shut()
        for lane_in in list(self._in.values()):
            lane_in.shut()

    def _lane(self, chunk: ChunkId) -> OutLane:
        return self._out[chunk.index % len(self._out)]

    def _check(self, work: Work, layout: Layout) -> None:
        reduces = work.kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)
        if reduces and work.arithmetic is None:
            raise UsageError("a reduction needs to know how chunks are combined")
        if not 0 <= work.root < self._ranks:
            raise UsageError(f"there is no rank {work.root} in a ring of {self._ranks}")
        if work.itemsize > self._chunk_bytes:
            raise UsageError(f"an element of {work.itemsize} bytes is larger than a chunk")
        start, stop = layout.segment(self._rank)
        takes = stop - start if work.kind is Kind.ALL_GATHER else work.count
        leaves = stop - start if work.kind is Kind.REDUCE_SCATTER else work.count
        gives_only = work.kind is Kind.BROADCAST and self._rank == work.root
        takes_only = work.kind is Kind.BROADCAST and self._rank != work.root
        if not takes_only and work.source.nbytes != takes * work.itemsize:
            raise UsageError(f"the source has {work.source.nbytes} bytes, not {takes} elements")
        if not gives_only and (
            work.target.nbytes != leaves * work.itemsize or work.target.readonly
        ):
            raise UsageError(
                f"the target has to be writable and to have {leaves} elements: it has "
                f"{work.target.nbytes} bytes"
            )

    def _keep_own(self, running: _Running) -> None:
        """Put into the target what no chunk brings."""
        work = running.work
        if work.kind is Kind.ALL_GATHER:
            start, stop = running.plan.layout.segment(self._rank)
            work.target[start * work.itemsize : stop * work.itemsize] = work.source
        elif self._ranks == 1 and work.kind is not Kind.BROADCAST:
            work.target[:] = work.source

    def _source(self, running: _Running, chunk: ChunkId) -> memoryview:
        return self._part(running, chunk, running.work.source, running.work.kind is Kind.ALL_GATHER)

    def _target(self, running: _Running, chunk: ChunkId) -> memoryview:
        only = running.work.kind is Kind.REDUCE_SCATTER
        return self._part(running, chunk, running.work.target, only)

    def _part(
        self, running: _Running, chunk: ChunkId, memory: memoryview, only_own: bool
    ) -> memoryview:
        layout, size = running.plan.layout, running.work.itemsize
        start, stop = layout.chunk(chunk)
        first = layout.segment(self._rank)[0] if only_own else 0
        return memory[(start - first) * size : (stop - first) * size]


def _head(operation: int, phase: Phase, chunk: ChunkId, data: memoryview) -> Head:
    return Head(Word.CHUNK, operation, chunk.index, phase, chunk.segment, nbytes=data.nbytes)
