"""Launches that train: a fault on the way, a stop and a resume, several hosts; then told again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest
from launching import Launch, launched, wait_for

from ftrain.comms.environment import SECRET_VARIABLE
from ftrain.launch.cli import main
from ftrain.launch.status import PastStatus, read_status

pytestmark = pytest.mark.slow

TRAINING = """
import os, sys, time, torch, ftrain

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = torch.utils.data.DataLoader(torch.ones(1000, 4), batch_size=2)
total = int(os.environ.get("STEPS", 30))
session = ftrain.Session(model=model, optimizer=optimizer, data=data, total_steps=total)
for step, batch in session.steps():
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    session.log(loss=loss)
    time.sleep(0.02)
    while total == 1000 and step > 10 and not os.path.exists("go-on"):
        time.sleep(0.02)
print("trained to step", session.step)
"""


def test_a_fault_is_told_once_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with launched(tmp_path, TRAINING, "faults=kill_rank", "faults.at_step=10") as launch:
        assert launch.wait() == 0, launch.shown
        assert launch.shown.count("died: SIGKILL. Restarted from memory in") == 1
        assert "trained to step 30" in launch.shown
        assert "goodput" in launch.shown
        assert "never struck" not in launch.shown
        assert "no ftrain.Session" not in launch.shown
        assert launch.gone_after(0)
    assert main(["report", str(launch.run_dir)]) == 0
    told = capsys.readouterr().out
    for word in (
        "1 launch, 1 injected fault",
        "exit code 0",
        "died: SIGKILL",
        "goodput",
        "stepped",
    ):
        assert word in told


@pytest.mark.soak
def test_a_fault_beyond_the_end_is_said(tmp_path: Path) -> None:
    with launched(tmp_path, TRAINING, "faults=kill_rank", "faults.at_step=500") as launch:
        assert launch.wait() == 0, launch.shown
        end = launch.shown.splitlines()[-1]
        assert end == "ftrain: never struck, the run was over before: sigkill at step 500"


def test_status_and_inject_on_a_running_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPS", "1000")
    with launched(tmp_path, TRAINING) as launch:
        run = str(launch.run_dir)

        def step() -> int:
            ranks = [r for node in read_status(run).nodes for r in node.ranks]
            return max((rank.step for rank in ranks), default=0)

        wait_for(lambda: launch.run_dir.joinpath("run.json").exists() and step() > 10)
        assert main(["status", run]) == 0
        shown = capsys.readouterr().out
        assert "/1000" in shown
        assert max(map(len, shown.splitlines()[1:])) < 80
        assert "snapshot" in shown.splitlines()[1]
        assert main(["status", run, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        (rank,) = told["nodes"][0]["ranks"]
        assert rank["total_steps"] == 1000
        assert rank["snapshot_step"] in (rank["step"] - 1, rank["step"])
        assert (rank["phase"], rank["loss"] > 0) == ("step", True)
        assert told["nodes"][0]["agent_pid"] == launch.pid_of("ftrain.launch.agent")

        assert main(["inject", run, "kind=sigkill", "rank=0"]) == 0
        assert f"pid {rank['pid']}" in capsys.readouterr().out
        (tmp_path / "go-on").touch()
        wait_for(lambda: "died: SIGKILL" in launch.shown)
        launch.popen.kill()
        assert launch.gone_after(1.0)
    assert main(["status", run]) == 1
    shown = capsys.readouterr().out
    assert "not running" in shown
    assert re.search(
        r"killed before it could say how it ended; \d+ steps completed; no step is durable; the"
        r" same command starts from the beginning",
        shown,
    )
    assert main(["inject", run, "kind=sigkill"]) == 2


def test_a_stop_saves_and_the_next_launch_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPS", "1000000")
    begin = "starts at step 0\n"
    for number in (signal.SIGINT, signal.SIGUSR1):  # SIGTERM: test_last_versions.py
        with launched(tmp_path, TRAINING) as launch:
            wait_for(lambda: launch.steps)
            launch.popen.send_signal(number)
            assert launch.wait() == 75, launch.shown
            assert launch.gone_after(0)
            assert "trained" not in launch.shown
            assert f"run directory {launch.run_dir}; {begin}" in launch.shown
        saved = re.search(r"with step (\d+) saved", launch.shown)
        assert saved
        past = read_status(launch.run_dir).past
        assert past == PastStatus(75, int(saved[1]), int(saved[1]), "")
        begin = f"resumes at step {saved[1]} from the durable version\n"
    steps = int(saved[1]) + 50
    monkeypatch.setenv("STEPS", str(steps))
    again = Launch(tmp_path)
    assert again.wait() == 0, again.shown
    assert f"trained to step {steps}" in again.shown
    assert "(50 in this launch)" in again.shown
    assert f"run directory {again.run_dir}; {begin}" in again.shown
    third = Launch(tmp_path)
    assert third.wait() == 0, third.shown
    assert f"ftrain: already complete at step {steps} (total_steps); nothing to do\n" in third.shown
    assert "goodput" not in third.shown


def test_two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "correct horse battery staple")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    line = ["--nnodes", "2", "--rdzv-endpoint", endpoint, "--run-id", "pair"]
    line.append(f"checkpoint.dir={tmp_path / 'durable'}")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    source = "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])"
    (folders[1] / "train.py").write_text(source)
    with launched(folders[0], source, *line, "--node-rank", "0") as first:
        second = Launch(folders[1], *line, "--node-rank", "1")
        assert (first.wait(), second.wait()) == (0, 0), first.shown + second.shown
        assert "rank 0 of 2" in first.shown
        assert "rank 1 of 2" in second.shown
        assert second.gone_after(0)


def test_a_wrong_secret_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    line = ["--nnodes", "2", "--rdzv-endpoint", endpoint, "--run-id", "pair"]
    other = tmp_path / "b"
    other.mkdir()
    (other / "train.py").write_text("x = 1\n")
    monkeypatch.setenv(SECRET_VARIABLE, "correct horse battery staple")
    with launched(tmp_path, "x = 1\n", *line, "--node-rank", "0"):
        monkeypatch.setenv(SECRET_VARIABLE, "incorrect horse")
        second = Launch(other, *line, "--node-rank", "1")
        assert second.wait() == 2, second.shown
        assert "secret differs" in second.shown
        assert "Traceback" not in second.shown
        assert os.listdir(second.run_dir)
