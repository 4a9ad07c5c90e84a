"""Random losses with random damage to what is left, put before the product's own servers.

Every surviving node has real memory, and over it the store, the slots of parity and the server that
its snapshot manager would have; only the connections are missing.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from parity_samples import record_of_rows, write_parity

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.header import PAGE_BYTES, ImageIdentity, ImageState, Layout
from ftrain.checkpoint.image import ImageReader, ImageWriter
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.comms.channel import Channel
from ftrain.comms.errors import CorruptionError, PeerLostError, StateError
from ftrain.comms.protocol.messages import Rebuild, RoundId, Share, VersionId
from ftrain.snapshot.chunks import ChunkServer, Request
from ftrain.snapshot.memory import map_fd
from ftrain.snapshot.parity import ImageRow, NodeRow, ParityRecord
from ftrain.snapshot.parity_slots import ParitySlots
from ftrain.snapshot.protocol.messages import (
    ChunkAnswer,
    ChunkRequest,
    RowRequest,
    SoundAnswer,
    SoundRequest,
)
from ftrain.snapshot.remains import HopelessError, Remains
from ftrain.snapshot.store import SlotStore
from ftrain.snapshot.stripes import RowChunk, Summer

VERSION = VersionId(3, 40)  # as in parity_samples
ROUND = RoundId(3, 17)
OTHER = VersionId(3, 39)
SLOTS = 3
CHUNK_BYTES = 4096
_Result = TypeVar("_Result")


def plan_of(rank: int, node: int, nbytes: int) -> ImagePlan:
    """An image with so much data."""
    whole = Placement.whole((nbytes,))
    segment = Segment("model/weight", "uint8", (nbytes,), str(rank), 0, nbytes, whole)
    return ImagePlan(lay_out([segment]), (Share(str(rank), node, 0, 1),), 500, CHUNK_BYTES)


def sealed_image(
    draw: random.Random, rank: int, node: int, version: VersionId, nbytes: int = 0
) -> bytes:
    """A whole image with so much data, or of one to six pages of them."""
    plan = plan_of(rank, node, nbytes or draw.randint(1, 6 * PAGE_BYTES))
    buffer = bytearray(plan.total_bytes)
    identity = ImageIdentity("run", "ab" * 16, version, rank, 16, node, 100)
    writer = ImageWriter(buffer, plan, identity, collectives=version.step)
    writer.begin(b"random numbers of rank %d at step %d" % (rank, version.step))
    writer.data[:] = draw.randbytes(len(writer.data))
    for chunk in range(writer.chunks):
        writer.finish_chunk(chunk)
    writer.seal()
    return bytes(buffer)


class Memory:
    """A memory file of one slot, as a test reads and damages it; the descriptor goes to whoever
    adopts it."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("ftrain-trial", os.MFD_CLOEXEC)
        os.truncate(self.fd, nbytes)
        self.view = map_fd(self.fd, nbytes)

    def flip(self, draw: random.Random, start: int, stop: int) -> None:
        """One bit."""
        self.view[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)


class Answers:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.data = bytearray()

    async def send(self, message: object) -> None:
        """See Channel."""
        self.messages.append(message)

    async def send_data_by(self, pool: object, views: Sequence[memoryview]) -> None:
        """See Channel."""
        for view in views:
            self.data += view


@dataclass
class Node:
    """A node that is left; a Holder, once its manager has started."""

    number: int
    images: dict[int, Memory]
    parity: Memory
    run: Callable[[Coroutine[Any, Any, None]], None]
    early: bool  # whether its manager has lived since before the damage
    touched: bool = False  # something of it was damaged
    server: ChunkServer | None = None
    fds: list[int] = field(default_factory=list)

    def start(self) -> None:
        """A manager takes over the memory."""
        if self.server is not None:
            return
        store = SlotStore(run_id="run", slots=SLOTS, memory_share_max=0.5)
        store.custody.set_group(VERSION.epoch, sorted(self.images), None)
        for rank, memory in self.images.items():
            store.adopt(rank, 1, memory.fd)
        slots = ParitySlots("run", store.budget, lambda *_: None)
        slots.adopt(0, self.parity.fd)
        self.server = ChunkServer(store, slots, self.number)

    def ask(self, request: Request, kind: type[_Result]) -> tuple[_Result, bytes]:
        """What the manager sends."""
        assert self.server is not None
        answers = Answers()
        self.run(self.server.serve(cast("Channel", answers), request))
        (answer,) = answers.messages
        assert isinstance(answer, kind)
        return answer, bytes(answers.data)

    def chunk(self, version: VersionId, chunk: int, chunk_bytes: int, nbytes: int) -> RowChunk:
        """See Holder."""
        return self._open(ChunkRequest(version, chunk, chunk_bytes, nbytes), nbytes)

    def row(self, round_: RoundId, stripe: int, row: int, nbytes: int) -> RowChunk:
        """See Holder."""
        return self._open(RowRequest(round_, stripe, row, nbytes), nbytes)

    def _open(self, request: Request, nbytes: int) -> RowChunk:
        answer, data = self.ask(request, ChunkAnswer)
        if answer.reason:
            raise StateError(answer.reason)
        assert len(data) == nbytes
        return RowChunk(memoryview(data))

    def close(self) -> None:
        """Its memory goes."""
        for memory in (*self.images.values(), self.parity):
            memory.view.release()
            os.close(memory.fd)


class Trial:
    """One group of nodes, some lost, some damaged. Closes itself as a context manager."""

    def __init__(
        self, draw: random.Random, loop: asyncio.AbstractEventLoop, summer: Summer
    ) -> None:
        self.draw, self.summer = draw, summer
        self.run_coroutine = loop.run_until_complete
        self.parity = draw.randint(1, 3)
        count = draw.randint(max(2, self.parity + 1), 8)
        numbers = draw.sample(range(40), count)
        self.images: dict[int, dict[int, bytes]] = {number: {} for number in numbers}
        rank = 0
        for number in numbers:
            for _ in range(draw.randint(1, 2)):
                self.images[number][rank] = sealed_image(draw, rank, number, VERSION)
                rank += 1
        most = self.parity + (draw.random() < 0.15)
        self.lost = draw.sample(numbers, min(draw.randint(1, most), count - 1))
        self.done: list[str] = []
        self.poisoned = False  # some parity was made of wrong bytes
        self.nodes = {n: self._survivor(n) for n in numbers if n not in self.lost}
        self._make_parity()
        self._damage()

    def __repr__(self) -> str:
        group = f"{len(self.images)} nodes, parity {self.parity}, {len(self.lost)} lost"
        return f"{group}; {', '.join(self.done)}"

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.close()

    # ------------------------------------------------------------ the world

    def _survivor(self, number: int) -> Node:
        memories = {}
        for rank, data in self.images[number].items():
            # A slot may have been made for a larger image.
            memory = Memory(len(data) + PAGE_BYTES * self.draw.choice((0, 0, 0, 1, 4)))
            memory.view[: len(data)] = data
            memories[rank] = memory
        needed = self._record(number).without_digests().total_bytes
        early = self.draw.random() < 0.5
        return Node(number, memories, Memory(needed), self.run_coroutine, early)

    def _record(self, holder: int) -> ParityRecord:
        rows = tuple(
            NodeRow(
                number,
                tuple(ImageRow(r, len(i), ImageReader(i).digest) for r, i in mine.items()),
            )
            for number, mine in self.images.items()
        )
        return record_of_rows(rows, self.parity, holder)

    def _make_parity(self) -> None:
        """Now and then some node gets wrong bytes of an image: then its parity has sound digests,
        and only a look at what was rebuilt tells."""
        draw = self.draw
        self.poisoned = draw.random() < 0.1
        wrong = draw.choice([place for place in self.images if self.images[place]])
        holders = draw.sample(list(self.nodes), draw.randint(1, len(self.nodes)))
        for number, node in self.nodes.items():
            sources = {n: dict(mine) for n, mine in self.images.items()}
            if self.poisoned and number in holders:
                rank = draw.choice(list(sources[wrong]))
                sent = bytearray(sources[wrong][rank])
                sent[draw.randrange(len(sent))] ^= 1 << draw.randrange(8)
                sources[wrong][rank] = bytes(sent)
                self.done.append(f"node {number} got rank {rank}'s image damaged")
            write_parity(node.parity.view, self._record(number), sources, self.summer).seal()

    def _damage(self) -> None:
        kinds = (self._flip_image, self._flip_image, self._flip_row, self._flip_record, self._swap)
        for node in self.nodes.values():
            if node.early:
                node.start()
        for _ in range(self.draw.choice((0, 0, 1, 1, 1, 2, 2, 3, 6))):
            self.draw.choice(kinds)(self.draw.choice(list(self.nodes.values())))
        if self.draw.random() < 0.02:
            for node in self.nodes.values():
                self._flip_record(node)

    def _flip_image(self, node: Node) -> None:
        rank = self.draw.choice(list(node.images))
        layout = ImageReader(self.images[node.number][rank]).header.layout
        name, start, stop = self.draw.choice(sections(layout))
        self._note(node, f"rank {rank}'s {name}")
        node.images[rank].flip(self.draw, start, stop)

    def _flip_row(self, node: Node) -> None:
        record = self._record(node.number).without_digests()
        self._note(node, "parity")
        node.parity.flip(self.draw, record.data_offset, record.total_bytes)

    def _flip_record(self, node: Node) -> None:
        self._note(node, "record")
        node.parity.flip(self.draw, 0, 32 + 64)  # not in the zeros behind it

    def _swap(self, node: Node) -> None:
        """Another version's image lies where this one lay."""
        rank = self.draw.choice(list(node.images))
        other = sealed_image(self.draw, rank, node.number, OTHER)
        place = node.images[rank].view
        if len(other) <= len(place):
            self._note(node, f"rank {rank}'s whole image")
            place[: len(other)] = other

    def _note(self, node: Node, what: str) -> None:
        node.touched = True
        self.done.append(f"node {node.number}: {what}")

    # ------------------------------------------------------------ what comes of it

    def run(self) -> Counter[str]:
        """Rebuild every lost node; AssertionError for a wrong byte."""
        answers = {}
        for number, node in self.nodes.items():
            node.start()
            answers[number], _ = node.ask(SoundRequest(ROUND, min(self.lost)), SoundAnswer)
        return Counter(self._rebuild(lost, answers) for lost in self.lost)

    def _rebuild(self, lost: int, answers: dict[int, SoundAnswer]) -> str:
        room = {
            rank: memoryview(bytearray(self.draw.randbytes(PAGE_BYTES) * (len(data) // PAGE_BYTES)))
            for rank, data in self.images[lost].items()
        }
        told = {number: answer for number, answer in answers.items() if answer.record}
        try:
            remains = Remains(Rebuild(ROUND, lost, 99), VERSION, told)
            remains.rebuild(room, self.nodes.__getitem__, self.summer)
        except HopelessError:
            outcome = "refused: too little is sound"
        except CorruptionError:
            outcome = "refused: what was rebuilt is wrong"
            assert self.poisoned
        except PeerLostError:
            outcome = "refused: no record is left"
            assert not told
        else:
            outcome = "rebuilt despite damage" if self.done else "rebuilt"
            assert room == self.images[lost]
            return outcome
        gone = len(self.lost) + sum(node.touched for node in self.nodes.values())
        assert gone > self.parity or self.poisoned, "it was refused without need"
        for rank, view in room.items():
            assert view == self.images[lost][rank] or not is_sealed(view)
        return outcome


def sections(layout: Layout) -> list[tuple[str, int, int]]:
    """The parts of an image, those that are not empty."""
    index_end = layout.index_offset + layout.index_bytes
    table_end = layout.table_offset + layout.table_bytes
    bounds = [
        ("first header", 0, PAGE_BYTES // 2),
        ("second header", PAGE_BYTES // 2, PAGE_BYTES),
        ("index", layout.index_offset, index_end),
        ("gap", index_end, layout.table_offset),
        ("table", layout.table_offset, table_end),
        ("gap", table_end, layout.small_offset),
        ("small section", layout.small_offset, layout.data_offset),
        ("data", layout.data_offset, layout.total_bytes),
        ("data", layout.data_offset, layout.total_bytes),
    ]
    return [part for part in bounds if part[1] < part[2]]


def is_sealed(view: memoryview) -> bool:
    """Whether somebody might take it for a whole image."""
    try:
        return ImageReader(view).state is ImageState.SEALED
    except (CorruptionError, StateError):
        return False
