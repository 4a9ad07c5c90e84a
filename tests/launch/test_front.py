"""``ftrain launch`` from end to end with scripts that hold no model."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from launching import Launch, launched, wait_for

HELLO = """
import os, sys
print("hello from rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:])
"""
WAITING = """
import os, pathlib, time
pathlib.Path(f"began-{os.environ['RANK']}-{os.getpid()}").touch()
while not os.path.exists("go-on"):
    time.sleep(0.01)
print("went on")
"""


def began(launch: Launch) -> set[str]:
    """A name for each rank process that began to run the script."""
    return {path.name for path in launch.folder.glob("began-*")}


@pytest.mark.slow
def test_scripts_run_to_their_end(tmp_path: Path) -> None:
    with launched(tmp_path, HELLO, "--nproc-per-node", "2", "--local-nodes", "2") as launch:
        assert launch.wait() == 0, launch.shown
        assert launch.gone_after(0)
        for rank in range(4):
            assert f"hello from rank {rank} of 4 []" in launch.shown


@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param("import sys; sys.exit(3)", "exit code 3", marks=pytest.mark.slow),
        ("x = 1\nraise ValueError('bad shape')", "ValueError: bad shape"),
    ],
)
def test_a_failing_script(tmp_path: Path, source: str, words: str) -> None:
    with launched(tmp_path, source, "--max-restarts", "0") as launch:
        assert launch.wait() == 1, launch.shown
        assert launch.gone_after(0)
        assert words in launch.shown
        assert launch.shown.count("Traceback") == int("ValueError" in words)


def test_nothing_outlives_a_killed_front(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING, "--nproc-per-node", "2") as launch:
        wait_for(lambda: len(began(launch)) == 2)
        assert len(launch.processes()) >= 5
        launch.popen.kill()
        assert launch.gone_after(1.0)


@pytest.mark.slow
def test_coordinator_comes_back_and_nobody_notices(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        for _ in range(2):
            killed = launch.kill("ftrain.launch.coordinator")
            wait_for(lambda old=killed: launch.pid_of("ftrain.launch.coordinator") != old)
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown
        assert len(began(launch)) == 1  # the rank was never restarted


@pytest.mark.slow
def test_coordinator_is_held_down(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        hold = launch.run_dir / "hold-coordinator"
        hold.touch()
        killed = launch.kill("ftrain.launch.coordinator")
        time.sleep(0.3)
        assert not any("launch.coordinator" in line for line in launch.processes().values())
        hold.unlink()
        assert launch.pid_of("ftrain.launch.coordinator") != killed
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown


@pytest.mark.slow
def test_a_dead_agent_is_replaced(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        launch.kill("ftrain.launch.agent")
        wait_for(lambda: len(began(launch)) == 2)
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown
        assert launch.gone_after(0)


def test_second_interrupt_forces(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        launch.popen.send_signal(signal.SIGINT)
        wait_for(lambda: "saving and stopping" in launch.shown)
        launch.popen.send_signal(signal.SIGINT)
        assert launch.wait(5) == 130
        assert launch.gone_after(0)
        assert "Traceback" not in launch.shown


@pytest.mark.slow
def test_one_launch_per_run_directory(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        second = Launch(tmp_path)
        assert second.wait(10) == 2
        assert f"in use by a running launch (pid {launch.popen.pid})" in second.shown
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0
        assert os.listdir(launch.run_dir)
