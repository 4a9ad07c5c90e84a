"""A launch that begins with weights from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import launched

from ftrain.checkpoint.durable import DurableStore
from ftrain.launch.cli import main

SOURCE = """
import torch, torch.distributed as dist, ftrain
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(3)
model = DistributedDataParallel(torch.nn.Linear(4, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=3)
assert session.step == 0
for step, _ in session.steps():
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_every_rank_of_a_launch_begins_with_what_was_imported(tmp_path: Path) -> None:
    weights = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.tensor([1.5, -2.0, 0.25])}
    torch.save(weights, tmp_path / "model.pt")
    run = str(tmp_path / "run")
    assert main(["checkpoints", "import", "--from", "torch", str(tmp_path / "model.pt"), run]) == 0
    with launched(tmp_path, SOURCE, "--nproc-per-node", "2") as launch:
        assert launch.wait(100) == 0, launch.shown
    assert launch.shown.count("model begins as imported from") == 1
    assert "resumes at step 0 from the durable version" in launch.shown
    versions = DurableStore(tmp_path / "run/checkpoints").versions()
    assert [version.step for version in versions] == [3, 0]
    out = str(tmp_path / "out.pt")
    assert main(["checkpoints", "export", "--to", "torch", run, out]) == 0
    found = torch.load(out, weights_only=True)  # learnt with a rate of 0
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
