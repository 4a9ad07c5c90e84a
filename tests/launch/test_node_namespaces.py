"""Hosts with addresses of their own, each in a network namespace; one of them goes dark."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import wait_for
from sharded_job import SOURCE, ShardedRun, read_losses

from ftrain.comms.environment import RACK_VARIABLE, SECRET_VARIABLE
from ftrain.comms.events import read_events

NODES, SPARES, STEPS, PAUSE_S = 3, 1, 150, 0.05


def ip(*words: str, check: bool = True) -> str:
    """Run ``ip``."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """A namespace with one interface, and the launch in it."""

    def __init__(self, node: int, bridge: str) -> None:
        self.node, self.name = node, f"ftrain-test-{os.getpid()}-{node}"
        self.address = f"10.77.0.{node + 1}"
        self.launch: subprocess.Popen[bytes] | None = None
        inner, outer = "eth0", f"port{node}"
        ip("netns", "add", self.name)
        ip("-n", bridge, "link", "add", outer, "type", "veth", "peer", inner, "netns", self.name)
        ip("-n", bridge, "link", "set", outer, "master", "bridge", "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", inner)
        ip("-n", self.name, "link", "set", inner, "up")

    def start(self, place: Path, *options: str) -> None:
        """Launch there."""
        folder = place / f"host{self.node}"
        folder.mkdir()
        (folder / "train.py").write_text(SOURCE)
        where = [f"--nnodes={NODES}", f"--spares={SPARES}", f"--node-rank={self.node}"]
        meet = ["--rdzv-endpoint=10.77.0.1:29666", "--run-id=spaces", "--run-dir=run"]
        own = [f"launch.host={self.address}", f"launch.bind={self.address}"]
        script = ["train.py", str(STEPS), "64", str(PAUSE_S)]
        command = [sys.executable, "-m", "ftrain.launch.cli", "launch", *where, *meet, *own]
        environment = {
            **os.environ,
            SECRET_VARIABLE: "correct horse battery staple",
            RACK_VARIABLE: f"rack{self.node}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        with (folder / "shown").open("wb") as out:
            self.launch = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command, *options, *script],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=out,
            )

    def pids(self) -> list[int]:
        """Every process there."""
        return [int(word) for word in ip("netns", "pids", self.name, check=False).split()]

    def go_dark(self) -> None:
        """No packet leaves any more, and everything is gone: nobody gets to say so."""
        ip("-n", self.name, "link", "set", "eth0", "down")
        self.kill()

    def kill(self) -> None:
        """Every process."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Namespaces, joined by a bridge in one more."""
    bridge = f"ftrain-test-{os.getpid()}"
    try:
        ip("netns", "add", bridge)
    except OSError as error:
        pytest.skip(f"this user can't make network namespaces: {error}")
    found: list[Host] = []
    try:
        ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
        ip("-n", bridge, "link", "set", "bridge", "up")
        found += [Host(node, bridge) for node in range(NODES + SPARES)]
        yield found
    finally:
        for host in found:
            host.kill()
            if host.launch is not None:
                host.launch.wait()
            ip("netns", "del", host.name, check=False)
        ip("netns", "del", bridge, check=False)


@pytest.mark.soak
def test_a_host_goes_dark_and_its_state_is_rebuilt_on_another(
    hosts: list[Host], tmp_path: Path
) -> None:
    options = [f"checkpoint.dir={tmp_path}/durable", "detection.node_lease_s=1.5"]
    for host in hosts[:NODES]:  # else the spare may be there first, and have a place
        host.start(tmp_path, *options)
    events = tmp_path / "host0" / "run" / "events.jsonl"
    wait_for(lambda: reached(tmp_path) >= 5, 60)
    hosts[NODES].start(tmp_path, *options)
    wait_for(lambda: reached(tmp_path) >= 60, 60)
    hosts[2].go_dark()
    codes = [h.launch.wait(120) for h in hosts if h.node != 2 and h.launch is not None]
    assert codes == [0, 0, 0], (tmp_path / "host0" / "shown").read_text()
    (incident,) = [event for event in read_events(events) if event["kind"] == "incident"]
    assert incident["restore"]["level"] == "parity"
    assert incident["steps_recomputed"] <= 2
    shown = (tmp_path / "host0" / "shown").read_text()
    assert "as may any one of the racks rack0, rack1, rack2" in shown
    plain = ShardedRun(tmp_path / "plain", nodes=NODES, steps=STEPS, pause_s=0)
    files = [tmp_path / f"host{host.node}" for host in hosts]
    assert read_losses(files, NODES, STEPS) == plain.losses()


def reached(place: Path) -> int:
    """Steps that rank 2 has done."""
    losses = place / "host2" / "losses-2"
    return len(losses.read_text().splitlines()) if losses.exists() else 0
