"""Which versions become durable, which stay, and how a run goes on from them under a launch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import Launch, launched, wait_for
from test_last_versions import TWO, saved, script

from ftrain.checkpoint.durable import DurableStore

pytestmark = pytest.mark.slow


def published(launch: Launch) -> list[int]:
    """The steps of all versions that became durable, in order."""
    events = launch.run_dir / "events.jsonl"
    text = events.read_text() if events.exists() else ""
    return [int(step) for step in re.findall(r'"text":"step (\d+) is durable"', text)]


def test_every_step_can_be_durable(tmp_path: Path) -> None:
    """At 100 ms a step nothing has to be left out, but for what starting and ending disturb."""
    slow = "time.sleep(0.1)"
    options = ("checkpoint.durable_every_steps=1", "checkpoint.keep_last=3")
    with launched(tmp_path, script("30", slow), *TWO, *options) as launch:
        assert launch.wait() == 0, launch.shown
        steps = published(launch)
        assert steps == sorted(set(steps))
        assert steps[-1] == 30
        assert len(steps) >= 24, steps
        assert saved(launch) == steps[-3:]


def test_versions_of_every_so_many_steps_are_multiples_and_some_stay_for_good(
    tmp_path: Path,
) -> None:
    options = (
        "checkpoint.durable_every_steps=10",
        "checkpoint.keep_last=1",
        "checkpoint.keep_every=40",
    )
    with launched(tmp_path, script("100"), *TWO, *options) as launch:
        assert launch.wait() == 0, launch.shown
        steps = published(launch)
        assert all(step % 10 == 0 for step in steps)
        assert len(steps) >= 5, steps
        firsts = [min(step for step in steps if step // 40 == n) for n in {s // 40 for s in steps}]
        assert saved(launch) == sorted({*firsts, steps[-1]})


@pytest.mark.soak
def test_a_cap_on_writing_slows_saving_and_not_training(tmp_path: Path) -> None:
    source = script("60").replace("torch.nn.Linear(4, 1)", "Wide()")
    source = source.replace(
        "torch.manual_seed(0)",
        "class Wide(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.ones(2_000_000))\n"
        "    def forward(self, x):\n"
        "        return x @ self.weight[:4, None]\n"
        "torch.manual_seed(0)",
    )
    options = ("checkpoint.durable_every_steps=1", "checkpoint.bytes_per_s_max=4e6")
    with launched(tmp_path, source, *TWO, *options) as launch:
        began_s = time.monotonic()
        wait_for(lambda: published(launch), 60)
        assert time.monotonic() - began_s > 1.0  # 8 MB at 4 MB/s on each of one node's two ranks
        assert launch.wait(120) == 0, launch.shown
        assert published(launch)[-1] == 60


@pytest.mark.soak
def test_a_run_goes_on_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    for ranks, total in ((2, 20), (3, 40), (1, 60), (2, 80)):
        with launched(tmp_path, script(str(total)), "--nproc-per-node", str(ranks)) as launch:
            assert launch.wait() == 0, launch.shown
            assert launch.shown.count(f"trained to step {total}") == ranks
            if total > 20:
                assert f"laid over {ranks}" in launch.shown
                assert f"step {total - 20}" in launch.shown
    store = DurableStore(tmp_path / "run" / "checkpoints")
    assert [version.step for version in store.versions()] == [80, 60]


@pytest.mark.soak
def test_versions_of_another_format_are_refused_by_name(tmp_path: Path) -> None:
    with launched(tmp_path, script("10"), *TWO) as launch:
        assert launch.wait() == 0, launch.shown
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("*/10.json")
    content = json.loads(manifest.read_text())
    del content["xxh3"]  # another format need not have the digest where this one has it
    manifest.write_text(json.dumps({**content, "format": 1}))
    again = Launch(tmp_path, *TWO)
    assert again.wait() == 2, again.shown
    assert "10.json is in format 1" in again.shown
    assert "use the ftrain that wrote it" in again.shown
    assert "Traceback" not in again.shown


@pytest.mark.soak
def test_what_is_saved_counts_when_the_directory_was_deleted_meanwhile(tmp_path: Path) -> None:
    every = ("checkpoint.durable_every_steps=10",)
    with launched(tmp_path, script("60", "time.sleep(0.05)"), *TWO, *every) as launch:
        wait_for(lambda: published(launch))
        shutil.rmtree(launch.run_dir / "checkpoints")
        assert launch.wait() == 0, launch.shown
        assert saved(launch)[-1] == 60
    survey = DurableStore(launch.run_dir / "checkpoints").survey()
    assert (survey.hidden, survey.problems) == ((), ())
    with launched(tmp_path, script("70"), *TWO) as again:
        assert again.wait() == 0, again.shown
    assert "resumes at step 60" in again.shown


def test_a_manifest_that_was_taken_away_is_no_silent_beginning(tmp_path: Path) -> None:
    with launched(tmp_path, script("20"), *TWO) as launch:
        assert launch.wait() == 0, launch.shown
        assert not list(launch.run_dir.glob("state/*.sock"))  # copying would trip over it
    folder = tmp_path / "run" / "checkpoints"
    (manifest,) = folder.glob("*/20.json")
    content = manifest.read_bytes()
    manifest.unlink()
    files = sorted(manifest.with_suffix("").iterdir())
    assert len(files) == 2
    again = Launch(tmp_path, *TWO)
    assert again.wait() == 1, again.shown
    assert f"can be used ({manifest} is gone, whose files are still there): put " in again.shown
    assert sorted(manifest.with_suffix("").iterdir()) == files
    manifest.write_bytes(content)
    again = Launch(tmp_path, *TWO)
    assert again.wait() == 0, again.shown
    assert "step 20" in again.shown
    shutil.rmtree(folder)
    anew = Launch(tmp_path, *TWO)
    assert anew.wait() == 0, anew.shown
    assert "starts at step 0: step 20 was durable once, and no version is left" in anew.shown


@pytest.mark.soak
def test_versions_of_which_none_can_be_used_are_no_silent_beginning(tmp_path: Path) -> None:
    every = ("checkpoint.durable_every_steps=5",)
    with launched(tmp_path, script("20", "time.sleep(0.05)"), *TWO, *every) as launch:
        assert launch.wait() == 0, launch.shown
        steps = saved(launch)
        assert len(steps) > 1
    folder = tmp_path / "run" / "checkpoints"
    newest = next(folder.glob(f"*/{steps[-1]}/rank1.seg"))
    whole = newest.read_bytes()
    newest.unlink()

    def begins(*options: str) -> str:
        """What a launch says first, and what of that is about the versions."""
        with launched(tmp_path, script("40", "time.sleep(0.05)"), *TWO, *options) as launch:
            wait_for(lambda: launch.steps or launch.popen.poll() is not None)
            launch.popen.kill()
            launch.popen.wait()
            (line,) = (line for line in launch.shown.splitlines() if "can be used" in line)
            assert "Traceback" not in launch.shown
            return line

    never = ("checkpoint.durable_every_s=1000",)
    line = begins(*never)
    assert line.startswith(f"not every version in {folder} can be used ({newest} is missing)")
    assert f"goes on from step {steps[-2]}; `ftrain checkpoints verify {folder}` names" in line

    for manifest in folder.glob("*/[0-9]*.json"):
        if manifest.stem != str(steps[-1]):
            manifest.write_text("{")
    for mode in ((), ("snapshot=off",)):
        with launched(tmp_path, script("40"), *TWO, *never, *mode) as launch:
            assert launch.wait() == 1, launch.shown
            (line,) = (line for line in launch.shown.splitlines() if "can be used" in line)
            assert line.startswith(f"ftrain: no version in {folder} can be used ({newest} is missi")
            assert f": put back what `ftrain checkpoints verify {folder}` names, or move " in line
            assert "Traceback" not in launch.shown
    status = [sys.executable, "-m", "ftrain.launch.cli", "status", "run"]
    said = subprocess.run(status, cwd=tmp_path, capture_output=True, text=True).stdout
    assert f"no version can be used ({newest.relative_to(tmp_path)} is missing)" in said

    newest.write_bytes(whole)  # put back
    with launched(tmp_path, script("20"), *TWO) as launch:
        assert launch.wait() == 0, launch.shown
        assert f"resumes at step {steps[-1]} from the durable version" in launch.shown


SAMPLES = """
import os, torch, ftrain
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
numbers = torch.arange(50.0)[:, None]
data = DataLoader(numbers, batch_size=2, sampler=DistributedSampler(numbers))
session = ftrain.Session(model=model, optimizer=optimizer, data=data, total_steps=TOTAL)
with open(f"samples-{dist.get_world_size()}-{dist.get_rank()}", "a") as seen:
    for step, batch in session.steps():
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(*(int(x) for x in batch), file=seen)
dist.destroy_process_group()
"""


@pytest.mark.soak
def test_no_sample_is_repeated_or_left_out_when_ranks_join_in_the_middle(tmp_path: Path) -> None:
    """50 samples: 5 steps of two ranks take 20, 5 steps of three ranks the other 30."""
    for ranks, total in ((2, 5), (3, 10)):
        source = SAMPLES.replace("TOTAL", str(total))
        with launched(tmp_path, source, "--nproc-per-node", str(ranks)) as launch:
            assert launch.wait() == 0, launch.shown
    seen = [int(n) for path in tmp_path.glob("samples-*") for n in path.read_text().split()]
    assert sorted(seen) == list(range(50))


@pytest.mark.soak
def test_an_interval_is_proposed_once_the_cost_is_known_and_at_the_next_start(
    tmp_path: Path,
) -> None:
    options = ("checkpoint.durable_every_s=0.5", "checkpoint.mtbf_s=1e7")
    with launched(tmp_path, script("60"), *TWO, *options) as launch:
        assert launch.wait() == 0, launch.shown
        assert launch.shown.count("a durable version costs") == 1
    with launched(tmp_path, script("80"), *TWO, *options) as again:
        assert again.wait() == 0, again.shown
        start, _, _ = again.shown.partition("trained to step 80")
        assert start.count("checkpoint.durable_every_s=") == 1
