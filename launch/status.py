"""``ftrain status``: what runs in a run directory, read from the processes' own pages.

Asks nobody: the agents' node files name the processes, and each rank's telemetry page is mapped
through its agent; of a run that is over the event log and the files tell.  So it works while the
coordinator is down, and disturbs nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ftrain.checkpoint.durable import DurableStore
from ftrain.comms.errors import FtrainError
from ftrain.comms.events import read_events
from ftrain.comms.process import start_ticks
from ftrain.comms.telemetry import Phase, TelemetryPage, Word
from ftrain.launch.place import versions_folder
from ftrain.launch.run_directory import RunRecord, read_run_record
from ftrain.launch.saved import SavedStatus, read_saved, saved_text
from ftrain.launch.words import print_table
from ftrain.recovery.node_file import NodeFile, NodeRank, read_node_files

_COLUMNS = ("node", "rank", "pid", "doing", "for", "step", "loss", "step time", "snapshot")
_ENDS = {0: "done", 1: "failed", 75: "stopped and saved", 130: "forced to stop"}


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
    captures_skipped: int = 0  # versions that could not be captured


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
    waits: bool = False  # as a spare: other nodes have all the ranks


@dataclass(frozen=True, slots=True)
class PastStatus:
    """What is known of a run that does not run."""

    exit_code: int | None  # of the newest launch; None: it was killed before it could say
    step: int  # steps completed
    durable_step: int  # -1 none
    damage: str  # why there is none, if there were some


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Everything that ``ftrain status`` shows."""

    run_id: str
    script: str
    world_size: int
    running: bool
    nodes: tuple[NodeStatus, ...] = field(default=())
    past: PastStatus | None = None  # when it does not run
    saved: SavedStatus = field(default_factory=SavedStatus)  # while it runs


def read_status(run_dir: str | os.PathLike[str]) -> RunStatus:
    """The state of a run on this host.

    Raises :class:`RunDirectoryError` when the directory holds no run.
    """
    path = Path(run_dir)
    record = read_run_record(path)
    nodes = _with_spares([_node(file) for file in read_node_files(path)], record.world_size)
    running = any(node.agent_pid for node in nodes)
    return RunStatus(
        run_id=record.run_id,
        script=record.script,
        world_size=record.world_size,
        running=running,
        nodes=nodes,
        past=None if running else _past(path, record),
        saved=read_saved(read_events(path / "events.jsonl")) if running else SavedStatus(),
    )


def show_status(run_dir: str, *, as_json: bool) -> int:
    """Print the state of a run; returns the exit code: 0 it runs, 1 it does not."""
    status = read_status(run_dir)
    if as_json:
        json.dump(asdict(status), sys.stdout, indent=2)
        print()
    else:
        _print_status(status)
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


def _with_spares(nodes: Sequence[NodeStatus], world_size: int) -> tuple[NodeStatus, ...]:
    """The nodes, and which of them wait while the newest formation has all its ranks elsewhere."""
    newest = max((node.epoch for node in nodes if node.ranks), default=0)
    whole = sum(len(node.ranks) for node in nodes if node.epoch == newest) >= world_size
    return tuple(
        replace(node, waits=True, ranks=())  # what it had in an earlier epoch is gone
        if whole and node.agent_pid and (node.epoch < newest or not node.ranks)
        else node
        for node in nodes
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
            snapshot_step=page[Word.CAPTURED_STEP] - 1,
            captures_skipped=page[Word.CAPTURES_SKIPPED],
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


def _past(path: Path, record: RunRecord) -> PastStatus:
    """What a run that does not run left behind."""
    launch, exit_code = None, None
    for event in read_events(path / "events.jsonl"):
        if event["kind"] == "launch" and event["launch"] != launch:
            launch, exit_code = event["launch"], None
        elif event["kind"] == "end":
            exit_code = int(event["data"]["exit_code"])
    records = read_events(path / "steps" / "rank0.jsonl")
    steps = (int(event["step"]) + 1 for event in records if event["kind"] == "step")
    durable_step, damage = _newest_durable(path)
    return PastStatus(exit_code, max(steps, default=0), durable_step, damage)


def _newest_durable(path: Path) -> tuple[int, str]:
    """Its step; or -1, and the first reason why no version can be used."""
    try:
        survey = DurableStore(versions_folder(path)).survey()
    except FtrainError:
        return -1, ""  # never launched, or the directory is gone
    if survey.versions:
        return survey.versions[0].step, ""
    return -1, next(iter(survey.problems), "")


def _past_text(past: PastStatus) -> str:
    """How the run ended and how it goes on, in one line."""
    code = past.exit_code
    said = "killed before it could say how it ended"
    if code is not None:
        said = f"{_ENDS.get(code, 'ended')} (exit code {code})"
    said = f"{said}; {past.step} steps completed"
    if past.durable_step < 0:
        again = "" if code == 0 else "; the same command starts from the beginning"
        what = f"no version can be used ({past.damage})" if past.damage else "no step is durable"
        return f"{said}; {what}{again}"
    again = "" if code == 0 else "; the same command goes on from there"
    return f"{said}; newest durable step {past.durable_step}{again}"


def _print_status(status: RunStatus) -> None:
    state = "running" if status.past is None else "not running"
    print(f"{status.run_id}: {state}, {status.world_size} ranks of {status.script}")
    if status.past is not None:
        print(_past_text(status.past))
        return
    if line := saved_text(status.saved):
        print(line)
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for node in status.nodes:
        name = str(node.node)
        if not node.agent_pid or not node.ranks:
            what = "waits as a spare" if node.waits else "starting"
            what = what if node.agent_pid else "its agent is gone"
            rows.append((name, "", "", what, "", "", "", "", ""))
        for rank in node.ranks:
            rows.append((name, *_cells(rank)))
            name = ""
    print_table(rows)


def _cells(rank: RankStatus) -> tuple[str, str, str, str, str, str, str, str]:
    total = f"/{rank.total_steps}" if rank.total_steps else ""
    return (
        str(rank.rank),
        str(rank.pid or "-"),
        rank.phase,
        f"{rank.phase_s:.1f} s",
        f"{rank.step}{total}",
        "" if rank.loss is None else f"{rank.loss:.4g}",
        f"{rank.step_s * 1e3:.1f} ms" if rank.step_s else "",
        str(rank.snapshot_step) if rank.snapshot_step >= 0 else "",
    )
