"""A real snapshot manager process, with the test in the agent's place, and ranks to go with it."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageReader, ImageWriter, held_of, resume_writer
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.comms import local
from ftrain.comms.errors import PeerLostError
from ftrain.comms.protocol.messages import Held, HeldParity, Notice, Share, VersionId
from ftrain.snapshot.client import FinishRequest, SnapshotClient
from ftrain.snapshot.protocol.messages import (
    AskInventory,
    CapturesFinished,
    Committed,
    Drop,
    FinishCaptures,
    Hold,
    Inventory,
    ManagerStarted,
    ParityComplete,
    Peer,
    RankDied,
    SetGroup,
    Setup,
    Taken,
)

RUN_ID = "run"
SECRET = bytes(range(32)).hex()
TOPOLOGY = "ab" * 16
CHUNK_BYTES = 4096
SMALL = b"random numbers of rank %d at step %d"
_Message = TypeVar("_Message")


class Manager:
    """One snapshot manager, as its agent sees it. Closes itself as a context manager."""

    def __init__(
        self,
        directory: Path,
        *,
        node: int = 0,
        incarnation: int = 100,
        slots: int = 3,
        wait: bool = True,
        **more: Any,
    ) -> None:
        self.directory = directory
        self.node = node
        self.incarnation = incarnation
        self.settings = {
            "bind": "127.0.0.1",
            "slots": slots,
            "memory_share_max": 0.5,
            "bytes_per_s_max": 0.0,
            "checkpoint_dir": str(directory / "checkpoints"),
            **more,
        }
        self.socket_path = str(directory / f"smp{node}.sock")
        self.memory: dict[tuple[int, int], int] = {}  # descriptors kept for the next manager
        self.starts = 0
        self.inbox: list[object] = []
        self.notices: list[str] = []
        self.address = ""
        self.start(wait=wait)

    def start(self, *, wait: bool = True) -> None:
        """Start a manager over the memory that is held."""
        self.link, theirs = local.pair()
        fd = theirs.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ftrain.snapshot.manager", "--fd", str(fd)], pass_fds=[fd]
        )
        theirs.close()
        places = sorted(self.memory)
        self.starts += 1
        setup = Setup(
            run_id=RUN_ID,
            secret=SECRET,
            node=self.node,
            incarnation=self.incarnation,
            socket_path=self.socket_path,
            host="127.0.0.1",
            taken=tuple(Taken(rank, slot) for rank, slot in places),
            generation=self.starts,
            **self.settings,
        )
        self.link.send(setup, [self.memory[place] for place in places])
        if wait:
            self.wait_started()

    def wait_started(self) -> None:
        """Wait until it serves."""
        started = self.expect(ManagerStarted)
        self.address, self.held = started.address, started.held

    def expect(
        self,
        kind: type[_Message],
        wanted: Callable[[_Message], bool] = lambda _: True,
        timeout_s: float = 10.0,
    ) -> _Message:
        """The next message of this kind; others are kept, descriptors are held."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for number, message in enumerate(self.inbox):
                if isinstance(message, kind) and wanted(message):
                    del self.inbox[number]
                    return message
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"no {kind.__name__}: {self.inbox} {self.notices}"
            self.link.settimeout(left_s)
            try:
                self._take(*self.link.receive())
            except TimeoutError:
                continue

    def drain(self) -> None:
        """Read what has arrived."""
        while select.select([self.link], [], [], 0)[0]:
            self._take(*self.link.receive())

    def newest_committed(self, version: VersionId) -> None:
        """Wait until this version is committed."""
        self.expect(Committed, lambda message: message.version >= version)

    def protected(self, version: VersionId) -> None:
        """Wait until every node has its parity of this version."""
        self.expect(ParityComplete, lambda message: message.version >= version)

    def parity(self) -> tuple[HeldParity, ...]:
        """What parity it holds; no round changes that until there is another group."""
        self.link.send(AskInventory())
        return self.expect(Inventory).parity

    def inventory(self) -> tuple[Held, ...]:
        """What it holds."""
        self.link.send(AskInventory())
        return self.expect(Inventory).held

    def group(
        self,
        epoch: int = 1,
        ranks: int = 1,
        *,
        first_rank: int = 0,
        world_size: int | None = None,
        peers: Sequence[Manager] = (),
        base: VersionId | None = None,
        dead: tuple[int, ...] = (),
        **parity: Any,
    ) -> None:
        """Tell it its group; ``parity``: the fields of SetGroup about that."""
        others = tuple(Peer(peer.node, peer.incarnation, peer.address) for peer in peers)
        self.link.send(
            SetGroup(
                epoch=epoch,
                first_rank=first_rank,
                local_world=ranks,
                world_size=world_size or ranks * (1 + len(others)),
                peers=others,
                base=base,
                dead=dead,
                **parity,
            )
        )

    def finish_captures(self, epoch: int = 1, deadline_s: float = 0.2) -> tuple[Held, ...]:
        """Order it, and wait for the answer."""
        self.link.send(FinishCaptures(epoch, deadline_s))
        return self.expect(CapturesFinished, lambda message: message.epoch == epoch).held

    def rank_died(self, rank: int, epoch: int = 1) -> None:
        """Say so."""
        self.link.send(RankDied(epoch, rank))

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.link.settimeout(1.0)
        for _ in range(2):  # a reset (it left something unread) hides what it had sent before
            with contextlib.suppress(PeerLostError):
                while True:
                    self._take(*self.link.receive())
        self.link.close()

    def close(self) -> None:
        """End it as an agent's death would, and let its memory go."""
        self.link.close()
        self.process.wait(10)
        for fd in self.memory.values():
            os.close(fd)
        self.memory.clear()

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, message: object, fds: list[int]) -> None:
        if isinstance(message, Hold):
            earlier = self.memory.pop((message.rank, message.slot), None)
            if earlier is not None:
                os.close(earlier)
            (self.memory[message.rank, message.slot],) = fds
        elif isinstance(message, Drop):
            os.close(self.memory.pop((message.rank, message.slot)))
        elif isinstance(message, Notice) and message.kind == "warning":
            self.notices.append(message.text)
        else:
            self.inbox.append(message)


class Rank:
    """A rank that captures random bytes, in this process. Closes itself as a context manager."""

    def __init__(
        self,
        manager: Manager,
        rank: int = 0,
        *,
        epoch: int = 1,
        world_size: int = 1,
        nbytes: int = 20_000,
        parts: int = 1,
        part: int = 0,
        key: str = "all",
    ) -> None:
        self.rank, self.epoch, self.world_size, self.node = rank, epoch, world_size, manager.node
        self.incarnation = manager.incarnation
        whole = Placement.whole((nbytes,))
        segments = lay_out([Segment("model/weight", "uint8", (nbytes,), key, 0, nbytes, whole)])
        share = Share(key, manager.node, part, parts)
        self.plan = ImagePlan(segments, (share,), 1000, CHUNK_BYTES)
        self.client = SnapshotClient(
            manager.socket_path, rank=rank, world_size=world_size, epoch=epoch, node=manager.node
        )
        self.client.reserve(self.plan.total_bytes)

    def version(self, step: int) -> VersionId:
        """The version of this rank's epoch."""
        return VersionId(self.epoch, step)

    def content(self, step: int) -> bytes:
        """What it captures at a step."""
        return state(self.rank, step, len(self.plan.segments) and self.plan.segments[0].nbytes)

    def start(self, step: int, chunks: int = -1) -> ImageWriter | None:
        """Begin a capture and copy the first ``chunks`` chunks (-1: all); None when denied."""
        buffer = self.client.begin(self.version(step))
        if buffer is None:
            return None
        identity = ImageIdentity(
            RUN_ID,
            TOPOLOGY,
            self.version(step),
            self.rank,
            self.world_size,
            self.node,
            self.incarnation,
        )
        writer = ImageWriter(buffer, self.plan, identity, collectives=step)
        writer.begin(SMALL % (self.rank, step))
        self.client.begun(self.version(step))
        self.fill(writer, step, range(writer.chunks)[: None if chunks < 0 else chunks])
        return writer

    def fill(self, writer: ImageWriter, step: int, chunks: Sequence[int]) -> None:
        """Copy these chunks."""
        data = self.content(step).ljust(len(writer.data), b"\0")
        for chunk in chunks:
            start, stop = writer.chunk_range(chunk)
            writer.data[start:stop] = data[start:stop]
            writer.finish_chunk(chunk)

    def seal(self, writer: ImageWriter, step: int) -> Held:
        """Complete a capture."""
        writer.seal()
        held = held_of(ImageReader(writer._view))
        self.client.sealed(self.version(step), held)
        return held

    def capture(self, step: int) -> Held | None:
        """The whole of it; None when denied."""
        writer = self.start(step)
        return self.seal(writer, step) if writer else None

    def task(self, timeout_s: float = 5.0) -> FinishRequest:
        """Wait for a dead rank's image to finish."""
        deadline_s = time.monotonic() + timeout_s
        while (request := self.client.poll()) is None:
            assert time.monotonic() < deadline_s, "nobody asked for anything"
            watched = [self.client] if self.client.fileno() >= 0 else []
            select.select(watched, [], [], 0.05)
        return request

    def finish(self, request: FinishRequest) -> None:
        """Complete a dead rank's image, and say so."""
        writer = resume_writer(request.buffer)
        data = state(request.rank, request.version.step).ljust(len(writer.data), b"\0")
        for chunk in writer.missing_chunks():
            start, stop = writer.chunk_range(chunk)
            writer.data[start:stop] = data[start:stop]
            writer.finish_chunk(chunk)
        writer.seal()
        held = held_of(ImageReader(request.buffer))
        self.client.finished(request.version, request.rank, held)

    def restored(self, step: int, epoch: int | None = None) -> dict[int, bytes]:
        """Verified content of every image of a version, by rank (b"" for small ones)."""
        version = VersionId(self.epoch if epoch is None else epoch, step)
        found = {}
        for image in self.client.open(version):
            reader = ImageReader(image.buffer)
            reader.require(rank=image.rank, run_id=RUN_ID)
            reader.verify()
            assert reader.small == SMALL % (image.rank, step)
            found[image.rank] = b"".join(bytes(reader.segment_bytes(s)) for s in reader.segments)
        self.client.release(version)
        return found

    def close(self) -> None:
        """Disconnect."""
        self.client.close()

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def state(rank: int, step: int, nbytes: int = 20_000) -> bytes:
    """What a rank captures at a step."""
    some = random.Random(rank * 1_000_003 + step).randbytes(min(nbytes, 10_007))
    return (some * (nbytes // len(some) + 1))[:nbytes]


def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until something becomes true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.005)
