"""What a rank reads from its environment, and what children inherit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ftrain.comms.environment import (
    CONTEXT_VARIABLE,
    RankContext,
    RankEnvironment,
    default_run_dir,
    encode_context,
    inherited_environment,
    rank_environment,
    replace_environment,
    running_script,
    secret_from_environment,
)
from ftrain.comms.errors import ConfigError
from ftrain.comms.protocol.messages import Formation, NodePlace, RestorePlan, VersionId
from ftrain.configs.schema import FaultConfig, FaultsConfig, FtrainConfig, LaunchConfig

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
CONTEXT = RankContext(
    job_id="job",
    epoch=4,
    incarnation=2**60,
    node=1,
    formation=Formation(
        epoch=4,
        places=(NodePlace(0, 9, 0, 2, "127.0.0.1", "127.0.0.1:5"),),
        store_host="127.0.0.1",
        store_port=77,
        restore=RestorePlan("memory", VersionId(3, 12), sources=(0,), reason="newest"),
        restarts=3,
    ),
    config=FtrainConfig(
        launch=LaunchConfig(preload=("numpy",)),
        faults=FaultsConfig(schedule=(FaultConfig(kind="sigkill", at_step=5),)),
    ),
    run_dir="/runs/öne",
    smp_socket="/runs/smp.sock",
    telemetry_fd=9,
    secret="00ff",
    start_ns=123456789012345,
)


def test_a_plain_python_run_is_a_world_of_one() -> None:
    assert rank_environment({}) == RankEnvironment()
    assert RankEnvironment().world_size == 1
    assert RankEnvironment().context is None


def test_torchruns_variables_are_read() -> None:
    assert rank_environment(TORCHRUN) == RankEnvironment(
        rank=3,
        local_rank=1,
        world_size=4,
        local_world_size=2,
        node=1,
        run_id="abc",
        restart_count=2,
    )


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(CONTEXT_VARIABLE, encode_context(CONTEXT))
    found = rank_environment()
    assert found.rank == 3
    assert found.context == CONTEXT


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "x", "RANK must be a whole number of at least 0, not 'x'"),
        ("RANK", "-1", "not '-1'"),
        ("RANK", "4", "RANK=4 does not fit WORLD_SIZE=4"),
        ("RANK", "²", "not '²'"),
        ("LOCAL_RANK", "2", "LOCAL_RANK=2 does not fit LOCAL_WORLD_SIZE=2"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be a whole number of at least 1"),
        ("WORLD_SIZE", "", "not ''"),
        ("TORCHELASTIC_RESTART_COUNT", "1.5", "not '1.5'"),
        (CONTEXT_VARIABLE, "{", "FTRAIN_CONTEXT is not what `ftrain launch` sets"),
        (CONTEXT_VARIABLE, "{}", "missing required field"),
        (CONTEXT_VARIABLE, "\udcff", "unset it to run without the launcher"),
    ],
)
def test_broken_variables_are_named(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_environment(TORCHRUN | {name: value})
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_a_wrong_field_in_the_context_is_named() -> None:
    text = encode_context(CONTEXT).replace('"epoch":4', '"epoch":"four"', 1)
    with pytest.raises(ConfigError, match=r"Expected `int`, got `str` - at `\$.epoch`"):
        rank_environment({CONTEXT_VARIABLE: text})


def test_children_inherit_neither_place_nor_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, CONTEXT_VARIABLE, "FTRAIN_SECRET", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MY_OWN", "kept")
    inherited = inherited_environment()
    assert inherited["MY_OWN"] == "kept"
    assert inherited["PATH"] == os.environ["PATH"]
    assert not {*TORCHRUN, CONTEXT_VARIABLE, "FTRAIN_SECRET", "MASTER_PORT"} & set(inherited)


def test_a_forked_rank_gets_a_new_environment() -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        replace_environment({"ONLY": "this", "RANK": "0"})
        os.write(write, repr(dict(os.environ)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    assert os.read(read, 1000) == b"{'ONLY': 'this', 'RANK': '0'}"
    os.close(read)


def test_the_secret_is_bytes_as_hex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTRAIN_SECRET", raising=False)
    assert secret_from_environment() is None
    monkeypatch.setenv("FTRAIN_SECRET", "correct horse")
    assert bytes.fromhex(secret_from_environment() or "") == b"correct horse"
    monkeypatch.setenv("FTRAIN_SECRET", "short")
    with pytest.raises(ConfigError, match="FTRAIN_SECRET has 5 characters"):
        secret_from_environment()


def test_runs_live_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_run_dir("llama-3.1") == str(tmp_path / "ftrain-runs" / "llama-3.1")
    assert default_run_dir("") == str(tmp_path / "ftrain-runs" / "python")
    for started, name in (
        ("runs/llama-3.1.py", "llama-3.1"),
        ("/opt/package/__main__.py", "package"),
        ("/usr/bin/ftrain-thing", "ftrain-thing"),
        ("", ""),
    ):
        monkeypatch.setattr("sys.argv", [started])
        assert running_script() == name
