"""A restarted DDP group computes the undisturbed run's numbers from its first step on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftrain.runtime import ddp

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from ftrain.runtime import ddp


def run(rank, world, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)

    def train(first, last, state, order):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(150, 150) for _ in range(7)])
        module = DistributedDataParallel(model, bucket_cap_mb=0.2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if state:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        if order is not None:
            assert ddp.restore_buckets(module, order)
        sums, kept = [], None
        for step in range(first, last):
            x = torch.randn(8, 150, generator=torch.Generator().manual_seed(step * 10 + rank))
            module(x).pow(2).mean().backward()
            sums.append([p.grad.double().mul(torch.arange(p.numel()).view_as(p)).sum().item()
                         for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                order = ddp.settle_buckets(module)
            if step == 1:
                kept = [{k: v.clone() for k, v in model.state_dict().items()},
                        torch.optim.AdamW.state_dict(optimizer), order]
                kept[1] = {"param_groups": kept[1]["param_groups"],
                           "state": {k: {n: t.clone() for n, t in v.items()}
                                     for k, v in kept[1]["state"].items()}}
        return sums, kept

    whole, kept = train(0, 5, None, None)
    same, _ = train(2, 5, kept, kept[2])
    plain, _ = train(2, 5, kept, None)
    if rank == 0:
        json.dump({"kept": same == whole[2:], "plain": plain == whole[2:]}, open(sys.argv[2], "w"))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, (4, sys.argv[1]), nprocs=4)
"""


@pytest.mark.slow
def test_four_ranks_resume_bit_exactly_with_the_kept_layout_and_not_without(
    tmp_path: Path,
) -> None:
    script = tmp_path / "buckets.py"
    script.write_text(SCRIPT)
    result = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rendezvous"), str(result)],
        check=True,
        timeout=100,
    )
    assert json.loads(result.read_text()) == {"kept": True, "plain": False}


def test_this_torch_has_the_private_names() -> None:
    assert ddp.supported()


LATE = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import ftrain

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
parts = {name: DistributedDataParallel(torch.nn.Linear(4, 4)) for name in ("g", "critic")}
optimizers = {name: torch.optim.AdamW(part.parameters()) for name, part in parts.items()}
session = ftrain.Session(model=parts, optimizer=optimizers, total_steps=5)
for step, _ in session.steps():
    name = "g" if step == 3 else "critic"
    parts[name](torch.ones(2, 4)).sum().backward()
    optimizers[name].step()
    print(step, session._bucket_orders, flush=True)
"""


def test_a_module_that_is_first_trained_later_has_its_layout_kept_as_well(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE)
    found = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rendezvous")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    shown = dict(line.split(maxsplit=1) for line in found.stdout.splitlines())
    assert shown["1"].startswith("[None, [")
    assert shown["4"].startswith("[[")
    assert "None" not in shown["4"]
