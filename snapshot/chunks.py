"""Chunks of images and of parity, from one node's manager to another's: both ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from ftrain.checkpoint.header import sealed_header
from ftrain.checkpoint.image import ImageReader
from ftrain.comms.channel import Channel, Identity, connect_blocking
from ftrain.comms.channel_blocking import BlockingChannel
from ftrain.comms.errors import (
    CorruptionError,
    FtrainError,
    PeerLostError,
    RemoteProtocolError,
    StateError,
)
from ftrain.comms.process import lower_priority
from ftrain.comms.protocol.messages import RoundId, VersionId
from ftrain.snapshot.bundle import Bundle
from ftrain.snapshot.parity import (
    BLOCK_BYTES,
    ImageRow,
    NodeRow,
    ParityReader,
    ParityRecord,
    encode_record,
)
from ftrain.snapshot.parity_slots import ParitySlots
from ftrain.snapshot.protocol.messages import (
    BundleAnswer,
    BundleRequest,
    ChunkAnswer,
    ChunkRequest,
    RowRequest,
    SoundAnswer,
    SoundRequest,
)
from ftrain.snapshot.store import Image, SlotStore, places_of

_TIMEOUT_S = 10.0  # without anything moving
_SOUND_S = 600.0  # while all that a node holds is compared with its digests
_DAMAGE_MAX = 16  # told in one answer
_SENDERS = 256  # one for each node that asks: who waits for one of us may hold up another
_NICE = 10  # training goes first

_Answer = TypeVar("_Answer")
Request = BundleRequest | ChunkRequest | RowRequest | SoundRequest  # of a manager, to another


def own_images(store: SlotStore, version: VersionId) -> list[Image]:
    """The whole images of a version on this node, in rising order of ranks; StateError if they are
    not all here, or no longer say of themselves that they are whole."""
    return [image for image, _ in _own(store, version)]


def _own(store: SlotStore, version: VersionId) -> list[tuple[Image, str]]:
    """The same, each with the digest of its header."""
    try:
        return [(image, _digest(image)) for image in _sealed_images(store, version)]
    except CorruptionError as error:
        raise StateError(str(error)) from None


def node_row(store: SlotStore, node: int, version: VersionId) -> NodeRow:
    """What of a version is protected on this node; raises as :func:`own_images` does.

    Only headers are looked at, as the index of a large model takes longer to read than all the
    rest; what was damaged behind a sound header is found by the scrubber.
    """
    rows = [(i.rank, i.view.nbytes, digest) for i, digest in _own(store, version)]
    return NodeRow(node, tuple(ImageRow(*row) for row in rows))


def _sealed_images(store: SlotStore, version: VersionId) -> list[Image]:
    """The same as they were once sealed, whatever became of them."""
    ranks = {rank for rank, _ in store.custody.sealed(version)}
    if not ranks or not ranks.issuperset(store.custody.local_ranks):
        raise StateError(f"step {version.step} of epoch {version.epoch} is not whole here")
    return [image for image in store.images(version) if image.whole]


def _digest(image: Image) -> str:
    """That of its header; StateError, CorruptionError unless that says that it is whole."""
    return sealed_header(image.view, f"rank {image.rank}'s image").digest


class ChunkServer:
    """Answers other nodes' managers, one request of a connection after the other."""

    def __init__(self, store: SlotStore, slots: ParitySlots, node: int) -> None:
        self._store = store
        self._slots = slots
        self._node = node
        self._pool = ThreadPoolExecutor(_SENDERS, "ftrain-send", lambda: lower_priority(_NICE))

    def close(self) -> None:
        """What is under way is left to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def serve(self, channel: Channel, request: Request) -> None:
        """Answer one request; what is sent can't be overwritten meanwhile."""
        if isinstance(request, BundleRequest):
            await channel.send(self._bundle(request))
        elif isinstance(request, SoundRequest):
            await channel.send(await self._sound(request))
        elif isinstance(request, ChunkRequest):
            await self._send_chunk(channel, request)
        else:
            await self._send_row(channel, request)

    def _bundle(self, request: BundleRequest) -> BundleAnswer:
        try:
            images = node_row(self._store, self._node, request.version).images
        except StateError as error:
            return BundleAnswer((), (), (), str(error))
        return BundleAnswer(
            tuple(image.rank for image in images),
            tuple(image.nbytes for image in images),
            tuple(image.digest for image in images),
        )

    async def _send_chunk(self, channel: Channel, request: ChunkRequest) -> None:
        try:
            with self.pinned(request.version) as images:
                views = self._as_protected(request.version, images)
                pieces = _by_block(views, request)
                await channel.send(ChunkAnswer())
                await channel.send_data_by(self._pool, pieces)
        except (StateError, CorruptionError) as error:
            await channel.send(ChunkAnswer(str(error)))

    async def _send_row(self, channel: Channel, request: RowRequest) -> None:
        try:
            reader = self._slots.reader(request.round)
            row = reader.row(request.stripe, request.row)
            if not 0 <= request.nbytes <= len(row):
                raise StateError(f"a row has {len(row)} bytes, not {request.nbytes}")
        except StateError as error:
            await channel.send(ChunkAnswer(str(error)))
            return
        await channel.send(ChunkAnswer())
        await channel.send_data_by(self._pool, [row[: request.nbytes]])
        if not self._holds(request.round, reader):  # its slot may have been another round's
            channel.close()

    def _holds(self, round_: RoundId, reader: ParityReader) -> bool:
        try:
            return self._slots.reader(round_) is reader
        except StateError:
            return False

    def _as_protected(self, version: VersionId, images: Sequence[Image]) -> dict[int, memoryview]:
        """The images in the sizes that they were protected with: a damaged header hides its own."""
        for held in reversed(self._slots.held()):
            if held.version == version:
                rows = self._slots.reader(held.round).record.of(self._node).images
                sizes = {row.rank: row.nbytes for row in rows}
                return {i.rank: i.view[: sizes.get(i.rank)] for i in images}
        for image in images:
            _digest(image)
        return {image.rank: image.view for image in images}

    async def _sound(self, request: SoundRequest) -> SoundAnswer:
        try:
            reader = self._slots.reader(request.round)
        except StateError as error:
            return SoundAnswer(b"", (), (), (), str(error))
        group = reader.record.group.nodes
        if request.lost not in group:
            return SoundAnswer(b"", (), (), (), f"node {request.lost} is of another group")
        try:
            with self.pinned(reader.record.version) as images:
                return await asyncio.to_thread(sound_answer, reader, images)
        except StateError as error:
            return await asyncio.to_thread(sound_answer, reader, (), str(error))

    @contextmanager
    def pinned(self, version: VersionId) -> Iterator[list[Image]]:
        """This node's images of a version, which are not overwritten meanwhile; StateError."""
        images = _sealed_images(self._store, version)
        places = places_of(images)
        self._store.custody.pin(places)
        try:
            yield images
        finally:
            self._store.custody.unpin(places)

    def writable(self, image: Image) -> memoryview:
        """The slot of one of :meth:`pinned`'s images, to be mended in place."""
        assert image.place is not None
        return self._store.region(*image.place).view


def _by_block(images: Mapping[int, memoryview], request: ChunkRequest) -> list[memoryview]:
    """The first bytes of a chunk, so that no frame goes beyond a block that is read at once;
    StateError for a request that can't be meant."""
    chunk, nbytes = request.chunk, request.nbytes
    if chunk < 0 or request.chunk_bytes < 1:
        raise StateError(f"there is no chunk {chunk} of {request.chunk_bytes} bytes")
    bundle = Bundle(images, request.chunk_bytes)
    if not 0 <= nbytes <= bundle.present(chunk):
        raise StateError(f"chunk {chunk} has {bundle.present(chunk)} bytes, not {nbytes}")
    starts = range(0, nbytes, BLOCK_BYTES)
    ranges = [(start, min(start + BLOCK_BYTES, nbytes)) for start in starts]
    return [piece for start, stop in ranges for piece in bundle.pieces(chunk, start, stop)]


def sound_answer(reader: ParityReader, images: Sequence[Image], lacking: str = "") -> SoundAnswer:
    """What of a round is as it was, of this node's parity and of its images, as long as they are
    not overwritten; ``lacking`` says why there are no images."""
    record = reader.record
    chunks, damage = ((), (lacking,)) if lacking else sound_chunks(record, images)
    broken = {number for number, _ in reader.damaged()}
    rows = tuple(
        (row.stripe, row.row) for number, row in enumerate(record.rows) if number not in broken
    )
    told = [*damage, *(f"row {record.rows[n].row} of parity" for n in sorted(broken))]
    return SoundAnswer(encode_record(record), chunks, rows, tuple(told[:_DAMAGE_MAX]))


def sound_chunks(
    record: ParityRecord, images: Sequence[Image]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Which chunks of the record's holder are still what was protected, and what is not, in words.

    ``images``: all that it has of the version, in rising order of ranks.
    """
    protected = record.of(record.holder)
    if [image.rank for image in images] != [row.rank for row in protected.images]:
        return (), ("the images here are of other ranks than those that were protected",)
    damaged: list[tuple[int, int]] = []
    words: list[str] = []
    first = 0
    for image, row in zip(images, protected.images, strict=True):
        for start, stop, why in _damage(image, row):
            damaged.append((first + start, first + stop))
            words.append(why)
        if image.view.nbytes != row.nbytes:  # nor is what follows where it was
            damaged.append((first, protected.nbytes))
            break
        first += row.nbytes
    size = record.chunk_bytes
    chunks = tuple(
        chunk
        for chunk in range(record.group.data)
        if not any(start < (chunk + 1) * size and stop > chunk * size for start, stop in damaged)
    )
    return chunks, tuple(words)


def _damage(image: Image, row: ImageRow) -> Iterator[tuple[int, int, str]]:
    """First byte, last one + 1, and the words for everything that is not as it was protected."""
    where = f"rank {image.rank}'s image"
    try:
        reader = ImageReader(image.view, where=where)
        if reader.digest != row.digest:  # a damaged header as well: then the digests are not known
            raise CorruptionError(f"{where} is not the one that was protected")
    except (CorruptionError, StateError) as error:
        yield 0, row.nbytes, str(error)
        return
    begin = reader.header.layout.data_offset
    try:
        reader.verify_sections()
    except CorruptionError as error:
        yield 0, begin, str(error)
    for chunk in range(reader.chunks):
        try:
            reader.verify_chunk(chunk)
        except CorruptionError as error:
            start, stop = reader.header.layout.chunk_range(chunk)
            yield begin + start, begin + stop, str(error)


class Source:
    """Another node's manager, as one thread asks it; connects when it is asked first.

    Raises PeerLostError, AuthenticationError, RemoteProtocolError, or StateError for what it says
    it has not.  After an error the connection is made anew.
    """

    def __init__(self, node: int, address: str, identity: Identity, secret: bytes) -> None:
        self.node = node
        self.address = address
        self._identity = identity
        self._secret = secret
        self._channel: BlockingChannel | None = None

    def close(self) -> None:
        """End the connection; what was under way is given up."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def interrupt(self) -> None:
        """From another thread: what waits for this source raises soon."""
        channel = self._channel
        if channel is not None:
            channel.interrupt()

    def bundle(self, version: VersionId) -> NodeRow:
        """What of a version is protected there."""
        answer = self._ask(BundleRequest(version), BundleAnswer)
        if answer.reason:
            raise StateError(f"node {self.node}: {answer.reason}")
        try:
            rows = zip(answer.ranks, answer.nbytes, answer.digests, strict=True)
            return NodeRow(self.node, tuple(ImageRow(*row) for row in rows))
        except ValueError:
            raise RemoteProtocolError(f"node {self.node} sent a broken list of images") from None

    def sound(self, round_: RoundId, lost: int) -> SoundAnswer:
        """What it has of a round that is as it was, if ``lost`` is of its group; takes long."""
        return self._ask(SoundRequest(round_, lost), SoundAnswer, _SOUND_S)

    def chunk(self, version: VersionId, chunk: int, chunk_bytes: int, nbytes: int) -> RemoteChunk:
        """The first bytes of a chunk of images."""
        return self._open(ChunkRequest(version, chunk, chunk_bytes, nbytes), nbytes)

    def row(self, round_: RoundId, stripe: int, row: int, nbytes: int) -> RemoteChunk:
        """The first bytes of a chunk of parity."""
        return self._open(RowRequest(round_, stripe, row, nbytes), nbytes)

    def _open(self, request: ChunkRequest | RowRequest, nbytes: int) -> RemoteChunk:
        answer = self._ask(request, ChunkAnswer)
        if answer.reason:
            raise StateError(f"node {self.node}: {answer.reason}")
        assert self._channel is not None
        return RemoteChunk(self._channel, nbytes)

    def _ask(self, request: object, kind: type[_Answer], limit_s: float = _TIMEOUT_S) -> _Answer:
        if self._channel is None:
            if not self.address:
                raise PeerLostError(f"node {self.node}'s snapshot manager is not there yet")
            self._channel = connect_blocking(
                self.address, self._identity, self._secret, timeout_s=_TIMEOUT_S
            )
        try:
            self._channel.settimeout(limit_s)
            self._channel.send(request)
            answer = self._channel.receive()
            self._channel.settimeout(_TIMEOUT_S)
        except FtrainError:
            self.close()
            raise
        if not isinstance(answer, kind):
            self.close()
            raise RemoteProtocolError(f"node {self.node} answered with {type(answer).__name__}")
        return answer


class RemoteChunk:
    """A chunk that another node sends, to be read to its end before that node is asked again."""

    def __init__(self, channel: BlockingChannel, nbytes: int) -> None:
        self.nbytes = nbytes
        self._channel = channel

    def read_into(self, buffer: memoryview) -> None:
        """See :class:`~ftrain.snapshot.stripes.Chunk`."""
        self._channel.receive_into(buffer)
