"""``ftrain launch`` from end to end with scripts that hold no model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import Launch, launched, small_disk, wait_for

from ftrain.launch.children import children_of
from ftrain.recovery.hold import hold_coordinator, let_go
from ftrain.recovery.node_file import node_file_path, read_node_file

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
        assert launch.shown.count("the script made no ftrain.Session: nothing of it was saved") == 1


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
        coordinator = launch.pid_of("ftrain.launch.coordinator")
        assert "libtorch" not in Path(f"/proc/{coordinator}/maps").read_text()  # 200 MB
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
        hold_coordinator(launch.run_dir, 60.0)
        killed = launch.kill("ftrain.launch.coordinator")
        time.sleep(0.3)
        assert not any("launch.coordinator" in line for line in launch.processes().values())
        let_go(launch.run_dir)
        assert launch.pid_of("ftrain.launch.coordinator") != killed
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown


@pytest.mark.slow
def test_a_killed_injector_does_not_keep_the_coordinator_down(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        hold_coordinator(launch.run_dir, 1.0)  # and nobody who would let go
        killed = launch.kill("ftrain.launch.coordinator")
        wait_for(lambda: launch.pid_of("ftrain.launch.coordinator") != killed, 10)
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_job(tmp_path: Path) -> None:
    """The run directory takes nothing more, and then the coordinator dies, and then the agent."""
    with (
        small_disk(tmp_path / "run", "1m") as fill,
        launched(tmp_path, WAITING, "--log-dir", "logs", "checkpoint=off") as launch,
    ):
        wait_for(lambda: began(launch))
        fill(True)
        killed = launch.kill("ftrain.launch.coordinator")
        wait_for(lambda: launch.pid_of("ftrain.launch.coordinator") != killed)
        launch.kill("ftrain.launch.agent")
        wait_for(lambda: len(began(launch)) == 2)
        assert launch.shown.count("the coordinator's state can't be written to") == 1, launch.shown
        fill(False)
        wait_for(lambda: "the coordinator's state is written to" in launch.shown)
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


@pytest.mark.soak
def test_an_interrupt_after_the_end_says_nothing_more(tmp_path: Path) -> None:
    """An agent that is stopped takes the front a while to end."""
    fails = WAITING + "if os.environ['RANK'] == '1': raise ValueError('told to')"
    options = ("--local-nodes", "2", "--max-restarts", "0", "snapshot=off", "checkpoint=off")
    with launched(tmp_path, fails, *options) as launch:
        wait_for(lambda: len(began(launch)) == 2)
        other = wait_for(lambda: read_node_file(node_file_path(launch.run_dir, 0)))
        os.kill(other.agent_pid, signal.SIGSTOP)
        (tmp_path / "go-on").touch()
        wait_for(lambda: "raised ValueError: told to" in launch.shown)
        time.sleep(0.3)  # the end comes in the same moment
        assert launch.popen.poll() is None
        launch.popen.send_signal(signal.SIGINT)
        assert launch.wait(20) == 1, launch.shown
        assert "forced" not in launch.shown


@pytest.mark.slow
def test_one_launch_per_run_directory(tmp_path: Path) -> None:
    with launched(tmp_path, WAITING) as launch:
        wait_for(lambda: began(launch))
        second = Launch(tmp_path)
        assert second.wait(10) == 2
        assert f"in use by another process (pid {launch.popen.pid})" in second.shown
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0
        assert os.listdir(launch.run_dir)


def test_what_a_wrapper_left_running_is_left_alone(tmp_path: Path) -> None:
    """A shell that starts a sidecar and becomes the launch by ``exec``: the sidecar goes on."""
    (tmp_path / "train.py").write_text(HELLO)
    wrapper = (
        "sleep 600 >/dev/null 2>&1 & echo $! > sidecar; "
        "exec {python} -m ftrain.launch.cli launch --run-dir run train.py"
    )
    done = subprocess.run(
        ["bash", "-c", wrapper.format(python=sys.executable)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    sidecar = int((tmp_path / "sidecar").read_text())
    os.kill(sidecar, signal.SIGKILL)  # ProcessLookupError: it was ended
    assert done.returncode == 0, done.stdout
    assert b"hello from rank 0 of 1" in done.stdout


@pytest.mark.slow
def test_a_container_whose_first_process_is_the_launch(tmp_path: Path) -> None:
    """As process 1 it gets the orphans of others; a signal to it stops the job as ever."""
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*container, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user can't make a process namespace")
    (tmp_path / "train.py").write_text(WAITING)
    wrapper = (
        "(sleep 600 & echo > orphaned) & exec {python} -m ftrain.launch.cli launch"
        " --run-dir run train.py > shown 2>&1"
    )
    with subprocess.Popen(
        [*container, "bash", "-c", wrapper.format(python=sys.executable)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    ) as unshare:
        try:
            wait_for(lambda: list(tmp_path.glob("began-*")))
            [first] = children_of(unshare.pid)
            sleepers = [pid for pid in children_of(first) if _command(pid).startswith(b"sleep")]
            assert len(sleepers) == 1  # not killed when it came
            for _ in range(2):
                os.kill(first, signal.SIGINT)
                wait_for(lambda: "saving and stopping" in (tmp_path / "shown").read_text())
            assert unshare.wait(10) == 130, (tmp_path / "shown").read_text()
        finally:
            unshare.kill()


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
