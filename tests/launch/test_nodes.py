"""Agents and the coordinator, with real processes and real kills, under the real front."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import gone, until

from ftrain.comms.events import read_events
from ftrain.launch.children import children_of
from ftrain.recovery.node_file import NodeFile, node_file_path, read_node_file

STEPPER = Path(__file__).with_name("stepper.py")


class Launch:
    """One ``ftrain launch`` of a script."""

    def __init__(self, place: Path, *arguments: str, nodes: int = 1, ranks: int = 2) -> None:
        self.place = place
        self.run_dir = place / "run"
        self.nodes = nodes
        self.ranks = ranks
        options = [f"--nproc-per-node={ranks}", f"--local-nodes={nodes}", "--run-dir=run"]
        command = [sys.executable, "-m", "ftrain.launch.cli", "launch", *options, *arguments]
        self.output = place / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=place, stdout=output, stderr=output)

    def node(self, node: int = 0) -> NodeFile | None:
        return read_node_file(node_file_path(self.run_dir, node))

    def running(self, node: int = 0) -> NodeFile:
        """The node, once all its ranks run the newest epoch."""
        until(lambda: self._complete(node), 40)
        found = self.node(node)
        assert found is not None
        return found

    def _complete(self, node: int) -> bool:
        assert self.process.poll() is None, self.text
        found = self.node(node)
        phases = [event for event in self.events("phase") if event["data"]["epoch"]]
        return (
            found is not None
            and len(found.ranks) == self.ranks
            and bool(phases)
            and phases[-1]["data"] == {"phase": "running", "epoch": found.epoch}
            and not any(gone(rank.pid, 0) for rank in found.ranks)
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / "events.jsonl"
        return [event for event in read_events(path) if event["kind"] == kind]

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait(self, timeout_s: float = 40) -> int:
        return self.process.wait(timeout_s)

    def finish(self) -> int:
        """Let the stepper end; the exit code."""
        (self.place / "finish").touch()
        return self.wait()

    def everything(self) -> list[int]:
        """All processes of the launch."""
        found, new = [self.process.pid], [self.process.pid]
        while new:
            new = [child for pid in new for child in children_of(pid)]
            found += new
        return found

    def kill(self) -> None:
        pids = self.everything() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        assert all(gone(pid) for pid in pids)


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[list[Launch]]:
    found: list[Launch] = []
    yield found
    for launch in found:
        launch.kill()


def kill_rank(launch: Launch, index: int = 1) -> NodeFile:
    """SIGKILL a rank and wait until the group runs again."""
    before = launch.running()
    os.kill(before.ranks[index].pid, signal.SIGKILL)
    until(lambda: (launch.node() or before).epoch > before.epoch, 20)
    after = launch.running()
    assert all(gone(rank.pid) for rank in before.ranks)
    assert {rank.pid for rank in before.ranks}.isdisjoint(rank.pid for rank in after.ranks)
    return after


def test_killed_ranks_come_back_and_say_so(tmp_path: Path, launches: list[Launch]) -> None:
    launch = Launch(tmp_path, "--max-restarts=9", str(STEPPER))
    launches.append(launch)
    for _ in range(3):
        kill_rank(launch)
    pids = launch.everything()
    assert launch.finish() == 0, launch.text
    assert all(gone(pid) for pid in pids)
    incidents = launch.events("incident")
    assert len(incidents) == 3
    for incident in incidents:
        assert re.fullmatch(
            r"step \d+: rank 1 \(node 0\) died: SIGKILL\. Restarted from the beginning in "
            r"\d\.\d\d s; \d+ steps? recomputed, 0 samples lost\.",
            incident["text"],
        )
        assert incident["text"] in launch.text
        assert list(incident["phases_s"]) == [
            "stopped",
            "forked",
            "script",
            "formed",
            "restored",
            "stepped",
        ]
    # quiet machine: ranks are gone and forked again within 60 ms
    assert min(incident["phases_s"]["forked"] for incident in incidents) < 0.4
    last = sorted((launch.run_dir / "logs").glob("*/attempt_4/*/stdout.log"))
    assert [log.parent.name for log in last] == ["0", "1"]
    assert last[1].read_text() == "rank 1 restart 3\n"
    assert "[node0 rank1] rank 1 restart 3\n" in launch.text
    summary = launch.events("summary")[0]["data"]["rows"]
    assert summary["incidents"] == 3


@pytest.mark.slow
def test_helpers_may_die(tmp_path: Path, launches: list[Launch]) -> None:
    """Worker server, snapshot manager and coordinator: the ranks go on, restarts still work."""
    launch = Launch(tmp_path, "--max-restarts=9", str(STEPPER))
    launches.append(launch)
    first = launch.running()
    ranks = [rank.pid for rank in first.ranks]
    os.kill(first.worker_server_pid, signal.SIGKILL)
    os.kill(first.smp_pid, signal.SIGKILL)
    coordinator = int((launch.run_dir / "state" / "coordinator.pid").read_text())
    os.kill(coordinator, signal.SIGKILL)
    until(lambda: len(launch.events("launch")) == 2, 20)

    def replaced() -> bool:
        node = launch.running()
        return node.smp_pid not in (0, first.smp_pid) and node.worker_server_pid not in (
            0,
            first.worker_server_pid,
        )

    until(replaced, 20)
    second = launch.running()
    assert [rank.pid for rank in second.ranks] == ranks
    assert second.epoch == first.epoch
    assert kill_rank(launch).epoch == first.epoch + 1
    assert launch.finish() == 0, launch.text
    assert len(launch.events("incident")) == 1


@pytest.mark.slow
def test_dead_agent_is_a_dead_node(tmp_path: Path, launches: list[Launch]) -> None:
    launch = Launch(tmp_path, "--max-restarts=9", str(STEPPER), nodes=2, ranks=1)
    launches.append(launch)
    other = launch.running(0)
    victim = launch.running(1)
    os.kill(victim.agent_pid, signal.SIGKILL)
    assert all(gone(pid) for pid in victim.pids)
    until(lambda: (launch.node(1) or victim).epoch > victim.epoch, 30)
    after = launch.running(1)
    assert after.incarnation > victim.incarnation
    assert launch.running(0).agent_pid == other.agent_pid
    assert launch.finish() == 0, launch.text
    assert "node 1 was lost: SIGKILL. Restarted from the beginning" in launch.text


@pytest.mark.slow
def test_nothing_outlives_the_front(tmp_path: Path, launches: list[Launch]) -> None:
    launch = Launch(tmp_path, str(STEPPER), nodes=2, ranks=1)
    launches.append(launch)
    launch.running(0)
    pids = launch.everything()
    assert len(pids) >= 2 + 2 * 4
    launch.process.kill()
    deadline = time.monotonic() + 1.0
    assert all(gone(pid, max(0.0, deadline - time.monotonic())) for pid in pids)


@pytest.mark.slow
def test_exception_is_shown_once_and_ends_the_job(tmp_path: Path, launches: list[Launch]) -> None:
    (tmp_path / "raise0").touch()
    (tmp_path / "raise1").touch()
    launch = Launch(tmp_path, "--max-restarts=2", str(STEPPER))
    launches.append(launch)
    assert launch.wait() == 1
    assert launch.text.count("ValueError: told to\n") == 1, launch.text
    assert re.search(r"rank \d \(node 0\)(, rank \d \(node 0\))? raised:", launch.text)
    assert "rank_main" not in launch.text
    assert "3 failures in a row with no new version in between" in launch.text
    assert re.search(
        r"the start failed: rank .+ raised ValueError: told to; trying again \(restart 1 of 2\)\n"
        r"(.+\n)*?the restart failed: rank .+; trying again \(restart 2 of 2\)\n",
        launch.text,
    ), launch.text
    rows = launch.events("summary")[0]["data"]["rows"]
    assert (rows["incidents"], rows["restarts"]) == (1, "2 (3 of the starts failed)")
    lost = re.search(r"start (\S+), restarts (\S+),", rows["time lost"])
    assert lost
    assert min(map(float, lost.groups())) > 0.01, rows
    logs = (launch.run_dir / "logs").glob("*/attempt_1/*/stderr.log")
    assert any("ValueError: told to" in log.read_text() for log in logs)


@pytest.mark.slow
def test_graceful_stop_ends_all_ranks_at_one_boundary(
    tmp_path: Path, launches: list[Launch]
) -> None:
    launch = Launch(tmp_path, str(STEPPER))
    launches.append(launch)
    launch.running()
    launch.process.send_signal(signal.SIGTERM)
    # the stepper captures nothing, so there is nothing to save, and that is said
    assert launch.wait() == 1
    logs = sorted((launch.run_dir / "logs").glob("*/attempt_1/*/stdout.log"))
    ends = {log.read_text().splitlines()[1] for log in logs}
    assert len(ends) == 1
    assert ends.pop().startswith("stopped at ")
    assert "all of a version to save" in launch.text


@pytest.mark.slow
def test_stopped_rank_is_noticed_and_replaced(tmp_path: Path, launches: list[Launch]) -> None:
    launch = Launch(tmp_path, "detection.hang_s=1", str(STEPPER))
    launches.append(launch)
    before = launch.running()
    os.kill(before.ranks[0].pid, signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: (launch.node() or before).epoch > before.epoch, 20)
    assert time.monotonic() - began < 5
    launch.running()
    assert launch.finish() == 0
    assert [i["failures"][0]["kind"] for i in launch.events("incident")] == ["stopped"]
