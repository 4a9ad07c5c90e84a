"""``ftrain status``: what runs in a run directory, read from the processes' own pages.

Asks nobody: the agents' node files name the processes, and each rank's telemetry page is mapped
through its agent.  So it works while the coordinator is down, and disturbs nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ftrain.comms.errors import RunDirectoryError
from ftrain.comms.process import start_ticks
from ftrain.comms.telemetry import Phase, TelemetryPage, Word
from ftrain.launch.run_directory import RunRecord, read_run_record
from ftrain.recovery.node_file import NodeFile, NodeRank, read_node_files


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank, as its telemetry page shows it."""

    rank: int
    pid: int  # 0: not running
    phase: str
    phase_s: float  # for how long
    step: int
    total_steps: int  # 0 unknown
    loss: float | None
    step_s: float  # median
    snapshot_step: int  # newest version in memory, -1 none


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node of this host. Pids are 0 for processes that do not run."""

    node: int
    incarnation: int
    epoch: int
    agent_pid: int
    smp_pid: int
    worker_server_pid: int
    ranks: tuple[RankStatus, ...]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Everything that ``ftrain status`` shows."""

    run_id: str
    script: str
    world_size: int
    running: bool
    nodes: tuple[NodeStatus, ...] = field(default=())


def read_status(run_dir: str | os.PathLike[str]) -> RunStatus:
    """The state of a run on this host.

    Raises :class:`RunDirectoryError` when the directory holds no run.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise RunDirectoryError(f"there is no run directory {path}")
    record: RunRecord = read_run_record(path)
    nodes = tuple(_node(file) for file in read_node_files(path))
    return RunStatus(
        run_id=record.run_id,
        script=record.script,
        world_size=record.world_size,
        running=any(node.agent_pid for node in nodes),
        nodes=nodes,
    )


def show_status(run_dir: str, *, as_json: bool) -> int:
    """Print the state of a run; returns the exit code: 0 it runs, 1 it does not."""
    status = read_status(run_dir)
    if as_json:
        json.dump(asdict(status), sys.stdout, indent=2)
        print()
    else:
        _print_tables(status)
    return 0 if status.running else 1


def _node(file: NodeFile) -> NodeStatus:
    def alive(pid: int) -> int:
        return pid if pid and _is_alive(file, pid) else 0

    agent_pid = alive(file.agent_pid)
    return NodeStatus(
        node=file.node,
        incarnation=file.incarnation,
        epoch=file.epoch,
        agent_pid=agent_pid,
        smp_pid=alive(file.smp_pid),
        worker_server_pid=alive(file.worker_server_pid),
        ranks=tuple(_rank(agent_pid, rank, alive(rank.pid)) for rank in file.ranks),
    )


def _is_alive(file: NodeFile, pid: int) -> bool:
    """Whether the process that the file means still runs (a zombie does not)."""
    try:
        same = start_ticks(pid) == file.starts.get(pid)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return same and state not in "ZX"


def _rank(agent_pid: int, rank: NodeRank, pid: int) -> RankStatus:
    page = _open_page(agent_pid, rank.telemetry_fd) if agent_pid else None
    if page is None:
        return RankStatus(rank.rank, pid, "unknown" if pid else "gone", 0.0, 0, 0, None, 0.0, -1)
    try:
        since_ns = page[Word.PHASE_SINCE_NS]
        return RankStatus(
            rank=rank.rank,
            pid=pid,
            phase=Phase(page[Word.PHASE]).name.lower() if pid else "gone",
            phase_s=max(0, time.monotonic_ns() - since_ns) / 1e9 if since_ns else 0.0,
            step=page[Word.STEP],
            total_steps=page[Word.TOTAL_STEPS],
            loss=page.loss if page[Word.LOSS_BITS] else None,
            step_s=page[Word.STEP_MEDIAN_NS] / 1e9,
            snapshot_step=page[Word.KEPT_STEP],
        )
    finally:
        page.close()


def _open_page(agent_pid: int, fd: int) -> TelemetryPage | None:
    try:
        opened = os.open(f"/proc/{agent_pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it ended, or is another user's
        return None
    try:
        return TelemetryPage(opened)
    except ValueError:
        return None
    finally:
        os.close(opened)  # the mapping stays


def _print_tables(status: RunStatus) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=not sys.stdout.isatty())
    state = "running" if status.running else "not running"
    console.print(
        f"{status.run_id}: {state}, {status.world_size} ranks of {status.script}", highlight=False
    )
    if not status.running:
        return
    table = Table("node", "rank", "pid", "doing", "for", "step", "loss", "step time", "snapshot")
    for node in status.nodes:
        name = f"{node.node} (epoch {node.epoch})"
        if not node.agent_pid or not node.ranks:
            table.add_row(name, "", "", "starting" if node.agent_pid else "its agent is gone")
        for rank in node.ranks:
            total = f"/{rank.total_steps}" if rank.total_steps else ""
            table.add_row(
                name,
                str(rank.rank),
                str(rank.pid or "-"),
                rank.phase,
                f"{rank.phase_s:.1f} s",
                f"{rank.step}{total}",
                "" if rank.loss is None else f"{rank.loss:.4g}",
                f"{rank.step_s * 1e3:.1f} ms" if rank.step_s else "",
                str(rank.snapshot_step) if rank.snapshot_step >= 0 else "",
            )
            name = ""
    console.print(table)
