"""An agent's worker server and snapshot manager: waited for, and replaced when they hang."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import OpenStore, StoreOpened
from ftrain.comms.telemetry import TelemetryPage
from ftrain.configs.schema import DetectionConfig, FtrainConfig
from ftrain.launch.children import children_of
from ftrain.launch.group_stores import GroupStores
from ftrain.launch.manager_link import ManagerLink
from ftrain.launch.reaper import Reaper
from ftrain.launch.worker_link import WorkerLink
from ftrain.launch.worker_messages import Forked, ForkRequest, RankSpec
from ftrain.snapshot.protocol.messages import ManagerStarted

pytestmark = pytest.mark.slow


def job_in(place: Path, lease_s: float) -> JobSpec:
    (place / "train.py").write_text("import time; time.sleep(60)")
    (place / "state").mkdir()
    return JobSpec(
        run_id="run",
        secret="00" * 16,
        run_dir=str(place),
        config=FtrainConfig(detection=DetectionConfig(node_lease_s=lease_s)),
        argv=(str(place / "train.py"),),
        module=False,
        script_digest="0" * 32,
        coordinator="127.0.0.1:1",
        front_pid=os.getpid(),
    )


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while not condition():
        assert loop.time() < deadline_s, "waited in vain"
        await asyncio.sleep(0.005)


class Forking:
    """The agent of a worker server: asks for one rank at a time, and notes what it hears."""

    def __init__(self, job: JobSpec, reaper: Reaper) -> None:
        self.epoch = 0
        self.forked: list[int] = []  # epochs
        self.failed: list[str] = []
        self.said: list[str] = []
        self._job = job
        self._reaper = reaper
        self.link = WorkerLink(
            job,
            1,
            reaper,
            on_forked=self._forked,
            on_failed=self.failed.append,
            on_change=lambda: None,
            on_down=self._down,
            on_ready=lambda: self.stores.server_ready(),
            on_store=lambda served: self.stores.served(served),
            say=lambda kind, text: self.said.append(text),
        )
        self.opened: list[StoreOpened] = []
        self.lost: list[str] = []
        self.stores = GroupStores(
            self.link,
            reaper,
            "127.0.0.1",
            opened=self.opened.append,
            lost=self.lost.append,
            say=lambda kind, text: self.said.append(text),
        )

    def fork(self) -> int:
        """Ask for a rank; returns the epoch."""
        self.epoch += 1
        null = os.open(os.devnull, os.O_WRONLY)
        spec = RankSpec(0, {"RANK": "0"}, str(Path(self._job.run_dir, "error.json")))
        self.link.fork(
            ForkRequest(self.epoch, (spec,)), [null, os.dup(null), TelemetryPage.create()]
        )
        return self.epoch

    async def kill_three_servers(self) -> None:
        """One after the other, while it imports torch."""
        for _ in range(3):
            await until(lambda: self.link.pid)
            killed = self.link.pid
            os.kill(killed, signal.SIGKILL)
            await until(lambda old=killed: self.link.pid != old)

    def _down(self, how: str) -> None:
        self.stores.server_down(how)

    def stop_server(self) -> None:
        """Stop the server, so that it forks no other copy, and the one that waits for a request."""
        os.kill(self.link.pid, signal.SIGSTOP)
        while is_running(self.link.pid):
            time.sleep(0.001)
        for pid in children_of(self.link.pid):
            os.kill(pid, signal.SIGSTOP)

    def _forked(self, message: Forked) -> None:
        self.forked.append(message.epoch)
        self._reaper.watch(message.pid, lambda status: None)
        self._reaper.kill(message.pid)


def with_server(job: JobSpec, scenario: Callable[[Forking], Awaitable[None]]) -> None:
    async def run() -> None:
        reaper = Reaper()
        agent = Forking(job, reaper)
        agent.link.start()
        await scenario(agent)
        agent.stores.close()
        agent.link.close()
        assert await reaper.kill_all()

    asyncio.run(run())


def test_a_request_waits_for_the_next_server_and_not_for_ever_for_one_that_hangs(
    tmp_path: Path,
) -> None:
    async def scenario(agent: Forking) -> None:
        first = agent.fork()
        os.kill(agent.link.pid, signal.SIGKILL)  # it imports torch
        await until(lambda: agent.forked == [first])
        assert not agent.failed

        await until(lambda: children_of(agent.link.pid))
        stopped = agent.link.pid
        agent.stop_server()
        agent.fork()
        await until(lambda: agent.failed)
        assert agent.failed == ["the worker server did not answer for 2 s"]
        assert "the worker server did not answer for 2 s: it is being replaced" in agent.said

        third = agent.fork()
        await until(lambda: agent.forked == [first, third])
        assert agent.link.pid != stopped
        assert not agent.link.forking

    with_server(job_in(tmp_path, 0.5), scenario)


def test_what_is_called_off_is_not_waited_for(tmp_path: Path) -> None:
    async def scenario(agent: Forking) -> None:
        agent.fork()
        agent.link.call_off()  # the server imports torch
        assert not agent.link.forking
        second = agent.fork()
        await until(lambda: agent.forked == [second])

        await until(lambda: children_of(agent.link.pid))
        agent.stop_server()
        agent.fork()
        began_s = asyncio.get_running_loop().time()
        agent.link.call_off()
        assert agent.link.forking  # a rank may still come
        await until(lambda: not agent.link.forking)
        assert asyncio.get_running_loop().time() - began_s < 5
        assert agent.forked == [second]

    with_server(job_in(tmp_path, 60.0), scenario)


def test_servers_that_die_while_ranks_wait_are_given_up(tmp_path: Path) -> None:
    async def scenario(agent: Forking) -> None:
        agent.fork()
        await agent.kill_three_servers()
        await until(lambda: agent.failed)
        assert agent.failed == ["the worker server ended: SIGKILL"]
        assert not agent.link.forking

    with_server(job_in(tmp_path, 60.0), scenario)


def test_a_store_that_no_server_lives_to_open_is_given_up(tmp_path: Path) -> None:
    """Before the first formation nothing else waits for a server."""

    async def scenario(agent: Forking) -> None:
        agent.stores.order(OpenStore(1))
        await agent.kill_three_servers()
        await until(lambda: agent.opened)
        assert agent.opened == [StoreOpened(1, 0, "the worker server ended: SIGKILL")]
        agent.stores.order(OpenStore(2))  # and the next group's is opened by the next server
        await until(lambda: len(agent.opened) == 2)
        assert agent.opened[1].epoch == 2
        assert agent.opened[1].port
        agent.stores.order(OpenStore(2))  # its answer was lost
        assert agent.opened[2] == agent.opened[1]

    with_server(job_in(tmp_path, 60.0), scenario)


def test_a_store_that_is_killed_is_told_and_replaced(tmp_path: Path) -> None:
    async def scenario(agent: Forking) -> None:
        agent.stores.order(OpenStore(1))
        await until(lambda: agent.opened)
        present = next(pid for pid in children_of(os.getpid()) if pid != agent.link.pid)
        os.kill(present, signal.SIGKILL)
        await until(lambda: agent.lost)
        assert agent.lost == ["SIGKILL"]
        agent.stores.order(OpenStore(1))
        await until(lambda: len(agent.opened) == 2)
        assert agent.opened[1].port != agent.opened[0].port

    with_server(job_in(tmp_path, 60.0), scenario)


def test_a_manager_that_hangs_at_its_start_is_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        started: list[str] = []
        said: list[str] = []
        down: list[str] = []
        mistakes: list[str] = []

        def serves(message: ManagerStarted) -> None:
            started.append(message.address)

        reaper = Reaper()
        link = ManagerLink(
            job_in(tmp_path, 0.25),
            0,
            1,
            reaper,
            on_started=serves,
            on_message=lambda message: None,
            on_down=down.append,
            on_mistake=mistakes.append,
            say=said.append,
        )
        link.start()
        os.kill(link.pid, signal.SIGSTOP)
        await until(lambda: started)
        link.close()
        assert await reaper.kill_all()
        assert "the snapshot manager does not answer: it is being replaced" in said
        assert down[0] == "SIGKILL"
        assert not mistakes

    asyncio.run(scenario())
