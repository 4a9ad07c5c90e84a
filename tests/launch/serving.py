"""A worker server as an agent has it, for tests: this process plays the agent."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrain.comms import local
from ftrain.comms.process import become_subreaper
from ftrain.comms.telemetry import TelemetryPage
from ftrain.launch.worker_messages import (
    Forked,
    ForkFailed,
    ForkRequest,
    Preload,
    RankSpec,
    ScriptEdited,
    ServerReady,
    StoreRequest,
    StoreServed,
)


@dataclass
class Rank:
    """A forked rank and what it left."""

    rank: int
    pid: int
    directory: Path
    news: list[object] = field(default_factory=list)

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        until(lambda: gone(self.pid, 60.0) and adopted(self.pid))
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def out(self) -> str:
        return (self.directory / f"out{self.rank}").read_text()

    @property
    def err(self) -> str:
        return (self.directory / f"err{self.rank}").read_text()

    @property
    def error_file(self) -> str:
        return str(self.directory / f"error{self.rank}.json")


class Serving:
    """Starts a worker server; ``fork`` forks ranks and waits for their pids."""

    def __init__(
        self, argv: Sequence[str], *, module: bool = False, modules: Sequence[str] = (), cwd: Path
    ) -> None:
        become_subreaper()
        self.socket, end = local.pair()
        os.set_inheritable(end.fileno(), True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ftrain.launch.worker_server"]
        command += ["--fd", str(end.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[end.fileno()], cwd=cwd, env=environment)
        end.close()
        self.socket.settimeout(60)
        self.socket.send(Preload(tuple(argv), module, tuple(modules)))
        self.ready: ServerReady = self.receive()
        self.epoch = 0

    def receive(self) -> Any:
        return self.socket.receive()[0]

    def fork(
        self, directory: Path, count: int = 1, environment: dict[str, str] | None = None
    ) -> list[Rank]:
        """Fork ``count`` ranks; raises AssertionError with the cause when that fails."""
        self.epoch += 1
        directory.mkdir(exist_ok=True)
        fds = []
        for rank in range(count):
            paths = (directory / f"out{rank}", directory / f"err{rank}")
            fds += [os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) for path in paths]
            fds.append(TelemetryPage.create())
        specs = tuple(
            RankSpec(rank, {"RANK": str(rank)}, str(directory / f"error{rank}.json"))
            for rank in range(count)
        )
        self.socket.send(ForkRequest(self.epoch, specs, environment or {}), fds)
        for fd in fds:
            os.close(fd)
        ranks: list[Rank] = []
        news: list[object] = []
        while len(ranks) < count:
            message = self.receive()
            if isinstance(message, Forked):
                ranks.append(Rank(message.rank, message.pid, directory, news))
            elif isinstance(message, ScriptEdited):
                news.append(message)
            else:
                assert isinstance(message, ForkFailed)
                raise AssertionError(message.cause)
        return ranks

    def store(self, bind: str = "127.0.0.1") -> StoreServed:
        """Have a store opened."""
        self.socket.send(StoreRequest(bind))
        found = self.receive()
        assert isinstance(found, StoreServed)
        return found

    def close(self) -> None:
        self.socket.close()
        self.process.wait(10)


def gone(pid: int, timeout_s: float = 1.0) -> bool:
    """Whether process ``pid`` ends (or is a zombie) within ``timeout_s``."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)


def adopted(pid: int) -> bool:
    """Whether ``pid`` is a child of this process by now."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1]) == os.getpid()


def until(condition: Any, timeout_s: float = 10.0) -> None:
    """Wait until ``condition()`` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
