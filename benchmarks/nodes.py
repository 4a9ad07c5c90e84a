"""Snapshot managers of several nodes with one rank each, without training, for benchmarks."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageReader, ImageWriter, held_of
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.comms import local
from ftrain.comms.protocol.messages import Notice, Rebuild, RoundId, Share, VersionId
from ftrain.snapshot.client import SnapshotClient
from ftrain.snapshot.protocol.messages import (
    AskInventory,
    Hold,
    Inventory,
    ManagerStarted,
    ParityComplete,
    Peer,
    SetGroup,
    Setup,
)

GROUP_SLOTS = 4
_CHUNK_BYTES = 16 << 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_WAIT_S = 120.0


class Node:
    """A manager, with the benchmark in the agent's place."""

    def __init__(self, folder: Path, node: int) -> None:
        self.node = node
        self.incarnation = 100 + node
        self.socket_path = str(folder / f"smp{node}.sock")
        self.memory: dict[tuple[int, int], int] = {}  # bytes of each slot
        self.parity_bytes = self.fetched_bytes = 0
        self.link, theirs = local.pair()
        fd = theirs.fileno()
        command = [sys.executable, "-m", "ftrain.snapshot.manager", "--fd", str(fd)]
        self.process = subprocess.Popen(command, pass_fds=[fd])
        theirs.close()
        self.link.send(
            Setup(
                run_id="bench",
                secret="00" * 32,
                node=node,
                incarnation=self.incarnation,
                socket_path=self.socket_path,
                bind="127.0.0.1",
                host="127.0.0.1",
                slots=GROUP_SLOTS,
                memory_share_max=0.9,
                bytes_per_s_max=0.0,
                checkpoint_dir="",
            )
        )
        self.address = self.expect(ManagerStarted).address

    def expect(self, kind: Any, wanted: Any = lambda _: True) -> Any:
        """The next message of this kind that is wanted; others are dropped."""
        deadline_s = time.monotonic() + _WAIT_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not select.select([self.link], [], [], left_s)[0]:
                break
            message, fds = self.link.receive()
            if isinstance(message, Hold):
                self.memory[message.rank, message.slot] = message.nbytes
            for fd in fds:
                os.close(fd)
            if isinstance(message, Notice) and message.kind == "parity":
                self.fetched_bytes = int(str(message.data["fetched_bytes"]))
            if isinstance(message, Notice) and message.kind == "warning":
                print(message.text, file=sys.stderr)
            if isinstance(message, kind) and wanted(message):
                return message
        raise TimeoutError(f"node {self.node} sent no {kind.__name__}")

    def cores_s(self) -> float:
        """What the manager has computed so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def close(self) -> None:
        """End it."""
        self.link.close()
        self.process.wait(10)


class Rank:
    """Captures random bytes as a training rank does: copied and hashed chunk by chunk."""

    def __init__(self, node: Node, rank: int, world_size: int, nbytes: int, epoch: int) -> None:
        whole = Placement.whole((nbytes,))
        segment = Segment("model/weight", "uint8", (nbytes,), str(rank), 0, nbytes, whole)
        shares = (Share(str(rank), node.node, 0, 1),)
        self.plan = ImagePlan(lay_out([segment]), shares, 4096, _CHUNK_BYTES)
        self.node, self.rank, self.world_size, self.epoch = node, rank, world_size, epoch
        self.data = memoryview(bytearray(np.random.default_rng(rank).bytes(nbytes)))
        self.client = SnapshotClient(
            node.socket_path, rank=rank, world_size=world_size, epoch=epoch, node=node.node
        )
        self.client.reserve(self.plan.total_bytes)
        self._writer: ImageWriter | None = None

    def capture(self, step: int) -> None:
        """All but the seal."""
        version = VersionId(self.epoch, step)
        buffer = self.client.begin(version)
        if buffer is None:
            raise RuntimeError(f"rank {self.rank} was given no slot for step {step}")
        who = ImageIdentity(
            "bench", "", version, self.rank, self.world_size, self.node.node, self.node.incarnation
        )
        writer = self._writer = ImageWriter(buffer, self.plan, who, collectives=step)
        writer.begin(b"")
        self.client.begun(version)
        for chunk in range(writer.chunks):
            start, stop = writer.chunk_range(chunk)
            stop = min(stop, len(self.data))
            writer.data[start:stop] = self.data[start:stop]
            writer.finish_chunk(chunk)

    def seal(self, step: int) -> None:
        """Say that it is there."""
        assert self._writer is not None
        self._writer.seal()
        held = held_of(ImageReader(self._writer._view))
        self.client.sealed(VersionId(self.epoch, step), held)


@dataclass(frozen=True, slots=True)
class Protected:
    """What one version took."""

    capture_s: float
    protect_s: float  # from the last seal on
    cores_s: float  # of capture and protection


class Group:
    """Nodes that protect each other."""

    def __init__(self, folder: Path, nodes: int, parity: int, nbytes: int) -> None:
        """``nbytes``: of each rank's state."""
        self.folder, self.parity, self.nbytes = folder, parity, nbytes
        self.nodes = [Node(folder, number) for number in range(nodes)]
        self.epoch = 1
        self.tell()
        self.ranks = [Rank(n, rank, nodes, nbytes, 1) for rank, n in enumerate(self.nodes)]

    def tell(self, **more: Any) -> None:
        """Tell every manager the group."""
        rebuild: Rebuild | None = more.pop("rebuild", None)
        for rank, node in enumerate(self.nodes):
            peers = [Peer(o.node, o.incarnation, o.address) for o in self.nodes if o is not node]
            node.link.send(
                SetGroup(
                    epoch=self.epoch,
                    first_rank=rank,
                    local_world=1,
                    world_size=len(self.nodes),
                    peers=tuple(peers),
                    guards=tuple(sorted(other.node for other in self.nodes)),
                    parity=self.parity,
                    rebuild=rebuild if rebuild is not None and rebuild.node == node.node else None,
                    **more,
                )
            )

    def protect(self, step: int) -> Protected:
        """Capture a version on all ranks, and wait until it is protected."""
        managers_s, own_s = sum(node.cores_s() for node in self.nodes), time.process_time()
        began_s = time.monotonic()
        threads = [Thread(target=rank.capture, args=(step,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        captured_s = time.monotonic()
        for rank in self.ranks:
            rank.seal(step)
        sealed_s = time.monotonic()
        version = VersionId(self.epoch, step)
        for node in self.nodes:
            node.expect(ParityComplete, lambda message: message.version >= version)
        protected_s = time.monotonic()
        cores_s = sum(node.cores_s() for node in self.nodes) - managers_s
        cores_s += time.process_time() - own_s
        return Protected(captured_s - began_s, protected_s - sealed_s, cores_s)

    def round(self) -> RoundId:
        """The newest that every node has parity of; no other begins until there is a new group."""
        newest = []
        for node in self.nodes:
            node.link.send(AskInventory())
            newest.append(max(held.round for held in node.expect(Inventory).parity))
        return min(newest)

    def memory_bytes(self) -> int:
        """What all slots of all nodes take."""
        return sum(nbytes for node in self.nodes for nbytes in node.memory.values())

    def fetched_bytes(self) -> int:
        """What all nodes fetched for the newest version that was told of."""
        return sum(node.fetched_bytes for node in self.nodes)

    def close(self) -> None:
        """End everything."""
        for rank in self.ranks:
            rank.client.close()
        for node in self.nodes:
            node.close()


@contextmanager
def grouped(folder: Path, nodes: int, parity: int, nbytes: int) -> Iterator[Group]:
    """A group that is ended."""
    group = Group(folder, nodes, parity, nbytes)
    try:
        yield group
    finally:
        group.close()
