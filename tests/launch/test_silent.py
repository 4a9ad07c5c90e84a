"""A control process that is alive and does nothing is replaced like a dead one."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Launch, launched, wait_for

from ftrain.comms.events import read_events
from ftrain.launch.pulse import Pulse
from ftrain.recovery.node_file import NodeFile, node_file_path, read_node_file

LEASE = "detection.node_lease_s=2"
STEPS = """
import os, time, torch, ftrain
import torch.distributed as dist

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=100000)
for step, _ in session.steps():
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(0.02)
    if os.path.exists("go-on"):
        break
dist.destroy_process_group()
"""


@pytest.fixture
def pair() -> Iterator[tuple[Pulse, socket.socket]]:
    """A pulse of this very process, and the end on which it answers."""
    pulse = Pulse(2.0, 2)
    with socket.socket(fileno=os.dup(pulse.child_fd)) as end:
        pulse.started()
        yield pulse, end
    pulse.close()


def answer(end: socket.socket) -> None:
    """What the child's loop does when it turns."""
    assert select.select([end], [], [], 5)[0]
    end.send(end.recv(4096))


def test_only_silence_after_an_answer_counts(pair: tuple[Pulse, socket.socket]) -> None:
    pulse, end = pair
    for _ in range(50):  # busy with its start
        assert pulse.look(os.getpid()) == ""
    answer(end)
    for _ in range(3):
        for _ in range(8):  # slow
            assert pulse.look(os.getpid()) == ""
        answer(end)
    for _ in range(9):
        said = pulse.look(os.getpid())
    assert said == "did not answer for 4.5 s"


def node_file(launch: Launch, node: int) -> NodeFile | None:
    return read_node_file(node_file_path(launch.run_dir, node))


def reached(launch: Launch) -> int:
    path = launch.run_dir / "steps" / "rank0.jsonl"
    return max((event.get("step", -1) for event in read_events(path)), default=-1)


@pytest.mark.slow
def test_a_stopped_coordinator_is_replaced_and_training_is_not_hit(tmp_path: Path) -> None:
    with launched(tmp_path, STEPS, LEASE) as launch:
        wait_for(lambda: reached(launch) > 5)
        before = node_file(launch, 0)
        stopped = launch.pid_of("ftrain.launch.coordinator")
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: launch.pid_of("ftrain.launch.coordinator") != stopped)
        at = reached(launch)
        wait_for(lambda: reached(launch) > at + 5)
        assert node_file(launch, 0) == before
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown
        assert re.search(r"the coordinator was stopped for [\d.]+ s: it is being", launch.shown)
        assert "died" not in launch.shown


@pytest.mark.slow
def test_a_stop_is_heard_while_the_coordinator_is_stopped(tmp_path: Path) -> None:
    with launched(tmp_path, STEPS, LEASE) as launch:
        wait_for(lambda: reached(launch) > 5)
        os.kill(launch.pid_of("ftrain.launch.coordinator"), signal.SIGSTOP)
        launch.popen.send_signal(signal.SIGINT)
        assert launch.wait(30) == 75, launch.shown
        assert re.search(r"stopped \(Ctrl-C\) with step \d+ saved", launch.shown)


@pytest.mark.soak
def test_a_stopped_agent_is_replaced(tmp_path: Path) -> None:
    """On one node its memory goes with it: the newest durable version is restored."""
    with launched(tmp_path, STEPS, LEASE, "checkpoint.durable_every_s=1") as launch:
        wait_for(lambda: "is durable" in launch.shown)
        os.kill(launch.pid_of("ftrain.launch.agent"), signal.SIGSTOP)
        restarted = r"Restarted from the durable version of step \d+ in (\S+) s;"
        took = wait_for(lambda: re.search(restarted, launch.shown))
        assert float(took[1]) > 0.1  # a new agent was started, and ranks
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown
        assert launch.shown.count("the agent of node 0 was stopped for") == 1
        assert launch.gone_after(0)


@pytest.mark.soak
def test_a_stopped_agent_of_two_nodes_loses_no_step(tmp_path: Path) -> None:
    with launched(tmp_path, STEPS, LEASE, "--local-nodes", "2") as launch:
        wait_for(lambda: reached(launch) > 5)
        stopped = node_file(launch, 1)
        assert stopped is not None
        os.kill(stopped.agent_pid, signal.SIGSTOP)
        wait_for(lambda: "Restarted from memory" in launch.shown)
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown
        said = re.search(
            r"node 1 was lost: .+ Restarted from memory in [\d.]+ s; [01] steps? recomputed",
            launch.shown,
        )
        assert said, launch.shown
        assert launch.shown.count("the agent of node 1 was stopped for") == 1
