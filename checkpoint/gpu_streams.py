"""Copies from GPUs beside the training: in streams of their own, hashed as they land.

The copies of a version are launched all at once, behind the kernels that made it.  A training
thread that is about to change the tensors waits only until they are launched: the GPU itself holds
its kernels back until the copies are done, and nobody waits for the hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager

import torch

from ftrain.checkpoint.image import ImageWriter
from ftrain.comms.process import let_others_run_on

_MARKED_BYTES = 64 * 1024 * 1024  # copied between two events, about a millisecond
_HASHERS = 4  # threads; one hashes slower than a GPU copies


class Marks:
    """A point in the current stream of each of some GPUs."""

    __slots__ = ("_events",)

    def __init__(self, gpus: Sequence[torch.device]) -> None:
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []
        for gpu in gpus:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(gpu))
            self._events.append((gpu, event))

    def synchronize(self) -> None:
        """Return when the GPUs have passed it."""
        for _, event in self._events:
            event.synchronize()

    def hold_back(self) -> None:
        """What is launched from now on in the current streams runs behind it."""
        for gpu, event in self._events:
            torch.cuda.current_stream(gpu).wait_event(event)


class GpuStreams:
    """A stream on each of some GPUs, and threads that hash what was copied there."""

    def __init__(self, gpus: Sequence[torch.device]) -> None:
        self.gpus = tuple(gpus)
        self._streams = [torch.cuda.Stream(gpu) for gpu in gpus]  # type: ignore[no-untyped-call]
        self._hashers = ThreadPoolExecutor(_HASHERS, "ftrain-hash", let_others_run_on)

    @contextmanager
    def behind(self, ready: Marks) -> Iterator[None]:
        """The calling thread's current streams are these, and wait for ``ready``."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
            ready.hold_back()
            yield

    def launch(self, ready: Marks, writer: ImageWriter, copy: Callable[[int], None]) -> list[Marks]:
        """Launch the copies of all chunks (``copy`` does so for one); returns for each chunk when
        it has landed.  What ``copy`` copies by itself is there on return."""
        landed: list[Marks] = []
        launched = 0
        with self.behind(ready):
            try:
                for chunk in range(writer.chunks):
                    copy(chunk)
                    start, stop = writer.chunk_range(chunk)
                    launched += stop - start
                    if launched >= _MARKED_BYTES or chunk == writer.chunks - 1:
                        landed += [Marks(self.gpus)] * (chunk + 1 - len(landed))
                        launched = 0
            except BaseException:  # whatever it was: the memory may be given to others afterwards
                self.synchronize()
                raise
        return landed

    def finish(self, landed: Sequence[Marks], finish_chunk: Callable[[int], None]) -> None:
        """Call ``finish_chunk`` for each chunk that has landed, several at a time; raises what the
        first of them raised, when all have ended."""

        def finish(chunk: int) -> None:
            landed[chunk].synchronize()
            finish_chunk(chunk)

        tasks = [self._hashers.submit(finish, chunk) for chunk in range(len(landed))]
        wait(tasks)
        for task in tasks:
            task.result()

    def synchronize(self) -> None:
        """Return when no copy is under way."""
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        """The same, and the threads end."""
        self.synchronize()
        self._hashers.shutdown()
