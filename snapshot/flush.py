"""Writes committed versions from memory to the durable level, beside the captures."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import file_name
from ftrain.checkpoint.pace import Pace
from ftrain.comms.errors import FtrainError
from ftrain.comms.process import lower_priority
from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.protocol.messages import Flush, Flushed, FlushedFile, FlushRefused
from ftrain.snapshot.store import Image, SlotStore, places_of

_NICE = 10  # of the writing threads: training goes first
_WRITERS = 2  # one compares a chunk with its digest while the other one writes
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Written:
    """What writing this node's part of a version took."""

    version: VersionId
    nbytes: int
    seconds: float
    cost_s: float  # of training on all cores: the writers' CPU time over the number of cores


class Flusher:
    """One flush at a time.

    ``answer`` gets a Flushed or FlushRefused for each Flush, ``on_trouble`` a sentence for the user
    when something fails that never should.
    """

    def __init__(
        self,
        store: SlotStore,
        directory: str,
        bytes_per_s_max: float,
        answer: Callable[[Flushed | FlushRefused], None],
        on_trouble: Callable[[str], None],
        on_written: Callable[[Written], None] = lambda written: None,
    ) -> None:
        self._store = store
        self._durable = DurableStore(directory, Pace(bytes_per_s_max)) if directory else None
        self._answer = answer
        self._trouble = on_trouble
        self._on_written = on_written
        self._threads: list[int] = []  # that write
        self._waiting: Flush | None = None  # for a version to be committed
        self._writing: Flush | None = None
        self._next: Flush | None = None  # came while another was written
        self._withdrawn: deque[VersionId] = deque(maxlen=_REMEMBERED)
        self._recent: deque[VersionId] = deque(maxlen=_REMEMBERED)  # committed
        self._thread = ThreadPoolExecutor(1, "ftrain-flush", self._begin_thread)
        self._writers = ThreadPoolExecutor(_WRITERS, "ftrain-write", self._begin_thread)
        self._task: asyncio.Task[None] | None = None

    def request(self, flush: Flush) -> None:
        """The agent wants a durable version; the same order again changes nothing."""
        if flush in (self._waiting, self._writing, self._next):
            return
        if self._writing is not None:
            if self._next is not None:
                self._refuse(self._next, "a newer order took its place")
            self._next = flush
            return
        if self._waiting is not None:
            self._refuse(self._waiting, "a newer order took its place")
            self._waiting = None
        self._consider(flush)

    def committed(self, version: VersionId) -> None:
        """Every node of the group holds ``version``."""
        self._recent.append(version)
        waiting = self._waiting
        if waiting is None or version.epoch < waiting.version.epoch:
            return
        if version.epoch > waiting.version.epoch:
            self._waiting = None
            self._refuse(waiting, f"epoch {waiting.version.epoch} is over")
        elif version.step >= waiting.version.step:
            self._waiting = None
            self._write(waiting, version)

    def withdrawn(self, version: VersionId) -> None:
        """A rank found its image of ``version`` to be wrong."""
        self._withdrawn.append(version)

    def group_changed(self) -> None:
        """Another epoch began: nothing of an older one will be committed any more."""
        waiting = self._waiting
        if waiting is not None and waiting.version.epoch < self._store.custody.epoch:
            self._waiting = None
            self._refuse(waiting, f"epoch {waiting.version.epoch} is over")

    def rank_ended(self) -> None:
        """A local rank ended: perhaps nobody is left to capture what is waited for."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._consider(waiting)

    def close(self) -> None:
        """Stop; a file being written is finished or left without a name."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=False, cancel_futures=True)

    def _consider(self, flush: Flush) -> None:
        asked, custody = flush.version, self._store.custody
        newest = custody.committed
        agreed = asked in self._recent or asked in (newest, custody.base)
        if agreed and custody.complete(asked):
            self._write(flush, asked)
        elif asked.epoch < custody.epoch and custody.complete(asked):
            self._write(flush, asked)  # named by the coordinator, who sees all nodes hold it
        elif asked.epoch != custody.epoch:
            self._refuse(flush, f"this node has no step {asked.step} of epoch {asked.epoch}")
        elif newest is not None and newest >= asked:
            self._refuse(flush, f"step {asked.step} was passed: step {newest.step} is committed")
        elif self._hopeless(asked):
            self._refuse(flush, f"every rank ended, and none captured step {asked.step}")
        else:
            self._waiting = flush

    def _hopeless(self, asked: VersionId) -> bool:
        """Whether no rank is left that could still complete ``asked`` or a later version."""
        custody, takeover = self._store.custody, self._store.takeover
        if not takeover.dead.issuperset(custody.local_ranks) or takeover.waiting():
            return False
        return not any(custody.complete(v) for v in custody.sealed_versions() if v >= asked)

    def _write(self, flush: Flush, version: VersionId) -> None:
        durable = self._durable
        if durable is None:
            self._refuse(flush, "there is no durable level (checkpoint.enabled=false)")
            return
        images = self._store.images(version, self._store.custody.local_ranks)
        self._store.custody.pin(places_of(images))
        self._writing = flush
        self._task = asyncio.get_running_loop().create_task(
            self._write_all(durable, flush, version, images)
        )

    async def _write_all(
        self, durable: DurableStore, flush: Flush, version: VersionId, images: list[Image]
    ) -> None:
        loop = asyncio.get_running_loop()
        answer: Flushed | FlushRefused
        files = []
        began_s, cpu_s = time.monotonic(), self._cpu_s()
        try:
            for image in images:
                record = await loop.run_in_executor(
                    self._thread,
                    durable.write_image,
                    flush.fence,
                    version,
                    image.rank,
                    image.view,
                    self._writers,
                )
                path = f"{flush.fence}/{version.step}/{file_name(image.rank)}"
                files.append(FlushedFile(record.rank, path, record.nbytes, record.digest))
            answer = Flushed(flush.version, version, flush.fence, tuple(files))
            nbytes = sum(file.nbytes for file in files)
            seconds, cpu_s = time.monotonic() - began_s, self._cpu_s() - cpu_s
            self._on_written(Written(version, nbytes, seconds, cpu_s / (os.cpu_count() or 1)))
            if version in self._withdrawn:
                why = f"step {version.step} was withdrawn"
                answer = FlushRefused(flush.version, flush.fence, why)
        except (FtrainError, OSError) as error:
            answer = FlushRefused(flush.version, flush.fence, str(error), write_failed=True)
        except Exception as error:  # a bug: this version is lost, the later ones need not be
            why = f"{type(error).__name__}: {error}"
            answer = FlushRefused(
                flush.version, flush.fence, f"writing it failed with {why}", write_failed=True
            )
            self._trouble(f"step {version.step} could not be written to the durable level: {why}")
        finally:
            self._store.custody.unpin(places_of(images))
        self._writing = None
        self._answer(answer)
        following, self._next = self._next, None
        if following is not None:
            self._consider(following)

    def _begin_thread(self) -> None:
        lower_priority(_NICE)
        self._threads.append(threading.get_ident())

    def _cpu_s(self) -> float:
        clocks = [time.pthread_getcpuclockid(thread) for thread in self._threads]
        return sum(time.clock_gettime(clock) for clock in clocks)

    def _refuse(self, flush: Flush, reason: str) -> None:
        self._answer(FlushRefused(flush.version, flush.fence, reason))
