"""A fleet of real parts for tests: a coordinator in a thread, peers in threads or processes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ftrain.comms.channel import check_bind
from ftrain.comms.errors import FtrainError
from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator
from ftrain.comms.fleet.server import FleetServer, decode_hard
from ftrain.comms.protocol.messages import Notice

SECRET = bytes(32)
SCRIPT = Path(__file__).with_name("fleet_process.py")


class Coordinator:
    """A coordinator in a thread, which can be stopped and started again at its address."""

    def __init__(self, address: str = "127.0.0.1:0", **options: Any) -> None:
        self.address = address
        self.options = options
        self.state: bytes | None = None
        self.notices: list[Notice] = []
        self.broken: FtrainError | None = None  # that the store raises
        self.start()

    def start(self) -> None:
        check_bind("127.0.0.1", False)
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        self.machine = FleetCoordinator(hard=decode_hard(self.state), **self.options)
        self._task = self.loop.create_task(self._serve())
        with suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self._task)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    async def _serve(self) -> None:
        server = FleetServer(
            self.machine, "run", SECRET, save=self._save, announce=self.notices.append
        )
        await server.run(self.address, self._heard)

    def _heard(self, address: str) -> None:
        self.address = address
        self._ready.set()

    def _save(self, state: bytes) -> None:
        if self.broken is not None:
            raise self.broken
        self.state = state


class Peer:
    """A peer in a process of its own: sums until it is told to end, telling of each sum."""

    script = SCRIPT

    def __init__(self, coordinator: str, number: int, incarnation: int, *args: object) -> None:
        self.number = number
        command = [sys.executable, str(self.script), coordinator, str(number), str(incarnation)]
        self.process = subprocess.Popen(
            [*command, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said: list[Any] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def sums(self) -> list[dict[str, Any]]:
        return [said for said in list(self.said) if "op" in said]

    def error(self) -> str:
        return next((said["error"] for said in list(self.said) if "error" in said), "")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def fleet_of(
    numbers: Sequence[int], *args: object, **options: Any
) -> Iterator[tuple[Coordinator, list[Peer]]]:
    """A coordinator and peers, of which all have finished a sum together."""
    coordinator = Coordinator(members_expected=len(numbers), **options)
    peers = [Peer(coordinator.address, number, 1, *args) for number in numbers]
    try:
        until(lambda: all(peer.sums() for peer in peers), "the first sum", 30)
        yield coordinator, peers
    finally:
        for peer in peers:
            peer.end()
        coordinator.stop()


def until(condition: Any, what: str, timeout_s: float = 15.0) -> None:
    """Wait for something that has to happen."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.005)
