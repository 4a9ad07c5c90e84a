"""The observer against real processes that hang, or are merely slow, in every way we know."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ftrain.comms.telemetry import TelemetryPage, Word
from ftrain.configs.schema import DetectionConfig
from ftrain.recovery.observer import Observer, request_stack
from ftrain.recovery.protocol.watchdog import Verdict

CONFIG = DetectionConfig(hang_s=0.6, poll_s=0.05, gil_busy_s=30, user_warn_s=30)
CHILD = Path(__file__).with_name("rank_child.py")


@dataclass
class Ranks:
    """Children with their pages, and an observer of them."""

    processes: list[subprocess.Popen[bytes]]
    pages: list[TelemetryPage]
    observer: Observer

    def watch(self, seconds: float) -> list[Verdict]:
        """What the observer says in that time, or until it says something."""
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            said = self.observer.poll(time.monotonic_ns())
            if said:
                return said
            time.sleep(CONFIG.poll_s)
        return []


@contextmanager
def running(
    *behaviours: str, config: DetectionConfig = CONFIG, stderr: int | None = None
) -> Iterator[Ranks]:
    fds = [TelemetryPage.create() for _ in behaviours]
    pages = [TelemetryPage(fd) for fd in fds]
    processes = []
    observer = Observer(config, range(len(behaviours)))
    try:
        for fd, page, behaviour in zip(fds, pages, behaviours, strict=True):
            page.clear()
            command = [sys.executable, str(CHILD), str(os.getpid()), behaviour, str(fd)]
            processes.append(subprocess.Popen(command, pass_fds=[fd], stderr=stderr))
        for rank, process in enumerate(processes):
            while not pages[rank][Word.SESSION_NS]:
                assert process.poll() is None
                time.sleep(0.005)
            observer.add(rank, process.pid, pages[rank])
        yield Ranks(processes, pages, observer)
    finally:
        observer.close()
        for process in processes:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        for fd, page in zip(fds, pages, strict=True):
            page.close()
            os.close(fd)


def test_stopped_rank_is_named_within_the_limit() -> None:
    with running("wait_in_collective", "sleep") as ranks:
        assert ranks.watch(0.2) == []
        ranks.processes[1].send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        [verdict] = ranks.watch(5)
        assert (verdict.rank, verdict.kind, verdict.action) == (1, "stopped", "restart")
        assert time.monotonic() - began_s < CONFIG.hang_s


def test_continued_rank_is_let_off() -> None:
    with running("sleep", "sleep") as ranks:
        ranks.processes[1].send_signal(signal.SIGSTOP)
        assert ranks.watch(0.2) == []
        ranks.processes[1].send_signal(signal.SIGCONT)
        assert ranks.watch(0.7) == []


def test_rank_asleep_with_the_gil_is_named() -> None:
    with running("wait_in_collective", "sleep_with_gil") as ranks:
        [verdict] = ranks.watch(5)
        assert (verdict.rank, verdict.kind, verdict.action) == (1, "gil", "restart")


def test_rank_that_left_a_collective_out_is_named() -> None:
    with running("wait_in_collective", "pass_the_collective") as ranks:
        [verdict] = ranks.watch(5)
        assert (verdict.rank, verdict.kind, verdict.action) == (1, "desync", "restart")


def test_ranks_that_all_wait_are_stalled() -> None:
    with running("wait_in_collective", "wait_in_collective") as ranks:
        found = ranks.watch(5)
        assert [(v.rank, v.kind) for v in found] == [(0, "stall"), (1, "stall")]


def test_slow_ranks_are_left_alone() -> None:
    with running("wait_in_collective", "burn_with_gil", "burn", "write", "sleep") as ranks:
        assert ranks.watch(1.5) == []


def test_gil_held_with_cpu_time_gets_its_own_limit() -> None:
    config = DetectionConfig(hang_s=0.4, poll_s=0.05, gil_busy_s=1.0)
    with running("burn_with_gil", config=config) as ranks:
        [verdict] = ranks.watch(5)
        assert verdict.kind == "gil"
        assert "with CPU time" in verdict.evidence


def test_long_user_code_is_warned_about_with_its_stack() -> None:
    config = DetectionConfig(hang_s=0.4, poll_s=0.05, user_warn_s=0.6, user_stall_s=1.5)
    with running("sleep", config=config, stderr=subprocess.PIPE) as ranks:
        [warning] = ranks.watch(5)
        assert warning.action == "warn"
        assert ranks.pages[0][Word.STALL_WARNED_NS]
        [verdict] = ranks.watch(5)
        assert (verdict.kind, verdict.action) == ("stall", "restart")
        ranks.processes[0].kill()
        stream = ranks.processes[0].stderr
        assert stream is not None
        assert b"in sleep" in stream.read()


def test_rank_that_ended_is_left_out_of_the_collective() -> None:
    with running("wait_in_collective", "sleep") as ranks:
        ranks.processes[1].kill()
        ranks.processes[1].wait()
        assert [sample.alive for sample in ranks.observer.samples()] == [True, False]
        [verdict] = ranks.watch(5)
        assert (verdict.rank, verdict.kind) == (1, "desync")


def test_other_nodes_counts_show_who_skipped() -> None:
    config = CONFIG
    fd = TelemetryPage.create()
    page = TelemetryPage(fd)
    observer = Observer(config, (0, 1))
    try:
        page.record_boundary(4, 7, 1)
        page[Word.STEP] = 4
        observer.add(0, os.getpid(), page)
        observer.record_boundary(1, 4, 8)
        [verdict] = observer.poll(time.monotonic_ns())
        assert (verdict.rank, verdict.kind) == (0, "desync")
    finally:
        observer.close()
        page.close()
        os.close(fd)


def test_other_nodes_counts_of_a_boundary_that_no_sample_shows() -> None:
    fd = TelemetryPage.create()
    page = TelemetryPage(fd)
    observer = Observer(CONFIG, (0, 1))
    try:
        for step in range(50):
            page.record_boundary(step, 2 * step, 1)
        page[Word.STEP] = 49
        observer.add(0, os.getpid(), page)
        assert observer.poll(time.monotonic_ns()) == []
        observer.record_boundaries(99, {1: 1})  # not reached here
        observer.record_boundaries(20, {1: 40})
        assert observer.poll(time.monotonic_ns()) == []
        observer.record_boundaries(21, {0: 0, 1: 43})  # of its own rank it knows better
        [verdict] = observer.poll(time.monotonic_ns())
        assert (verdict.rank, verdict.kind) == (0, "desync")
        assert verdict.evidence == "42 collectives up to boundary 21, other ranks 43"
    finally:
        observer.close()
        page.close()
        os.close(fd)


def test_stack_is_not_asked_of_who_would_die_of_it() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not request_stack(process.pid)
        assert process.poll() is None
        process.kill()
    assert not request_stack(process.pid)


def test_process_that_is_gone_can_not_be_added() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    fd = TelemetryPage.create()
    page = TelemetryPage(fd)
    observer = Observer(CONFIG, (0,))
    with pytest.raises(ProcessLookupError, match="rank 0"):
        observer.add(0, process.pid, page)
    observer.close()
    page.close()
    os.close(fd)
