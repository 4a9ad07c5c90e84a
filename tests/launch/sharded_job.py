"""A job whose nodes have nothing in common (FSDP2), and launches of it that lose nodes.

Every rank writes its losses, bit by bit; each rank's own samples come from the step alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftrain.comms.events import read_events

SOURCE = """
import os, sys, time
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import ftrain

steps, width, pause_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(32, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh(),
    torch.nn.Linear(width, 8),
)
for layer in model:
    if isinstance(layer, torch.nn.Linear):
        fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=steps)
with open(f"losses-{rank}", "a") as out:
    for step, _ in session.steps():
        draw = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(16, 32, generator=draw)
        loss = model(x).square().mean() + (model(x)[:, 0] - x[:, 0]).square().mean()
        loss.backward()
        time.sleep(pause_s)
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss)
        print(step, loss.item().hex(), file=out, flush=True)
"""


class ShardedRun:
    """One launch in a folder of its own, to its end."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        nodes: int = 4,
        steps: int = 60,
        width: int = 64,
        pause_s: float = 0.0,
        timeout_s: float = 120,
    ) -> None:
        folder.mkdir()
        (folder / "train.py").write_text(SOURCE)
        self.folder, self.nodes, self.steps = folder, nodes, steps
        command = [sys.executable, "-m", "ftrain.launch.cli", "launch", "--run-dir", "run"]
        place = [f"--local-nodes={nodes}", "--nproc-per-node=1"]
        script = ["train.py", str(steps), str(width), str(pause_s)]
        done = subprocess.run(
            [*command, *place, *options, *script],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.code, self.shown = done.returncode, done.stdout + done.stderr

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        events = read_events(self.folder / "run" / "events.jsonl")
        return [event for event in events if event["kind"] == kind]

    def losses(self) -> dict[int, list[str]]:
        """The last word of each rank about each step."""
        return read_losses([self.folder], self.nodes, self.steps)

    def require_equal(self, undisturbed: ShardedRun) -> None:
        """Ended well, with every loss as in a run that nothing happened to."""
        assert self.code == 0, self.shown
        assert undisturbed.code == 0, undisturbed.shown
        assert self.losses() == undisturbed.losses()


def read_losses(folders: Sequence[Path], ranks: int, steps: int) -> dict[int, list[str]]:
    """The last word of each rank about each step, wherever it was said; later folders win."""
    found = {}
    for rank in range(ranks):
        files = [folder / f"losses-{rank}" for folder in folders]
        lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
        words = dict(line.split() for line in lines)
        found[rank] = [words[str(step)] for step in range(steps)]
    return found


def recomputed(incidents: Sequence[dict[str, Any]]) -> list[int]:
    """Steps that each incident cost."""
    return [incident["steps_recomputed"] for incident in incidents]
