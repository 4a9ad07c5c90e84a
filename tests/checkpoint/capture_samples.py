"""Slots in memory and images, for tests of the capture engine."""

from __future__ import annotations

import mmap
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ftrain.checkpoint.capture import CaptureEngine
from ftrain.checkpoint.copying import bytes_of
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageReader, ImageWriter
from ftrain.checkpoint.pinned import PageLock
from ftrain.checkpoint.tensors import StateTensor, plan_image
from ftrain.comms.errors import MemoryShortError
from ftrain.comms.protocol.messages import Held, Share, VersionId

CHUNK_BYTES = 64 * 1024


@dataclass
class Finish:
    version: VersionId
    rank: int
    buffer: memoryview


class Memory:
    """Two slots in this process, with a door for requests to finish another rank's image."""

    def __init__(self) -> None:
        self.denied = "all slots are taken"
        self.deny = False
        self.maps: list[mmap.mmap] = []
        self.locks: list[PageLock] = []
        self.turn = 0
        self.handed_in: list[tuple[VersionId, Held]] = []
        self.withdrawn: list[VersionId] = []
        self.reserved: list[tuple[str, int]] = []  # by which thread
        self.room_made = threading.Event()
        self.answers: list[tuple[int, Held | None]] = []
        self.door, self.bell = socket.socketpair()
        self.door.setblocking(False)
        self.request: Finish | None = None
        self.answered = threading.Event()
        self.open = threading.Event()  # until then nobody can enter
        self.open.set()

    def reserve(self, image_bytes: int) -> None:
        if image_bytes > 2**28:
            raise MemoryShortError("the slots need more memory than there is")
        self.reserved.append((threading.current_thread().name, image_bytes))
        self.unlock()
        self.maps = [mmap.mmap(-1, image_bytes) for _ in range(2)]

    def unlock(self) -> None:
        while self.locks:
            self.locks.pop().release()

    def enter(self) -> None:
        self.open.wait()
        if not self.locks:
            self.locks = [PageLock(memoryview(found)) for found in self.maps]

    def enter_more(self) -> bool:
        self.room_made.set()
        return False

    def begin(self, version: VersionId, wait_s: float | None = None) -> memoryview | None:
        if self.deny:
            return None
        self.turn ^= 1
        return memoryview(self.maps[self.turn])

    def begun(self, version: VersionId) -> None:
        pass

    def sealed(self, version: VersionId, held: Held) -> None:
        self.handed_in.append((version, held))

    def withdraw(self, version: VersionId) -> None:
        self.withdrawn.append(version)

    def fileno(self) -> int:
        return self.door.fileno()

    def poll(self) -> Finish | None:
        try:
            self.door.recv(1)
        except BlockingIOError:
            return None
        return self.request

    def finished(self, version: VersionId, rank: int, held: Held | None) -> None:
        self.answers.append((rank, held))
        self.answered.set()

    def ask(self, request: Finish) -> Held | None:
        self.request = request
        self.bell.send(b"!")
        assert self.answered.wait(10)
        return self.answers[-1][1]

    def image(self) -> ImageReader:
        return ImageReader(memoryview(self.maps[self.turn]))

    def close(self) -> None:
        self.unlock()
        self.door.close()
        self.bell.close()


def identity(version: VersionId, rank: int) -> ImageIdentity:
    return ImageIdentity(
        run_id="run",
        topology="ab",
        version=version,
        rank=rank,
        world_size=2,
        node=0,
        incarnation=1,
    )


@contextmanager
def capturing(
    memory: Memory, share: Callable[[str], Share], chunk_bytes: int, notes: list[str]
) -> Iterator[CaptureEngine]:
    """Rank 0's engine, which says its notes there."""
    engine = CaptureEngine(
        memory, identity, share, rank=0, chunk_bytes=chunk_bytes, on_note=notes.append
    )
    yield engine
    engine.close()


def share_of(rank: int) -> Share:
    return Share("0,1", 0, rank, 2)


def contents(image: ImageReader) -> dict[tuple[str, int], bytes]:
    return {(s.name, s.start): bytes(image.segment_bytes(s)) for s in image.segments}


def unfinished(
    rank: int,
    state: tuple[StateTensor, ...],
    version: VersionId,
    chunk_bytes: int = CHUNK_BYTES,
) -> memoryview:
    """What a rank leaves that was killed after its first chunk."""
    plan = plan_image(state, lambda key: share_of(rank), 1024, chunk_bytes)
    buffer = memoryview(mmap.mmap(-1, plan.total_bytes))
    writer = ImageWriter(buffer, plan, identity(version, rank), 3)
    writer.begin(b"the dead rank's small state")
    for piece in plan.pieces(0):
        tensor = next(t.tensor for t in state if t.name == piece.segment.name)
        raw = bytes_of(tensor).cpu().numpy().tobytes()
        writer.data[piece.offset : piece.offset + piece.nbytes] = raw[
            piece.start : piece.start + piece.nbytes
        ]
    writer.finish_chunk(0)
    return buffer
