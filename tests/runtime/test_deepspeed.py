"""DeepSpeed scripts on two gloo ranks, killed and resumed, with our engine and with DeepSpeed's."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked_script import FORKED, imported
from forked_script import run as run_script

from ftrain.comms.errors import CorruptionError, RestoreError
from ftrain.runtime.deepspeed import complete_tags, verify

JOB = Path(__file__).with_name("deepspeed_job.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
    ),
]
Losses = dict[int, str]


class Run:
    """One run of the job; its files are beside the checkpoints."""

    def __init__(self, folder: Path, *options: str, fresh: bool = False) -> None:
        self.checkpoints = folder / "checkpoints"
        self.out = folder / "run"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        command = [str(JOB), "--folder", str(self.checkpoints), "--out", str(self.out), *options]
        self.log = folder / "log"
        self.ranks = [
            FORKED.Process(target=run_script, args=(command, environment, self.log, fresh))
            for environment in (
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
                }
                for rank in (0, 1)
            )
        ]
        for process in self.ranks:
            process.start()

    def records(self, rank: int = 0) -> list[dict[str, Any]]:
        path = self.out.with_suffix(f".{rank}.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[Losses]:
        """Of each rank; a step that was made again has to give the same."""
        found: list[Losses] = []
        for rank in (0, 1):
            losses: Losses = {}
            for record in self.records(rank):
                if "step" in record:
                    assert losses.setdefault(record["step"], record["loss"]) == record["loss"]
            found.append(losses)
        return found

    def of(self, key: str, rank: int = 0) -> list[Any]:
        return [record[key] for record in self.records(rank) if key in record]

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        for process in self.ranks:
            process.join(200)
        assert [process.exitcode for process in self.ranks] == [0, 0], self.said()[-6000:]

    def await_that(self, holds: Callable[[], bool]) -> None:
        while not holds():
            assert all(process.is_alive() for process in self.ranks), self.said()[-6000:]
            time.sleep(0.002)

    def kill(self) -> None:
        self.stop()
        assert [process.exitcode for process in self.ranks] == [-signal.SIGKILL] * 2

    def stop(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """The process that the ranks are forked from: importing DeepSpeed takes seconds."""
    with imported("deepspeed", "ftrain.runtime.deepspeed", DS_ACCELERATOR="cpu"):
        yield


@pytest.fixture
def started() -> Iterator[Callable[..., Run]]:
    """Runs that are ended with the test, whatever happens."""
    runs: list[Run] = []

    def start(folder: Path, *options: str, fresh: bool = False) -> Run:
        folder.mkdir(exist_ok=True)
        runs.append(Run(folder, *options, fresh=fresh))
        return runs[-1]

    yield start
    for run in runs:
        run.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Twelve steps of ZeRO-1 with DeepSpeed's own engine: its losses, and its checkpoints."""
    run = Run(tmp_path_factory.mktemp("own"), "--stage", "1", "--engine", "deepspeed")
    try:
        run.end()
        yield run
    finally:
        run.stop()


def test_killed_ranks_go_on_with_the_same_losses_past_a_damaged_file(
    tmp_path: Path, started: Callable[..., Run], undisturbed: Run
) -> None:
    run = started(tmp_path)
    run.await_that(lambda: len(run.of("step")) >= 6)
    run.kill()
    killed_at = len(run.of("step"))
    run = started(tmp_path, "--steps", "11")
    run.end()
    starts = run.of("start")
    assert starts[0] == 0
    assert killed_at - 3 <= starts[1] <= killed_at + 1  # saved after every step
    assert run.of("failures") == [[]]
    assert complete_tags(run.checkpoints)[0] == "step11"
    assert verify(run.checkpoints, "step11") > 0
    assert not list(run.checkpoints.rglob("*.py")), "scripts that can't read these files"
    path = run.checkpoints / "step11" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(path.read_bytes())
    content[5000] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptionError, match="does not match its digest"):
        verify(run.checkpoints, "step11")
    run = started(tmp_path)
    run.end()
    assert [run.of("start", rank)[2] for rank in (0, 1)] == [10, 10]
    (said,) = re.findall(r"ftrain: tag step11 is not loaded: rank .*", run.said())
    assert "does not match its digest" in said
    assert said.endswith("step10 is loaded instead")
    assert run.losses() == undisturbed.losses()
    assert (run.checkpoints / "latest").read_text() == "step12"
    assert verify(run.checkpoints, "step11") == verify(run.checkpoints, "step12")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ("--stage", "2", "--accumulate", "2", "--precision", "bf16"), marks=pytest.mark.soak
        ),
        ("--stage", "3"),
    ],
    ids=lambda options: f"zero{options[1]}",
)
def test_so_do_those_of_other_stages(
    tmp_path: Path, started: Callable[..., Run], options: tuple[str, ...]
) -> None:
    undisturbed = started(tmp_path / "own", *options, "--engine", "deepspeed")
    undisturbed.end()
    run = started(tmp_path / "ours", *options)
    run.await_that(lambda: len(run.of("step")) >= 6)
    run.kill()
    run = started(tmp_path / "ours", *options)
    run.end()
    assert run.of("start")[1] >= 3
    assert run.losses() == undisturbed.losses()
    assert run.of("failures") == [[]]
    assert verify(run.checkpoints, "step12") > 0


def test_both_engines_read_what_the_other_one_wrote(
    tmp_path: Path, started: Callable[..., Run], undisturbed: Run
) -> None:
    shutil.copytree(undisturbed.checkpoints, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest").write_text("step4")
    ours = started(tmp_path, "--save-every", "4", "--steps", "8")
    ours.end()
    assert ours.said().count("was written by DeepSpeed's own engine") == 2  # once on each rank
    target = tmp_path / "exported" / "checkpoints"
    program = (
        "import sys, ftrain.runtime.deepspeed as d; d.export(sys.argv[1], 'step8', sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(ours.checkpoints), str(target)],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        check=True,
        timeout=100,
    )
    last = started(tmp_path / "exported", "--save-every", "4", "--engine", "deepspeed")
    last.end()
    assert (ours.of("start"), last.of("start")) == ([4], [8])
    expected = [{step: losses[step] for step in range(4, 12)} for losses in undisturbed.losses()]
    assert [a | b for a, b in zip(ours.losses(), last.losses(), strict=True)] == expected


@pytest.mark.parametrize(
    "tag",
    ["", pytest.param("last", marks=pytest.mark.soak)],
    ids=["new-tag", "same-tag"],
)
def test_a_kill_while_files_are_written_leaves_the_checkpoint_before(
    tmp_path: Path, started: Callable[..., Run], tag: str
) -> None:
    options = ["--stage", "1", "--width", "512", "--steps", "4", "--tag", tag]
    slow = ("--bytes-per-s", "1000000", "--wait-at", "1")
    run = started(tmp_path, *options, *slow)
    run.await_that(lambda: bool(run.of("waited")))
    first, second = (tag, tag) if tag else ("step1", "step2")
    assert (run.checkpoints / "latest").read_text() == first
    before = verify(run.checkpoints, first)
    folder = run.checkpoints / second
    # Both ranks write their part; neither is done, as that takes seconds.
    run.await_that(lambda: len(list(folder.glob("*.new"))) >= 2)
    run.kill()
    assert list(folder.glob("*.new")), "killed too late"
    assert (run.checkpoints / "latest").read_text() == first
    assert complete_tags(run.checkpoints) == [first]
    assert verify(run.checkpoints, first) == before
    if not tag:
        with pytest.raises(RestoreError, match=r"not complete.*'step1'"):
            verify(run.checkpoints, "step2")
    run = started(tmp_path, *options)
    run.end()
    assert run.of("start") == [0, 1]
    run.losses()  # no step that was made twice differs
    last = tag or "step4"
    assert (run.checkpoints / "latest").read_text() == last
    assert verify(run.checkpoints, last) == before
    assert not list(run.checkpoints.rglob("*.new"))


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_does_not_stop_training(tmp_path: Path, started: Callable[..., Run]) -> None:
    options = ["--stage", "1", "--width", "512", "--steps", "6", "--save-every", "2"]
    with small_disk(tmp_path / "checkpoints", 7_000_000):  # a checkpoint takes 4.5 MB
        run = started(tmp_path, *options)
        run.end()
        assert len(run.of("step")) == 6
        (failures,) = run.of("failures")
        assert len(failures) == 2
        assert "step4 was not saved: rank" in failures[0]
        assert " are free" in failures[0]
        assert "step4 was not saved" in run.said()
        assert complete_tags(run.checkpoints) == ["step2"]
        assert verify(run.checkpoints, "step2") > 4_000_000
        assert (run.checkpoints / "latest").read_text() == "step2"
        assert not (run.checkpoints / "step4").exists(), "what failed gives its room back"


def test_a_script_that_just_ends_leaves_its_last_checkpoint(
    tmp_path: Path, started: Callable[..., Run]
) -> None:
    options = ["--stage", "1", "--width", "256", "--steps", "2", "--save-every", "2", "--just-end"]
    # Multiprocessing ends its processes without what Python does at the end of an interpreter.
    run = started(tmp_path, *options, "--bytes-per-s", "500000", fresh=True)
    run.end()
    assert (run.checkpoints / "latest").read_text() == "step2"
    assert verify(run.checkpoints, "step2") > 0
