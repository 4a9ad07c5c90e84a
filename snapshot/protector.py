"""Makes a node's parity, round after round: the engine of :class:`Protection`.

One low-priority thread fetches what the others' images contribute, adds it up and hashes it; the
manager's event loop decides.  A round that is overtaken is given up at the next block.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.checkpoint.pace import Pace
from ftrain.comms.channel import Identity
from ftrain.comms.driver import Driver
from ftrain.comms.errors import (
    CorruptionError,
    FtrainError,
    MemoryShortError,
    PeerLostError,
    StateError,
)
from ftrain.comms.process import lower_priority
from ftrain.comms.protocol.messages import HeldParity, RoundId, VersionId
from ftrain.comms.protocol.ready import Address
from ftrain.snapshot.chunks import Source, node_row, own_images
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.parity import (
    NodeRow,
    ParityRecord,
    ParityWriter,
)
from ftrain.snapshot.parity_slots import ParitySlots
from ftrain.snapshot.protocol.keeping import Keeping
from ftrain.snapshot.protocol.messages import SetGroup
from ftrain.snapshot.protocol.placement import ParityGroup, chunk_bytes
from ftrain.snapshot.protocol.protection import Begin, Protected, Protection
from ftrain.snapshot.store import Place, SlotStore, places_of
from ftrain.snapshot.stripes import Summer, Term, parity_parts

TICK_S = 0.05
_NICE = 10  # training goes first
_RETRY_S = 0.05  # after a peer that is not there, or not that far
_TRIES = 100
_ROUNDS_PER_PROCESS = 1_000_000  # more than a manager gets to


class _Overtaken(Exception):
    """The round is given up."""


@dataclass(slots=True)
class _Job:
    """A round that is being worked on."""

    round: RoundId
    version: VersionId
    began_s: float
    over: threading.Event = field(default_factory=threading.Event)
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Made:
    """What a round took on this node."""

    version: VersionId
    nbytes: int  # of parity
    fetched_bytes: int
    seconds: float


class Protector:
    """This node's part in the protection of versions by parity on other nodes.

    Args:
        post: send a message to another node's manager soon.
        address_of: where another node's manager listens; "": unknown.
        on_made: all of this node's parity of a version is there.
        on_protected: every node's is.
        on_trouble: a sentence for the user.
    """

    def __init__(
        self,
        store: SlotStore,
        slots: ParitySlots,
        identity: Identity,
        secret: bytes,
        *,
        generation: int,
        bytes_per_s_max: float,
        post: Callable[[int, object], None],
        address_of: Callable[[int], str],
        on_made: Callable[[Made], None],
        on_protected: Callable[[VersionId], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._store = store
        self._slots = slots
        self._identity = identity
        self._secret = secret
        self._post = post
        self._address_of = address_of
        self._on_made = on_made
        self._on_protected = on_protected
        self._on_trouble = on_trouble
        self._pace = Pace(bytes_per_s_max)
        self._machine = Protection(identity.node, generation * _ROUNDS_PER_PROCESS)
        self._driver: Driver[None] = Driver(
            self._machine, persist=lambda _: None, send=self._send, perform=self._perform
        )
        self._keeping = Keeping()
        self._pins: dict[RoundId, list[Place]] = {}
        self._group = ParityGroup((), 0)
        self._epoch = 0
        self._job: _Job | None = None
        self._waiting: Begin | None = None  # until what it is of was rebuilt here
        self._rebuilding: VersionId | None = None
        self._told: set[type] = set()
        self._closed = False
        self._sources: dict[int, Source] = {}  # of the thread
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "ftrain-parity", lambda: lower_priority(_NICE))
        self._ticking: asyncio.Task[None] | None = None

    def adopted(self) -> None:
        """What an earlier manager left is in the slots and the store: keep all of it."""
        for held in self._slots.held():
            self._keeping.found(held.round, held.version)
            self._pin(held.round, held.version)

    @property
    def leads(self) -> bool:
        """Whether this node is the one that has to be told of :meth:`held_by_all`."""
        return self._machine.leads

    def held(self) -> tuple[HeldParity, ...]:
        """Every round whose parity is whole here."""
        return self._slots.held()

    def set_group(self, group: SetGroup) -> None:
        """Another membership, or the same told again."""
        self._drop(self._keeping.new_group(group.epoch, group.kept))
        if group.epoch <= self._epoch:
            return
        self._epoch = group.epoch
        self._give_up_job()
        self._group = ParityGroup(group.guards, group.parity)
        self._rebuilding = group.base if group.rebuild is not None else None
        nodes = [self._identity.node, *(peer.node for peer in group.peers)]
        protects = self._group.parity > 0
        # Without parity of before it is not known whether the base needs any.
        base = group.base if group.kept is not None else None
        self._machine.new_group(
            group.epoch, nodes if protects else [], self._identity.incarnation, base
        )
        if protects and self._ticking is None:
            self._ticking = self._loop.create_task(self._tick())
            self._ticking.add_done_callback(self._ticking_ended)
        self._driver.pump()

    def rebuilt(self) -> None:
        """What :class:`SetGroup` wanted to be rebuilt is there, or never will be."""
        self._rebuilding = None
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._start(waiting)

    def held_by_all(self, version: VersionId) -> None:
        """Every node of the group holds ``version``, which needs parity."""
        if not self._keeping.frozen:
            self._machine.held_by_all(version)
            self._driver.pump()

    def withdrawn(self, version: VersionId) -> None:
        """An image of ``version`` here turned out to be wrong: nobody need protect it."""
        job = self._job
        if job is not None and job.version == version:
            self._refuse(job.round.number)

    def freeze(self) -> None:
        """What this node holds is being said for the last time before the next group."""
        self._keeping.freeze()
        self._give_up_job()

    def receive(self, message: object) -> None:
        """Another manager's word."""
        if not self._keeping.frozen:
            self._driver.receive(message)

    def close(self) -> None:
        """Stop."""
        self._closed = True
        if self._ticking is not None:
            self._ticking.cancel()
        self._give_up_job()
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ the machine's side

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if not self._keeping.frozen:
                self._driver.tick()

    def _ticking_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._tell(StateError(f"rounds go on no more: {error!r}"))

    def _send(self, address: Address, message: object) -> None:
        if isinstance(address, int):
            self._post(address, message)

    def _perform(self, effect: object) -> None:
        if isinstance(effect, Begin):
            self._begin(effect)
        elif isinstance(effect, Protected):
            self._drop(self._keeping.over(effect.round))
            self._on_protected(effect.version)

    def _begin(self, begin: Begin) -> None:
        self._give_up_job()
        self._drop(self._keeping.begin(begin.round, begin.version, begin.first, begin.over))
        if self._rebuilding == begin.version:
            self._waiting = begin
        else:
            self._start(begin)

    def _start(self, begin: Begin) -> None:
        round_ = RoundId(self._epoch, begin.round)
        if self._keeping.is_whole(round_):
            self._machine.done(begin.round)  # an earlier manager made it
            self._driver.pump()
            return
        if not self._pin(round_, begin.version):
            self._refuse(begin.round)
            return
        try:
            own = node_row(self._store, self._identity.node, begin.version)
            self._slots.take(round_)
        except (StateError, MemoryShortError) as error:  # damaged since it was pinned, say
            self._tell(error)
            self._refuse(begin.round)
            return
        job = self._job = _Job(round_, begin.version, time.monotonic())
        self._loop.create_task(self._work(job, own))

    async def _work(self, job: _Job, own: NodeRow) -> None:
        try:
            writer = await self._loop.run_in_executor(self._thread, self._make, job, own)
        except _Overtaken:
            return
        except Exception as error:  # a bug as well costs this round, and no more
            if job is self._job and not self._closed:
                self._tell(error)
                self._refuse(job.round.number)
            return
        if job is not self._job:
            return
        self._job = None
        self._slots.sealed(writer.seal())
        self._keeping.whole(job.round.number)
        record = writer.record
        nbytes = record.chunk_bytes * len(record.rows)
        took_s = time.monotonic() - job.began_s
        self._on_made(Made(job.version, nbytes, job.sent_bytes, took_s))
        self._machine.done(job.round.number)
        self._driver.pump()

    def _refuse(self, number: int) -> None:
        self._give_up_job()
        self._machine.unable(number)
        self._driver.pump()

    def _give_up_job(self) -> None:
        job, self._job, self._waiting = self._job, None, None
        if job is not None:
            job.over.set()
            for source in list(self._sources.values()):
                source.interrupt()

    def _pin(self, round_: RoundId, version: VersionId) -> bool:
        """Keep this node's images of a version for a round; False if they are not whole here."""
        if round_ in self._pins:
            return True
        try:
            places = places_of(own_images(self._store, version))
        except StateError:
            return False
        self._store.custody.pin(places)
        self._pins[round_] = places
        return True

    def _drop(self, rounds: list[RoundId]) -> None:
        for round_ in rounds:
            self._slots.drop(round_)
            self._store.custody.unpin(self._pins.pop(round_, []))

    def _tell(self, error: Exception) -> None:
        """Each kind of reason once."""
        kind = type(error)
        if kind not in self._told:
            self._told.add(kind)
            why = str(error) if isinstance(error, FtrainError | OSError) else repr(error)
            self._on_trouble(f"versions are not protected as they should be: {why}")

    # ------------------------------------------------------------ the thread's side

    def _make(self, job: _Job, own: NodeRow) -> ParityWriter:
        """Fetch and add up; MemoryShortError, or what the others' nodes refuse for too long."""
        for tries in range(_TRIES):
            try:
                return self._try(job, own)
            except (PeerLostError, StateError, CorruptionError):
                if tries == _TRIES - 1:
                    raise
                self._raise_if_over(job)
            if job.over.wait(_RETRY_S):
                raise _Overtaken
        raise AssertionError("the last try returns or raises")

    def _try(self, job: _Job, own: NodeRow) -> ParityWriter:
        rows = [
            own if node == own.node else self._source(node).bundle(job.version)
            for node in self._group.nodes
        ]
        data = self._group.data
        record = ParityRecord(
            run_id=self._identity.run_id,
            epoch=job.round.epoch,
            round=job.round.number,
            version=job.version,
            holder=own.node,
            incarnation=self._identity.incarnation,
            parity=self._group.parity,
            chunk_bytes=chunk_bytes([row.nbytes for row in rows], data, PAGE_BYTES),
            nodes=tuple(rows),
        )
        self._raise_if_over(job)
        writer = self._slots.write(record)

        def before(nbytes: int) -> None:
            self._raise_if_over(job)
            self._pace.wait(nbytes)
            job.sent_bytes += nbytes

        choice = engine()
        if choice.slow:
            slow = StateError(f"nothing faster is there than {choice.engine.name}")
            self._loop.call_soon_threadsafe(self._tell, slow)
        summer = Summer(choice.engine, before)
        try:
            for number, (stripe, row) in enumerate(self._group.held_by(own.node)):
                terms = self._terms(job, writer.record, stripe, row)
                summer.fill(
                    writer.rows[number],
                    terms,
                    lambda block, number=number: writer.finish_block(number, block),  # type: ignore[misc]
                )
        except BaseException:
            for source in self._sources.values():  # what they still send is of no use
                source.close()
            raise
        return writer

    def _terms(self, job: _Job, record: ParityRecord, stripe: int, row: int) -> list[Term]:
        terms = []
        for part in parity_parts(record, stripe, row):
            chunk = self._group.stripes_of(part.node).index(stripe)
            start = chunk * record.chunk_bytes
            present = min(max(record.of(part.node).nbytes - start, 0), record.chunk_bytes)
            if present and part.factor:
                source = self._source(part.node)
                opened = source.chunk(job.version, chunk, record.chunk_bytes, present)
                terms.append(Term(part.factor, opened))
        return terms

    def _source(self, node: int) -> Source:
        address = self._address_of(node)
        source = self._sources.get(node)
        if source is None or source.address != address:
            if source is not None:
                source.close()
            source = Source(node, address, self._identity, self._secret)
            self._sources[node] = source
        return source

    @staticmethod
    def _raise_if_over(job: _Job) -> None:
        if job.over.is_set():
            raise _Overtaken
