"""``<run_dir>/state/node<k>.json``: which processes make up a node, for whoever breaks one.

The agent writes it whenever a process of the node starts; the injector, another process of the
same user, reads it and maps the telemetry pages through ``/proc/<agent pid>/fd/<descriptor>``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ftrain.comms.process import start_ticks
from ftrain.comms.wire import BAD_INPUT


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRank:
    """One rank of a node."""

    rank: int
    pid: int
    telemetry_fd: int  # the page's descriptor in the agent


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFile:
    """The processes of one node; a pid of 0 is a process that does not run."""

    node: int
    incarnation: int
    epoch: int
    agent_pid: int
    smp_pid: int = 0
    worker_server_pid: int = 0
    ranks: tuple[NodeRank, ...] = ()
    # pid -> start time in clock ticks since boot, filled in when the file is written, so that a
    # reader never takes a later process of the same number for the one that was meant.
    starts: dict[int, int] = field(default_factory=dict)

    @property
    def pids(self) -> tuple[int, ...]:
        """Every process that runs."""
        fixed = (self.agent_pid, self.smp_pid, self.worker_server_pid)
        return tuple(pid for pid in (*fixed, *(rank.pid for rank in self.ranks)) if pid)


def node_file_path(run_dir: str | os.PathLike[str], node: int) -> Path:
    """Where the node's file lies."""
    return Path(run_dir) / "state" / f"node{node}.json"


def write_node_file(run_dir: str | os.PathLike[str], file: NodeFile) -> None:
    """Replace the node's file (never half written; not synced: it outlives no reboot)."""
    path = node_file_path(run_dir, file.node)
    path.parent.mkdir(parents=True, exist_ok=True)
    starts: dict[int, int] = {}
    for pid in file.pids:
        try:
            starts[pid] = start_ticks(pid)
        except ProcessLookupError:
            continue  # gone already: a reader finds no start time and leaves the number alone
    fresh = path.with_suffix(".json.new")
    fresh.write_bytes(msgspec.json.encode(dataclasses.replace(file, starts=starts)))
    fresh.replace(path)


def read_node_file(path: str | os.PathLike[str]) -> NodeFile | None:
    """The node's file, or None when there is none."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=NodeFile)
    except (FileNotFoundError, *BAD_INPUT):
        return None


def read_node_files(run_dir: str | os.PathLike[str]) -> Iterator[NodeFile]:
    """The files of all nodes of this host, by node number."""
    paths = (Path(run_dir) / "state").glob("node*.json")
    for path in sorted(paths, key=lambda path: (len(path.name), path.name)):
        file = read_node_file(path)
        if file is not None:
            yield file
