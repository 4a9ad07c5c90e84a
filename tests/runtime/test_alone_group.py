"""Ranks without a launcher agree among themselves, and seldom."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from forked_script import imported, python

from ftrain.runtime.alone import Looks

SCRIPT = """
import os, signal, sys, time
import torch, torch.distributed as dist
import ftrain
from ftrain.runtime.heartbeat import collectives_enqueued
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=300)
for step, _ in session.steps():
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(0.01)
    if sys.argv[2] == "stop" and step == 100 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if sys.argv[2] == "save" and step == 100 and rank == 0:
        session.save()
print(session.step, collectives_enqueued())
"""


def together(folder: Path, meet: str, what: str) -> list[tuple[int, str, str]]:
    """Both ranks' exit codes and what they printed."""
    (folder / "job.py").write_text(SCRIPT)
    ranks = [
        subprocess.Popen(
            [sys.executable, "job.py", str(folder / meet), what],
            cwd=folder,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100) for process in ranks]
    codes = [process.returncode for process in ranks]
    return [(code, out, err) for code, (out, err) in zip(codes, said, strict=True)]


def steps_saved(folder: Path) -> list[int]:
    found = (folder / "ftrain-runs/job/checkpoints").glob("*/[0-9]*.json")
    return sorted(int(manifest.stem) for manifest in found)


@pytest.mark.soak
def test_a_stop_of_one_rank_stops_all_at_one_boundary_and_the_next_run_goes_on(
    tmp_path: Path,
) -> None:
    stopped = together(tmp_path, "first", "stop")
    assert [code for code, _, _ in stopped] == [75, 75], stopped
    (step,) = steps_saved(tmp_path)
    assert 100 < step <= 100 + 2 * 64
    assert all(f"saved step {step} in" in err for _, _, err in stopped)
    went_on = together(tmp_path, "second", "run")
    assert [code for code, _, _ in went_on] == [0, 0], went_on
    assert steps_saved(tmp_path) == [step, 300]


def test_ranks_ask_each_other_about_once_in_a_second_and_a_wish_of_one_is_heard(
    tmp_path: Path,
) -> None:
    ended = together(tmp_path, "meet", "save")
    assert [code for code, _, _ in ended] == [0, 0], ended
    first, last = steps_saved(tmp_path)
    assert 100 < first <= 100 + 2 * 64
    assert last == 300
    for _, out, _ in ended:
        step, collectives = (int(word) for word in out.split())
        assert step == 300
        assert collectives < 30  # of which 2 a version


def test_looks_become_rarer_and_never_rarer_than_their_limit() -> None:
    looks = Looks(10.0)
    at, step, asked = 0.0, 0, []
    for step in range(1, 2000):
        at += 0.001
        if looks.due(step):
            asked.append(step)
            looks.agree(step, looks.proposal(step, at))
    gaps = [after - before for before, after in pairwise(asked)]
    assert gaps[:6] == [1, 2, 4, 8, 16, 32]
    assert max(gaps) == 64
    at += 50.0  # one slow step, and it is asked at the next ones again
    looks.agree(step, looks.proposal(step, at))
    assert looks.due(step + 2)


BEGUN_WITH_AN_IMPORT = """
import torch, ftrain
model = torch.nn.Linear(400, 400)
optimizer = torch.optim.AdamW(model.parameters())
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=3)
print("from step", session.step, len(optimizer.state))
for step, _ in session.steps():
    model(torch.ones(2, 400)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_an_import_is_not_mixed_with_what_a_damaged_version_left(tmp_path: Path) -> None:
    """Its optimizer begins anew, which it can't in a process that read half of another version."""
    (tmp_path / "job.py").write_text(BEGUN_WITH_AN_IMPORT)
    tensors = {"weight": torch.ones(400, 400), "bias": torch.zeros(400)}
    torch.save(tensors, tmp_path / "model.pt")
    checkpoints = tmp_path / "ftrain-runs/job"
    words = ("checkpoints", "import", "--from", "torch", str(tmp_path / "model.pt"))
    subprocess.run([sys.executable, "-m", "ftrain.launch.cli", *words, checkpoints], check=True)

    with imported("ftrain", "torch._dynamo"):
        _import_and_damage(tmp_path, checkpoints)


def _import_and_damage(tmp_path: Path, checkpoints: Path) -> None:
    def run() -> CompletedProcess[str]:
        return python(tmp_path, "job.py")

    assert "from step 0 0" in run().stdout
    assert steps_saved(tmp_path) == [0, 3]
    (newest,) = (path for path in checkpoints.rglob("3.json"))
    segment = max(newest.with_suffix("").glob("*.seg"), key=lambda path: path.stat().st_size)
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    again = run()
    assert again.returncode == 1
    assert f"to begin anew with that, move {newest} away" in again.stderr
    newest.unlink()
    assert "from step 0 0" in run().stdout
