"""DeepSpeed scripts on two gloo ranks, killed and resumed, with our engine and with DeepSpeed's."""

from __future__ import annotations

import importlib.util
import json
import os
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

    def __init__(self, folder: Path, *options: str, world_size: int = 2, name: str = "run") -> None:
        self.checkpoints = folder / "checkpoints"
        self.out = folder / name
        self.world_size = world_size
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        command = [sys.executable, str(JOB), "--folder", str(self.checkpoints)]
        command += ["--out", str(self.out), *options]
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as log:
            self.ranks = [
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env={
                        **os.environ,
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(world_size),
                        "LOCAL_WORLD_SIZE": str(world_size),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port,
                        "OMP_NUM_THREADS": "1",
                        "DS_ACCELERATOR": "cpu",
                        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
                    },
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(world_size)
            ]

    def records(self, rank: int = 0) -> list[dict[str, Any]]:
        path = self.out.with_suffix(f".{rank}.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[Losses]:
        """Of each rank; a step that was made again has to give the same."""
        found: list[Losses] = []
        for rank in range(self.world_size):
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
        codes = [process.wait(200) for process in self.ranks]
        assert codes == [0] * self.world_size, self.said()[-6000:]

    def await_that(self, holds: Callable[[], bool]) -> None:
        while not holds():
            assert all(process.poll() is None for process in self.ranks), self.said()[-6000:]
            time.sleep(0.002)

    def kill(self) -> None:
        for process in self.ranks:
            process.send_signal(signal.SIGKILL)
        assert [process.wait() for process in self.ranks] == [-signal.SIGKILL] * self.world_size


@pytest.fixture
def started() -> Iterator[Callable[..., Run]]:
    """Runs that are ended with the test, whatever happens."""
    runs: list[Run] = []

    def start(folder: Path, *options: str, **more: Any) -> Run:
        folder.mkdir(exist_ok=True)
        runs.append(Run(folder, *options, **more))
        return runs[-1]

    yield start
    for run in runs:
        for process in run.ranks:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    "options",
    [
        ("--stage", "1"),
        ("--stage", "2", "--accumulate", "2", "--precision", "bf16"),
        ("--stage", "3"),
    ],
    ids=lambda options: f"zero{options[1]}",
)
def test_killed_ranks_go_on_with_the_same_losses(
    tmp_path: Path, started: Callable[..., Run], options: tuple[str, ...]
) -> None:
    undisturbed = started(tmp_path / "own", *options, "--steps", "12", "--engine", "deepspeed")
    undisturbed.end()
    run = started(tmp_path / "ours", *options, "--steps", "12")
    run.await_that(lambda: len(run.of("step")) >= 6)
    run.kill()
    run = started(tmp_path / "ours", *options, "--steps", "12")
    run.end()
    starts = run.of("start")
    assert starts[0] == 0
    assert 3 <= starts[1] <= 7  # at step 6, saved after every step
    assert run.losses() == undisturbed.losses()
    assert run.of("failures") == [[]]
    assert complete_tags(run.checkpoints)[0] == "step12"
    assert verify(run.checkpoints, "step12") > 0
    assert not list(run.checkpoints.rglob("*.py")), "scripts that can't read these files"


def test_both_engines_read_what_the_other_one_wrote(
    tmp_path: Path, started: Callable[..., Run]
) -> None:
    options = ("--stage", "2", "--save-every", "4")
    undisturbed = started(tmp_path / "own", *options, "--steps", "12", "--engine", "deepspeed")
    undisturbed.end()
    first = started(tmp_path / "mixed", *options, "--steps", "4", "--engine", "deepspeed")
    first.end()
    ours = started(tmp_path / "mixed", *options, "--steps", "8")
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
    last = started(tmp_path / "exported", *options, "--steps", "12", "--engine", "deepspeed")
    last.end()
    assert (ours.of("start"), last.of("start")) == ([0, 4], [8])
    together = [a | b for a, b in zip(ours.losses(), last.losses(), strict=True)]
    assert together == undisturbed.losses()


@pytest.mark.parametrize("tag", ["", "last"], ids=["new-tag", "same-tag"])
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


def test_a_damaged_file_is_refused(tmp_path: Path, started: Callable[..., Run]) -> None:
    run = started(tmp_path, "--stage", "1", "--steps", "2")
    run.end()
    path = run.checkpoints / "step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(path.read_bytes())
    content[5000] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptionError, match="does not match its digest"):
        verify(run.checkpoints, "step2")
    run = started(tmp_path, "--stage", "1", "--steps", "4")
    assert run.ranks[1].wait(100) == 1
    assert "does not match its digest" in run.said()
    assert "load another tag, such as 'step1'" in run.said()
    run.ranks[0].kill()  # it waits for rank 1, which a launcher would tell it
    run.ranks[0].wait()
    (run.checkpoints / "latest").write_text("step1")
    run = started(tmp_path, "--stage", "1", "--steps", "4")
    run.end()
    assert run.of("start")[-1] == 1


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
        assert "bytes are free" in failures[0]
        assert "step4 was not saved" in run.said()
        assert complete_tags(run.checkpoints) == ["step2"]
        assert verify(run.checkpoints, "step2") > 4_000_000
        assert (run.checkpoints / "latest").read_text() == "step2"
        assert not (run.checkpoints / "step4").exists(), "what failed gives its room back"
        again = started(tmp_path, *options, "--engine", "ftrain", name="again")
        again.await_that(lambda: bool(again.of("start")))
        assert again.of("start") == [2]
        again.kill()


def test_a_script_that_just_ends_leaves_its_last_checkpoint(
    tmp_path: Path, started: Callable[..., Run]
) -> None:
    options = ["--stage", "1", "--width", "256", "--steps", "2", "--save-every", "2", "--just-end"]
    run = started(tmp_path, *options, "--bytes-per-s", "500000")
    run.end()
    assert (run.checkpoints / "latest").read_text() == "step2"
    assert verify(run.checkpoints, "step2") > 0


def test_what_can_not_be_saved_is_named_and_training_goes_on(
    tmp_path: Path, started: Callable[..., Run]
) -> None:
    run = started(tmp_path, "--stage", "1", "--steps", "3", "--spoil", "2", world_size=1)
    run.end()
    (failures,) = run.of("failures")
    assert len(failures) == 1
    assert "step2 was not saved" in failures[0]
    assert "mp_rank_00_model_states.callback is a builtins.function" in failures[0]
    assert complete_tags(run.checkpoints) == ["step3", "step1"]
