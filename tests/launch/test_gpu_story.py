"""A rank that trains on a GPU is killed: the same numbers as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import Launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Two ranks share one GPU, which NCCL refuses.
SCRIPT = """
import hashlib, os, torch, ftrain
from torch import distributed as dist, nn

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
torch.use_deterministic_algorithms(True)
dist.init_process_group("gloo")
torch.cuda.set_device(0)
torch.manual_seed(1)
model = nn.Sequential(
    nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.GELU(), nn.Dropout(0.1), nn.Linear(2048, 8)
).cuda()
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
session = ftrain.Session(model=wrapped, optimizer=optimizer, total_steps=60)
for step in session.steps():
    batch = torch.randn(64, 512, device="cuda")
    wrapped(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
digest = hashlib.sha256()
for tensor in model.state_dict().values():
    digest.update(tensor.cpu().numpy().tobytes())
print("weights", dist.get_rank(), digest.hexdigest())
"""


def weights(folder: Path, *tokens: str) -> tuple[list[str], str]:
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    launch = Launch(folder, "--nproc-per-node", "2", *tokens)
    assert launch.wait(110) == 0, launch.shown
    lines = launch.shown.splitlines()
    return sorted(line.partition("weights")[2] for line in lines if "weights" in line), launch.shown


@pytest.mark.timeout(240)
def test_killed_and_resumed_with_the_same_weights(tmp_path: Path) -> None:
    undisturbed, _ = weights(tmp_path / "undisturbed")
    disturbed, shown = weights(tmp_path / "disturbed", "faults=kill_rank", "faults.at_step=30")
    assert len(undisturbed) == 2
    assert disturbed == undisturbed
    assert "from memory" in shown
