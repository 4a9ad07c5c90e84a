"""An agent that can't work says why in a sentence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ftrain.comms.job import JobSpec, write_job
from ftrain.configs.schema import FtrainConfig


@pytest.mark.parametrize("descriptors", [8, 10])  # for itself, and for its helpers
def test_without_descriptors(tmp_path: Path, descriptors: int) -> None:
    job = JobSpec(
        run_id="x",
        secret="00",
        run_dir=str(tmp_path),
        config=FtrainConfig(),
        argv=("train.py",),
        module=False,
        script_digest="",
        coordinator="127.0.0.1:1",
        front_pid=os.getpid(),
    )
    options = ["--job", str(write_job(job)), "--node", "0", "--incarnation", "1"]
    ours, pulse = socket.socketpair()
    with ours, pulse:
        limited = f'ulimit -n {descriptors}; exec "$0" "$@" --pulse-fd 0'
        done = subprocess.run(
            ["bash", "-c", limited, sys.executable, "-m", "ftrain.launch.agent", *options],
            stdin=pulse,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 1
    said = "ftrain: node 0: the agent can't work: [Errno 24] Too many open files"
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
