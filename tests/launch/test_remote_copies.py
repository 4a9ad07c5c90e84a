"""Launches whose durable versions are copied to an object store, and that come back from there."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from launching import Launch, launched, wait_for
from s3_server import S3Server

from ftrain.comms.events import read_events
from ftrain.comms.job import JobSpec
from ftrain.configs.schema import CheckpointConfig, FtrainConfig
from ftrain.launch.joining import join_request

pytestmark = pytest.mark.slow

TRAINING = """
import os, time, torch, ftrain

torch.manual_seed(3)
model = torch.nn.Linear(40, 10)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
data = torch.utils.data.DataLoader(torch.randn(1000, 40), batch_size=2, shuffle=True)
session = ftrain.Session(model=model, optimizer=optimizer, data=data, total_steps=120)
for step, batch in session.steps():
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    session.log(loss=loss)
    time.sleep(0.02)
    while step == 100 and os.path.exists("wait"):
        time.sleep(0.02)
"""


@pytest.fixture(params=["s3", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that works."""
    if request.param == "file":
        return (tmp_path / "mounted").as_uri()
    s3: S3Server = request.getfixturevalue("s3")
    return s3.uri("bucket/run")


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step, as it was computed last."""
    lines = (run_dir / "steps/rank0.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    return {record["step"]: record["loss"] for record in steps}


def events(launch: Launch, kind: str) -> list[dict[str, object]]:
    path = launch.run_dir / "events.jsonl"
    return [event for event in read_events(path) if event["kind"] == kind]


def test_everything_here_is_lost_and_training_goes_on(uri: str, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    with launched(undisturbed, TRAINING) as launch:
        assert launch.wait() == 0, launch.shown
        wanted = losses(launch.run_dir)
    tokens = [f"checkpoint.remote={uri}"]
    (tmp_path / "wait").touch()
    more = ["checkpoint.durable_every_s=0.3", "checkpoint.remote_every_s=0.5"]
    with launched(tmp_path, TRAINING, *tokens, *more) as launch:
        wait_for(lambda: len(events(launch, "copied")) > 1)
        name = uri.partition("?")[0]
        assert events(launch, "copied")[0]["place"] == name
        launch.popen.kill()  # and with it all memory
        assert launch.gone_after(2.0)
    run_id = json.loads((launch.run_dir / "run.json").read_text())["run_id"]
    shutil.rmtree(launch.run_dir)
    (tmp_path / "wait").unlink()
    again = Launch(tmp_path, *tokens)
    assert again.wait() == 0, again.shown
    came = re.search(r"no durable version here: step (\d+) comes from (\S+) \(", again.shown)
    assert came, again.shown
    assert came[2] == name
    assert f"resumes at step {came[1]} from the durable version" in again.shown
    assert json.loads((again.run_dir / "run.json").read_text())["run_id"] == run_id
    resumed = losses(again.run_dir)
    assert min(resumed) == int(came[1])
    assert resumed == {step: loss for step, loss in wanted.items() if step >= min(resumed)}
    assert f"step 120 was copied to {name}" in again.shown

    shutil.rmtree(again.run_dir)
    third = Launch(tmp_path, *tokens)
    assert third.wait() == 0, third.shown
    assert "already complete at step 120" in third.shown


def test_a_stop_copies_what_it_saved(s3: S3Server, tmp_path: Path) -> None:
    tokens = [f"checkpoint.remote={s3.uri('bucket/run')}"]
    (tmp_path / "wait").touch()
    with launched(tmp_path, TRAINING, *tokens) as launch:
        wait_for(lambda: launch.steps)
        launch.popen.send_signal(signal.SIGTERM)
        assert launch.wait() == 75, launch.shown
        saved = re.search(r"with step (\d+) saved", launch.shown)
        assert saved
        assert f"step {saved[1]} was copied to s3://bucket/run\n" in launch.shown
        assert launch.gone_after(0)


def test_a_store_that_goes_away_stops_nobody(s3: S3Server, tmp_path: Path) -> None:
    tokens = [f"checkpoint.remote={s3.uri('bucket/run')}", "checkpoint.remote_end_s=1"]
    tokens += ["checkpoint.durable_every_s=0.3", "checkpoint.remote_every_s=0.3"]
    with launched(tmp_path, TRAINING, *tokens) as launch:
        wait_for(lambda: events(launch, "copied"))
        s3.kill()
        assert launch.wait() == 0, launch.shown
        assert "the last version was not copied within 1 s: run again" in launch.shown
        again = [e for e in events(launch, "warning") if "attempt 1 of" in str(e["text"])]
        assert again
        assert launch.gone_after(0)
    assert sorted(losses(launch.run_dir)) == list(range(120))


def test_a_store_that_refuses_is_said_before_anything_starts(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    with launched(tmp_path, TRAINING, f"checkpoint.remote={s3.uri('bucket/run')}") as launch:
        assert launch.wait() == 2, launch.shown
        assert launch.shown.startswith("ftrain: s3://bucket/run refuses access")
        assert len(launch.shown.splitlines()) == 1
    with launched(tmp_path, TRAINING, "checkpoint.remote=/just/a/path") as launch:
        assert launch.wait() == 2, launch.shown
        assert launch.shown.startswith("ftrain: a place for checkpoints is a URI such as s3://")
    with launched(tmp_path, TRAINING, "checkpoint=off", "checkpoint.remote=file:///x") as launch:
        assert launch.wait() == 2, launch.shown
        assert "leave checkpoint=off out" in launch.shown


def test_a_run_never_begins_anew_because_its_copies_are_damaged(tmp_path: Path) -> None:
    tokens = [f"checkpoint.remote={(tmp_path / 'mounted').as_uri()}"]
    with launched(tmp_path, TRAINING, *tokens) as launch:
        assert launch.wait() == 0, launch.shown
    for path in (tmp_path / "mounted").rglob("rank0.seg"):
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    shutil.rmtree(launch.run_dir)
    again = Launch(tmp_path, *tokens)
    assert again.wait() == 1, again.shown
    assert "rank0.seg: chunk 0" in again.shown
    assert again.shown.splitlines()[-1].startswith("ftrain: no version in file:///")


def test_hosts_that_join_need_no_store_and_hear_no_secret(tmp_path: Path) -> None:
    config = FtrainConfig(checkpoint=CheckpointConfig(remote="s3://key:secret@bucket/run"))
    job = JobSpec(
        run_id="run",
        secret="00",
        run_dir=str(tmp_path),
        config=config,
        argv=("train.py",),
        module=False,
        script_digest="",
        coordinator="",
        front_pid=0,
    )
    assert "secret@" not in str(join_request(job))
