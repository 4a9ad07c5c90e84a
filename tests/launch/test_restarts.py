"""What can't be started is tried again; what never works is not started for ever."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
from launching import Launch, launched, wait_for
from test_front import WAITING, began

from ftrain.launch.children import children_of
from ftrain.recovery.node_file import NodeFile, node_file_path, read_node_file

# Imported by every Python process of the launch before anything else.
DIES = """
import os, signal, sys
if "{module}" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGSEGV)
"""


def limit_descriptors(pid: int, limit: int) -> int:
    """Leave a process as many; returns what it had."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
    return soft


def node(launch: Launch) -> NodeFile:
    found = wait_for(lambda: read_node_file(node_file_path(launch.run_dir, 0)))
    assert isinstance(found, NodeFile)
    return found


@pytest.mark.slow
def test_an_agent_without_descriptors_keeps_its_ranks(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch) and node(launch).ranks)  # nothing is asked of the server
        before = node(launch)
        had = limit_descriptors(before.agent_pid, 3)
        os.kill(before.worker_server_pid, signal.SIGKILL)
        wait_for(lambda: "the worker server can't be started (Too many open fi" in launch.shown)
        os.kill(before.smp_pid, signal.SIGKILL)
        wait_for(lambda: "the snapshot manager can't be started (Too many op" in launch.shown)
        time.sleep(1.2)  # another attempt
        limit_descriptors(before.agent_pid, had)
        wait_for(lambda: node(launch).worker_server_pid not in (0, before.worker_server_pid))
        wait_for(lambda: node(launch).smp_pid not in (0, before.smp_pid))
        assert (node(launch).agent_pid, node(launch).ranks) == (before.agent_pid, before.ranks)
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown
        assert launch.shown.count("can't be started") == 2, launch.shown
        assert len(began(launch)) == 1


@pytest.mark.slow
def test_ranks_end_and_start_though_their_agent_has_no_descriptors(tmp_path: Path) -> None:
    """It can't even look for what they left behind."""
    with launched(tmp_path, WAITING, "launch.max_restarts=5") as launch:
        wait_for(lambda: began(launch) and node(launch).ranks)
        before = node(launch)
        had = limit_descriptors(before.agent_pid, 3)
        os.kill(before.ranks[0].pid, signal.SIGKILL)
        wait_for(lambda: "Too many open files" in launch.shown)
        limit_descriptors(before.agent_pid, had)
        wait_for(lambda: len(began(launch)) == 2)
        assert node(launch).agent_pid == before.agent_pid, launch.shown
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown


@pytest.mark.soak
def test_a_front_without_descriptors_starts_the_agent_later(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        had = limit_descriptors(launch.popen.pid, 3)
        for module in ("ftrain.launch.agent", "ftrain.launch.coordinator"):
            launch.kill(module)
        said = ("the agent of node 0 can't be", "the coordinator can't be started (Too many open")
        wait_for(lambda: all(words in launch.shown for words in said))
        time.sleep(1.2)  # another attempt
        limit_descriptors(launch.popen.pid, had)
        wait_for(lambda: len(began(launch)) == 2)
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown
        assert launch.shown.count("can't be started") == 2, launch.shown
        assert "Traceback" not in launch.shown


@pytest.mark.slow
def test_ranks_wait_for_a_worker_server_that_is_in_a_crash_loop(tmp_path: Path) -> None:
    """The only restart that is allowed is not used up by the pause between its starts."""
    with launched(tmp_path, WAITING, "--max-restarts", "1") as launch:
        wait_for(lambda: began(launch))
        (rank,) = wait_for(lambda: node(launch).ranks)
        for _ in range(5):
            pid = wait_for(lambda: node(launch).worker_server_pid)
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda old=pid: node(launch).worker_server_pid != old)
        os.kill(rank.pid, signal.SIGKILL)
        wait_for(lambda: len(began(launch)) == 2)
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown


@pytest.mark.soak
def test_a_stop_while_the_worker_server_hangs_ends_the_job(tmp_path: Path) -> None:
    """Its ranks were about to be started again."""
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        server, (rank,) = node(launch).worker_server_pid, node(launch).ranks
        for pid in (server, *wait_for(lambda: children_of(server))):
            os.kill(pid, signal.SIGSTOP)
        os.kill(rank.pid, signal.SIGKILL)
        phases = launch.run_dir / "events.jsonl"
        wait_for(lambda: phases.read_text().count('"phase":"starting"') == 2)
        began_s = time.monotonic()
        launch.popen.send_signal(signal.SIGINT)
        assert launch.wait(30) == 75, launch.shown
        assert time.monotonic() - began_s < 6  # and not what a stop may take at most
        assert "stopped (Ctrl-C) with nothing to save" in launch.shown


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coordinator", "agent"])
def test_what_dies_of_a_signal_at_its_start_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "path"
    path.mkdir()
    (path / "sitecustomize.py").write_text(DIES.format(module=f"ftrain.launch.{name}"))
    monkeypatch.setenv("PYTHONPATH", str(path))
    with launched(tmp_path, WAITING) as launch:
        began_s = time.monotonic()
        assert launch.wait(30) == 1, launch.shown
        assert time.monotonic() - began_s > 3  # there are pauses
        assert launch.gone_after(0)
        assert "ended with SIGSEGV 6 times right after its start" in launch.shown


def test_a_coordinator_that_can_not_work_here_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "run" / "state" / "epoch").mkdir(parents=True)
    with launched(tmp_path, WAITING) as launch:
        assert launch.wait() == 2, launch.shown
        assert launch.gone_after(0)
        (line,) = launch.shown.splitlines()
        assert line.startswith(f"ftrain: coordinator: {tmp_path}/run/state/epoch can't be used")
