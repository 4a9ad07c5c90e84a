"""The injector against stand-in nodes made of real processes with real telemetry pages."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftrain.comms.errors import ConfigError, RunDirectoryError
from ftrain.comms.events import read_events
from ftrain.comms.job import JobSpec, read_job, write_job
from ftrain.comms.process import oom_kills
from ftrain.configs.schema import FaultConfig, FaultsConfig, FtrainConfig, LaunchConfig
from ftrain.recovery.faults import NodeFile, NodeRank, read_node_files
from ftrain.recovery.hold import is_held
from ftrain.recovery.injection import (
    FAULTS_FILE,
    Injector,
    inject_now,
    replay_schedule,
)
from ftrain.recovery.node_file import node_file_path, write_node_file
from ftrain.recovery.sightings import Sightings
from ftrain.recovery.victims import Victim, check_memory_trap, seize_node

HERE = Path(__file__).parent
COORDINATOR = "import signal; 'coordinator'; signal.pause()"


class FakeJob:
    """Two nodes of one or two ranks, and a coordinator."""

    def __init__(self, run_dir: Path, nodes: int = 2, per_node: int = 1, spares: int = 0) -> None:
        self.run_dir = run_dir
        self.nodes = nodes
        self.spares = spares
        self.per_node = per_node
        self.processes: list[subprocess.Popen[bytes]] = []
        self.write_job(FaultsConfig())

    def write_job(self, faults: FaultsConfig) -> Path:
        launch = LaunchConfig(
            local_nodes=self.nodes, spares=self.spares, nproc_per_node=self.per_node
        )
        return write_job(
            JobSpec(
                run_id="r",
                secret="00",
                run_dir=str(self.run_dir),
                config=FtrainConfig(launch=launch, faults=faults),
                argv=("train.py",),
                module=False,
                script_digest="0" * 32,
                coordinator="127.0.0.1:1",
                front_pid=os.getpid(),
            )
        )

    def start(self) -> None:
        for node in range(self.nodes):
            self.start_node(node, self.per_node, 1)
        wait_for(lambda: len(self.files()) == self.nodes)

    def start_node(self, *numbers: int) -> None:
        command = [sys.executable, str(HERE / "fake_node.py"), str(self.run_dir)]
        self.processes.append(subprocess.Popen([*command, *map(str, numbers)]))

    def start_coordinator(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", COORDINATOR])
        (self.run_dir / "state").mkdir(exist_ok=True)
        (self.run_dir / "state" / "coordinator.pid").write_text(str(process.pid))
        self.processes.append(process)
        return process

    def files(self) -> list[NodeFile]:
        return list(read_node_files(self.run_dir))

    def inject(self, *faults: FaultConfig, seed: int = 0) -> list[dict[str, Any]]:
        job = read_job(self.run_dir / "job.json")
        return asyncio.run(Injector(job, faults, seed).run())

    def ends(self, node: int) -> list[dict[str, int]]:
        """How ranks ended, as their parent saw it."""
        path = self.run_dir / f"ends{node}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def events(self) -> list[dict[str, Any]]:
        return list(read_events(self.run_dir / FAULTS_FILE))

    def close(self) -> None:
        victims = [victim for file in self.files() for victim in seize_node(file)]
        for victim in victims:
            victim.send(signal.SIGKILL)
            victim.close()
        for process in self.processes:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about in time"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def job(tmp_path: Path) -> Iterator[FakeJob]:
    job = FakeJob(tmp_path)
    try:
        job.start()
        yield job
    finally:
        job.close()


def test_kill_at_a_step_and_another_during_its_recovery(job: FakeJob) -> None:
    first, second = job.inject(
        FaultConfig(kind="sigkill", at_step=20, rank=1),
        FaultConfig(kind="sigkill", at_step=20, rank=1, phase="recovery"),
    )
    assert (first["rank"], first["node"], first["outcome"]) == (1, 1, "ended")
    assert 20 <= first["step"] <= 40
    assert first["epoch"] == 1
    assert (second["epoch"], second["phase"] in ("starting", "restoring")) == (2, True)
    wait_for(lambda: len(job.ends(1)) == 2)
    assert job.ends(1) == [{"rank": 1, "code": -signal.SIGKILL}] * 2
    assert job.ends(0) == []
    begin, end = (event for event in job.events() if event["id"] == first["id"])
    assert (begin["kind"], end["kind"]) == ("fault_begin", "fault_end")
    assert begin["monotonic_ns"] <= end["struck_ns"] <= end["monotonic_ns"]
    assert begin["pid"] == end["pid"]


def test_stopped_rank_is_continued(job: FakeJob) -> None:
    [end] = job.inject(FaultConfig(kind="sigstop", at_s=0.0, node=0, resume_s=0.2))
    assert end["outcome"] == "stopped and resumed"
    assert end["rank"] == 0
    assert job.ends(0) == []


def test_rank_breaks_itself_in_the_phase_asked_for(job: FakeJob) -> None:
    ends = job.inject(
        FaultConfig(kind="sigkill", at_step=12, rank=0, phase="optimizer"),
        FaultConfig(kind="exit", at_step=12, rank=1, phase="boundary"),
    )
    assert [(end["step"], end["phase"]) for end in ends] == [(12, "optimizer"), (12, "boundary")]
    wait_for(lambda: bool(job.ends(0) and job.ends(1)))
    assert job.ends(0)[0]["code"] == -signal.SIGKILL
    assert job.ends(1)[0]["code"] == 3


def test_two_faults_on_one_page_take_turns(job: FakeJob) -> None:
    later, sooner = job.inject(
        FaultConfig(kind="exit", at_step=25, rank=0, delay_s=0.01),
        FaultConfig(kind="exception", at_step=10, rank=0, phase="forward_backward"),
    )
    assert (sooner["step"], sooner["phase"], sooner["epoch"]) == (10, "step", 1)
    assert (later["step"] >= 25, later["epoch"]) == (True, 2)
    wait_for(lambda: len(job.ends(0)) == 2)
    assert [end["code"] for end in job.ends(0)] == [1, 3]


def test_armed_fault_outlives_the_process_it_was_meant_for(job: FakeJob) -> None:
    ends = job.inject(
        FaultConfig(kind="segfault", at_step=60, rank=0, phase="recovery"),
        FaultConfig(kind="sigkill", at_step=60, rank=0),
    )
    assert [end["epoch"] for end in ends] == [2, 1]
    wait_for(lambda: len(job.ends(0)) == 2)
    assert [end["code"] for end in job.ends(0)] == [-signal.SIGKILL, -signal.SIGSEGV]


def test_skipped_collective_and_gil_hang(job: FakeJob) -> None:
    skipped, hung = job.inject(
        FaultConfig(kind="skip_collective", at_step=10, rank=0),
        FaultConfig(kind="gil_hang", at_step=10, rank=1),
    )
    assert (skipped["step"], skipped["phase"], skipped["outcome"]) == (
        10,
        "step",
        "it left out an all-reduce",
    )
    assert hung["outcome"] == "it sleeps now and holds the GIL"
    sightings = Sightings(job.run_dir, 2)
    sightings.look()
    [skipper] = sightings.ranks(rank=0)
    wait_for(lambda: skipper.page.boundary(11) is not None)
    assert skipper.page.boundary(11) == (21, skipper.page.boundary(11)[1])  # type: ignore[index]
    sightings.close()


def test_out_of_memory_kill_hits_one_process(job: FakeJob) -> None:
    try:
        check_memory_trap()
    except ConfigError as error:
        pytest.skip(str(error))
    before = oom_kills().host
    [end] = job.inject(FaultConfig(kind="oom", at_step=5, rank=1))
    assert end["outcome"] == "ended"
    wait_for(lambda: bool(job.ends(1)))
    assert job.ends(1)[0]["code"] == -signal.SIGKILL
    assert job.ends(0) == []
    assert oom_kills().host > before
    assert not list(Path("/sys/fs/cgroup").glob(f"**/ftrain-oom-{end['pid']}"))


def test_node_goes_dark_as_a_whole(tmp_path: Path) -> None:
    job = FakeJob(tmp_path, per_node=2)
    try:
        job.start()
        file, other = job.files()
        [end] = job.inject(FaultConfig(kind="node", at_step=5, rank=1))
        assert (end["outcome"], end["node"]) == ("ended", 0)
        assert set(file.pids) <= set(end["pids"])
        assert all(gone(pid) for pid in file.pids)
        assert not any(gone(pid) for pid in other.pids)
    finally:
        job.close()


def test_helpers_of_a_node(job: FakeJob) -> None:
    file = job.files()[1]
    ends = job.inject(
        FaultConfig(kind="smp", at_s=0.0, node=1),
        FaultConfig(kind="worker_server", at_s=0.05, node=1),
    )
    assert [end["pid"] for end in ends] == [file.smp_pid, file.worker_server_pid]
    assert not gone(file.agent_pid)
    [end] = job.inject(FaultConfig(kind="agent", at_step=0, node=1))
    assert end["pid"] == file.agent_pid
    wait_for(lambda: all(gone(pid) for pid in file.pids))


def test_coordinator_stays_down_for_a_while(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    process = job.start_coordinator()
    try:
        path = job.write_job(
            FaultsConfig(schedule=(FaultConfig(kind="coordinator", at_s=0.0, down_s=0.5),))
        )
        command = [sys.executable, "-m", "ftrain.recovery.injection", "--job", str(path)]
        with subprocess.Popen(command) as injector:
            assert process.wait(10) == -signal.SIGKILL
            assert is_held(tmp_path)
            assert injector.wait(10) == 0
        assert not is_held(tmp_path)
        assert [event["kind"] for event in job.events()] == ["fault_begin", "fault_end"]
    finally:
        job.close()


def test_random_schedule_is_seeded_and_can_be_replayed(job: FakeJob) -> None:
    schedule = FaultConfig(kind="sigkill", mtbf_s=0.15, count_max=2)
    done = job.inject(schedule, seed=5)
    assert len(done) == 2
    again = replay_schedule(job.run_dir / FAULTS_FILE)
    assert [(fault.kind, fault.rank) for fault in again] == [("sigkill", e["rank"]) for e in done]
    assert [fault.at_step for fault in again] == [end["step"] for end in done]
    (job.run_dir / FAULTS_FILE).unlink()
    repeated = job.inject(schedule, seed=5)
    assert [end["rank"] for end in repeated] == [end["rank"] for end in done]


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[FakeJob]:
    """Rank 1 is on node 2 by now; node 1, which had it, has not said yet that it has it no more."""
    job = FakeJob(tmp_path, spares=1)
    try:
        job.start()
        job.start_node(2, 1, 1, 1, 4)
        wait_for(lambda: len(job.files()) == 3)
        yield job
    finally:
        job.close()


def test_a_rank_is_hit_where_it_is_when_the_fault_is_due(moved: FakeJob) -> None:
    by_rank, by_node = moved.inject(
        FaultConfig(kind="sigkill", at_step=5, rank=1),
        FaultConfig(kind="exit", at_step=20, node=2),
    )
    assert (by_rank["rank"], by_rank["node"], by_rank["outcome"]) == (1, 2, "ended")
    assert (by_node["rank"], by_node["node"], by_node["outcome"]) == (1, 2, "ended")
    wait_for(lambda: len(moved.ends(2)) == 2)
    assert moved.ends(1) == []


def test_a_nodes_fault_hits_who_has_the_rank_or_the_node_that_is_named(moved: FakeJob) -> None:
    by_rank, by_node = moved.inject(
        FaultConfig(kind="smp", at_step=5, rank=1),
        FaultConfig(kind="smp", at_step=5, node=1),
    )
    files = {file.node: file for file in moved.files()}
    assert (by_rank["node"], by_rank["pid"]) == (2, files[2].smp_pid)
    assert (by_node["node"], by_node["pid"]) == (1, files[1].smp_pid)
    assert by_node["step"] >= 5  # of the job: the node has no rank


def test_a_random_node_is_one_that_has_ranks(moved: FakeJob) -> None:
    fault = FaultConfig(kind="node", at_s=0.0)
    job = read_job(moved.run_dir / "job.json")

    def drawn(seed: int) -> int:
        injector = Injector(job, (fault,), seed)
        chosen = injector._drawn(fault, random.Random(seed))
        return asyncio.run(injector._found(chosen, 0)).node

    nodes = [drawn(seed) for seed in range(12)]
    assert set(nodes) == {0, 2}
    assert [drawn(seed) for seed in range(12)] == nodes


def test_a_spare_can_be_named_and_no_node_beyond(moved: FakeJob) -> None:
    assert inject_now(moved.run_dir, FaultConfig(kind="smp", node=2))["node"] == 2
    with pytest.raises(ConfigError, match="nodes 0 to 2"):
        inject_now(moved.run_dir, FaultConfig(kind="smp", node=3))


def test_inject_now(job: FakeJob) -> None:
    end = inject_now(job.run_dir, FaultConfig(kind="sigkill", rank=1))
    assert end["outcome"] == "ended"
    with pytest.raises(ConfigError, match="ranks 0 to 1"):
        inject_now(job.run_dir, FaultConfig(kind="sigkill", rank=2))


def test_no_job_is_one_sentence(tmp_path: Path) -> None:
    fault = FaultConfig(kind="sigkill", rank=0)
    with pytest.raises(RunDirectoryError, match="no job was launched"):
        inject_now(tmp_path, fault)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="job file"):
        inject_now(tmp_path, fault)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    path = FakeJob(tmp_path).write_job(FaultsConfig())
    path.write_bytes(path.read_bytes().replace(str(os.getpid()).encode(), str(ended.pid).encode()))
    with pytest.raises(RunDirectoryError, match="no job runs"):
        inject_now(tmp_path, fault)


def test_bad_schedule_ends_the_injector_with_one_sentence(tmp_path: Path) -> None:
    faults = FaultsConfig(schedule=(FaultConfig(kind="sigkil", at_step=1),))
    path = FakeJob(tmp_path).write_job(faults)
    command = [sys.executable, "-m", "ftrain.recovery.injection", "--job", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert ended.stderr.startswith("ftrain: faults: kind='sigkil' is none of sigkill,")
    assert ended.stderr.count("\n") == 1


def test_reused_pid_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        with pytest.raises(ProcessLookupError):
            Victim(bystander.pid, start=1)
        file = NodeFile(node=0, incarnation=1, epoch=1, agent_pid=bystander.pid)
        write_node_file(tmp_path, file)
        path = node_file_path(tmp_path, 0)
        stale = dataclasses.replace(file, starts={bystander.pid: 1})
        assert seize_node(stale) == []
        text = path.read_text()
        path.write_text(text.replace(text[text.index('"starts"') :], '"starts":{}}'))
        sightings = Sightings(tmp_path, 1)
        sightings.look()
        assert sightings.files == {}
        assert bystander.poll() is None
        bystander.kill()


def test_node_file_is_read_back_and_rubbish_passed_over(tmp_path: Path) -> None:
    entry = NodeRank(rank=0, pid=os.getpid(), telemetry_fd=9)
    file = NodeFile(node=3, incarnation=2, epoch=7, agent_pid=os.getpid(), ranks=(entry,))
    write_node_file(tmp_path, file)
    node_file_path(tmp_path, 1).write_text("{")
    [read] = read_node_files(tmp_path)
    assert dataclasses.replace(read, starts={}) == file
    assert list(read.starts) == [os.getpid()]


def test_replay_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no fault is written there"):
        replay_schedule(tmp_path / "faults.jsonl")
