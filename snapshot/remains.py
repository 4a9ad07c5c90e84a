"""What is left of a round of parity after a loss, and what comes of it, whoever hands it over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from ftrain.checkpoint.files import page_buffer
from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.checkpoint.image import ImageReader
from ftrain.comms.errors import CorruptionError, PeerLostError, StateError
from ftrain.comms.protocol.messages import Rebuild, RoundId, VersionId
from ftrain.snapshot.bundle import Bundle
from ftrain.snapshot.parity import ImageRow, ParityRecord, decode_record
from ftrain.snapshot.protocol.messages import SoundAnswer
from ftrain.snapshot.stripes import Chunk, Part, Summer, rebuild


class HopelessError(StateError):
    """Trying again is of no use."""


class Holder(Protocol):
    """A node that is left, as it is asked for what it holds; raises FtrainError."""

    def chunk(self, version: VersionId, chunk: int, chunk_bytes: int, nbytes: int) -> Chunk:
        """The first bytes of a chunk of images."""
        ...

    def row(self, round_: RoundId, stripe: int, row: int, nbytes: int) -> Chunk:
        """The first bytes of a chunk of parity."""
        ...


class Remains:
    """What is sound of a round, of which a lost node's images are to be rebuilt.

    Args:
        order: which round, which node.
        version: what the round has to be of.
        answers: what every node says that is left, by number.
        unheard: why nothing was heard of some others, which may have more.

    Raises:
        PeerLostError: it is not enough, but those who are not heard may have it.
        HopelessError: it is not enough.
        CorruptionError: an answer makes no sense.
    """

    def __init__(
        self,
        order: Rebuild,
        version: VersionId,
        answers: Mapping[int, SoundAnswer],
        unheard: Sequence[str] = (),
    ) -> None:
        told = {node: answer.record for node, answer in answers.items() if answer.record}
        records = {node: decode_record(record) for node, record in told.items()}
        mine = {node: r for node, r in records.items() if order.lost in r.group.nodes}
        if not mine:
            raise PeerLostError(
                unheard[0] if unheard else f"nobody holds round {order.round.number} any more"
            )
        record = next(iter(mine.values()))
        if record.version != version:
            raise HopelessError(f"round {order.round.number} is of step {record.version.step}")
        if any(_protected(other) != _protected(record) for other in mine.values()):
            raise HopelessError("the records of its parity contradict each other")
        self._order = order
        self._record = record
        self._answers = {node: answers[node] for node in mine}
        self.images = record.of(order.lost).images
        self.damage = tuple(text for answer in self._answers.values() for text in answer.damage)
        self._check(unheard)

    def there(self, stripe: int) -> Collection[int]:
        """The nodes whose part of a stripe is sound."""
        group = self._record.group
        found = []
        for node, answer in self._answers.items():
            if node in group.holders(stripe):
                row = group.holders(stripe).index(node)
                if (stripe, row) in answer.rows:
                    found.append(node)
            elif group.stripes_of(node).index(stripe) in answer.chunks:
                found.append(node)
        return found

    def _check(self, unheard: Sequence[str]) -> None:
        record, group = self._record, self._record.group
        lost_bytes = record.of(self._order.lost).nbytes
        for chunk, stripe in enumerate(group.stripes_of(self._order.lost)):
            count = len(self.there(stripe))
            if count >= group.data or chunk * record.chunk_bytes >= lost_bytes:
                continue
            if unheard:
                raise PeerLostError(unheard[0])
            damage = f" ({self.damage[0]})" if self.damage else ""
            raise HopelessError(
                f"{count} chunks are sound of a stripe that needs {group.data}{damage}"
            )

    def rebuild(
        self,
        room: Mapping[int, memoryview],
        holder_of: Callable[[int], Holder],
        summer: Summer,
        require_current: Callable[[], None] = lambda: None,
    ) -> None:
        """Fill the memory of each rank, which is as large as its image.

        ``require_current`` raises when nothing may be written any more.  Raises CorruptionError if
        it is not what the record says, and whatever the holders raise; then what is not as it was
        is no image either.
        """
        headers = {rank: page_buffer(PAGE_BYTES) for rank in room}
        pieces: dict[int, memoryview] = {}  # of each rank the header's page, then the rest
        for rank, view in room.items():
            view[:PAGE_BYTES] = bytes(PAGE_BYTES)  # what is unfinished must not seem to be an image
            pieces[2 * rank], pieces[2 * rank + 1] = headers[rank], view[PAGE_BYTES:]
        bundle = Bundle(pieces, self._record.chunk_bytes)

        def open_part(part: Part, nbytes: int) -> Chunk:
            return self._open(holder_of(part.node), part, nbytes)

        rebuild(self._record, self._order.lost, bundle, self.there, open_part, summer)
        for image in self.images:
            view = room[image.rank]
            require_current()
            view[:PAGE_BYTES] = headers[image.rank]
            try:
                _require(view, image)
            except CorruptionError:
                view[:PAGE_BYTES] = bytes(PAGE_BYTES)
                raise

    def _open(self, holder: Holder, part: Part, nbytes: int) -> Chunk:
        if part.row >= 0:
            return holder.row(self._order.round, part.stripe, part.row, nbytes)
        record = self._record
        chunk = record.group.stripes_of(part.node).index(part.stripe)
        present = record.of(part.node).nbytes - chunk * record.chunk_bytes
        return holder.chunk(record.version, chunk, record.chunk_bytes, max(0, min(nbytes, present)))


def _protected(record: ParityRecord) -> object:
    """What all nodes' records of one round agree on."""
    return record.version, record.nodes, record.parity, record.chunk_bytes


def _require(view: memoryview, image: ImageRow) -> None:
    """CorruptionError unless ``view`` is the image that the record names."""
    where = f"rank {image.rank}'s rebuilt image"
    try:
        reader = ImageReader(view, where=where)
    except StateError as error:  # of another format, as it seems
        raise CorruptionError(str(error)) from None
    if reader.digest != image.digest:
        raise CorruptionError(f"{where} is not the one that was lost")
    reader.verify()
