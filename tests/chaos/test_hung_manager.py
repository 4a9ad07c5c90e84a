"""A snapshot manager that is alive and does nothing is replaced like a dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_runs import command, events, node_file, slots, wait_for

from ftrain.recovery.node_file import node_file_path

pytestmark = pytest.mark.slow


def newest_step(run_dir: Path) -> int:
    """The newest version that the slots of both ranks hold."""
    held = [set(slots(node_file(run_dir), rank)) for rank in range(2)]
    return max((version.step for version in held[0] & held[1]), default=0)


def test_a_stopped_snapshot_manager_is_replaced(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = command(run_dir, ["--nproc-per-node", "2"], ["--steps", "900"])
    with subprocess.Popen(line, cwd=tmp_path) as process:
        try:
            wait_for(lambda: node_file_path(run_dir, 0).exists() and newest_step(run_dir) > 20)
            stopped = node_file(run_dir).smp_pid
            os.kill(stopped, signal.SIGSTOP)
            before = newest_step(run_dir)
            wait_for(lambda: node_file(run_dir).smp_pid not in (0, stopped))
            wait_for(lambda: newest_step(run_dir) > before + 5)
            os.kill(node_file(run_dir).ranks[1].pid, signal.SIGKILL)
            assert process.wait(90) == 0
        finally:
            process.kill()
    (incident,) = events(run_dir, "incident")
    assert incident["restore"]["level"] == "memory"
    assert incident["steps_recomputed"] <= 1
    texts = [event["text"] for event in events(run_dir, "warning")]
    assert sum("does not answer: it is being replaced" in text for text in texts) == 1


@pytest.mark.soak
def test_a_rank_killed_while_the_manager_has_not_answered_loses_one_step(tmp_path: Path) -> None:
    """Its image is sealed and nobody was told: the manager finds it once it runs again."""
    run_dir = tmp_path / "run"
    line = command(run_dir, ["--nproc-per-node", "2"], ["--steps", "900"])
    with subprocess.Popen(line, cwd=tmp_path) as process:
        try:
            for incident in range(4):
                wait_for(lambda: node_file_path(run_dir, 0).exists() and newest_step(run_dir) > 20)
                wait_for(lambda n=incident: len(events(run_dir, "incident")) == n)
                before = newest_step(run_dir)
                wait_for(lambda b=before: newest_step(run_dir) > b + 5)
                file = node_file(run_dir)
                os.kill(file.smp_pid, signal.SIGSTOP)
                time.sleep(0.02 * incident)
                os.kill(file.ranks[1].pid, signal.SIGKILL)
                time.sleep(0.1)
                os.kill(file.smp_pid, signal.SIGCONT)
            assert process.wait(90) == 0
        finally:
            process.kill()
    found = events(run_dir, "incident")
    assert [one["restore"]["level"] for one in found] == ["memory"] * 4
    assert all(one["steps_recomputed"] <= 1 for one in found), found
