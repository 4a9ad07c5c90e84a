"""etcd nodes on loopback, each of which can be killed, stopped and started again.

They are of the package etcd-server. What this does not show: disks that are slow to sync (nodes
keep their data in a temporary directory), networks that delay, and versions other than the one
installed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from s3_server import free_port

_START_S_MAX = 20.0


def etcd() -> str:
    """The program; skips the test where there is none, or fails it where CI is set."""
    found = shutil.which("etcd")
    if found is None:
        words = "etcd is not installed: install the package etcd-server"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    return found


class EtcdNode:
    """One node; its address and data stay the same each time it is started."""

    def __init__(self, name: str, folder: Path, *options: str, scheme: str = "http") -> None:
        self.name = name
        self.port, self.peer_port = free_port(), free_port()
        self.log = folder / f"{name}.log"
        self._data = folder / name
        self._scheme = scheme
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def endpoint(self) -> str:
        """Where clients find it."""
        return f"127.0.0.1:{self.port}"

    @property
    def peer(self) -> str:
        """Where other nodes find it."""
        return f"http://127.0.0.1:{self.peer_port}"

    def launch(self, cluster: str) -> None:
        """Start it, without waiting."""
        client = f"{self._scheme}://{self.endpoint}"
        command = [etcd(), "--name", self.name, "--data-dir", str(self._data)]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", self.peer, "--initial-advertise-peer-urls", self.peer]
        command += ["--initial-cluster", cluster, "--initial-cluster-state", "new"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([*command, *self._options], stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process, self._paused = None, False

    def pause(self) -> None:
        """Let it hang with its connections open; returns when none of its threads runs."""
        assert self._process is not None
        if not self._paused:
            self._paused = True
            self._process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._paused = False
        self._process.send_signal(signal.SIGCONT)

    def ask(self, path: str, context: ssl.SSLContext | None = None, **body: object) -> Any:
        """Call etcd's JSON gateway, as an administrator's tool would."""
        url = f"{self._scheme}://{self.endpoint}/v3/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode())
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(request, timeout=5) as answer:
            return json.load(answer)

    def wait(self, context: ssl.SSLContext | None = None) -> None:
        """Return when it answers for the cluster."""
        deadline = time.monotonic() + _START_S_MAX
        while not self._answers(context):
            assert self._process is not None, "it was killed"
            assert self._process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.02)

    def _answers(self, context: ssl.SSLContext | None) -> bool:
        try:
            self.ask("kv/range", context, key=base64.b64encode(b"ready?").decode())
        except OSError:
            return False
        return True


class EtcdCluster:
    """Nodes of one cluster, with ``options`` for each."""

    def __init__(self, folder: Path, size: int, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.nodes = [EtcdNode(f"n{number}", folder, *options) for number in range(size)]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """All nodes' addresses."""
        return tuple(node.endpoint for node in self.nodes)

    def start(self, *nodes: EtcdNode) -> None:
        """Start these nodes, or all; returns when they answer."""
        cluster = ",".join(f"{node.name}={node.peer}" for node in self.nodes)
        started = nodes or self.nodes
        for node in started:
            node.launch(cluster)
        for node in started:
            node.wait()

    def kill(self) -> None:
        """SIGKILL all of them."""
        for node in self.nodes:
            node.kill()

    def leader(self) -> EtcdNode:
        """The node that leads."""
        for node in self.nodes:
            status = node.ask("maintenance/status")
            if status["leader"] == status["header"]["member_id"]:
                return node
        raise AssertionError("no node leads")

    def compact(self) -> None:
        """Have the history of all keys forgotten."""
        node = self.nodes[0]
        header = node.ask("kv/range", key=base64.b64encode(b"any").decode())["header"]
        node.ask("kv/compaction", revision=header["revision"], physical=True)

    def delete(self, key: bytes) -> None:
        """Remove a key, as an administrator might."""
        self.nodes[0].ask("kv/deleterange", key=base64.b64encode(key).decode())
