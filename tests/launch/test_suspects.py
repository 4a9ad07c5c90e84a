"""A version after whose restore the loss is NaN gives way to an older one, and no script is driven
round in circles because its loss is NaN for reasons of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from launching import Launch, launched, wait_for

from ftrain.comms.events import read_events

pytestmark = pytest.mark.slow

# ``Scale`` is sound while the ranks live; in the first formation what is saved of it may not be.
SCRIPT = """
import os, signal, time, torch, ftrain
import torch.distributed as dist

restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
first = restart == 0
step = 0

class Scale:
    value = 1.0
    def state_dict(self):
        return {"value": float("nan") if first and step >= POISON_AT else self.value}
    def load_state_dict(self, state):
        self.value = state["value"]

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
scale = Scale()
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=40, scale=scale)
begun = session.step
for step, _ in session.steps():
    loss = model(torch.ones(2, 4)).square().mean() * scale.value
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    odd = step in NAN_AT or (not first and session.step == begun + NAN_AFTER)
    session.log(loss=float("nan") if odd else loss)
    time.sleep(0.02)
    while first and step == 21 and open("run/events.jsonl").read().count('"published"') < PUBLISHED:
        time.sleep(0.02)
    while step == HOLD_AT and restart == 3 and not os.path.exists("go-on"):
        time.sleep(0.02)
    if step == HOLD_AT and restart == 3 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
print("trained to step", session.step, "with a loss of", float(loss))
dist.destroy_process_group()
"""


def script(
    *,
    poison_at: int = 99,
    nan_at: tuple[int, ...] = (),
    nan_after: int = 99,
    published: int = 0,
    hold_at: int = 99,
) -> str:
    settings: dict[str, object] = {"POISON_AT": poison_at, "NAN_AT": nan_at}
    settings |= {"NAN_AFTER": nan_after, "PUBLISHED": published, "HOLD_AT": hold_at}
    text = SCRIPT
    for name, value in settings.items():
        text = text.replace(name, repr(value))
    return text


KILLED = ("--nproc-per-node", "2", "faults=kill_rank", "faults.at_step=22", "faults.rank=1")


def restored(launch: Launch) -> list[tuple[str, int, bool]]:
    """What each formation restored: level, step, trusted."""
    plans = [e["formation"]["restore"] for e in events(launch, "formation")]
    return [(p["level"], p["version"]["step"] if p["version"] else 0, p["trusted"]) for p in plans]


def events(launch: Launch, kind: str) -> list[dict[str, Any]]:
    return [
        event for event in read_events(launch.run_dir / "events.jsonl") if event["kind"] == kind
    ]


def last_loss(launch: Launch) -> float:
    lines = (launch.run_dir / "steps" / "rank0.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    return math.nan if steps[-1]["loss"] is None else float(steps[-1]["loss"])


def test_poisoned_versions_give_way_to_an_older_one(tmp_path: Path) -> None:
    source = script(poison_at=19, published=2)  # the version of step 20 is the first bad one
    options = (*KILLED, "checkpoint.durable_every_steps=10", "launch.max_restarts=1")
    with launched(tmp_path, source, *options) as launch:
        assert launch.wait() == 0, launch.shown
        shown = launch.shown
    levels = restored(launch)
    assert levels[0] == ("fresh", 0, False)
    assert levels[-1] == ("durable", 10, False)
    assert levels[1][0] == "memory"
    steps = [step for _, step, _ in levels[1:-1]]  # down to 20 in memory, or its file
    assert steps == sorted(set(steps), reverse=True)
    assert steps[-1] >= 20
    assert shown.count("an older version is tried: the loss is nan") == len(levels) - 2
    assert "step 22 was restored: that version is suspected\n" in shown
    assert "can be used" not in shown
    assert "no loss makes a version suspect" not in shown
    (incident,) = events(launch, "incident")
    assert {failure["kind"] for failure in incident["failures"]} >= {"signal", "loss"}
    assert math.isfinite(last_loss(launch))
    assert "trained to step 40" in shown


def test_a_script_whose_loss_is_nan_at_one_step_goes_on(tmp_path: Path) -> None:
    source = script(nan_at=(25,), published=1)
    options = (*KILLED, "checkpoint.durable_every_steps=20", "launch.max_restarts=1")
    with launched(tmp_path, source, *options) as launch:
        assert launch.wait() == 0, launch.shown
        shown = launch.shown
    levels = restored(launch)
    assert [level for level, _, _ in levels] == ["fresh", "memory", "durable", "memory"]
    assert levels[2] == ("durable", 20, False)
    assert levels[3] == ("memory", 25, True)
    assert shown.count("the loss is bad at step 26 again, with an older version") == 1
    assert "trained to step 40" in shown


def test_what_was_settled_outlives_the_coordinator(tmp_path: Path) -> None:
    source = script(nan_at=(25, 31), published=1, hold_at=29)
    options = (*KILLED, "checkpoint.durable_every_steps=20", "launch.max_restarts=1")
    with launched(tmp_path, source, *options) as launch:
        wait_for(lambda: events(launch, "formation") and restored(launch)[-1][2])
        launch.kill("ftrain.launch.coordinator")
        wait_for(lambda: len(events(launch, "launch")) == 2)
        (tmp_path / "go-on").touch()
        assert launch.wait() == 0, launch.shown
        shown = launch.shown
    assert [trusted for _, _, trusted in restored(launch)] == [False] * 3 + [True] * 2
    assert shown.count("an older version is tried") == 1
    assert "trained to step 40" in shown


def test_without_an_older_version_training_does_not_begin_anew(tmp_path: Path) -> None:
    source = script(nan_after=2)  # never at the same step again
    with launched(tmp_path, source, *KILLED, "launch.max_restarts=1") as launch:
        assert launch.wait() == 0, launch.shown
        shown = launch.shown
    levels = restored(launch)
    assert {level for level, _, _ in levels[1:]} == {"memory"}
    assert [trusted for _, _, trusted in levels] == [False] * (len(levels) - 1) + [True]
    assert len(levels) <= 6
    assert levels[-1][1] >= levels[-2][1]
    assert shown.count("no older version is left") == 1
    assert "trained to step 40" in shown


@pytest.mark.parametrize("option", ["", "detection.suspect_steps=0"])
def test_a_script_whose_loss_was_nan_before_the_version_is_not_suspected(
    tmp_path: Path, option: str
) -> None:
    nan_at = tuple(range(23, 40)) if option else tuple(range(3, 40))
    options = [*KILLED, option] if option else KILLED
    with launched(tmp_path, script(nan_at=nan_at), *options) as launch:
        assert launch.wait() == 0, launch.shown
        shown = launch.shown
    assert len(restored(launch)) == 2
    assert "suspect" not in shown
