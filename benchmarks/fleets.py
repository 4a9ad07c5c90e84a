"""Fleets of processes for benchmarks: a coordinator, members, networks that can be cut."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from common import Record

from ftrain.comms.addresses import bound_address, listen_tcp
from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator
from ftrain.comms.fleet.server import FleetServer, decode_hard
from ftrain.comms.protocol.messages import Notice
from ftrain.comms.store.files import FileStore

SECRET = bytes(32)
RUN = "bench"
_WAIT_S = 60.0
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_WARM = ["torch", "torch.distributed", "numpy", "ftrain.comms.fleet.collectives", __name__]


class StuckError(RuntimeError):
    """Something that has to happen does not."""


class Worker:
    """A process forked from one that has imported everything, and what it says over a pipe."""

    def __init__(self, target: Callable[..., None], *args: object, space: str = "") -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(_WARM)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_begin, args=(target, space, theirs, *args), daemon=True
        )
        self.process.start()
        theirs.close()
        self.over = False  # it has said its last word

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.over = True


def _begin(target: Callable[..., None], space: str, pipe: Connection, *args: object) -> None:
    # What is stopped, or only computes, would outlive a benchmark that was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if space:
        enter(space)
    with suppress(KeyboardInterrupt, BrokenPipeError):
        target(pipe, *args)


def hear(workers: list[Worker], heard: Callable[[Worker, Any], None], timeout_s: float) -> None:
    """Take what any of them has said, or says within a time."""
    pipes = {worker.pipe: worker for worker in workers if not worker.over}
    for pipe in wait(list(pipes), timeout_s):
        worker = pipes[pipe]  # type: ignore[index]
        try:
            while worker.pipe.poll():
                heard(worker, worker.pipe.recv())
        except (EOFError, ConnectionResetError):
            worker.over = True


# ------------------------------------------------------------------ the coordinator


def lead(pipe: Connection, directory: str, address: str, options: Record) -> None:
    """A coordinator that keeps its state in a directory; tells its address, then its news."""
    listener = listen_tcp(address)
    where = bound_address(listener)
    term = FileStore(Path(directory)).campaign(where, _WAIT_S)
    assert term is not None
    machine = FleetCoordinator(hard=decode_hard(term.load()), **options)

    def announce(notice: Notice) -> None:
        pipe.send((time.monotonic(), notice.text))

    server = FleetServer(machine, RUN, SECRET, save=term.save, announce=announce)
    asyncio.run(server.run(listener, pipe.send))


class Coordinator:
    """A coordinator in a process, which may be killed and started again."""

    def __init__(
        self, directory: str, host: str = "127.0.0.1", space: str = "", **options: Any
    ) -> None:
        self.address = f"{host}:0"
        self.news: list[tuple[float, str]] = []
        self._directory, self._space, self._options = directory, space, options
        self.start()

    def start(self) -> None:
        """At the address that it had before."""
        self.worker = Worker(lead, self._directory, self.address, self._options, space=self._space)
        if not self.worker.pipe.poll(_WAIT_S):
            raise StuckError("the coordinator does not start")
        self.address = self.worker.pipe.recv()

    def kill(self) -> None:
        """At once."""
        self.worker.kill()

    def heard(self, news: Any) -> None:
        """What came over its pipe."""
        self.news.append(news)


# ------------------------------------------------------------------ networks


def ip(*words: str, check: bool = True) -> str:
    """Run ``ip``; OSError where it does not work."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def enter(space: str) -> None:
    """Move this process, which has one thread, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/var/run/netns/{space}", os.O_RDONLY)
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter the network namespace {space}")
    finally:
        os.close(fd)


class Network:
    """Namespaces with one interface each, joined by a bridge; number 0 is the coordinator's."""

    def __init__(self, name: str, hosts: int) -> None:
        self._bridge = f"{name}-b"
        self.names = [f"{name}-{number}" for number in range(hosts)]
        self.hosts = [f"10.79.0.{number + 1}" for number in range(hosts)]

    def make(self) -> None:
        """OSError for who may not."""
        ip("netns", "add", self._bridge)
        ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._bridge, "link", "set", "bridge", "up")
        for number, (name, host) in enumerate(zip(self.names, self.hosts, strict=True)):
            ip("netns", "add", name)
            pair = ["type", "veth", "peer", "eth0", "netns", name]
            ip("-n", self._bridge, "link", "add", f"port{number}", *pair)
            self.join(number)
            ip("-n", self._bridge, "link", "set", f"port{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"{host}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def cut(self, number: int) -> None:
        """No packet gets to it or from it any more, and nobody is told."""
        ip("-n", self._bridge, "link", "set", f"port{number}", "nomaster")

    def join(self, number: int) -> None:
        """The contrary."""
        ip("-n", self._bridge, "link", "set", f"port{number}", "master", "bridge")

    def remove(self) -> None:
        """All of it."""
        for name in (*self.names, self._bridge):
            ip("netns", "del", name, check=False)


@contextmanager
def networked(hosts: int) -> Iterator[Network]:
    """A network for the length of a ``with`` block."""
    network = Network(f"ftrain-bench-{os.getpid()}", hosts)
    try:
        network.make()
        yield network
    finally:
        network.remove()


def networks_work() -> str:
    """Why no network can be made here; empty: one can."""
    try:
        with networked(1):
            return ""
    except OSError as error:
        return str(error)


@contextmanager
def coordinated(host: str = "127.0.0.1", space: str = "", **options: Any) -> Iterator[Coordinator]:
    """A coordinator for the length of a ``with`` block."""
    with tempfile.TemporaryDirectory() as directory:
        coordinator = Coordinator(directory, host, space, **options)
        try:
            yield coordinator
        finally:
            coordinator.kill()
