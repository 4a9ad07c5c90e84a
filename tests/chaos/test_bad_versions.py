"""Versions that went bad are passed over: in memory, on the disk, and never silently."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_runs import command, events, losses, node_file, run, slots, wait_for

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.image import ImageReader
from ftrain.comms.protocol.messages import VersionId
from ftrain.recovery.node_file import NodeFile

pytestmark = pytest.mark.slow

HELD_AT = 20


@contextmanager
def held(run_dir: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], NodeFile]]:
    """A launch whose ranks hold in step ``HELD_AT``; killed at the end if it still runs."""
    arguments = ["--steps", "40", "--hold-at", str(HELD_AT)]
    line = command(run_dir, ["--nproc-per-node", "2", *options], arguments)
    with subprocess.Popen(line, cwd=run_dir.parent) as process:
        try:
            wait_for(lambda: all((run_dir.parent / f"held{rank}").exists() for rank in range(2)))
            yield process, node_file(run_dir)
        finally:
            process.kill()


def damage(path: Path, what: str = "data", chunk: int = 0) -> None:
    """Flip one bit of an image: of a chunk of its data, its small section or its header."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as image:
        with memoryview(image) as view, view.toreadonly() as shown:
            layout = ImageReader(shown).header.layout
        places = {
            "data": layout.data_offset + layout.chunk_range(chunk)[0],
            "small": layout.small_offset,
            "index": layout.index_offset,
        }
        image[places[what]] ^= 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, float]]:
    """The losses of a run in which nothing happens, by rank."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(run_dir, ["--nproc-per-node", "2"], ["--steps", "40"])
    return losses(run_dir)


def test_a_version_damaged_in_memory_gives_way_to_an_older_one(
    tmp_path: Path, undisturbed: list[dict[int, float]]
) -> None:
    run_dir = tmp_path / "run"
    with held(run_dir) as (process, node):
        newest = VersionId(1, HELD_AT)
        wait_for(lambda: all(newest in slots(node, rank) for rank in range(2)))
        damage(slots(node, 0)[newest])
        os.kill(node.ranks[1].pid, signal.SIGKILL)
        assert process.wait(60) == 0
    (incident,) = events(run_dir, "incident")
    kinds = [failure["kind"] for failure in incident["failures"]]
    assert kinds[0] == "signal"
    assert set(kinds[1:]) == {"restore"}  # of one rank or of both
    assert incident["restore"]["level"] == "memory"
    assert incident["restore"]["version"] == {"epoch": 1, "step": HELD_AT - 1}
    assert f"step {HELD_AT} of epoch 1 was found bad" in incident["restore"]["reason"]
    assert losses(run_dir) == undisturbed


TWO_NODES = ("--local-nodes", "2", "--nproc-per-node", "1", "snapshot.chunk_bytes=1048576")


def check_repaired(run_dir: Path, damaged: list[str], sources: list[str]) -> None:
    """The one incident went back to the newest version, and the repair was told once."""
    (incident,) = events(run_dir, "incident")
    assert incident["restore"]["level"] == "memory"
    assert incident["restore"]["version"] == {"epoch": 1, "step": HELD_AT}
    assert [failure["kind"] for failure in incident["failures"]] == ["signal"]
    (repair,) = events(run_dir, "repair")
    assert len(repair["data"]["damage"]) == len(damaged)
    for text, found in zip(damaged, repair["data"]["damage"], strict=True):
        assert found.startswith(text)
        assert text in repair["text"]
    assert repair["data"]["sources"] == sources


def share(rank: int, node: int) -> str:
    return f"rank {rank}'s share of step {HELD_AT} in the memory of node {node}"


@pytest.mark.parametrize(
    "what", ["data", *(pytest.param(w, marks=pytest.mark.soak) for w in ("small", "index"))]
)
def test_a_damaged_copy_is_repaired_from_another_nodes(
    tmp_path: Path, undisturbed: list[dict[int, float]], what: str
) -> None:
    run_dir = tmp_path / "run"
    newest = VersionId(1, HELD_AT)
    with held(run_dir, *TWO_NODES) as (process, node):
        wait_for(lambda: all(newest in slots(node_file(run_dir, n), n) for n in range(2)))
        damage(slots(node, 0)[newest], what)
        os.kill(node.ranks[0].pid, signal.SIGKILL)
        assert process.wait(60) == 0
    small = f"rank 0's share of step {HELD_AT} in the memory of node 1"
    whole = share(1, 1)
    sources = {"data": [whole], "small": [small], "index": [small, whole]}
    check_repaired(run_dir, [share(0, 0)], sources[what])
    assert losses(run_dir) == undisturbed


@pytest.mark.soak
def test_copies_that_are_all_damaged_in_other_places_repair_each_other(
    tmp_path: Path, undisturbed: list[dict[int, float]]
) -> None:
    run_dir = tmp_path / "run"
    newest = VersionId(1, HELD_AT)
    with held(run_dir, *TWO_NODES) as (process, node):
        other = node_file(run_dir, 1)
        wait_for(lambda: newest in slots(node, 0) and newest in slots(other, 1))
        damage(slots(node, 0)[newest], chunk=0)
        damage(slots(other, 1)[newest], chunk=1)
        os.kill(node.ranks[0].pid, signal.SIGKILL)
        assert process.wait(60) == 0
    repairs = events(run_dir, "repair")
    told = {(r["data"]["damage"][0].split(":")[0], *r["data"]["sources"]) for r in repairs}
    assert told == {(share(0, 0), share(1, 1)), (share(1, 1), share(0, 0))}
    (incident,) = events(run_dir, "incident")
    assert incident["restore"]["version"] == {"epoch": 1, "step": HELD_AT}
    assert losses(run_dir) == undisturbed


def test_memory_that_is_all_damaged_gives_way_to_a_durable_version(
    tmp_path: Path, undisturbed: list[dict[int, float]]
) -> None:
    run_dir = tmp_path / "run"
    with held(run_dir, "checkpoint.durable_every_s=0.1", "launch.max_restarts=5") as (
        process,
        node,
    ):
        wait_for(lambda: VersionId(1, HELD_AT) in slots(node, 0))
        wait_for(lambda: events(run_dir, "published"))
        for path in slots(node, 0).values():
            damage(path)
        os.kill(node.ranks[1].pid, signal.SIGKILL)
        assert process.wait(60) == 0
    (incident,) = events(run_dir, "incident")
    assert incident["restore"]["level"] == "durable"
    assert f"step {HELD_AT} of epoch 1 was found bad" in incident["restore"]["reason"]
    assert losses(run_dir) == undisturbed


def test_a_damaged_durable_version_gives_way_and_another_model_does_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ["--nproc-per-node", "2"]
    run(run_dir, options, ["--steps", "120", "--save-at", "20", "80"])
    newest, older = DurableStore(run_dir / "checkpoints").versions()
    before = losses(run_dir)

    output = run(run_dir, options, ["--width", "128"], code=2)
    assert output.count("use another run directory") == 1
    assert "found bad" not in (run_dir / "events.jsonl").read_text()

    with newest.file(1).open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        content[4096] ^= 1  # of its first chunk
    output = run(run_dir, options, ["--steps", "120"])
    assert "not restored from any more" in output
    restore = events(run_dir, "formation")[-1]["formation"]["restore"]
    assert (restore["level"], restore["version"]["step"]) == ("durable", older.step)
    assert f"durable step {newest.step} of epoch 1 was found bad" in restore["reason"]
    assert losses(run_dir) == before  # also where a step was done again


WRITER = """
import json, os, signal, sys, time, torch, ftrain

STOP = sys.argv[1:2] == ["stop"]
torch.manual_seed(0)
model = torch.nn.Linear(64, 64, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=30)
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and sys.argv[1:] != ["again"]
for step, _ in session.steps():
    model(torch.ones(4, 64)).square().mean().backward()
    if first and step == 20:
        while STOP and b'"published"' not in open("run/events.jsonl", "rb").read():
            time.sleep(0.02)
        while session.statistics().captured < 21:
            pass
        model.weight.data.mul_(1.5)  # outside of any optimizer
    optimizer.step()
    optimizer.zero_grad()
    if first and step == 20:
        if STOP:
            if "coordinator" in sys.argv:
                os.kill(int(open("run/state/coordinator.pid").read()), signal.SIGKILL)
            os.kill(json.load(open("run/job.json"))["front_pid"], signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_version_that_a_write_outside_the_optimizer_may_have_hit_is_not_restored(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "writer.py").write_text(WRITER)
    line = [*command(run_dir, [], [])[:-1], str(tmp_path / "writer.py")]
    subprocess.run(line, cwd=tmp_path, check=True, timeout=90)
    _, second = [event["formation"] for event in events(run_dir, "formation")]
    assert second["restore"]["version"]["step"] == 19
    (withdrawn,) = events(run_dir, "withdrawn")
    assert withdrawn["data"]["step"] == 20


@pytest.mark.parametrize(
    "also",
    [[], pytest.param(["coordinator"], marks=pytest.mark.soak)],
    ids=["alone", "coordinator dies"],
)
def test_a_stop_saves_what_is_left_when_the_durable_version_was_withdrawn(
    tmp_path: Path, also: list[str]
) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "writer.py").write_text(WRITER)
    durable = "checkpoint.durable_every_steps=20"
    line = [*command(run_dir, [durable], [])[:-1], str(tmp_path / "writer.py")]
    done = subprocess.run(
        [*line, "stop", *also], cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 75, done.stderr
    assert "with step 19 saved" in done.stderr + done.stdout
    assert [event["version"]["step"] for event in events(run_dir, "published")] == [20, 19]
    assert [v.step for v in DurableStore(run_dir / "checkpoints").versions()] == [19]
    again = subprocess.run(
        [*line, "again"], cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert again.returncode == 0, again.stderr
    assert events(run_dir, "formation")[-1]["formation"]["restore"]["version"]["step"] == 19
