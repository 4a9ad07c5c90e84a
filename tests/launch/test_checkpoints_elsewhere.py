"""``ftrain checkpoints`` on copies in an object store, named by an address."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launching import wait_for
from s3_server import KEY, SECRET, S3Server, free_port
from sending import send
from showing import Shown
from small_versions import flip, save, weights

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.store import RemoteStore
from ftrain.comms.job import JobSpec, write_job
from ftrain.configs.schema import CheckpointConfig, FtrainConfig


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    return Shown(capsys)


@dataclass
class Copied:
    """A run with the versions of steps 10 to 40, and their copies elsewhere."""

    run: Path
    uri: str
    name: str
    folder: Path  # that the objects are files in


def make_copies(run: Path, uri: str, folder: Path, rows: int = 400) -> Copied:
    local = DurableStore(run / "checkpoints")
    place = Place(uri)
    for step in range(10, 41, 10):
        send(RemoteStore(place), save(local, 1, step, rows=rows))
    place.close()
    return Copied(run, uri, place.name, folder)


@pytest.fixture(params=["file", "s3"])
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Copied:
    if request.param == "file":
        folder = tmp_path / "mounted" / "run 1"
        return make_copies(tmp_path / "run", folder.as_uri(), folder)
    s3: S3Server = request.getfixturevalue("s3")
    return make_copies(tmp_path / "run", s3.uri("bucket/run"), s3.folder / "bucket/run")


def named_by_job(run: Path, uri: str, folder: str = "") -> None:
    config = FtrainConfig(checkpoint=CheckpointConfig(remote=uri, dir=folder))
    write_job(
        JobSpec(
            run_id="run",
            secret="00",
            run_dir=str(run),
            config=config,
            argv=("train.py",),
            module=False,
            script_digest="",
            coordinator="127.0.0.1:1",
            front_pid=0,
        )
    )


def test_copies_are_looked_at_as_versions_are(shown: Shown, copied: Copied) -> None:
    code, text = shown("list", copied.uri)
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["40", "30", "20", "10"]
    assert {line.split()[3] for line in text.splitlines()[1:]} == {"L4"}
    told = shown.told("list", copied.uri, "--verify")
    assert told["places"] == [copied.name]
    stored = sum(path.stat().st_size for path in (copied.folder / "1/40").iterdir())
    assert told["versions"][0]["bytes"] == stored
    assert told["versions"][0]["manifest"] == f"{copied.name}/1/40.json"
    assert all(version["verified"] for version in told["versions"])
    here = shown.told("show", copied.run, "--step", "30")
    there = shown.told("show", copied.uri, "--step", "30")
    assert there["tensors"] == here["tensors"]
    assert [file["rank"] for file in there["files"]] == [0, 1]
    assert f" in {copied.name}/1/30\n" in shown("show", copied.uri, "--step", "30")[1]


def test_damage_in_a_copy_is_named(shown: Shown, copied: Copied) -> None:
    code, text = shown("verify", copied.uri)
    assert (code, text.split(" are sound")[0]) == (0, "4 of 4 versions")
    flip(copied.folder / "1/20/rank0.seg", 4096)
    told = shown.told("verify", copied.uri, code=1)
    (damage,) = told["damage"]
    assert damage.startswith(f"{copied.name}/1/20/rank0.seg: chunk 0")
    assert [v["verified"] for v in told["versions"]] == [True, True, False, True]


@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
def test_an_export_needs_no_copy_here(
    shown: Shown, copied: Copied, tmp_path: Path, kind: str
) -> None:
    shutil.rmtree(copied.run)
    told = shown.told("export", "--to", kind, "--step", "30", copied.uri, tmp_path / "out")
    assert (told["step"], told["tensors"]) == (30, 4)
    shown("import", "--from", kind, tmp_path / "out", tmp_path / "new")
    shown("export", "--to", "torch", tmp_path / "new", tmp_path / "again.pt")
    found = torch.load(tmp_path / "again.pt", weights_only=True)
    expected = {**weights(30), "seen": torch.tensor(30)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_copies_are_pruned_by_the_same_rules(shown: Shown, tmp_path: Path) -> None:
    copied = make_copies(tmp_path / "run", (tmp_path / "to").as_uri(), tmp_path / "to")
    shown("prune", copied.uri, "--pin", "20")
    told = shown.told("prune", copied.uri, "--keep-last", "1", "--dry-run")
    assert [version["step"] for version in told["removed"]] == [30, 10]
    assert told["kept"] == [40, 20]
    assert (copied.folder / "1/30.json").exists()
    code, text = shown("prune", copied.uri, "--keep-last", "1")
    assert code == 0
    assert "kept: 40, 20" in text
    assert sorted(path.name for path in (copied.folder / "1").iterdir()) == [
        "20",
        "20.json",
        "20.pin",
        "40",
        "40.json",
        "fence.json",
    ]
    shown("prune", copied.uri, "--unpin", "20", "--keep-last", "1")
    assert [v["step"] for v in shown.told("list", copied.uri)["versions"]] == [40]
    assert "no version of step 5" in shown.refused("prune", copied.uri, "--pin", "5")


def test_a_bucket_is_pruned(shown: Shown, s3: S3Server, tmp_path: Path) -> None:
    copied = make_copies(tmp_path / "run", s3.uri("bucket/run"), s3.folder / "bucket/run")
    told = shown.told("prune", copied.uri, "--keep-last", "3")
    assert [version["step"] for version in told["removed"]] == [10]
    assert not (copied.folder / "1/10.json").exists()
    s3.restart()  # see there about folder marks
    assert [v["step"] for v in shown.told("list", copied.uri)["versions"]] == [40, 30, 20]


def test_list_shows_a_runs_copies_when_it_is_asked_to(shown: Shown, tmp_path: Path) -> None:
    copied = make_copies(tmp_path / "run", (tmp_path / "to").as_uri(), tmp_path / "to")
    assert "has no checkpoint.remote" in shown.refused("list", copied.run, "--remote")
    assert "has no checkpoint.remote" in shown.refused("list", copied.uri, "--remote")
    named_by_job(copied.run, copied.uri)
    shutil.rmtree(copied.run / "checkpoints/1/30")
    code, text = shown("list", copied.run)
    assert code == 1
    assert f"copies are in {copied.name}: list them too with --remote" in text
    told = shown.told("list", copied.run, "--remote", code=1)
    assert told["places"] == [str(copied.run / "checkpoints"), copied.name]
    rows = [(v["step"], v["level"], v["complete"]) for v in told["versions"]]
    assert rows == [
        (40, "L3", True),
        (40, "L4", True),
        (30, "L3", False),
        (30, "L4", True),
        (20, "L3", True),
        (20, "L4", True),
        (10, "L3", True),
        (10, "L4", True),
    ]


def test_that_there_is_no_copy_is_said(shown: Shown, tmp_path: Path) -> None:
    save(DurableStore(tmp_path / "run/checkpoints"), 1, 10)
    copies = (tmp_path / "copies").as_uri()
    named_by_job(tmp_path / "run", copies)
    code, text = shown("list", tmp_path / "run", "--remote")
    assert (code, text.splitlines()[-1]) == (0, f"no version in {copies}")


def test_copies_that_can_not_be_looked_at_do_not_hide_the_versions(
    shown: Shown, tmp_path: Path, s3_credentials: None
) -> None:
    save(DurableStore(tmp_path / "run/checkpoints"), 1, 10)
    uri = f"s3://{KEY}:{SECRET}@bucket/run?endpoint_override=127.0.0.1:{free_port()}&scheme=http"
    named_by_job(tmp_path / "run", uri)
    told = shown.told("list", tmp_path / "run", "--remote", code=1)
    assert [(v["step"], v["level"]) for v in told["versions"]] == [(10, "L3")]
    (problem,) = told["problems"]
    assert problem.startswith("s3://bucket/run can't be reached")
    assert SECRET not in json.dumps(told)
    code, text = shown("list", tmp_path / "run")
    assert code == 0
    assert SECRET not in text


def test_a_copy_of_a_run_is_another_run(shown: Shown, tmp_path: Path) -> None:
    """What is done to the copy must not be done to the versions of the run at the old place."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    for step in (10, 20):
        save(DurableStore(run / "checkpoints"), 1, step, rows=4)
    named_by_job(run, "", str(run / "checkpoints"))
    shutil.copytree(run, copy)
    shown("prune", copy, "--keep-last", "1")
    assert [v["step"] for v in shown.told("list", copy)["versions"]] == [20]
    assert [v["step"] for v in shown.told("list", run)["versions"]] == [20, 10]
    shutil.rmtree(run)
    assert [v["step"] for v in shown.told("list", copy)["versions"]] == [20]
    run.mkdir()
    named_by_job(run, "", str(run / "checkpoints"))
    assert f"there are none in {run / 'checkpoints'} (yet, or" in shown.refused("list", run)
    elsewhere = tmp_path / "elsewhere"
    copy.joinpath("checkpoints").rename(elsewhere)
    named_by_job(run, "", str(elsewhere))
    assert shown.told("list", run)["places"] == [str(elsewhere)]


def test_what_is_wrong_elsewhere_is_said_in_a_sentence(
    shown: Shown, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no complete version in s3://bucket/no" in shown.refused(
        "verify", s3.uri("bucket/no")
    )
    assert shown("list", s3.uri("bucket/no")) == (0, "no version in s3://bucket/no\n")
    assert "the bucket of s3://gone/run does not exist" in shown.refused("show", s3.uri("gone/run"))
    nobody = f"s3://bucket/run?endpoint_override=127.0.0.1:{free_port()}&scheme=http"
    assert "s3://bucket/run can't be reached" in shown.refused("list", nobody, code=1)
    assert "no option is called nonsense" in shown.refused("list", "s3://bucket/run?nonsense=1")
    assert "a URI such as" in shown.refused("list", "http://bucket/run")
    wrong = s3.uri("bucket/run").replace("s3://", f"s3://{KEY}:guessed@")
    for command in (("list",), ("prune", "--keep-last", "1"), ("export", "--to", "torch")):
        more = (tmp_path / "x.pt",) if command[0] == "export" else ()
        sentence = shown.refused(*command, wrong, *more)
        assert "s3://bucket/run refuses access" in sentence
        assert "guessed" not in sentence
    assert not (tmp_path / "x.pt").exists()


def test_secrets_in_an_address_are_used_and_never_shown(
    shown: Shown, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = make_copies(tmp_path / "run", s3.uri("bucket/run"), s3.folder / "bucket/run")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    secret = copied.uri.replace("s3://", f"s3://{KEY}:{SECRET}@")
    for command in ("list", "show", "verify"):
        for more in ((), ("--json",)):
            code, text = shown(command, secret, *more)
            assert code == 0
            assert SECRET not in text
    for refused in (
        ("list", "--remote", secret),
        ("list", secret, secret),
        ("show", "--step", "11", secret),
        ("export", "--to", "torch", copied.run, secret),
        ("import", "--from", "torch", secret, tmp_path / "new"),
        ("import", "--from", "torch", tmp_path / "x.pt", secret),
    ):
        assert SECRET not in shown.refused(*refused)
    sentence = shown.refused("import", "--from", "torch", tmp_path / "x.pt", secret)
    assert "s3://bucket/run is an address: import into a run directory" in sentence


PROGRAM = "import sys; from ftrain.launch.cli import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def started(*tokens: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, "checkpoints", *map(str, tokens)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def interrupt(process: subprocess.Popen[str]) -> None:
    """Press Ctrl-C: it ends at once, and says nothing."""
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.communicate(timeout=20) == ("", "")
    assert time.monotonic() - began < 2  # the store is given 5 s and more
    assert process.returncode == 130


def test_ctrl_c_ends_a_command_whose_store_does_not_answer(s3_credentials: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with started("list", f"s3://b/r?endpoint_override=127.0.0.1:{port}&scheme=http") as process:
            silent.settimeout(30)
            connection, _ = silent.accept()
            with connection:
                connection.recv(1)  # the request is there, and pyarrow waits for an answer
                interrupt(process)


def test_ctrl_c_in_an_export_leaves_nothing_behind(s3: S3Server, tmp_path: Path) -> None:
    folder = s3.folder / "bucket/run"
    copied = make_copies(tmp_path / "run", s3.uri("bucket/run"), folder, rows=20_000)
    out = tmp_path / "out"
    with started("export", "--to", "safetensors", copied.uri, out) as process:
        fresh = tmp_path / f"out.{process.pid}.new"
        wait_for(fresh.exists)
        s3.pause()
        interrupt(process)
    assert not fresh.exists()
    assert not out.exists()
