"""SIGKILL at any moment of a job that saves all the time: nothing published is torn or lost.

``pytest -m soak tests/chaos/test_durable_kills.py -s`` kills 200 times.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from small_runs import command, events, losses, node_file, wait_for

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import DurableVersion, open_files
from ftrain.comms.errors import CorruptionError
from ftrain.launch.children import children_of

KEEP = 3
OPTIONS = [
    *("--nproc-per-node", "2", "--max-restarts", "1000"),
    *("checkpoint.durable_every_s=0.2", f"checkpoint.keep_last={KEEP}"),
]
VICTIMS = ("manager", "manager", "rank", "ranks", "coordinator", "manager and ranks", "everything")
Key = tuple[int, int]


class Job:
    """A launch that saves all the time, and is launched again when all of it was killed."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.store = DurableStore(run_dir / "checkpoints")
        self.process = self._launch()

    def published(self) -> list[Key]:
        """What was told to be published, in order."""
        if not (self.run_dir / "events.jsonl").exists():
            return []
        return [(e["fence"], e["version"]["step"]) for e in events(self.run_dir, "published")]

    def progress(self, more: int = 1) -> None:
        """Wait until so many versions more are published."""
        before = len(self.published())
        wait_for(lambda: self._alive() and len(self.published()) >= before + more, 60)

    def strike(self, victim: str, chance: random.Random) -> None:
        """Kill, and look at what is there."""
        told = max(self.published())
        pids = self._pids(victim, chance)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if victim == "everything":
            self.process.wait()
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)
            survey = self.store.survey()
            assert survey.problems == ()
            assert survey.versions[0].key >= told
            for version in survey.versions:
                verify(version)
            self.process = self._launch()
        else:
            wait_for(lambda: self._holds(told), 20)

    def stop(self) -> None:
        """A graceful end, after which nothing but whole versions is left."""
        self.process.send_signal(signal.SIGTERM)  # a background job ignores SIGINT
        assert self.process.wait(60) == 75
        survey = self.store.survey()
        assert survey.problems == ()
        assert survey.hidden == ()
        assert survey.versions[0].key == max(self.published())
        assert len(survey.versions) == KEEP
        expected = {f for v in survey.versions for f in (v.path, v.file(0), v.file(1))}
        records = {version.path.with_name("fence.json") for version in survey.versions}
        records.add(self.store.directory / "lock")
        files = {path for path in self.store.directory.rglob("*") if path.is_file()}
        assert files == expected | records

    def kill(self) -> None:
        """Whatever happened before: nothing of it stays."""
        pids = self._pids("everything", random.Random())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _launch(self) -> subprocess.Popen[bytes]:
        line = command(self.run_dir, OPTIONS, ["--steps", "1000000"])
        with (self.run_dir.parent / "output").open("ab") as output:
            return subprocess.Popen(
                line, cwd=self.run_dir.parent, stdout=output, stderr=output, stdin=output
            )

    def _alive(self) -> bool:
        assert self.process.poll() is None, (self.run_dir.parent / "output").read_text()[-3000:]
        return True

    def _pids(self, victim: str, chance: random.Random) -> list[int]:
        below, new = [], [self.process.pid]
        while new:
            new = [child for pid in new for child in children_of(pid)]
            below += new
        if victim == "everything":
            return [self.process.pid, *below]
        node = node_file(self.run_dir)
        ranks = [rank.pid for rank in node.ranks]
        coordinator = [pid for pid in below if b"launch.coordinator" in _command_line(pid)]
        return {
            "manager": [node.smp_pid],
            "rank": [chance.choice(ranks)],
            "ranks": ranks,
            "manager and ranks": [node.smp_pid, *ranks],
            "coordinator": coordinator,
        }[victim]

    def _holds(self, told: Key) -> bool:
        """Whether the newest version verifies; a sweep may be going on at the same time."""
        survey = self.store.survey()
        assert survey.versions[0].key >= told
        try:
            verify(survey.versions[0])
        except CorruptionError:
            newest = self.store.survey().versions[0]
            assert newest.key > survey.versions[0].key, "the newest version does not verify"
            return False
        return survey.problems == ()


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def verify(version: DurableVersion) -> None:
    """Every byte of it."""
    with open_files(version) as files:
        for reader in files:
            if isinstance(reader, CorruptionError):
                raise reader
            reader.verify()


def kill_at_points(run_dir: Path, points: int, seed: int) -> None:
    """One job, killed in part or as a whole again and again, at any moment of its saving."""
    chance = random.Random(seed)
    struck: Counter[str] = Counter()
    job = Job(run_dir)
    try:
        for number in range(points):
            job.progress(2)
            time.sleep(chance.random() * 0.25)  # any moment between two versions
            victim = VICTIMS[number % len(VICTIMS)]
            try:
                job.strike(victim, chance)
            except AssertionError as error:
                raise AssertionError(f"SIGKILL {number}, of {victim}: {error}") from error
            struck[victim] += 1
        job.progress(KEEP + 1)
        job.stop()
    finally:
        job.kill()
    losses(run_dir)  # a step that was done again had the same loss again: what was loaded is right
    print(f"\n{points} SIGKILLs ({dict(struck)}): {len(job.published())} versions published")


@pytest.mark.slow
def test_a_few_kills(tmp_path: Path) -> None:
    kill_at_points(tmp_path / "run", len(VICTIMS), 0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_kills(tmp_path: Path) -> None:
    kill_at_points(tmp_path / "run", 200, 1)
