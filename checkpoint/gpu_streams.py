"""Copies from GPUs beside the training: in streams of their own, hashed as they land.

The copies of a version are launched all at once, behind the kernels that made it.  A training
thread that is about to change the tensors waits only until they are launched: the GPU itself holds
its kernels back until the copies are done, and nobody waits for the hashes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue

import torch

from ftrain.checkpoint.image import ImageWriter
from ftrain.comms.process import let_others_run_on

_MARKED_BYTES = 64 * 1024 * 1024  # copied between two events, about a millisecond
_HASHERS = 4  # threads; one hashes slower than a GPU copies


def in_cuda_graph() -> bool:
    """Whether what is launched now is not run but recorded."""
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use and torch.cuda.is_current_stream_capturing()


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
        self._works: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for number in range(_HASHERS):
            # Not a pool of the library: those take no work any more when a script has ended, and
            # an exit would wait for a GPU that hangs.
            name = f"ftrain-hash-{number}"
            threading.Thread(target=self._hash, name=name, daemon=True).start()

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
            for chunk in range(writer.chunks):
                copy(chunk)
                start, stop = writer.chunk_range(chunk)
                launched += stop - start
                if launched >= _MARKED_BYTES or chunk == writer.chunks - 1:
                    landed += [Marks(self.gpus)] * (chunk + 1 - len(landed))
                    launched = 0
        return landed

    def finish(self, landed: Sequence[Marks], finish_chunk: Callable[[int], None]) -> None:
        """Call ``finish_chunk`` for each chunk that has landed, several at a time; raises what one
        of them raised, when all have ended."""
        remaining = iter(range(len(landed)))
        errors: list[BaseException] = []
        ended = threading.Semaphore(0)

        def work() -> None:
            try:
                while (chunk := next(remaining, None)) is not None:  # whoever comes first
                    landed[chunk].synchronize()
                    finish_chunk(chunk)
            except BaseException as error:  # whatever it was: it is raised where it is waited for
                errors.append(error)
                deque(remaining, maxlen=0)
            finally:
                ended.release()

        for _ in range(_HASHERS):
            self._works.put(work)
        for _ in range(_HASHERS):
            ended.acquire()
        if errors:
            raise errors[0]

    def synchronize(self) -> None:
        """Return when no copy is under way."""
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        """The same, and the threads end."""
        self.synchronize()
        for _ in range(_HASHERS):
            self._works.put(None)

    def _hash(self) -> None:
        let_others_run_on()
        torch.cuda.set_device(self.gpus[0])  # every thread begins with the first of the machine
        while (work := self._works.get()) is not None:
            work()


def streams_on(gpus: Sequence[torch.device], before: GpuStreams | None) -> GpuStreams:
    """Those of ``before`` if they are on these GPUs, else new ones in their place."""
    if before is not None and before.gpus == tuple(gpus):
        return before
    if before is not None:
        before.close()
    return GpuStreams(gpus)
