"""FSDP2 modules show other parameters while they are unsharded; versions hold the shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from ftrain.runtime.state import TrainingState


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainingState({"model": model}, {"optimizer": optimizer}, {}, rank)
    before = {t.name: t.tensor.data_ptr() for t in state.layout().tensors}
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(torch.ones(2, 4))  # an evaluation, which no backward follows
    unsharded = sum(not isinstance(p, DTensor) for p in model.parameters())
    after = {t.name: t.tensor.data_ptr() for t in state.layout().tensors}
    shapes = {t.name: list(t.tensor.shape) for t in state.layout().tensors}
    with open(f"{folder}/{rank}.json", "w") as out:
        json.dump([unsharded, before, after, shapes], out)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=2)
"""


@pytest.mark.soak
def test_an_evaluation_after_the_first_step_does_not_hide_the_shards(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=100)
    for rank in range(2):
        unsharded, before, after, shapes = json.loads((tmp_path / f"{rank}.json").read_text())
        assert unsharded > 0  # else this says nothing
        assert {name: after[name] for name in before} == before
        assert shapes["model/0.weight"] == [4, 4]
        assert len(after) == 4 + 4 * 3
        assert shapes["optimizer/model/0.weight/exp_avg"] == [4, 4]
