"""Looks in the background whether what is protected is still as it was, and mends what is not.

What is wanted of the newest round of parity is compared with its digests now and then: this node's
images and its parity.  A damaged chunk is made anew from what the others hold, so that damage in
one place is gone before there is damage in another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from ftrain.checkpoint.files import page_buffer
from ftrain.comms.channel import Identity
from ftrain.comms.errors import CorruptionError, FtrainError, StateError
from ftrain.comms.process import lower_priority
from ftrain.comms.protocol.messages import Rebuild, RoundId
from ftrain.snapshot.bundle import Bundle
from ftrain.snapshot.chunks import ChunkServer, RemoteChunk, Source, sound_answer
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.parity import BLOCK_BYTES, ParityReader, ParityRecord
from ftrain.snapshot.parity_slots import ParitySlots
from ftrain.snapshot.protocol.messages import SoundAnswer
from ftrain.snapshot.remains import Remains
from ftrain.snapshot.store import Image
from ftrain.snapshot.stripes import Part, Summer, Term, lost_parts, parity_parts

_T = TypeVar("_T")
_NICE = 15  # behind the making of parity


class Scrubber:
    """One look after the other, ``every_s`` apart; 0: none.

    Args:
        chunks: has this node's images.
        address_of: where another node's manager listens.
        on_mended: a sentence for the user, about damage that is no more.
        on_trouble: ... about damage that still is.
    """

    def __init__(
        self,
        slots: ParitySlots,
        chunks: ChunkServer,
        identity: Identity,
        secret: bytes,
        *,
        every_s: float,
        address_of: Callable[[int], str],
        on_mended: Callable[[str], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._slots = slots
        self._chunks = chunks
        self._identity = identity
        self._secret = secret
        self._every_s = every_s
        self._address_of = address_of
        self._on_mended = on_mended
        self._on_trouble = on_trouble
        self._told = ""
        self._thread = ThreadPoolExecutor(1, "ftrain-scrub", lambda: lower_priority(_NICE))
        self._task: asyncio.Task[None] | None = None
        if every_s > 0:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._look()
            except Exception as error:  # a bug as well: the next look may find none
                why = str(error) if isinstance(error, FtrainError | OSError) else repr(error)
                if why != self._told:  # it is found again every time
                    self._told = why
                    self._on_trouble(f"what is protected is damaged and can't be mended: {why}")

    async def _look(self) -> None:
        held = self._slots.held()
        if not held:
            return
        reader, version = self._slots.reader(held[-1].round), held[-1].version
        try:
            with self._chunks.pinned(version) as images:
                answer = await self._do(partial(sound_answer, reader, images))
                if not answer.damage or not self._is_current(reader):
                    return
                await self._mend(reader, images, answer)
        except StateError:
            if self._is_current(reader):
                raise

    async def _mend(
        self, reader: ParityReader, images: Sequence[Image], answer: SoundAnswer
    ) -> None:
        record = reader.record
        work = _Mending(self, record)
        try:
            await self._do(work.ask)
            sizes = {row.rank: row.nbytes for row in record.of(record.holder).images}
            writable = {i.rank: self._chunks.writable(i)[: sizes[i.rank]] for i in images}
            bundle = Bundle(writable, record.chunk_bytes)
            for chunk in set(range(record.group.data)) - set(answer.chunks):
                terms, present = (
                    await self._do(partial(work.of_chunk, chunk)),
                    bundle.present(chunk),
                )
                await self._fill(reader, terms, present, partial(bundle.pieces, chunk))
            for number, row in enumerate(record.rows):
                if (row.stripe, row.row) in answer.rows:
                    continue
                terms = await self._do(partial(work.of_row, row.stripe, row.row))
                pieces = partial(_pieces, self._slots.writable(work.round, number))
                await self._fill(reader, terms, record.chunk_bytes, pieces)
        finally:
            work.close()
        again = await self._do(partial(sound_answer, reader, images))
        if not self._is_current(reader):
            return
        if again.damage:
            raise CorruptionError("; ".join(again.damage))
        others = ", ".join(str(n) for n in record.group.nodes if n != record.holder)
        self._on_mended(f"{' and '.join(answer.damage)}; mended from what nodes {others} hold")

    async def _fill(
        self,
        reader: ParityReader,
        terms: Sequence[Term],
        nbytes: int,
        pieces: Callable[[int, int], Iterable[memoryview]],
    ) -> None:
        """Write what differs from the sum of ``terms``: here, where slots are given to others."""
        scratch, summer = page_buffer(BLOCK_BYTES), Summer(engine().engine)
        for start in range(0, nbytes, BLOCK_BYTES):
            block = scratch[: min(BLOCK_BYTES, nbytes - start)]
            await self._do(partial(summer.fill_next, block, start, terms))
            if not self._is_current(reader):
                raise StateError("the round is over")
            done = 0
            for piece in pieces(start, start + len(block)):
                right = block[done : done + len(piece)]
                if piece != right:
                    piece[:] = right
                done += len(piece)

    def _is_current(self, reader: ParityReader) -> bool:
        record = reader.record
        try:
            return self._slots.reader(RoundId(record.epoch, record.round)) is reader
        except StateError:
            return False

    def source(self, node: int) -> Source:
        """A connection to another node's manager."""
        return Source(node, self._address_of(node), self._identity, self._secret)

    async def _do(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class _Mending:
    """The other nodes of a round, as the thread asks them."""

    def __init__(self, scrubber: Scrubber, record: ParityRecord) -> None:
        self.round = RoundId(record.epoch, record.round)
        self._record = record
        others = [node for node in record.group.nodes if node != record.holder]
        self._sources = {node: scrubber.source(node) for node in others}
        self._answers: Mapping[int, SoundAnswer] = {}

    def close(self) -> None:
        """End every connection."""
        for source in self._sources.values():
            source.close()

    def ask(self) -> None:
        """What the others have that is sound."""
        self._answers = {
            node: source.sound(self.round, self._record.holder)
            for node, source in self._sources.items()
        }

    def of_chunk(self, chunk: int) -> list[Term]:
        """What a chunk of this node's images is the sum of."""
        record = self._record
        order = Rebuild(self.round, record.holder, record.holder)
        remains = Remains(order, record.version, self._answers)
        stripe = record.group.stripes_of(record.holder)[chunk]
        present = record.of(record.holder).nbytes - chunk * record.chunk_bytes
        parts = lost_parts(record, record.holder, chunk, remains.there(stripe))
        nbytes = min(present, record.chunk_bytes)
        return [Term(part.factor, self._open(part, nbytes)) for part in parts if part.factor]

    def of_row(self, stripe: int, row: int) -> list[Term]:
        """What a chunk of this node's parity is the sum of; StateError if that is damaged."""
        record = self._record
        parts = parity_parts(record, stripe, row)
        for part in parts:
            chunk = record.group.stripes_of(part.node).index(stripe)
            if chunk not in self._answers[part.node].chunks:
                raise StateError(f"node {part.node}'s images are damaged as well")
        return [Term(part.factor, self._open(part, record.chunk_bytes)) for part in parts]

    def _open(self, part: Part, nbytes: int) -> RemoteChunk:
        record, source = self._record, self._sources[part.node]
        if part.row >= 0:
            return source.row(self.round, part.stripe, part.row, nbytes)
        chunk = record.group.stripes_of(part.node).index(part.stripe)
        present = record.of(part.node).nbytes - chunk * record.chunk_bytes
        return source.chunk(record.version, chunk, record.chunk_bytes, max(0, min(nbytes, present)))


def _pieces(row: memoryview, start: int, stop: int) -> list[memoryview]:
    return [row[start:stop]]
