"""One file's copy in memory: what may change at once is copied at once, the rest behind the step.

What changes when, by DeepSpeed's code: everything in a ZeRO optimizer's state (moments, master
weights) and the parameters that it owns change inside ``engine.step`` only, behind the commit that
DeepSpeed asks for there.  Module buffers change in forward, frozen parameters and whatever the
script put into ``client_state`` at any moment.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftrain.checkpoint.copying import CopyProgram
from ftrain.checkpoint.gpu_streams import GpuStreams, Marks, streams_on
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageReader, ImageWriter
from ftrain.checkpoint.pinned import PageLock
from ftrain.checkpoint.tensors import Changes, StateTensor, plan_image
from ftrain.comms.protocol.messages import Share
from ftrain.runtime.deepspeed.tree import Folder, Leaf

CHUNK_BYTES = 8 * 1024 * 1024
_SHARE = "file"  # each file is whole in itself
_SMALL_BYTES_MIN = 64 * 1024


class Room:
    """Memory for one copy, kept from one save to the next; one at a time has it."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._lock: PageLock | None = None
        self._streams: GpuStreams | None = None
        self._free = threading.Semaphore()

    def take(self, nbytes: int) -> memoryview:
        """So many bytes at least, once nobody else has them.  Raises OSError: there are none."""
        self._free.acquire()
        try:
            if self._map is None or len(self._map) < nbytes:
                self._forget()  # first, so that never both are there
                self._map = mmap.mmap(-1, nbytes)
        except BaseException:  # whatever it was: the next one gets a turn
            self._free.release()
            raise
        return memoryview(self._map)

    def lock_pages(self) -> None:
        """Let GPUs copy to it at full speed."""
        if self._lock is None and self._map is not None:
            self._lock = PageLock(memoryview(self._map))

    def streams(self, gpus: Sequence[torch.device]) -> GpuStreams:
        """For copies from these to it."""
        self._streams = streams_on(gpus, self._streams)
        return self._streams

    def close(self) -> None:
        """No copy is made any more."""
        if self._streams is not None:
            self._streams.close()
        self._streams = None
        self._forget()

    def _forget(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._map = self._lock = None

    def give_back(self) -> None:
        """The copy is not needed any more."""
        self._free.release()


class Shot:
    """The copy of one file's state.  When this is made, all that may change at once is in it.

    Args:
        path: the file that it is for.
        folded: the state dict.
        identity: whose it is.
        room: taken here, given back by :meth:`release`.
        changes: when a tensor changes; what changes inside the step is left to :meth:`complete`.

    Raises:
        OSError: no memory.
        StateError: it does not fit a file.
    """

    def __init__(
        self,
        path: Path,
        folded: Folder,
        identity: ImageIdentity,
        room: Room,
        changes: Callable[[Leaf], Changes],
    ) -> None:
        self.path = path
        self.problem: BaseException | None = None
        self._room = room
        self._copied = threading.Event()
        self._ended = threading.Event()
        tensors = tuple(
            StateTensor.whole(leaf.name, leaf.tensor, _SHARE, changes(leaf))
            for leaf in folded.leaves
        )
        small = folded.small
        plan = plan_image(
            tensors,
            lambda key: Share(key, 0, 0, 1),
            max(_SMALL_BYTES_MIN, 2 * len(small)),
            CHUNK_BYTES,
        )
        self._program: CopyProgram | None = CopyProgram(plan, tensors)
        self._image = room.take(plan.total_bytes)[: plan.total_bytes]
        try:
            self._writer = ImageWriter(self._image, plan, identity)
            self._writer.prepare(small)
            self._copy(Changes.ANYTIME)
            self._writer.declare()
            self._ready = Marks(self._program.gpus)
        except BaseException:  # whatever it was: the room is free again, and nobody copies to it
            Marks(self._program.gpus).synchronize()
            self.release()
            raise

    def complete(self) -> None:
        """Copy and hash the rest; :attr:`problem` says what went wrong."""
        try:
            self._copy_rest()
            self._writer.seal()
        except Exception as error:  # a thread's end must not leave the training thread waiting
            self.problem = error
        finally:
            self._program = None  # and with it the tensors
            self._copied.set()
            self._ended.set()

    def wait_copied(self) -> None:
        """Return when the tensors may change."""
        self._copied.wait()

    def image(self) -> ImageReader:
        """What was copied, once it is; raises what went wrong."""
        self._ended.wait()
        if self.problem is not None:
            raise self.problem
        return ImageReader(self._image, where=f"the copy for {self.path}")

    def release(self) -> None:
        """Give the memory back."""
        self._room.give_back()

    def _copy_rest(self) -> None:
        program = self._program
        assert program is not None

        def copy(chunk: int) -> None:
            program.copy(self._writer, chunk, (Changes.IN_STEP,))

        if not program.gpus:
            for chunk in range(self._writer.chunks):
                copy(chunk)
                self._writer.finish_chunk(chunk)
            return
        torch.cuda.set_device(program.gpus[0])  # every thread begins with the first of the machine
        self._room.lock_pages()
        streams = self._room.streams(program.gpus)
        try:
            landed = streams.launch(self._ready, self._writer, copy)
        finally:
            streams.synchronize()
        self._copied.set()  # the rest reads the copy
        streams.finish(landed, self._writer.finish_chunk)

    def _copy(self, kind: Changes) -> None:
        assert self._program is not None
        if self._program.has((kind,)):
            if self._program.has_on_gpu((kind,)):
                self._room.lock_pages()
            for chunk in range(self._writer.chunks):
                self._program.copy(self._writer, chunk, (kind,))


def changes_of(state: Mapping[str, Any], *, lazy: bool) -> Callable[[Leaf], Changes]:
    """When the tensors of one of DeepSpeed's state dicts change."""
    owned = {name for group in state.get("param_shapes") or () for name in group}
    # A file has either; in one with a module, this is a key of the script's client_state.
    is_optimizers = "module" not in state

    def changes(leaf: Leaf) -> Changes:
        top, *rest = leaf.steps
        in_step = (
            rest[0] in owned
            if top == "module" and rest
            else top == "optimizer_state_dict" and is_optimizers
        )
        return Changes.IN_STEP if lazy and in_step else Changes.ANYTIME

    return changes
