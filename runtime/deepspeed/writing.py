"""Behind the training thread: copies are completed, files written, checkpoints published."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrain.checkpoint.directory import free_bytes
from ftrain.checkpoint.files import NewFile
from ftrain.checkpoint.pace import Pace
from ftrain.checkpoint.segment_writer import plan_file, write_file
from ftrain.comms.errors import FtrainError, PeerLostError
from ftrain.comms.process import lower_priority
from ftrain.runtime.deepspeed import tags
from ftrain.runtime.deepspeed.peers import Peers, Report
from ftrain.runtime.deepspeed.shot import Shot

PEERS_WAIT_S = 600.0  # for the other ranks' files, once one's own are durable
_NICE = 10


@dataclass(slots=True)
class Save:
    """One call of ``save_checkpoint``."""

    number: int
    name: str  # of the files that are being written
    save_dir: Path
    tag: str
    is_latest: bool  # once it is complete
    files: dict[str, tags.TagFile] = field(default_factory=dict)  # durable ones of this rank
    problem: str = ""

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.save_dir / self.tag


class _InTurn(Executor):
    """No threads: Python's own pools take no work once the interpreter began to end, and then the
    last checkpoint is still being written."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Done when this returns; raises what ``fn`` raises."""
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


_Task = Callable[[], None]


class Writer:
    """Two threads: one completes copies, as the next step waits for them, the other one writes.

    What fails is collected in :attr:`failures`, and in :meth:`unsaid` until it is asked for.
    """

    def __init__(self, peers: Peers, pace: Pace) -> None:
        self.failures: list[str] = []
        self.durable = 0
        self._peers = peers
        self._pace = pace
        self._lock = threading.Lock()
        self._unsaid: list[str] = []
        self._copying: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._writing: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_run, args=(tasks, nice), name=name, daemon=True)
            for tasks, nice, name in (
                (self._copying, 0, "ftrain-copy"),
                (self._writing, _NICE, "ftrain-write"),
            )
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def add(self, save: Save, shot: Shot) -> None:
        """A file of the save; returns at once."""
        self._copying.put(shot.complete)
        self._writing.put(lambda: self._write(save, shot))

    def finish(self, save: Save) -> None:
        """It has no more files; returns at once."""
        self._writing.put(lambda: self._finish(save))

    def drain(self) -> None:
        """Return when all that was handed over until now is dealt with."""
        done = threading.Event()
        self._writing.put(done.set)
        done.wait()

    def close(self) -> None:
        """The same, and the threads end."""
        atexit.unregister(self.close)
        for tasks in (self._copying, self._writing):
            tasks.put(None)
        for thread in self._threads:
            thread.join()

    def unsaid(self) -> list[str]:
        """What failed since this was asked last."""
        with self._lock:
            unsaid, self._unsaid = self._unsaid, []
        return unsaid

    # ---- in the writing thread

    def _write(self, save: Save, shot: Shot) -> None:
        """One file, synced and in its place."""
        path = shot.path
        new = tags.new_path(path, save.name)
        nbytes = 0
        try:
            tags.clear(path, self._peers.name)
            planned = plan_file(shot.image())
            nbytes = planned.nbytes
            with NewFile(new, nbytes) as file:
                write_file(planned, file, _InTurn(), self._pace)
                file.sync()
            tags.place(path, save.name)
            save.files[path.name] = tags.TagFile(nbytes, planned.tail.digest)
        except Exception as error:  # whatever it was: training goes on, and this is told
            reason = f"{error}"
            if isinstance(error, OSError) and not isinstance(error, FtrainError):
                reason = (
                    f"{path} can't be written ({error.strerror}): it takes {nbytes} bytes, "
                    f"{free_bytes(path.parent)} are free"
                )
            save.problem = save.problem or reason
            with suppress(OSError):
                new.unlink(missing_ok=True)
        finally:
            shot.release()

    def _finish(self, save: Save) -> None:
        """Tell the others; rank 0 makes the tag exist once all ranks' files are durable, and says
        so.  A rank writes nothing more before that: it may belong to the same tag."""
        peers = self._peers
        try:
            report = Report(peers.rank, str(save.folder), dict(save.files), save.problem)
            peers.tell(save.number, report)
            if peers.rank == 0:
                problem = self._publish(save)
                peers.announce(save.number, problem)
            else:
                problem = peers.announced(save.number, PEERS_WAIT_S)
        except Exception as error:  # whatever it was: training goes on, and this is told
            problem = "" if tags.is_published(save.folder, save.name) else f"{error}"
        if not problem:
            self.durable += 1
            return
        sentence = f"checkpoint {save.folder} was not saved: {problem}"
        with self._lock:
            self.failures.append(sentence)
            if peers.rank == 0 or save.problem:  # the others need not say the same
                self._unsaid.append(sentence)

    def _publish(self, save: Save) -> str:
        """Make the tag exist; returns why not."""
        try:
            reports = self._peers.gather(save.number, PEERS_WAIT_S)
        except PeerLostError as error:
            return f"{error}"
        files = {name: file for report in reports for name, file in report.files.items()}
        problems = [f"rank {r.rank}: {r.problem}" for r in reports if r.problem]
        strays = {report.folder for report in reports} - {str(save.folder)}
        if strays:
            problems.append(f"other ranks save to {sorted(strays)[0]}")
        if not problems and files:
            try:
                tags.publish(save.folder, save.name, self._peers.world_size, files)
                if save.is_latest:
                    tags.name_latest(save.save_dir, save.tag)
                return ""
            except OSError as error:
                problems.append(f"{error.filename or save.folder}: {error.strerror}")
        if problems:
            tags.discard(save.folder, save.name, files)
        return "; ".join(problems)


def _run(tasks: queue.SimpleQueue[_Task | None], nice: int) -> None:
    if nice:
        lower_priority(nice)
    while (task := tasks.get()) is not None:
        task()
        del task  # what it holds goes before the next one comes
