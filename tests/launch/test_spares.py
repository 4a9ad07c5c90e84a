"""A waiting node takes the place of one that is lost, with real processes and real kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import Launch, launched, wait_for

from ftrain.comms.errors import UsageError
from ftrain.comms.events import read_events
from ftrain.launch.cli import main
from ftrain.launch.start import launch as start
from ftrain.launch.status import read_status

pytestmark = pytest.mark.slow

TRAINING = """
import hashlib, os, time, torch, ftrain
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)]))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=TOTAL)
for step, _ in session.steps():
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    loss = model(torch.randn(16, 64, generator=generator)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    session.log(loss=loss)
    time.sleep(0.05)
    while step in HOLDS and not os.path.exists(f"go-on-{step}"):
        time.sleep(0.02)
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
print("rank", dist.get_rank(), "weights", hashlib.sha256(weights).hexdigest(), flush=True)
dist.destroy_process_group()
"""


def source(total: int, *holds: int) -> str:
    return TRAINING.replace("TOTAL", str(total)).replace("HOLDS", str(holds))


def events(launch: Launch, kind: str) -> list[dict[str, Any]]:
    path = launch.run_dir / "events.jsonl"
    return [event for event in read_events(path) if event["kind"] == kind]


def seats(launch: Launch) -> list[list[int]]:
    """The nodes of each formation, in rank order."""
    formations = [event["formation"] for event in events(launch, "formation")]
    return [[place["node"] for place in formation["places"]] for formation in formations]


def losses(launch: Launch) -> list[dict[int, float]]:
    """Each rank's loss by step; a step done twice has to have the same one twice."""
    found: list[dict[int, float]] = [{}, {}]
    for rank, mine in enumerate(found):
        for event in read_events(launch.run_dir / "steps" / f"rank{rank}.jsonl"):
            if event["kind"] == "step":
                assert mine.setdefault(event["step"], event["loss"]) == event["loss"]
    return found


def weights(launch: Launch) -> set[str]:
    return {line.split("weights ")[1] for line in launch.shown.splitlines() if "weights " in line}


def stepped(launch: Launch, nodes: tuple[int, int]) -> None:
    """Until the ranks run on these nodes, and the third one waits."""

    def waiting() -> bool:
        if not (launch.run_dir / "events.jsonl").exists():
            return False
        found = read_status(launch.run_dir).nodes
        ranks = {node.node: [r.rank for r in node.ranks if r.step > 0] for node in found}
        (third,) = {0, 1, 2} - set(nodes)
        running = [ranks.get(node) for node in nodes] == [[0], [1]]
        return running and any(node.node == third and node.waits for node in found)

    wait_for(waiting, 40)


def test_spares_take_the_seats_of_lost_nodes_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--local-nodes=2", "--nproc-per-node=1", "detection.node_lease_s=15")
    (tmp_path / "calm").mkdir()
    with launched(tmp_path / "calm", source(60), *size) as calm:
        assert calm.wait() == 0
    # The second blow is for whoever has rank 1 then: the node that took it over.
    faults = "faults.schedule=[{kind:node,at_step:15,node:1},{kind:node,at_step:35,rank:1}]"
    (tmp_path / "rough").mkdir()
    with launched(tmp_path / "rough", source(60, 10, 30, 50), *size, "--spares=1", faults) as rough:
        stepped(rough, (0, 1))
        (rough.folder / "go-on-10").touch()
        stepped(rough, (0, 2))  # node 1 was started again and waits
        capsys.readouterr()
        assert main(["status", str(rough.run_dir)]) == 0
        assert "waits as a spare" in capsys.readouterr().out
        (rough.folder / "go-on-30").touch()
        stepped(rough, (0, 1))
        (rough.folder / "go-on-50").touch()
        assert rough.wait() == 0
    assert seats(rough) == [[0, 1], [0, 2], [0, 1]]
    incidents = events(rough, "incident")
    assert [incident["steps_recomputed"] <= 1 for incident in incidents] == [True, True]
    assert "node 2 takes the place of node 1" in rough.shown
    struck = read_events(rough.run_dir / "faults.jsonl")
    assert [each["node"] for each in struck if each["kind"] == "fault_end"] == [1, 2]
    assert losses(rough) == losses(calm)
    assert weights(rough) == weights(calm)
    assert len(weights(calm)) == 1


def test_a_spare_that_is_lost_disturbs_nobody(tmp_path: Path) -> None:
    size = ("--local-nodes=2", "--nproc-per-node=1", "--spares=1", "detection.node_lease_s=15")
    fault = "faults.schedule=[{kind:node,at_step:5,node:2}]"
    with launched(tmp_path, source(30, 4), *size, fault) as launch:
        stepped(launch, (0, 1))
        (launch.folder / "go-on-4").touch()
        assert launch.wait() == 0
    assert seats(launch) == [[0, 1]]
    assert events(launch, "incident") == []
    struck = read_events(launch.run_dir / "faults.jsonl")
    assert [(e["node"], e["outcome"]) for e in struck if "outcome" in e] == [(2, "ended")]


@pytest.mark.parametrize("options", [("--spares=1",), ("--spares=1", "--nnodes=1")])
def test_spares_of_a_job_of_one_node_are_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    with pytest.raises(UsageError, match="--spares 1 on one node has nothing to spare"):
        start([*options, "--run-dir", str(tmp_path / "run"), str(script)])
    with pytest.raises(UsageError, match="--spares must be a whole number of at least 0"):
        start(["--spares=-1", str(script)])
