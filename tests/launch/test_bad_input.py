"""Bad input: one clear sentence on standard error, the right exit code, nothing left running."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftrain.comms.environment import SECRET_VARIABLE
from ftrain.launch.cli import main
from ftrain.launch.run_directory import open_run_directory
from ftrain.launch.script import check_script


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one good script in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    (tmp_path / "train.py").write_text("print('trained')\n")
    return tmp_path


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    """Runs a command line that must be refused; returns the sentence."""
    yield Refused(capsys)
    assert not (folder / "ftrain-runs" / "train" / "job.json").exists()


class Refused:
    """``refused("launch …")`` asserts exit code 2 and one line, and returns that line."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *tokens: str) -> str:
        began = time.monotonic()
        assert main(tokens) == 2
        assert time.monotonic() - began < 3
        shown = self._capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("ftrain: ")
        assert shown.err.count("\n") == 1, shown.err
        return shown.err


def test_no_script(refused: Refused) -> None:
    assert "no script" in refused("launch")


def test_missing_script(refused: Refused) -> None:
    assert "there is no script gone.py" in refused("launch", "gone.py")


def test_directory(refused: Refused, folder: Path) -> None:
    (folder / "src").mkdir()
    assert "is a directory" in refused("launch", "src")


def test_syntax_error(refused: Refused, folder: Path) -> None:
    (folder / "bad.py").write_text("x = 1\nfor for\n")
    sentence = refused("launch", "bad.py")
    assert f"syntax error in {folder / 'bad.py'}, line 2" in sentence


@pytest.mark.parametrize(
    "content", [b"#!/bin/sh\necho hello | cat\n", b"\x7fELF\x00\x01", b"\xff\xfe\x00", b"a: b: c"]
)
def test_not_python(refused: Refused, folder: Path, content: bytes) -> None:
    (folder / "tool").write_bytes(content)
    assert "tool is not a Python script" in refused("launch", "tool")


@pytest.mark.parametrize("name", ["gone", "package.gone", "package", "train.gone"])
def test_missing_module(refused: Refused, folder: Path, name: str) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("raise SystemError('never imported')\n")
    assert f"-m {name}" in refused("launch", "-m", name)


def test_bad_override(refused: Refused) -> None:
    assert "did you mean 'launch.nnodes'" in refused("launch", "launch.nodes=2", "train.py")


def test_bad_option(refused: Refused) -> None:
    assert "--nproc-per-node" in refused("launch", "--nproc-per-node", "0", "train.py")


def test_bad_fault(refused: Refused) -> None:
    assert "sigkil" in refused("launch", "faults.kind=sigkil", "train.py")
    assert "rank=5" in refused("launch", "faults=kill_rank", "faults.rank=5", "train.py")


def test_port_in_use(refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = refused("launch", "--rdzv-endpoint", f"127.0.0.1:{port}", "train.py")
    assert f"127.0.0.1:{port}" in sentence
    assert "in use" in sentence


def test_more_nodes_than_there_is_memory_for(refused: Refused) -> None:
    for options in (["--local-nodes", "4", "--spares", "100000"], ["--local-nodes", "100000"]):
        text = refused("launch", *options, "train.py")
        assert "nodes on this machine" in text
        assert "are free: ask for fewer" in text


def test_endpoint_that_is_no_address(refused: Refused) -> None:
    sentence = refused("launch", "--rdzv-endpoint", "no.such.invalid", "train.py")
    assert "there is no host 'no.such.invalid'" in sentence
    assert "write host:port" in sentence


def test_wide_bind_without_secret(refused: Refused) -> None:
    assert SECRET_VARIABLE in refused("launch", "launch.bind=0.0.0.0", "train.py")


def test_several_nodes_need_endpoint_name_and_secret(refused: Refused) -> None:
    line = ["launch", "--nnodes", "2"]
    assert "--rdzv-endpoint" in refused(*line, "train.py")
    line += ["--rdzv-endpoint", "127.0.0.1:29411"]
    assert "--run-id" in refused(*line, "train.py")
    line += ["--run-id", "x"]
    assert SECRET_VARIABLE in refused(*line, "train.py")


def test_a_name_for_loopback_is_no_endpoint(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "correct horse battery staple")
    line = ["launch", "--nnodes", "2", "--run-id", "x", "--rdzv-endpoint"]
    sentence = refused(*line, "127.1:29411", "train.py")
    assert "--rdzv-endpoint 127.1:29411: on this host that is the loopback address 127.0.0.1" in (
        sentence
    )
    for address in ("127.0.0.2", "localhost"):
        options = ["192.0.2.1:29411", "--local-addr", address]
        assert f"--local-addr {address}: on this host" in refused(*line, *options, "train.py")


def test_read_only_run_directory(refused: Refused, folder: Path) -> None:
    if os.geteuid() == 0:
        where = Path("/proc/ftrain-run")  # root may write everywhere else
    else:
        where = folder / "locked"
        where.mkdir(mode=0o500)
    sentence = refused("launch", "--run-dir", str(where), "train.py")
    assert f"the run directory {where} can't be written" in sentence
    assert "--run-dir" in sentence


def test_log_directory_that_can_not_be_made(refused: Refused) -> None:
    sentence = refused("launch", "--log-dir", "train.py/x", "train.py")
    assert "train.py/x can't be written (Not a directory): choose another with --log-dir" in (
        sentence
    )


def test_run_directory_is_a_file(refused: Refused) -> None:
    assert "can't be written" in refused("launch", "--run-dir", "train.py/x", "train.py")


def test_no_versions_can_be_put_into_a_file(refused: Refused, folder: Path) -> None:
    sentence = refused("launch", "checkpoint.dir=train.py/x", "train.py")
    assert f"can be put into {folder / 'train.py/x'} ({folder / 'train.py'} is no dir" in sentence
    sentence = refused("launch", "checkpoint.dir=/proc/x", "train.py")  # where not even root may
    assert "no durable version can be put into /proc/x (/proc: No such file" in sentence
    assert "checkpoint.dir" in sentence


def test_foreign_run_directory(refused: Refused, folder: Path) -> None:
    run = folder / "run"
    open_run_directory(run, check_script("train.py", module=False), world_size=1).close()
    (folder / "other.py").write_text("print('another')\n")
    assert "another script" in refused("launch", "--run-dir", "run", "other.py")
    assert "belongs to run" in refused("launch", "--run-dir", "run", "--run-id", "x", "train.py")
    (run / "run.json").write_text("{torn")
    assert "run.json is not readable" in refused("launch", "--run-dir", "run", "train.py")


def test_run_directory_in_use(refused: Refused, folder: Path) -> None:
    run = folder / "run"
    script = check_script("train.py", module=False)
    held = open_run_directory(run, script, world_size=1)
    sentence = refused("launch", "--run-dir", "run", "train.py")
    assert f"in use by another process (pid {os.getpid()})" in sentence
    held.close()
    open_run_directory(run, script, world_size=1).close()


def test_bad_run_id(refused: Refused) -> None:
    assert "run id" in refused("launch", "--run-id", "a/b", "train.py")


def test_unknown_command(refused: Refused) -> None:
    assert "one of launch, status" in refused("lunch")
    assert "ftrain launch train.py" in refused("train.py")


def test_status_of_nothing(refused: Refused, folder: Path) -> None:
    for command in (["status"], ["report"], ["inject", "kind=sigkill"]):
        said = [refused(command[0], place, *command[1:]) for place in ("gone", str(folder))]
        assert said[0] == "ftrain: there is no run directory gone\n"
        assert said[1] == f"ftrain: {folder} is not a run directory: it has no run.json\n"


def test_as_a_process(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ftrain.launch.cli", "launch", "gone.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ftrain: there is no script gone.py")


def test_configuration_is_printed_without_a_script(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--cfg", "job", "snapshot=off"]) == 0
    assert "snapshot:\n  enabled: false\n" in capsys.readouterr().out
