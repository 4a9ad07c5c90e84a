"""A ring of ranks that moves and adds up chunks: the engine of :class:`RingOperation`.

One thread serves what comes from the left neighbour, chunk by chunk: it is added to or kept, and
sent on.  Chunks of several operations share the ring; none waits for another one's end.
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
from ftrain.comms.errors import FtrainError, PeerLostError, RemoteProtocolError, UsageError
from ftrain.comms.protocol.chunk_frames import Head, Word
from ftrain.comms.protocol.ring import ChunkId, Do, Kind, Layout, Phase, RingOperation
from ftrain.comms.protocol.ring_barrier import RingBarrier


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank brings into a collective.

    ``source`` and ``target`` are bytes: of all elements, or of the rank's own segment where a
    collective takes or leaves only that.  They may be the same memory.
    """

    kind: Kind
    count: int  # elements of the whole
    itemsize: int
    source: memoryview
    target: memoryview
    arithmetic: Arithmetic | None = None
    root: int = 0

    def digest(self) -> int:
        """Equal on all ranks, or they do not mean the same."""
        words = (self.kind, self.count, self.itemsize, self.root, self.arithmetic)
        return xxhash.xxh3_64_intdigest(repr(words).encode())


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
        self._in, self._out = lanes_in, lanes_out
        self._chunk_bytes = chunk_bytes
        self._startable = starts
        self._lock = threading.Lock()  # of all that follows
        self._running: dict[int, _Running] = {}
        self._barriers: dict[int, _Barriers] = {}
        self._begun = 0
        self._error: FtrainError | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._serve, args=(n,), name=f"ftrain-ring-{n}", daemon=True)
            for n in range(len(lanes_in))
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, work: Work) -> Handle:
        """Begin a collective; the memory is the ring's until the handle is over."""
        layout = Layout(work.count, self._ranks, max(1, self._chunk_bytes // work.itemsize))
        plan = RingOperation(work.kind, self._rank, layout, work.root)
        running = _Running(work, plan, work.digest())
        self._keep_own(running)
        with self._lock:
            if self._error is not None:
                running.handle.end(self._error)
                return running.handle
            number, self._begun = self._begun, self._begun + 1
            if self._ranks == 1:
                running.handle.end()
                return running.handle
            self._running[number] = running
            self._barrier(number).begun.reach()
        os.eventfd_write(self._wake, 1)
        return running.handle

    def close(self) -> None:
        """Leave the ring; what is under way ends with PeerLostError."""
        self._fail(PeerLostError("the ring was closed here"))
        for thread in self._threads:
            thread.join()
        os.close(self._wake)

    # ------------------------------------------------------------ the threads

    def _serve(self, number: int) -> None:
        lane = self._in[number]
        poll = select.poll()
        poll.register(lane.fileno(), select.POLLIN)
        if not number:
            poll.register(self._wake, select.POLLIN)
            for out in self._out:
                poll.register(out.fileno(), select.POLLRDHUP)
        try:
            while self._error is None:
                for fd, _ in poll.poll():
                    if fd == self._wake:
                        with suppress(BlockingIOError):
                            os.eventfd_read(self._wake)
                        self._speak()
                        self._start()
                    elif fd == lane.fileno():
                        self._take(lane, lane.next())
                    else:
                        raise PeerLostError("the right neighbour closed the connection")
        except FtrainError as error:
            self._fail(error)
        except (OSError, ValueError) as error:
            self._fail(RemoteProtocolError(f"the ring is broken: {error}"))

    def _take(self, lane: InLane, head: Head) -> None:
        if head.word is Word.CHUNK:
            self._take_chunk(lane, head)
            return
        if head.word is Word.HALT:
            raise PeerLostError("a neighbour ended the ring")
        with self._lock:
            barriers = self._barrier(head.operation)
            if head.word is Word.BEGUN:
                barriers.digest = head.value
                barriers.begun.heard(head.number)
            else:
                barriers.done.heard(head.number)
        self._speak()
        self._start()

    def _take_chunk(self, lane: InLane, head: Head) -> None:
        phase, chunk = Phase(head.phase), ChunkId(head.segment, head.number)
        with self._lock:
            running = self._running.get(head.operation)
            if running is None:
                raise RemoteProtocolError(f"there is no operation {head.operation}")
            plan = running.plan
            do = plan.arrived(phase, chunk)
            if plan.takes_out(phase, chunk):
                self._startable += 1
        self._do(lane, head, running, do, chunk)
        if plan.done:
            with self._lock:
                self._barrier(head.operation).done.reach()
            self._speak()
        self._start()

    def _do(self, lane: InLane, head: Head, running: _Running, do: Do, chunk: ChunkId) -> None:
        work, out = running.work, self._out[chunk.index % len(self._out)]
        if do is Do.NOTHING:
            return
        if do in (Do.KEEP, Do.KEEP_AND_SEND, Do.KEEP_AND_TELL):
            target = self._target(running, chunk)
            lane.take(target)
            if do is Do.KEEP_AND_SEND:
                out.send(head, target)  # the same chunk has the same checksum
            elif do is Do.KEEP_AND_TELL:
                out.say(_head(head.operation, Phase.SPENT, chunk, target[:0]))
            return
        assert work.arithmetic is not None
        own = self._source(running, chunk)
        came = lane.borrow()
        if do is Do.ADD_AND_SEND and not own.nbytes:
            out.send(_head(head.operation, Phase.REDUCE, chunk, own), own)
            return
        if do is Do.ADD_AND_SEND:
            room = out.room(own.nbytes)
            work.arithmetic.combine(came, own, room[: own.nbytes])
            lane.give_back()
            out.send_room(_head(head.operation, Phase.REDUCE, chunk, own), room)
            return
        target = self._target(running, chunk)
        work.arithmetic.combine(came, own, target)
        lane.give_back()
        work.arithmetic.finish(target, self._ranks)
        if do is Do.ADD_KEEP_AND_SEND:
            out.send(_head(head.operation, Phase.GATHER, chunk, target), target)

    def _start(self) -> None:
        """Put as much of one's own into the ring as may be."""
        while True:
            with self._lock:
                number = next((n for n in self._running if self._may_start(n)), None)
                if number is None or self._startable < 1:
                    return
                self._startable -= 1
                running = self._running[number]
                phase, chunk = running.plan.start()
            own = self._source(running, chunk)
            self._out[chunk.index % len(self._out)].send(_head(number, phase, chunk, own), own)

    def _may_start(self, number: int) -> bool:
        return bool(
            self._running[number].plan.left_to_start and self._barriers[number].begun.passed
        )

    def _speak(self) -> None:
        """Say to the right what there is to say about who has begun and who is done."""
        words: list[Head] = []
        with self._lock:
            for number, barriers in list(self._barriers.items()):
                running = self._running.get(number)
                if running is None:
                    continue
                if barriers.digest not in (0, running.digest):
                    raise UsageError(
                        f"the ranks do not mean the same by collective {number}: kind, number of "
                        "elements, dtype, reduction and root have to be equal on all of them"
                    )
                if ranks := barriers.begun.to_say():
                    words.append(Head(Word.BEGUN, number, ranks, value=running.digest))
                if ranks := barriers.done.to_say():
                    words.append(Head(Word.DONE, number, ranks))
        for word in words:
            self._out[0].say(word)
        with self._lock:
            over = [n for n, barriers in self._barriers.items() if barriers.done.passed]
            for number in over:
                del self._barriers[number]
                self._running.pop(number).handle.end()

    # ------------------------------------------------------------ inside

    def _barrier(self, number: int) -> _Barriers:
        found = self._barriers.get(number)
        if found is None:
            found = _Barriers(RingBarrier(self._ranks), RingBarrier(self._ranks))
            self._barriers[number] = found
        return found

    def _fail(self, error: FtrainError) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            running, self._running = list(self._running.values()), {}
        for lane_out in self._out:
            lane_out.close()
        for lane_in in self._in:
            lane_in.close()
        for one in running:
            one.handle.end(error)
        os.eventfd_write(self._wake, 1)

    def _keep_own(self, running: _Running) -> None:
        """Put into the target what no chunk brings."""
        work = running.work
        if work.kind is Kind.ALL_GATHER or (self._ranks == 1 and work.kind is not Kind.BROADCAST):
            own = running.plan.layout.segment(self._rank)
            start, stop = (edge * work.itemsize for edge in own)
            if work.kind is Kind.ALL_GATHER:
                work.target[start:stop] = work.source
            else:
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
