"""Overrides: what is taken, and what each mistake is told."""

from __future__ import annotations

import pytest

from ftrain.comms.errors import ConfigError
from ftrain.configs.schema import FaultConfig
from ftrain.launch.resolve import is_override, resolve


def test_values_of_every_type() -> None:
    config = resolve(
        [
            "launch.nproc_per_node=2",
            "snapshot.memory_share_max=0.25",
            "detection.hang_s=3",
            "snapshot.rehash=false",
            "launch.preload=[a,b.c]",
            "++seed=7",
        ]
    )
    assert config.launch.nproc_per_node == 2
    assert config.snapshot.memory_share_max == 0.25
    assert config.detection.hang_s == 3.0
    assert config.snapshot.rehash is False
    assert config.launch.preload == ("a", "b.c")
    assert config.seed == 7


@pytest.mark.parametrize(
    "text", ["007", "true", "0:1,1:3", "a b", "x=y", "[a", "", '"', "ü\\", "'q'x", "null"]
)
def test_text_is_text(text: str) -> None:
    assert resolve([f"launch.log_dir={text}"]).launch.log_dir == text


def test_interpolation_is_refused_when_it_is_broken() -> None:
    with pytest.raises(ConfigError, match="compose"):
        resolve(["launch.log_dir=${a"])


def test_quoted_text_loses_its_quotes() -> None:
    assert resolve(["launch.log_dir='a b'"]).launch.log_dir == "a b"


def test_later_overrides_win() -> None:
    assert resolve(["seed=1", "seed=2"]).seed == 2


def test_single_fault() -> None:
    config = resolve(["faults=kill_rank", "faults.at_step=50", "faults.rank=1"])
    assert config.faults.schedule == (FaultConfig(kind="sigkill", at_step=50, rank=1),)


def test_single_fault_without_a_time_comes_at_a_step() -> None:
    (fault,) = resolve(["faults.kind=smp"]).faults.schedule
    assert fault.at_step > 0


@pytest.mark.parametrize(
    ("key", "value"), [("at_s", 2.5), ("mtbf_s", 30.0), ("at_step", 0), ("at_s", 0.0)]
)
def test_single_fault_takes_the_time_that_was_given(key: str, value: float) -> None:
    (fault,) = resolve(["faults=hang_rank", f"faults.{key}={value}"]).faults.schedule
    assert getattr(fault, key) == value
    assert {fault.at_step, fault.at_s, fault.mtbf_s} == {-1, value}


def test_schedule_and_single_fault_add_up() -> None:
    config = resolve(
        ["faults.schedule=[{kind:sigkill,at_step:5},{kind: node, at_s: 1}]", "faults.kind=smp"]
    )
    assert [fault.kind for fault in config.faults.schedule] == ["sigkill", "node", "smp"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("launch.nproc=2", ["'launch.nproc=2'", "did you mean 'launch.nproc_per_node'"]),
        ("lunch.nnodes=1", ["did you mean 'launch.nnodes'"]),
        ("nproc_per_node=2", ["did you mean 'launch.nproc_per_node'"]),
        ("fault=none", ["did you mean 'faults'"]),
        ("zzz.yyy=1", ["no key 'zzz.yyy'", "the groups are", "snapshot"]),
        ("zzz=1", ["no key 'zzz'", "there are", "snapshot"]),
        ("events.zzz=1", ["events has", "events.bytes_max"]),
        ("snapshot=of", ["no choice 'of'", "did you mean 'off'", "default, off"]),
        ("snapshot={a: 1}", ["no choice"]),
        ("launch.nnodes=x", ["launch.nnodes must be a whole number, not 'x'", "in 'launch.nn"]),
        ("launch.nnodes=1.5", ["must be a whole number, not 1.5"]),
        ("launch.nnodes=1,2", ["must be a whole number, not '1,2'"]),
        ("launch.nnodes=[", ["must be a whole number, not '['"]),
        ("launch.nnodes=null", ["must be a whole number, not null"]),
        ("launch.stop_grace_s=inf", ["launch.stop_grace_s must be a finite number, not 'inf'"]),
        ("detection.user_warn_s=nan", ["detection.user_warn_s must be a finite number"]),
        ("detection.user_stall_s=0", ["detection.user_stall_s must be more than 0, not '0"]),
        ("snapshot.enabled=maybe", ["must be true or false, not 'maybe'"]),
        ("launch.preload=a", ["launch.preload must be a list [a, b], not 'a'"]),
        ("launch.preload=[1]", ["launch.preload[0] must be text, not 1"]),
        ("launch.preload=[a", ["launch.preload=[a", "compose"]),
        ("+foo=1", ["can't be added"]),
        ("~launch=default", ["can't be added or removed"]),
        ("launch.nproc_per_node=0", ["launch.nproc_per_node must be at least 1, not '0'"]),
        ("snapshot.slots=1", ["snapshot.slots must be at least 2"]),
        ("snapshot.chunk_bytes=5000", ["multiple of 4096"]),
        ("snapshot.memory_share_max=1.5", ["more than 0 and at most 1"]),
        ("launch.tee=7", ["launch.tee must be 0, 1, 2 or 3"]),
        ("faults.at_s=3", ["says when, but not what"]),
        ("faults.schedule=3", ["must be a list of faults"]),
        ("faults.schedule=[{kind:a,at_stp:5}]", ["no key 'at_stp'", "did you mean 'at_step'"]),
        ("faults.schedule=[{kind:a,at_step:x}]", ["faults.schedule[0].at_step must be a whole"]),
        ("checkpoint.remote=/mnt/x", ["checkpoint.remote: '/mnt/x' is no place for checkpoints"]),
        ("no-override", ["is not an override"]),
    ],
)
def test_mistakes_are_one_sentence(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([override])
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["faults=kill_rank", "faults.at_step=5", "faults.at_s=1"], "at_step and at_s"),
        (["launch.local_nodes=2", "launch.nnodes=3"], "leave one of them out"),
        (["launch.nnodes=2", "launch.node_rank=2"], "must be below"),
        (["launch.node_rank=3"], "launch.node_rank=3 must be below launch.nnodes=1"),
        (["launch.local_nodes=2", "launch.node_rank=1"], "must be below launch.nnodes=1"),
        (["launch.spares=-1"], "launch.spares must be at least 0"),
        (
            ["launch.nnodes=2", "launch.spares=1", "launch.node_rank=3"],
            r"must be below launch.nnodes=2 \+ launch.spares=1",
        ),
        (["launch.local_nodes=2", "launch.spares=1", "launch.node_rank=1"], "must be below"),
    ],
)
def test_contradictions(overrides: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        resolve(overrides)


def test_a_spare_of_several_hosts_has_a_rank_beyond_theirs() -> None:
    config = resolve(["launch.nnodes=2", "launch.spares=1", "launch.node_rank=2"])
    assert config.launch.node_rank == 2


@pytest.mark.parametrize("token", ["a=b", "launch.nnodes=2", "+x=1", "~x=", "faults.schedule=[]"])
def test_overrides_are_recognised(token: str) -> None:
    assert is_override(token)


def test_a_path_with_an_equals_sign_reads_as_an_override() -> None:
    assert is_override("dir/a=b.py")  # such a script needs `--` before it


@pytest.mark.parametrize("token", ["train.py", "--lr=3", "./a=b.py", "=", "1=2", ""])
def test_other_tokens_are_not(token: str) -> None:
    assert not is_override(token)


@pytest.mark.parametrize(
    "others", [["faults.schedule=[{"], ["checkpoint.remot=s3://key:other/secret@bucket/run"]]
)
def test_no_mistake_shows_the_secret_of_another_override(others: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(["checkpoint.remote=s3://key:secret@bucket/run", *others])
    assert "secret" not in str(caught.value)
    assert "key:" not in str(caught.value)
