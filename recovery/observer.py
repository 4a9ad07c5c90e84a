"""Looks at ranks from outside: telemetry pages and /proc, never the rank's cooperation.

Each agent observes its own ranks.  It may pass on what other nodes say of theirs, because some
rules need the whole group: samples to :meth:`Observer.poll`, boundary counts (the snapshot
managers' gossip carries them) to :meth:`Observer.record_boundaries`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ftrain.comms.protocol.phases import Phase, Where
from ftrain.comms.telemetry import TelemetryPage, Word
from ftrain.configs.schema import DetectionConfig
from ftrain.recovery.protocol.watchdog import WARN, RankSample, Verdict, Watchdog

STACK_SIGNAL = signal.SIGRTMIN + 1  # the worker server has every rank write its stacks on it
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_READ_BYTES = 4096
_BOUNDARIES_READ = 8


class Observer:
    """Watches the local ranks of one formation.

    ``ranks`` are all ranks of the group, local or not; the local ones are added one by one.
    Close it, and make a new one, when the group is stopped.
    """

    def __init__(self, config: DetectionConfig, ranks: Iterable[int]) -> None:
        self._watchdog = Watchdog(config, ranks)
        self._watched: dict[int, _Watched] = {}

    def add(self, rank: int, pid: int, page: TelemetryPage) -> None:
        """Watch ``rank``; its page stays the caller's. ProcessLookupError: it is gone already."""
        self.remove(rank)
        self._watched[rank] = _Watched(rank, pid, page)

    def remove(self, rank: int) -> None:
        """Watch it no longer."""
        watched = self._watched.pop(rank, None)
        if watched is not None:
            watched.close()

    def record_boundary(self, rank: int, step: int, collectives: int) -> None:
        """Another node's rank had enqueued so many collectives at boundary ``step``."""
        if rank not in self._watched:
            self._watchdog.record_boundary(rank, step, collectives)

    def record_boundaries(self, step: int, counts: Mapping[int, int]) -> None:
        """Other nodes' ranks (rank -> collectives) at boundary ``step``, and the local ones there.

        Samples alone may pass over that boundary, when steps are much shorter than the polls.
        """
        for rank, collectives in counts.items():
            self.record_boundary(rank, step, collectives)
        for watched in self._watched.values():
            entry = watched.page.boundary(step)
            if entry is not None:
                self._watchdog.record_boundary(watched.rank, step, entry[0])

    def poll(self, now_ns: int, remote: Sequence[RankSample] = ()) -> list[Verdict]:
        """Look at every local rank; what is new to say of them.

        ``now_ns`` is CLOCK_MONOTONIC.  A verdict to warn has the rank write its stacks to its
        standard error first.  Verdicts on other nodes' ranks are left to their own agents.
        """
        samples = [watched.sample() for watched in self._watched.values()]
        verdicts = self._watchdog.observe(now_ns, [*samples, *remote])
        local = [verdict for verdict in verdicts if verdict.rank in self._watched]
        for verdict in local:
            if verdict.action == WARN:
                watched = self._watched[verdict.rank]
                watched.page[Word.STALL_WARNED_NS] = now_ns
                request_stack(watched.pid)
        return local

    def samples(self) -> list[RankSample]:
        """One look at every local rank, for another node's observer."""
        return [watched.sample() for watched in self._watched.values()]

    def close(self) -> None:
        """Watch nothing any longer."""
        for rank in tuple(self._watched):
            self.remove(rank)


def request_stack(pid: int) -> bool:
    """Ask a rank to write all its threads' stacks to its standard error; False: it can't.

    The signal kills a process that does not expect it, so the kernel is asked first.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        if not int(caught.split()[1], 16) >> (STACK_SIGNAL - 1) & 1:
            return False
        os.kill(pid, STACK_SIGNAL)
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return False
    return True


class _Vitals(NamedTuple):
    """What the kernel says of a process; the default is one that is gone."""

    state: str = "X"
    main_cpu_ns: int = 0
    process_cpu_ns: int = 0
    io_bytes: int = 0


class _Watched:
    """One local rank: descriptors of its /proc files, which stay its own if the pid is reused."""

    def __init__(self, rank: int, pid: int, page: TelemetryPage) -> None:
        self.rank = rank
        self.pid = pid
        self.page = page
        self._fds: list[int] = []
        try:
            for name in ("stat", f"task/{pid}/stat"):
                self._fds.append(_open(f"/proc/{pid}/{name}"))
        except FileNotFoundError:
            self.close()
            raise ProcessLookupError(f"rank {rank}: there is no process {pid}") from None
        try:
            self._fds.append(_open(f"/proc/{pid}/io"))
        except (FileNotFoundError, PermissionError):
            pass  # then I/O is not evidence of life; CPU time still is

    def sample(self) -> RankSample:
        page = self.page
        step = page[Word.STEP]
        recent = range(max(0, step - _BOUNDARIES_READ + 1), step + 2)
        found = ((each, page.boundary(each)) for each in recent)
        vitals = self._vitals()
        return RankSample(
            rank=self.rank,
            alive=vitals.state not in "ZX",
            state=vitals.state,
            main_cpu_ns=vitals.main_cpu_ns,
            process_cpu_ns=vitals.process_cpu_ns,
            io_bytes=vitals.io_bytes,
            phase=Phase(page[Word.PHASE]),
            step=step,
            steps_done=page[Word.STEPS_DONE],
            gil_beat=page[Word.GIL_BEAT],
            where=Where(page[Word.WHERE]),
            collectives=page[Word.COLLECTIVES],
            boundaries=tuple((each, entry[0]) for each, entry in found if entry is not None),
            step_median_ns=page[Word.STEP_MEDIAN_NS],
        )

    def _vitals(self) -> _Vitals:
        try:
            whole, main = (_read(fd) for fd in self._fds[:2])
            io_bytes = _io_bytes(_read(self._fds[2])) if len(self._fds) > 2 else 0
        except (ProcessLookupError, PermissionError):
            return _Vitals()  # PermissionError: /proc/<pid>/io of a process that is ending
        state, process_cpu_ns = _stat(whole)
        return _Vitals(state, _stat(main)[1], process_cpu_ns, io_bytes)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read(fd: int) -> bytes:
    return os.pread(fd, _READ_BYTES, 0)


def _stat(text: bytes) -> tuple[str, int]:
    """State, and user + system time in ns, of a /proc stat file."""
    fields = text.rpartition(b")")[2].split()  # the name in brackets may hold anything
    return fields[0].decode(), (int(fields[11]) + int(fields[12])) * _TICK_NS


def _io_bytes(text: bytes) -> int:
    """Bytes read and written: by system calls, and from and to the disk."""
    counted = (b"rchar:", b"wchar:", b"read_bytes:", b"write_bytes:")
    lines = (line.split() for line in text.splitlines())
    return sum(int(line[1]) for line in lines if line[0] in counted)
