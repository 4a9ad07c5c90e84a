"""What could not be saved is said and is no success; what can be saved of a job that fails, is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Launch, launched, small_disk

pytestmark = pytest.mark.slow

TRAIN = """
import os, sys, time, torch, ftrain
import torch.distributed as dist

RANK = int(os.environ["RANK"])
if int(os.environ["WORLD_SIZE"]) > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(WIDTH, 8)
if int(os.environ["WORLD_SIZE"]) > 1:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=20)
for step, _ in session.steps():
    BODY
    optimizer.zero_grad()
    model(torch.ones(2, WIDTH)).square().mean().backward()
    optimizer.step()
print("trained to step", session.step)
"""
TWO = ("--nproc-per-node", "2")


def script(body: str = "pass", width: int = 4) -> str:
    return TRAIN.replace("BODY", body).replace("WIDTH", str(width))


def saved(launch: Launch) -> list[int]:
    """The steps of the durable versions."""
    found = (launch.run_dir / "checkpoints").glob("*/[0-9]*.json")
    return sorted(int(manifest.stem) for manifest in found)


def warnings(launch: Launch) -> list[str]:
    lines = (launch.run_dir / "events.jsonl").read_text().splitlines()
    return [event["text"] for event in map(json.loads, lines) if event["kind"] == "warning"]


@pytest.mark.parametrize(
    "snapshot", ["snapshot.slots=3", pytest.param("snapshot=off", marks=pytest.mark.soak)]
)
def test_an_end_that_no_disk_takes_is_no_success(tmp_path: Path, snapshot: str) -> None:
    with small_disk(tmp_path / "disk", "1m"):
        where = f"checkpoint.dir={tmp_path / 'disk'}"
        with launched(tmp_path, script(width=40_000), *TWO, snapshot, where) as launch:
            assert launch.wait() == 1, launch.shown
            assert launch.gone_after(0)
    assert launch.shown.count("trained to step 20") == 2
    assert "step 20" in launch.shown
    said = [line for line in launch.shown.splitlines() if line.startswith("ftrain: ")][-1]
    assert "is not durable" in said
    assert "bytes were needed" in said
    assert "checkpoint.dir" in said
    assert "Traceback" not in launch.shown
    assert saved(launch) == []


def test_an_end_that_found_no_memory_is_no_success(tmp_path: Path) -> None:
    body = """
    if step == 18:
        import resource
        taken = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (taken + (84 << 20), resource.RLIM_INFINITY))"""
    with launched(tmp_path, script(body, width=1_000_000), "snapshot=off") as launch:
        assert launch.wait() == 1, launch.shown
    assert "trained to step 20" in launch.shown
    assert "step 20, the end of the run, is not durable: no memory for a copy" in launch.shown


def test_a_version_that_fails_on_the_way_is_told_once(tmp_path: Path) -> None:
    body = """
    time.sleep(0.1)
    if step == 15:
        os.unlink("disk/filler")"""
    with small_disk(tmp_path / "disk", "1m") as fill:
        fill(True)
        options = (f"checkpoint.dir={tmp_path / 'disk'}", "checkpoint.durable_every_s=0.2")
        with launched(tmp_path, script(body), *options) as launch:
            assert launch.wait() == 0, launch.shown
        assert (tmp_path / "disk" / "1" / "20.json").exists()
    assert launch.shown.count("no durable version could be written") == 1
    told = [text for text in warnings(launch) if "no durable version could be written" in text]
    assert len(told) == 1
    assert "bytes were needed" in told[0]


@pytest.mark.soak
def test_a_manager_that_hangs_at_the_end_is_replaced_and_the_end_saved(tmp_path: Path) -> None:
    late = (
        script()
        + """
import signal
node = __import__("json").load(open("run/state/node0.json"))
os.kill(node["smp_pid"], signal.SIGSTOP)
"""
    )
    with launched(tmp_path, late) as launch:
        assert launch.wait() == 0, launch.shown
    assert "the snapshot manager does not answer" in launch.shown
    assert saved(launch) == [20]


@pytest.mark.soak
def test_a_manager_that_hangs_before_the_end_does_not_cost_the_end(tmp_path: Path) -> None:
    """The steps meanwhile are not captured; the last boundary waits for the next manager."""
    body = """
    if step == 15:
        node = __import__("json").load(open("run/state/node0.json"))
        os.kill(node["smp_pid"], __import__("signal").SIGSTOP)"""
    with launched(tmp_path, script(body)) as launch:
        assert launch.wait() == 0, launch.shown
    assert saved(launch) == [20]


@pytest.mark.parametrize(
    "failure",
    [
        "raise ValueError('boom')",
        pytest.param("sys.exit(3)", marks=pytest.mark.soak),
        pytest.param("os.kill(os.getpid(), 9)", marks=pytest.mark.soak),
    ],
)
def test_what_memory_holds_of_a_job_that_is_given_up_is_saved(tmp_path: Path, failure: str) -> None:
    body = f"""
    if step == 12 and RANK == 1 and not os.path.exists("mended"):
        {failure}"""
    with launched(tmp_path, script(body), *TWO, "--max-restarts", "1") as launch:
        assert launch.wait() == 1, launch.shown
        assert launch.gone_after(0)
    assert saved(launch) == [12]
    assert "step 12 is saved: run again once that is mended" in launch.shown
    (tmp_path / "mended").touch()
    again = Launch(tmp_path, *TWO)
    assert again.wait() == 0, again.shown
    assert again.shown.count("trained to step 20") == 2
    assert "steps             20 (8 in this launch)" in again.shown


def test_giving_up_on_a_full_disk_says_both(tmp_path: Path) -> None:
    body = """
    if step == 12:
        raise ValueError("boom")"""
    with small_disk(tmp_path / "disk", "1m"):
        where = f"checkpoint.dir={tmp_path / 'disk'}"
        options = ("--max-restarts", "0", where)
        with launched(tmp_path, script(body, width=40_000), *options) as launch:
            assert launch.wait() == 1, launch.shown
    assert "raised ValueError: boom" in launch.shown
    assert "but the last version could not be saved" in launch.shown
    assert "bytes were needed" in launch.shown


MISTAKES = {
    "no state": "ftrain.Session(model=model, optimizer=optimizer, counter=object())",
    "two sessions": "second = ftrain.Session(model=model, optimizer=optimizer)",
    "two loops": "\nfor a in session.steps():\n    for b in session.steps():\n        pass",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_with_session_is_one_sentence_and_no_restart(
    tmp_path: Path, mistake: str
) -> None:
    begin = script().split("for step, _")[0]
    if mistake == "no state":
        begin = begin.split("session = ")[0]
    with launched(tmp_path, f"{begin}\n{MISTAKES[mistake]}", *TWO) as launch:
        assert launch.wait() == 2, launch.shown
        assert launch.gone_after(0)
    said = [line for line in launch.shown.splitlines() if line.startswith("ftrain: ")]
    assert said.pop(0).startswith("ftrain: run directory ")
    assert len(said) == 1
    assert "can't go on: " in said[0]
    assert "rank " in said[0]
    assert f"({tmp_path / 'train.py'}, line " in said[0]
    assert "Traceback" not in launch.shown
    assert "steps             0 (0 in this launch)" in launch.shown
    events = (launch.run_dir / "events.jsonl").read_text()
    assert events.count('"kind":"formation"') == 1


@pytest.mark.soak
def test_another_model_in_the_run_directory_is_a_mistake(tmp_path: Path) -> None:
    with launched(tmp_path, script()) as launch:
        assert launch.wait() == 0, launch.shown
    with launched(tmp_path, script(width=8)) as launch:
        assert launch.wait() == 2, launch.shown
    assert "can't go on: " in launch.shown
    assert "Traceback" not in launch.shown
    assert "(0 in this launch)" in launch.shown
    assert saved(launch) == [20]


def test_a_script_that_never_steps_is_told_once_and_saves_nothing(tmp_path: Path) -> None:
    source = script().replace("optimizer.step()", "pass")
    with launched(tmp_path, source, *TWO) as launch:
        assert launch.wait() == 0, launch.shown
    assert launch.shown.count("no registered optimizer was stepped") == 1
    assert "is durable" not in launch.shown
    assert "session.py" not in launch.shown


def test_accumulated_gradients_raise_no_suspicion_and_end_durable(tmp_path: Path) -> None:
    source = script().replace("optimizer.step()", "optimizer.step() if step % 16 == 15 else None")
    source = source.replace("    optimizer.zero_grad()\n", "")
    with launched(tmp_path, source) as launch:
        assert launch.wait() == 0, launch.shown
    assert "no registered optimizer" not in launch.shown
    assert launch.shown.count("is durable") == 1
    assert saved(launch) == [16]
