"""Launches whose durable versions are copied to an object store, and that come back from there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Launch, launched, wait_for
from s3_server import S3Server
from small_versions import save

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.remote.client import StoreClient
from ftrain.checkpoint.remote.protocol.messages import StoreUpload
from ftrain.checkpoint.retention import Retention
from ftrain.comms.errors import FtrainError
from ftrain.comms.events import read_events
from ftrain.comms.job import JobSpec
from ftrain.configs.schema import CheckpointConfig, FtrainConfig
from ftrain.launch import remote_copies
from ftrain.launch.cli import main
from ftrain.launch.joining import join_request
from ftrain.launch.remote_copies import RemoteCopies, fetch_newest
from ftrain.launch.status import RunStatus, read_status

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


@pytest.fixture(params=["s3", pytest.param("file", marks=pytest.mark.soak)])
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
    came = re.search(r"none is here, step (\d+) comes from (\S+) \(", again.shown)
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
        assert "copying the last version" not in launch.shown.partition("was copied to")[2]
        assert launch.gone_after(0)


@pytest.mark.soak
def test_what_nohup_ignores_does_not_end_the_last_copy(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "wait").touch()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launched(tmp_path, TRAINING, f"checkpoint.remote={s3.uri('bucket/run')}") as launch:
            wait_for(lambda: "step 100/" in launch.shown)
            s3.pause()
            (tmp_path / "wait").unlink()
            wait_for(lambda: "copying the last version to" in launch.shown)
            launch.popen.send_signal(signal.SIGHUP)
            s3.resume()
            assert launch.wait() == 0, launch.shown
            assert "step 120 was copied to s3://bucket/run\n" in launch.shown
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [event["step"] for event in events(launch, "copied")] == [120]


@pytest.mark.soak
def test_copies_come_every_so_many_steps(tmp_path: Path) -> None:
    tokens = [f"checkpoint.remote={(tmp_path / 'mounted').as_uri()}"]
    tokens += ["checkpoint.durable_every_steps=10", "checkpoint.remote_every_steps=40"]
    with launched(tmp_path, TRAINING, *tokens) as launch:
        assert launch.wait() == 0, launch.shown
        copied = [int(str(event["step"])) for event in events(launch, "copied")]
        assert copied.pop() == 120  # behind the run
        assert [step // 40 for step in copied] == sorted({step // 40 for step in copied})
        assert {1, 2} <= {step // 40 for step in copied}, copied


def stopped_run(tmp_path: Path, *tokens: str) -> tuple[int, Path]:
    """A run that was stopped, with its last version copied: the step and the file of rank 0."""
    (tmp_path / "wait").touch()
    with launched(tmp_path, TRAINING, *tokens) as launch:
        wait_for(lambda: launch.steps)
        launch.popen.send_signal(signal.SIGTERM)
        assert launch.wait() == 75, launch.shown
    assert "was copied to" in launch.shown
    (tmp_path / "wait").unlink()
    (file,) = launch.run_dir.glob("checkpoints/*/*/rank0.seg")
    return int(file.parent.name), file


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)


def test_what_is_damaged_here_is_repaired_from_the_copy(uri: str, tmp_path: Path) -> None:
    tokens = [f"checkpoint.remote={uri}"]
    step, file = stopped_run(tmp_path, *tokens)
    flip(file)
    again = Launch(tmp_path, *tokens)
    assert again.wait() == 0, again.shown
    assert f"resumes at step {step} from the durable version" in again.shown
    name = uri.partition("?")[0]
    assert f"repaired from {name}/" in again.shown, again.shown
    assert str(file) in again.shown
    assert sorted(losses(again.run_dir)) == list(range(120))


@pytest.mark.soak
@pytest.mark.parametrize("cut", [False, True])
def test_a_file_that_is_gone_or_cut_off_comes_from_the_copy(
    s3: S3Server, tmp_path: Path, cut: bool
) -> None:
    tokens = [f"checkpoint.remote={s3.uri('bucket/run')}"]
    step, file = stopped_run(tmp_path, *tokens)
    whole = file.read_bytes()
    file.unlink()
    if cut:
        file.write_bytes(whole[:-100])
    again = Launch(tmp_path, *tokens, "checkpoint.keep_last=100")
    assert again.wait() == 0, again.shown
    assert f"none is here, step {step} comes from s3://bucket/run (" in again.shown
    assert f"resumes at step {step} from the durable version" in again.shown
    assert file.read_bytes() == whole


@pytest.mark.soak
def test_a_store_that_is_gone_hinders_nobody_who_has_versions(s3: S3Server, tmp_path: Path) -> None:
    tokens = [f"checkpoint.remote={s3.uri('bucket/run')}"]
    step, _ = stopped_run(tmp_path, *tokens)
    s3.kill()
    again = Launch(tmp_path, *tokens, "checkpoint.remote_end_s=0")
    assert again.wait() == 0, again.shown
    assert f"goes on from what is here, step {step}" in again.shown
    assert f"resumes at step {step} from the durable version" in again.shown


def test_a_store_that_goes_away_stops_nobody(s3: S3Server, tmp_path: Path) -> None:
    tokens = [f"checkpoint.remote={s3.uri('bucket/run')}", "checkpoint.remote_end_s=1"]
    tokens += ["checkpoint.durable_every_s=0.3", "checkpoint.remote_every_s=0.3"]
    (tmp_path / "wait").touch()
    with launched(tmp_path, TRAINING, *tokens) as launch:
        wait_for(lambda: events(launch, "copied"))
        s3.kill()
        wait_for(lambda: any("attempt 1 of" in str(e["text"]) for e in events(launch, "warning")))
        (tmp_path / "wait").unlink()
        assert launch.wait() == 0, launch.shown
        assert "the last version was not copied within 1 s: run again" in launch.shown
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
        assert launch.shown.startswith("ftrain: checkpoint.remote: '/just/a/path' is no place")
    with launched(tmp_path, TRAINING, "checkpoint=off", "checkpoint.remote=file:///x") as launch:
        assert launch.wait() == 2, launch.shown
        assert "leave checkpoint=off out" in launch.shown


@pytest.mark.soak
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


def copier(
    config: CheckpointConfig, here: DurableStore, run_id: str, said: list[str]
) -> RemoteCopies:
    return RemoteCopies(
        config,
        here,
        run_id,
        on_copied=lambda fields: said.append(f"copied {fields['step']}"),
        on_failed=lambda text, kind, again: said.append(text),
        on_told=said.append,
    )


def test_what_is_withdrawn_while_it_is_copied_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = DurableStore(tmp_path / "here")
    version = save(here, 1, 5)
    config = CheckpointConfig(remote=(tmp_path / "mounted").as_uri())
    said: list[str] = []
    ask = remote_copies._ask

    async def ask_and_withdraw(
        client: StoreClient, request: object, *rest: Any, **more: Any
    ) -> Any:
        answer = await ask(client, request, *rest, **more)
        if isinstance(request, StoreUpload):
            here.sweep(Retention(1), "run", active={version.key}, withdrawn={version.version})
        return answer

    async def copy() -> bool:
        copies = copier(config, here, "run", said)
        try:
            return await copies.copy_newest()
        finally:
            await copies.close()

    with monkeypatch.context() as patch:
        patch.setattr(remote_copies, "_ask", ask_and_withdraw)
        assert not asyncio.run(copy())
    assert "step 5 was deleted here while it was copied" in said[-1]
    assert not list((tmp_path / "mounted").rglob("5.json"))
    save(here, 1, 6)
    assert asyncio.run(copy()), said
    assert list((tmp_path / "mounted").rglob("6.json"))


def test_a_run_that_began_with_an_import_keeps_its_id(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "model.pt")
    tokens = ["checkpoints", "import", "--from", "torch", "model.pt", "run"]
    assert main([*tokens[:4], *(str(tmp_path / name) for name in tokens[4:])]) == 0
    config = CheckpointConfig(remote=(tmp_path / "mounted").as_uri())
    here = DurableStore(tmp_path / "run/checkpoints")
    here.begin_fence(2, "train-1", here.versions()[0].version)
    said: list[str] = []

    async def there_and_back() -> str:
        copies = copier(config, here, "train-1", said)
        assert await copies.copy_newest(), said
        await copies.close()
        return await fetch_newest(config, DurableStore(tmp_path / "new"), said.append)

    assert asyncio.run(there_and_back()) == "train-1", said
    assert [version.step for version in DurableStore(tmp_path / "new").versions()] == [0]


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


LARGE = """
import torch, ftrain

torch.set_num_threads(2)
model = torch.nn.Sequential(*(torch.nn.Linear(3300, 3300) for _ in range(10)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
data = torch.utils.data.DataLoader(torch.randn(10_000, 3300), batch_size=64)
session = ftrain.Session(model=model, optimizer=optimizer, data=data, total_steps=TOTAL)
for step, batch in session.steps():
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    session.log(loss=loss)
"""


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_slow_upload_never_stops_capture(s3: S3Server, tmp_path: Path) -> None:
    """1.3 GB of state at 20 MB/s, while every step is captured and every tenth made durable."""
    rate = 20e6
    tokens = [
        f"checkpoint.remote={s3.uri('bucket/run')}",
        f"checkpoint.remote_bytes_per_s_max={rate}",
    ]
    tokens += ["checkpoint.durable_every_steps=10", "checkpoint.remote_every_s=1"]
    seen: list[RunStatus] = []
    with launched(tmp_path, LARGE.replace("TOTAL", "100000"), *tokens) as launch:
        deadline = time.monotonic() + 500

        def copied_twice() -> bool:
            assert time.monotonic() < deadline, launch.shown
            with contextlib.suppress(FtrainError):
                seen.append(read_status(launch.run_dir))
            return len(events(launch, "copied")) >= 2

        wait_for(copied_twice, timeout_s=500)
        launch.popen.send_signal(signal.SIGTERM)
        assert launch.wait(120) == 75, launch.shown
        assert launch.gone_after(0)
    first, second = events(launch, "copied")[:2]
    nbytes, took_s = int(str(second["bytes"])), float(str(second["took_s"]))
    published = [
        event
        for event in events(launch, "published")
        if float(str(first["wall_s"])) < float(str(event["wall_s"])) < float(str(second["wall_s"]))
    ]
    ranks = [status.nodes[0].ranks[0] for status in seen if status.nodes and status.nodes[0].ranks]
    during = [s for s in seen if s.saved.copied_step == first["step"]]
    lag_s = max(status.saved.copied_age_s for status in during)
    behind = max(s.saved.durable_step - s.saved.copied_step for s in during)
    skipped, steps = max(rank.captures_skipped for rank in ranks), max(rank.step for rank in ranks)
    print(
        f"\n{nbytes / 1e9:.2f} GB in {took_s:.0f} s ({nbytes / took_s / 1e6:.1f} MB/s);"
        f" {steps} steps, {skipped} captures skipped; {len(published)} versions became durable"
        f" during the second copy; lag at most {lag_s:.0f} s and {behind} steps"
    )
    assert nbytes / took_s < rate * 1.05
    assert took_s > 40
    assert skipped == 0
    saved = [event["version"]["step"] for event in events(launch, "published")][:-1]  # type: ignore[index]
    assert saved == list(range(10, 10 * len(saved) + 1, 10))  # each tenth; the last is the stop's
    assert len(published) >= 3  # on a slow machine, of steps of 2 s
    assert lag_s > took_s * 0.9
    assert behind >= 20
