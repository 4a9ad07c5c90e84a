"""Launches of the small job, and what they left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos_runs import lines

from ftrain.checkpoint.header import ImageState
from ftrain.checkpoint.image import ImageReader
from ftrain.comms.errors import CorruptionError
from ftrain.comms.protocol.messages import VersionId
from ftrain.recovery.node_file import NodeFile, node_file_path, read_node_file

JOB = Path(__file__).with_name("small_job.py")


def command(run_dir: Path, options: list[str], arguments: list[str]) -> list[str]:
    """The command line of a launch."""
    program = [sys.executable, "-m", "ftrain.launch.cli", "launch", "--run-dir", str(run_dir)]
    return [*program, *options, str(JOB), *arguments]


def run(
    run_dir: Path, options: list[str], arguments: list[str], *, code: int = 0, timeout_s: float = 90
) -> str:
    """Launch the job and wait for it; it has to end with that exit code. Returns its output."""
    found = subprocess.run(
        command(run_dir, options, arguments),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=run_dir.parent,
    )
    output = found.stdout + found.stderr
    assert found.returncode == code, output[-6000:]
    return output


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """What the event log says."""
    return [event for event in lines(run_dir / "events.jsonl") if event["kind"] == kind]


def losses(run_dir: Path) -> list[dict[int, float]]:
    """Each rank's loss by step; a step done twice has to have the same one twice."""
    found: list[dict[int, float]] = [{}, {}]
    for rank, mine in enumerate(found):
        for line in lines(run_dir / "steps" / f"rank{rank}.jsonl"):
            if line["kind"] == "step":
                assert mine.setdefault(line["step"], line["loss"]) == line["loss"], (rank, line)
    return found


def wait_for(question: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait until the answer is true."""
    deadline = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(0.01)


def node_file(run_dir: Path, node: int = 0) -> NodeFile:
    """Which processes a node has."""
    found = read_node_file(node_file_path(run_dir, node))
    assert found is not None
    return found


def slots(node: NodeFile, rank: int) -> dict[VersionId, Path]:
    """The slots that hold a sealed image of this rank, as files of the snapshot manager."""
    found = {}
    for fd in Path(f"/proc/{node.smp_pid}/fd").iterdir():
        try:
            if f"ftrain-rank{rank}-slot" not in os.readlink(fd):
                continue
            reader = ImageReader(fd.read_bytes())
        except (FileNotFoundError, CorruptionError):
            continue  # closed meanwhile; never written
        else:
            if reader.state is ImageState.SEALED:
                found[reader.identity.version] = fd
    return found
