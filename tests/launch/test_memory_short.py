"""Snapshots that do not fit: refused from the start, one warning when they outgrow their share."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launched

from ftrain.comms.process import available_memory_bytes

pytestmark = pytest.mark.slow

TRAIN = """
import os, torch, ftrain
import torch.distributed as dist

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(WIDTH, 8))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=20)
for step, _ in session.steps():
    optimizer.zero_grad()
    model(torch.ones(2, WIDTH)).square().mean().backward()
    optimizer.step()
print("trained to step", session.step)
"""
TWO = ("--nproc-per-node", "2")


def test_a_launch_whose_snapshots_do_not_fit_is_refused(tmp_path: Path) -> None:
    options = (*TWO, "snapshot.memory_share_max=0.000001")
    with launched(tmp_path, TRAIN.replace("WIDTH", "4"), *options) as launch:
        assert launch.wait() == 2, launch.shown
        assert launch.gone_after(0)
    said = [line for line in launch.shown.splitlines() if line.startswith("ftrain: ")]
    assert said.pop(0).startswith("ftrain: run directory ")
    assert len(said) == 1
    for word in ("MiB", "snapshot.slots", "snapshot.memory_share_max", "snapshot=off"):
        assert word in said[0]
    assert "0.00" not in said[0]
    assert "trained" not in launch.shown


def test_snapshots_that_outgrow_their_share_are_warned_about_once(tmp_path: Path) -> None:
    # Each of 2 ranks keeps half of the state in each of 3 slots, 1.9 MB of weights and 3.8 MB of
    # Adam's two moments: what the first one makes room for leaves enough for the other one's
    # weights, but not for its moments too.
    weights_bytes = 40_000 * 8 * 4
    share = 2 * 3 * 1.4 * weights_bytes / available_memory_bytes()
    options = (*TWO, f"snapshot.memory_share_max={share:.9f}")
    with launched(tmp_path, TRAIN.replace("WIDTH", "40_000"), *options) as launch:
        assert launch.wait() == 1, launch.shown
    assert launch.shown.count("trained to step 20") == 2
    assert launch.shown.count("training goes on without new snapshots") == 1
    assert "capture.py" not in launch.shown
    assert "the end of the run, step 20, is not durable" in launch.shown
