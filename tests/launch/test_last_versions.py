"""However a run ends, its end is durable: a stop, the end of the data, a break, a late stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from launching import Launch, launched, wait_for

pytestmark = pytest.mark.slow

STEPS = """
import os, sys, time, torch, ftrain
import torch.distributed as dist

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
data = torch.utils.data.DataLoader(torch.ones(60, 4), batch_size=2)
session = ftrain.Session(model=model, optimizer=optimizer, data=data, total_steps=TOTAL)
for step, batch in session.steps():
    EARLY
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(0.02)
LATE
print("trained to step", session.step)
dist.destroy_process_group()
"""
TWO = ("--nproc-per-node", "2")


def script(total: str = "None", early: str = "pass", late: str = "") -> str:
    return STEPS.replace("TOTAL", total).replace("EARLY", early).replace("LATE", late)


def saved(launch: Launch) -> list[int]:
    """The steps of the durable versions."""
    found = (launch.run_dir / "checkpoints").glob("*/[0-9]*.json")
    return sorted(int(manifest.stem) for manifest in found)


@pytest.mark.soak
def test_a_stop_without_snapshots_in_memory_saves(tmp_path: Path) -> None:
    with launched(tmp_path, script("200"), *TWO, "snapshot=off") as launch:
        wait_for(lambda: launch.steps)
        launch.popen.send_signal(signal.SIGTERM)
        assert launch.wait() == 75, launch.shown
        (step,) = saved(launch)
        assert f"with step {step} saved" in launch.shown
        assert "trained" not in launch.shown
    again = Launch(tmp_path, *TWO, "snapshot=off")
    assert again.wait() == 0, again.shown
    assert again.shown.count("trained to step 200") == 2
    assert saved(again) == [step, 200]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.soak) for n in (signal.SIGUSR1, signal.SIGINT)),
    ],
)
def test_a_stop_signal_to_every_process_saves(tmp_path: Path, number: signal.Signals) -> None:
    """As systemd and SLURM send it: nobody who is needed for saving dies of it."""
    store = f"checkpoint.remote={(tmp_path / 'mounted').as_uri()}"
    options = ("checkpoint.durable_every_s=1", "checkpoint.remote_every_s=0.1")
    with launched(tmp_path, script("2000"), *TWO, store, *options) as launch:
        wait_for(lambda: saved(launch))
        launch.pid_of("ftrain.checkpoint.remote.worker")
        for pid in (*launch.processes(), launch.popen.pid):
            os.kill(pid, number)
        assert launch.wait() == 75, launch.shown
        assert f"with step {saved(launch)[-1]} saved" in launch.shown
        events = (launch.run_dir / "events.jsonl").read_text()
        assert events.count('"kind":"launch"') == 1  # one coordinator
        assert "the snapshot manager ended" not in events


def test_a_wish_to_save_without_snapshots_in_memory_is_done_by_the_ranks(tmp_path: Path) -> None:
    early = "session.save() if step == 3 else None"
    with launched(tmp_path, script("30", early), *TWO, "snapshot=off") as launch:
        assert launch.wait() == 0, launch.shown
        assert len(saved(launch)) == 2
        assert saved(launch)[1] == 30
        assert "no durable version" not in launch.shown


@pytest.mark.parametrize(
    "snapshot", [pytest.param("snapshot.every_steps=4", marks=pytest.mark.soak), "snapshot=off"]
)
def test_the_end_of_the_data_is_durable(tmp_path: Path, snapshot: str) -> None:
    with launched(tmp_path, script(), *TWO, snapshot) as launch:
        assert launch.wait() == 0, launch.shown
        assert "trained to step 30" in launch.shown
        assert saved(launch) == [30]


def test_the_boundary_before_a_break_is_durable(tmp_path: Path) -> None:
    early = "if step == 10: break"
    with launched(tmp_path, script(early=early), *TWO) as launch:
        assert launch.wait() == 0, launch.shown
        assert "trained to step 10" in launch.shown
        assert saved(launch) == [10]


def test_after_a_break_the_newest_version_that_was_kept_counts(tmp_path: Path) -> None:
    early = "if step == 10: break"
    with launched(tmp_path, script(early=early), *TWO, "snapshot.every_steps=4") as launch:
        assert launch.wait() == 0, launch.shown
        assert saved(launch) == [8]


def test_a_stop_in_the_last_evaluation_leaves_the_end_durable(tmp_path: Path) -> None:
    late = """
open(f"evaluating{os.environ['RANK']}", "w").close()
while not os.path.exists("evaluated"):
    time.sleep(0.01)
"""
    with launched(tmp_path, script("5", late=late), *TWO) as launch:
        wait_for(lambda: all((tmp_path / f"evaluating{rank}").exists() for rank in range(2)))
        launch.popen.send_signal(signal.SIGTERM)
        wait_for(lambda: "all ranks end at boundary 5" in events(launch))
        (tmp_path / "evaluated").touch()
        assert launch.wait() == 0, launch.shown
        assert "trained to step 5" in launch.shown
        assert saved(launch) == [5]


def events(launch: Launch) -> str:
    return (launch.run_dir / "events.jsonl").read_text()
