"""The job file: what the front tells the processes that it starts.

Written once per launch to ``<run_dir>/job.json`` with mode 0600, because it holds the job secret.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ftrain.comms.errors import RunDirectoryError
from ftrain.comms.wire import BAD_INPUT
from ftrain.configs.schema import FtrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One launch of one job."""

    run_id: str
    secret: str  # hex
    run_dir: str  # absolute
    config: FtrainConfig
    argv: tuple[str, ...]  # the script (or module) and its arguments
    module: bool  # argv[0] is a module name (-m)
    script_digest: str  # hex, of its source at the launch
    coordinator: str  # "host:port"
    front_pid: int

    @property
    def nodes(self) -> int:
        """Number of nodes that the job's ranks need."""
        return self.config.launch.local_nodes or self.config.launch.nnodes

    @property
    def spares(self) -> int:
        """Number of nodes that wait in addition."""
        return self.config.launch.spares

    @property
    def all_nodes(self) -> int:
        """Number of nodes with an agent."""
        return self.nodes + self.spares

    @property
    def local_agents(self) -> int:
        """Number of agents on this machine."""
        return self.all_nodes if self.config.launch.local_nodes else 1

    @property
    def local_world(self) -> int:
        """Ranks per node."""
        return self.config.launch.nproc_per_node


def write_job(job: JobSpec, name: str = "job.json") -> Path:
    """Write the job file atomically, readable by its owner only; returns its path.

    Raises RunDirectoryError.
    """
    path = Path(job.run_dir) / name
    fresh = path.with_suffix(".json.new")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(job)))
        fresh.replace(path)
    except OSError as error:
        raise RunDirectoryError(
            f"{path} can't be written ({error.strerror}): make room, or choose another directory "
            "with --run-dir"
        ) from None
    return path


def read_job(path: str | os.PathLike[str]) -> JobSpec:
    """Read a job file; raises :class:`RunDirectoryError` in one sentence when it is not one."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=JobSpec)
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path} does not exist: no job was launched in this run directory"
        ) from None
    except (OSError, *BAD_INPUT) as error:
        raise RunDirectoryError(f"{path} can't be read as a job file: {error}") from None
