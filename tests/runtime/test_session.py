"""Session in a plain ``python train.py``: resuming, misuse, and what counts as a step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from forked_script import imported, python

from ftrain.checkpoint.lock import held_versions

HEAD = """
import os, sys, time, warnings
import torch
import ftrain
from torch.utils.data import DataLoader
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
data = DataLoader(torch.randn(30, 4), batch_size=4, shuffle=True)
"""

LOOP = """
session = ftrain.Session(
    model=model, optimizer=optimizer, scheduler=scheduler, data=data, total_steps=TOTAL)
for step, batch in session.steps():
    loss = model(batch).pow(2).mean()
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    session.log(loss=loss)
    EXTRA
print("end", session.step)
"""


def run(folder: Path, body: str, *, head: str = HEAD, check: bool = True) -> CompletedProcess[str]:
    script = folder / "job.py"
    script.write_text(head + body)
    done = python(folder, str(script))
    assert not check or done.returncode == 0, done.stderr
    return done


def loop(total: int = 20, extra: str = "pass") -> str:
    return LOOP.replace("TOTAL", str(total)).replace("EXTRA", extra)


def losses(folder: Path) -> dict[int, float]:
    """Step to loss; a step that was done twice must have the same loss twice."""
    found: dict[int, float] = {}
    for line in (folder / "ftrain-runs/job/steps/rank0.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        if record["kind"] == "step":
            assert found.setdefault(record["step"], record["loss"]) == record["loss"]
    return found


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """The process that scripts are forked from."""
    with imported("ftrain", "torch._dynamo"):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert "end 20" in run(folder, loop()).stdout
    return losses(folder)


def test_a_killed_run_goes_on_from_its_saved_version(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    extra = "session.save() if step == 7 else None; step == 11 and os.kill(os.getpid(), 9)"
    killed = run(tmp_path, loop(extra=extra), check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tmp_path, loop())
    assert "end 20" in resumed.stdout
    assert losses(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak)],
)
def test_a_signal_saves_and_the_next_run_goes_on(
    tmp_path: Path, undisturbed: dict[int, float], number: signal.Signals
) -> None:
    extra = f"step == 9 and os.kill(os.getpid(), {int(number)})"
    stopped = run(tmp_path, loop(extra=extra), check=False)
    assert stopped.returncode == 75
    assert "run me again" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    run(tmp_path, loop())
    assert losses(tmp_path) == undisturbed


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    run(tmp_path, loop(5))
    again = run(tmp_path, loop(5))
    assert "end 5" in again.stdout
    assert len(losses(tmp_path)) == 5


def test_a_damaged_version_is_passed_over_for_an_older_one(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    extra = "step in (4, 9) and session.save(); step == 11 and os._exit(1)"
    run(tmp_path, loop(extra=extra), check=False)
    newest = tmp_path / "ftrain-runs/job/checkpoints/1/10/rank0.seg"
    data = bytearray(newest.read_bytes())
    data[-2000] ^= 1
    newest.write_bytes(data)
    resumed = run(tmp_path, loop())
    assert "step 10 is not used" in resumed.stderr
    assert "resumes at step 5 from " in resumed.stderr
    assert losses(tmp_path) == undisturbed


def test_a_version_is_saved_although_an_older_one_cannot_be_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "ftrain-runs/job/checkpoints/1"
    extra = (
        f"step in (4, 9) and session.save(); step == 15 and os.mkdir({f'{folder}/5/rank9.seg'!r})"
    )
    done = run(tmp_path, loop(extra=extra))
    assert "old versions can't be deleted" in done.stderr
    assert "not published" not in done.stderr
    assert (folder / "20.json").exists()


def test_versions_of_which_none_can_be_used_are_no_silent_beginning(tmp_path: Path) -> None:
    run(
        tmp_path,
        loop(extra="step in (4, 9) and session.save(); step == 11 and os._exit(1)"),
        check=False,
    )
    folder = tmp_path / "ftrain-runs/job/checkpoints/1"
    for step in (5, 10):
        (folder / f"{step}/rank0.seg").unlink()
    again = run(tmp_path, loop(12), check=False)
    assert again.returncode == 1
    (line,) = (line for line in again.stderr.splitlines() if "can be used" in line)
    assert f"no version in {folder.parent} can be used" in line
    assert "1/10/rank0.seg is missing, and 1 more): put back what " in line
    assert line.endswith(f", or move {folder.parent} away to begin at step 0")
    folder.parent.rename(tmp_path / "away")
    assert "end 12" in run(tmp_path, loop(12)).stdout


def test_another_models_run_directory_is_refused_in_one_sentence(tmp_path: Path) -> None:
    run(tmp_path, loop(3))
    other = run(tmp_path, loop(5), head=HEAD.replace("16", "17"), check=False)
    assert other.returncode == 1
    assert "use another run directory for another model" in other.stderr


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("ftrain.Session(model=model, optimizer=optimizer, thing=object())", "has no state_dict"),
        ("ftrain.Session(model=object(), optimizer=optimizer)", "expected a torch Module"),
        (
            "a = ftrain.Session(model=model, optimizer=optimizer)\n"
            "b = ftrain.Session(model=model, optimizer=optimizer)",
            "already has a Session",
        ),
        (
            "s = ftrain.Session(model=model, optimizer=optimizer, total_steps=9)\n"
            "for _ in s.steps():\n  for _ in s.steps(): pass",
            "already being iterated",
        ),
    ],
)
def test_misuse_gets_one_clear_sentence(tmp_path: Path, body: str, sentence: str) -> None:
    failed = run(tmp_path, body, check=False)
    assert failed.returncode != 0
    assert sentence in failed.stderr.strip().splitlines()[-1]


def test_a_run_directory_that_can_not_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "ftrain-runs").write_text("")
    failed = run(tmp_path, loop(3), check=False)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert "can't be written (" in last
    assert "run the script in another directory" in last
    assert failed.stderr.count("Traceback") == 1


def test_an_optimizer_that_is_never_stepped_is_said(tmp_path: Path) -> None:
    body = loop(6).replace("    optimizer.step()\n", "").replace("    scheduler.step()\n", "")
    assert "no registered optimizer was stepped" in run(tmp_path, body).stderr


ACCUMULATE = """
session = ftrain.Session(model=model, optimizer=optimizer, scheduler=scheduler, data=data,
                         total_steps=20)
for step, batch in session.steps():
    loss = model(batch).pow(2).mean() / 3
    loss.backward()
    if step % 3 == 2:
        optimizer.step(); scheduler.step(); optimizer.zero_grad()
    session.log(loss=loss)
    EXTRA
"""


def test_accumulation_goes_back_to_its_first_micro_batch(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(whole, ACCUMULATE.replace("EXTRA", "pass"))
    extra = "step == 8 and session.save(); step == 13 and os._exit(1)"
    run(broken, ACCUMULATE.replace("EXTRA", extra), check=False)
    run(broken, ACCUMULATE.replace("EXTRA", "pass"))
    assert losses(broken) == losses(whole)
    assert set(losses(broken)) == set(range(20))


def test_closures_several_optimizers_and_clipping(tmp_path: Path) -> None:
    head = HEAD.replace(
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)",
        "optimizer = torch.optim.LBFGS(model[0].parameters(), lr=0.1, max_iter=3)\n"
        "second = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)",
    ).replace("torch.nn.Dropout(0.2)", "torch.nn.Tanh()")
    body = """
session = ftrain.Session(model=model, optimizer=[optimizer, second], data=data, total_steps=12)
for step, batch in session.steps():
    def closure():
        optimizer.zero_grad(); second.zero_grad()
        loss = model(batch).pow(2).mean()
        loss.backward()
        return loss
    loss = optimizer.step(closure)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    second.step()
    session.log(loss=loss)
    EXTRA
"""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(whole, body.replace("EXTRA", "pass"), head=head)
    extra = "step == 4 and session.save(); step == 6 and os._exit(1)"
    run(broken, body.replace("EXTRA", extra), head=head, check=False)
    run(broken, body.replace("EXTRA", "pass"), head=head)
    assert losses(broken) == losses(whole)


def test_a_step_that_the_scaler_skips_still_is_a_step(tmp_path: Path) -> None:
    body = """
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
session = ftrain.Session(model=model, optimizer=optimizer, scaler=scaler, data=data,
                         total_steps=16)
for step, batch in session.steps():
    loss = model(batch).pow(2).mean()
    if step in (5, 6):
        loss = loss * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer); scaler.update(); optimizer.zero_grad()
    session.log(loss=loss.nan_to_num(0, 0, 0), scale=scaler.get_scale())
    EXTRA
"""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(whole, body.replace("EXTRA", "pass"))
    extra = "step == 6 and session.save(); step == 9 and os._exit(1)"
    run(broken, body.replace("EXTRA", extra), check=False)
    run(broken, body.replace("EXTRA", "pass"))
    assert losses(broken) == losses(whole)
    assert os.path.exists(broken / "ftrain-runs/job/checkpoints/1/7.json")


OPEN_ENDED = """
session = ftrain.Session(model=model, optimizer=optimizer, data=data)
for step, batch in session.steps():
    EARLY
    loss = model(batch).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    session.log(loss=loss)
    LATE
print("end", session.step)
"""


def saved_steps(folder: Path) -> list[int]:
    """The steps of the durable versions."""
    found = (folder / "ftrain-runs/job/checkpoints").glob("*/[0-9]*.json")
    return sorted(int(manifest.stem) for manifest in found)


def test_the_end_of_the_data_is_saved(tmp_path: Path) -> None:
    body = OPEN_ENDED.replace("EARLY", "pass").replace("LATE", "pass")
    assert "end 8" in run(tmp_path, body).stdout
    assert saved_steps(tmp_path) == [8]
    again = run(tmp_path, body)
    assert "end 8" in again.stdout
    assert len(losses(tmp_path)) == 8


@pytest.mark.parametrize(
    "leave", ["break", pytest.param("raise ValueError", marks=pytest.mark.soak)]
)
def test_nothing_is_saved_of_a_loop_that_was_left(tmp_path: Path, leave: str) -> None:
    """The body may have changed anything before it was left."""
    early = f"if step == 5:\n        model.weight.data.zero_()\n        {leave}"
    body = OPEN_ENDED.replace("EARLY", early).replace("LATE", "pass")
    run(tmp_path, body, check=False)
    assert saved_steps(tmp_path) == []
    again = run(tmp_path, OPEN_ENDED.replace("EARLY", "pass").replace("LATE", "pass"))
    assert "end 8" in again.stdout
    assert sorted(losses(tmp_path)) == list(range(8))


def test_one_process_at_a_time_saves_into_a_directory(tmp_path: Path) -> None:
    """Each of two would hide what the other one saves."""
    versions = tmp_path / "ftrain-runs/job/checkpoints"
    with held_versions(versions, "do something else"):
        second = run(tmp_path, loop(), check=False)
    assert second.returncode != 0
    assert f"{versions} is in use by another process (pid {os.getpid()})" in second.stderr
    assert "end 20" in run(tmp_path, loop()).stdout
