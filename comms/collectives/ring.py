"""A ring of ranks that moves and adds up chunks: the engine of :class:`RingOperation`.

One thread serves what comes from the left neighbour, chunk by chunk: it is added to or kept, and
sent on.  Chunks of several operations share the ring; none waits for another one's end.

An operation has one or more *parts* (tensors, say the buckets of a step's gradients): each begins
on its own, and the operation is over when all ranks have the whole result of all parts.

A ring that breaks stays broken: whoever made it is told, has it :meth:`Ring.halt`, and learns what
was under way and how much of it is here.  What becomes of that is not the ring's business.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import xxhash

from ftrain.comms.collectives.codec import Codec, Plain, codec_for
from ftrain.comms.collectives.lanes import InLane, OutLane, garbled, lost
from ftrain.comms.collectives.quantise import Scratch
from ftrain.comms.collectives.work import Handle, Work
from ftrain.comms.errors import (
    FtrainError,
    PeerLostError,
    RemoteProtocolError,
    StateError,
    UsageError,
)
from ftrain.comms.protocol.chunk_frames import Head, Word
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.ring import (
    ChunkId,
    Do,
    Layout,
    MendOperation,
    OpId,
    Phase,
    RingOperation,
)
from ftrain.comms.protocol.ring_barrier import RingBarrier

_AHEAD_MAX = 65536  # parts that a neighbour may have begun before this rank
_UNEQUAL = (
    "the ranks do not mean the same by a collective: kind, number of elements, dtype, reduction, "
    "quantisation, root and size of chunks have to be equal on all of them"
)


@dataclass(slots=True)
class Part:
    """One tensor of an operation that is under way."""

    work: Work
    rank: int  # in the ring in which it began
    layout: Layout
    plan: RingOperation | MendOperation
    digest: int
    codec: Codec
    saved: list[tuple[int, int]] = field(default_factory=list)  # bytes of the target, in the backup

    def held(self) -> list[bool]:
        """For each chunk, whether its result is here."""
        return [self.plan.holds(chunk) for chunk in self.layout.ids()]

    def restore(self) -> None:
        """Put the inputs back that the result took the place of."""
        backup = self.work.backup
        if backup is not None:
            for start, stop in self.saved:
                self.work.target[start:stop] = backup[start:stop]
        self.saved.clear()


@dataclass(slots=True)
class Operation:
    """What is under way."""

    over: Callable[[], None]
    parts: dict[int, Part] = field(default_factory=dict)
    complete: bool = False  # its last part has begun

    @property
    def whole(self) -> bool:
        """Whether all of its result is here, and nothing has to be passed on."""
        return self.complete and all(part.plan.done for part in self.parts.values())


@dataclass(slots=True)
class _Begun:
    """Of one part; words may come before it is begun here."""

    barrier: RingBarrier
    digest: int = 0  # that the left neighbour says


class Ring:
    """One rank's place in a ring.

    Every rank brings in the same operations; those without an :class:`OpId` in the same order.

    Args:
        rank: in the ring.
        lanes_in: from the left neighbour; empty with ``lanes_out`` when the ring has one rank.
        chunk_bytes: at most; the same on all ranks.
        starts: chunks that this rank may have put in and not yet seen taken out.
        failed: called once, by the ring's thread, when it breaks.  By default whatever is under way
            then ends with the error.
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
        failed: Callable[[FtrainError], None] | None = None,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.moved = 0  # chunks and words that came so far
        self._in = {lane.fileno(): lane for lane in lanes_in}
        self._lanes: tuple[InLane | OutLane, ...] = (*lanes_in, *lanes_out)
        self._out = list(lanes_out)
        self._left = lanes_in[0].peer if lanes_in else Identity("alone", "rank", rank, 0)
        self._chunk_bytes = chunk_bytes
        self._startable = starts
        self._failed = failed
        self._scratch = Scratch()  # of the ring's thread
        self._right_over = False  # it has hung up, which it may once it needs nothing more
        self._lock = threading.Lock()  # of what follows, which :meth:`put` changes as well
        self._running: dict[OpId, Operation] = {}
        self._begun: dict[tuple[OpId, int], _Begun] = {}
        self._done: dict[OpId, RingBarrier] = {}
        self._numbered = 0  # operations that :meth:`begin` gave a number
        self._handles: dict[OpId, Handle] = {}
        self._error: FtrainError | None = None
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="ftrain-ring", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ from any thread

    def begin(self, work: Work) -> Handle:
        """Begin an operation of one part, numbered in the order of these calls; the memory is the
        ring's until the handle is over.

        Raises UsageError for what can't be one.
        """
        handle = Handle()
        with self._lock:
            op, self._numbered = OpId(0, self._numbered), self._numbered + 1
            self._handles[op] = handle
        try:
            self.put(op, 0, work, last=True, over=lambda: self._end(op))
        except UsageError:
            del self._handles[op]
            raise
        with self._lock:
            error = self._error
        if error is not None:
            self._end(op, error)
        return handle

    def put(self, op: OpId, part: int, work: Work, *, last: bool, over: Callable[[], None]) -> None:
        """Begin a part of an operation.  On a ring that is broken it waits to be told of.

        ``over`` is called, by the ring's thread, when all ranks have all of the operation.

        Raises UsageError for what can't be one.
        """
        layout = Layout(work.count, self.ranks, max(1, self._chunk_bytes // work.itemsize))
        work.check(self.rank, layout, self._chunk_bytes)
        plan = RingOperation(work.kind, self.rank, layout, work.root)
        codec = codec_for(work.kind, work.arithmetic, work.quantise, self._scratch)
        digest = xxhash.xxh3_64_intdigest(repr((work.meaning(), self._chunk_bytes)).encode())
        made = Part(work, self.rank, layout, plan, digest, codec)
        if self.ranks == 1 and work.in_place:
            self._save(made, 0, work.target.nbytes)
        work.keep_own(self.rank, layout)
        self._put(op, part, made, last, over)

    def mend(
        self,
        op: OpId,
        number: int,
        part: Part,
        sources: Mapping[ChunkId, int],
        *,
        last: bool,
        over: Callable[[], None],
    ) -> None:
        """Go on with a part that another ring left undone: its ranks hold all of its result."""
        lacks = {chunk for chunk in sources if not part.plan.holds(chunk)}
        plan = MendOperation(self.rank, self.ranks, sources, lacks)
        made = Part(part.work, part.rank, part.layout, plan, 0, Plain(None), part.saved)
        self._put(op, number, made, last, over)

    def withdraw(self, op: OpId) -> bool:
        """Take back what not all ranks have begun; False when all have, as far as is known here."""
        with self._lock:
            parts = self._running[op].parts
            if any(self._begun[op, number].barrier.passed for number in parts):
                return False
            del self._running[op]
            return True

    def waits(self) -> tuple[bool, bool]:
        """Whether parts wait for other ranks to begin them, and whether some are under way."""
        with self._lock:
            passed = [
                self._begun[op, number].barrier.passed
                for op, operation in self._running.items()
                for number in operation.parts
            ]
        return not all(passed), any(passed)

    def traffic(self) -> int:
        """Bytes that the kernel has moved for this ring, both ways: grows while anything moves."""
        return sum(lane.traffic() for lane in self._lanes)

    def halt(self) -> dict[OpId, Operation]:
        """Stop at once, and say what was under way; the memory is the ring's no more."""
        with self._lock:
            self._error = self._error or PeerLostError("the ring was halted")
        self.close()
        return self._running

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

    def _put(self, op: OpId, number: int, part: Part, last: bool, over: Callable[[], None]) -> None:
        with self._lock:
            operation = self._running.setdefault(op, Operation(over))
            operation.parts[number] = part
            operation.complete = last
            self._barriers(op, number).barrier.reach()
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def _end(self, op: OpId, error: FtrainError | None = None) -> None:
        handle = self._handles.pop(op, None)
        if handle is not None:
            handle.end(error)

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
            in_order = self._closed and not self._running
            closed = self._closed
        with suppress(FtrainError):
            if isinstance(error, UsageError):
                self._out[0].say(Head(Word.HALT))
            elif in_order:
                for lane in self._out:
                    lane.say(Head(Word.LEAVE))
        if not in_order:
            self._shut()
        if self._failed is None:
            for op in list(self._handles):
                self._end(op, error)
        elif not closed:
            self._failed(error)

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
                    if not self._hear_lane(self._in[fd]):
                        poll.unregister(fd)
                        del self._in[fd]
                elif event & ~select.POLLOUT:
                    self._right_over = True  # it may, once this rank has nothing more for it
                    self._raise_if_undone(outs[fd], "it closed the connection")
                    poll.unregister(fd)
                    del outs[fd]
                else:
                    outs[fd].catch_up()

    def _hear_lane(self, lane: InLane) -> bool:
        """Take what comes next; PeerGarbledError, which says whose it is, for garbage."""
        try:
            return self._take(lane, lane.next())
        except RemoteProtocolError as error:
            raise garbled(lane.peer, str(error)) from None

    def _take(self, lane: InLane, head: Head) -> bool:
        """False when nothing follows on this lane."""
        self.moved += 1
        if head.word is Word.CHUNK:
            self._take_chunk(lane, head)
            return True
        if head.word is Word.LEAVE:
            self._raise_if_undone(lane, "it left in the middle of a collective")
            lane.close()
            return False
        if head.word is Word.HALT:
            raise self._unequal()
        if head.word not in (Word.BEGUN, Word.DONE):
            raise RemoteProtocolError(f"{head.word.name} came in the middle of a ring's life")
        self._hear(head)
        self._start()
        self._speak(head.op)
        return True

    def _hear(self, head: Head) -> None:
        with self._lock:
            if max(len(self._begun), len(self._done)) > _AHEAD_MAX:
                raise RemoteProtocolError(f"words came about more than {_AHEAD_MAX} parts ahead")
            if head.word is Word.BEGUN:
                begun = self._barriers(head.op, head.part)
                begun.digest = head.value
                barrier = begun.barrier
            else:
                barrier = self._done_of(head.op)
            with _of_the_peer():
                barrier.heard(head.number)

    def _take_chunk(self, lane: InLane, head: Head) -> None:
        with self._lock:
            operation = self._running.get(head.op)
            part = operation.parts.get(head.part) if operation is not None else None
        if part is None:
            raise RemoteProtocolError(f"a chunk came of {head.op}, which is not under way")
        chunk = ChunkId(head.segment, head.number)
        with _of_the_peer():
            phase = Phase(head.phase)
            do = part.plan.do_with(phase, chunk)
        self._do(lane, head, part, do, chunk)
        part.plan.arrived(phase, chunk)  # not before: who is cut off in the middle has only a half
        self._startable += part.plan.takes_out(phase, chunk)
        self._start()
        if part.plan.done:
            self._speak(head.op)

    def _do(self, lane: InLane, head: Head, part: Part, do: Do, chunk: ChunkId) -> None:
        work, codec, out = part.work, part.codec, self._lane(chunk)
        keeps = do in (Do.KEEP, Do.KEEP_AND_SEND, Do.KEEP_AND_TELL)
        own = work.target[:0] if keeps else work.source_of(part.rank, part.layout, chunk)
        held = work.held_of(part.rank, part.layout, chunk) if keeps else own
        expected = 0 if do is Do.NOTHING else codec.wire_bytes(held.nbytes)
        if head.nbytes != expected:
            raise RemoteProtocolError(f"a chunk of {head.nbytes} bytes came instead of {expected}")
        if do is Do.NOTHING:
            return
        if do is Do.ADD_AND_SEND:
            codec.add_and_send(lane, own, out, replace(head, value=0))
            return
        if work.in_place:
            self._save(part, *work.target_range(part.rank, part.layout, chunk))
        if keeps:  # the same chunk has the same checksum
            codec.keep(lane, held, out if do is Do.KEEP_AND_SEND else None, head)
            if do is Do.KEEP_AND_TELL:
                out.say(_head(head.op, head.part, Phase.SPENT, chunk, 0))
        else:
            target = work.target_of(part.rank, part.layout, chunk)
            onward = out if do is Do.ADD_KEEP_AND_SEND else None
            sent = replace(head, phase=Phase.GATHER, value=0)
            codec.add_and_keep(lane, own, target, self.ranks, onward, sent)

    def _save(self, part: Part, start: int, stop: int) -> None:
        """Before these bytes of the target are overwritten for the first time."""
        backup = part.work.backup
        if backup is not None and stop > start and (start, stop) not in part.saved:
            backup[start:stop] = part.work.target[start:stop]
            part.saved.append((start, stop))

    def _go_on(self) -> None:
        """Parts were begun: start and say what can be."""
        if not self._in or self._right_over:
            for lane in self._lanes[-1:] if self._in else self._lanes[:1]:
                self._raise_if_undone(lane, "it has left the ring")
        self._start()
        with self._lock:
            ops = list(self._running)
        for op in ops:
            self._speak(op)

    def _start(self) -> None:
        """Put as much of one's own into the ring as may be."""
        while self._startable > 0:
            with self._lock:
                found = self._startable_part()
            if found is None:
                return
            op, number, part = found
            self._speak(op)  # ranks that do not mean the same hear of it before a chunk comes
            self._startable -= 1
            phase, chunk = part.plan.start()
            mends = isinstance(part.plan, MendOperation)
            read = part.work.held_of if mends else part.work.source_of
            own = read(part.rank, part.layout, chunk)
            head = _head(op, number, phase, chunk, part.codec.wire_bytes(own.nbytes))
            part.codec.send(own, self._lane(chunk), head)
            if part.plan.done:
                self._speak(op)

    def _startable_part(self) -> tuple[OpId, int, Part] | None:
        """Of what may put a chunk into the ring that with the highest priority, or the oldest."""
        best: tuple[OpId, int, Part] | None = None
        for op, operation in self._running.items():
            for number, part in operation.parts.items():
                if not part.plan.left_to_start or not self._begun[op, number].barrier.passed:
                    continue
                if best is None or part.work.priority > best[2].work.priority:
                    best = op, number, part
        return best

    def _speak(self, op: OpId) -> None:
        """Say to the right what there is to say about an operation, and end it when it is over."""
        words: list[Head] = []
        with self._lock:
            operation = self._running.get(op)
            if operation is None:  # not begun here, or over since
                return
            for number, part in operation.parts.items():
                begun = self._begun[op, number]
                if begun.digest not in (0, part.digest):
                    raise self._unequal()
                if ranks := begun.barrier.to_say():
                    words.append(Head(Word.BEGUN, op, number, ranks, value=part.digest))
            done = self._done_of(op)
            if operation.whole and all(
                self._begun[op, number].barrier.passed for number in operation.parts
            ):
                done.reach()
            if ranks := done.to_say():
                words.append(Head(Word.DONE, op, 0, ranks))
            if over := done.passed:
                del self._running[op], self._done[op]
                for number in operation.parts:
                    del self._begun[op, number]
        if not self._right_over and self._out:
            for word in words:
                self._out[0].say(word)
        if over:
            operation.over()

    def _unequal(self) -> FtrainError:
        """What the left neighbour says of an operation is not what is meant here."""
        if self._failed is None:
            return UsageError(_UNEQUAL)
        return garbled(self._left, _UNEQUAL)  # whoever made the ring may go on without one of them

    def _raise_if_undone(self, lane: InLane | OutLane, why: str) -> None:
        with self._lock:
            if any(self._needs_all(op, operation) for op, operation in self._running.items()):
                raise lost(lane.peer, why)

    def _needs_all(self, op: OpId, operation: Operation) -> bool:
        """Whether an operation can't do without a neighbour that has left.

        In a ring that somebody watches over, what that one has not begun waits to be withdrawn:
        it left for the next ring, and the word to follow it is on its way.
        """
        if operation.whole:
            return False
        begun = [self._begun[op, number].barrier.passed for number in operation.parts]
        return self._failed is None or any(begun)

    # ------------------------------------------------------------ inside

    def _barriers(self, op: OpId, part: int) -> _Begun:
        found = self._begun.get((op, part))
        if found is None:
            found = self._begun[op, part] = _Begun(RingBarrier(self.ranks))
        return found

    def _done_of(self, op: OpId) -> RingBarrier:
        found = self._done.get(op)
        if found is None:
            found = self._done[op] = RingBarrier(self.ranks)
        return found

    def _shut(self) -> None:
        """Wake whoever waits in a lane; descriptors stay until the thread is gone."""
        for lane in self._lanes:
            lane.shut()

    def _lane(self, chunk: ChunkId) -> OutLane:
        return self._out[chunk.index % len(self._out)]


@contextmanager
def _of_the_peer() -> Iterator[None]:
    """What is wrong in there came from the neighbour."""
    try:
        yield
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from None


def _head(op: OpId, part: int, phase: Phase, chunk: ChunkId, nbytes: int) -> Head:
    return Head(Word.CHUNK, op, part, chunk.index, phase, chunk.segment, nbytes=nbytes)
