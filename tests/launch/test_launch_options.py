"""The command line of ``ftrain launch``, as a table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ftrain.comms.errors import UsageError
from ftrain.launch.options import EXAMPLES, parse_launch
from ftrain.launch.resolve import resolve


@pytest.mark.parametrize(
    ("line", "overrides", "argv"),
    [
        ("train.py", [], ["train.py"]),
        ("train.py --lr 0.1 a=b -- c", [], ["train.py", "--lr", "0.1", "a=b", "--", "c"]),
        ("seed=1 train.py seed=2", ["seed=1"], ["train.py", "seed=2"]),
        ("--nproc-per-node 2 t.py", ["launch.nproc_per_node=2"], ["t.py"]),
        ("--nproc_per_node=2 t.py", ["launch.nproc_per_node=2"], ["t.py"]),
        ("seed=1 --nnodes 2:2 t.py", ["launch.nnodes=2", "seed=1"], ["t.py"]),
        ("--local_nodes=3 t.py", ["launch.local_nodes=3"], ["t.py"]),
        ("--local-nodes 2 --spares 1 t.py", ["launch.local_nodes=2", "launch.spares=1"], ["t.py"]),
        ("-- a=b.py x", [], ["a=b.py", "x"]),
        ("seed=1 -- seed=2", ["seed=1"], ["seed=2"]),
        ("-r 0:1,1:2 t.py", ["launch.redirects=0:1,1:2"], ["t.py"]),
        ("-t3 t.py", ["launch.tee=3"], ["t.py"]),
        ("--tee=0 --redirects 3 t.py", ["launch.redirects=3", "launch.tee=0"], ["t.py"]),
        ("--rdzv-id 7 t.py", ["launch.run_id=7"], ["t.py"]),
        ("--rdzv-backend ftrain t.py", [], ["t.py"]),
        ("--rdzv-endpoint h:5 t.py", ["launch.rdzv_endpoint=h:5"], ["t.py"]),
        ("--rdzv-endpoint h t.py", ["launch.rdzv_endpoint=h:29400"], ["t.py"]),
        ("--master-addr h t.py", ["launch.rdzv_endpoint=h:29500"], ["t.py"]),
        ("--master-port 5 t.py", ["launch.rdzv_endpoint=127.0.0.1:5"], ["t.py"]),
        ("--master-addr ::1 t.py", ["launch.rdzv_endpoint=[::1]:29500"], ["t.py"]),
        ("--standalone --rdzv-endpoint h:5 t.py", [], ["t.py"]),
        ("--local-addr 10.0.0.1 t.py", ["launch.host=10.0.0.1"], ["t.py"]),
        ("--max-restarts 0 t.py", ["launch.max_restarts=0"], ["t.py"]),
        (
            "--nnodes 2 --node-rank 1 --log-dir /x t.py",
            ["launch.nnodes=2", "launch.node_rank=1", "launch.log_dir=/x"],
            ["t.py"],
        ),
        ("--run-dir /r t.py", ["launch.run_dir=/r"], ["t.py"]),
    ],
)
def test_accepted(line: str, overrides: list[str], argv: list[str]) -> None:
    request = parse_launch(line.split())
    assert sorted(request.overrides) == sorted(overrides)
    assert list(request.argv) == argv
    assert not request.module
    resolve(request.overrides)


def test_module() -> None:
    request = parse_launch(["-m", "package.train", "-m", "x"])
    assert request.module
    assert request.argv == ("package.train", "-m", "x")


def test_foreign_backend_is_noted() -> None:
    (note,) = parse_launch(["--rdzv-backend=c10d", "t.py"]).notes
    assert "ftrain's own" in note


@pytest.mark.parametrize("word", ["cpu", "auto"])
def test_ranks_by_word(word: str) -> None:
    if word == "auto" and any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd")):
        pytest.skip("this machine has GPUs")
    request = parse_launch(["--nproc-per-node", word, "t.py"])
    assert request.overrides == (f"launch.nproc_per_node={os.cpu_count()}",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--nnodes 1:4 t.py", ["--nnodes 1:4", "fixed number", "--nnodes 4"]),
        ("--nnodes 0 t.py", ["--nnodes", "at least 1"]),
        ("--nnodes two t.py", ["--nnodes", "'two'"]),
        ("--nproc-per-node 0 t.py", ["--nproc-per-node", "at least 1", "'0'"]),
        ("--nproc-per-node -1 t.py", ["--nproc-per-node"]),
        ("--nproc-per-node x t.py", ["--nproc-per-node", "auto, cpu or gpu", "'x'"]),
        ("--max-restarts x t.py", ["--max-restarts", "'x'"]),
        ("--rdzv-backend etcd t.py", ["etcd", "leave it out"]),
        ("--rdzv-conf a=b t.py", ["--rdzv-conf", "leave it out"]),
        ("--rdzv_conf=a=b t.py", ["--rdzv-conf", "leave it out"]),
        ("--monitor-interval 5 t.py", ["--monitor-interval", "at once"]),
        ("--no-python t.sh", ["--no-python", "Python"]),
        ("--shutdown-timeout=9 t.py", ["launch.stop_grace_s"]),
        ("--nproc-per-nod 2 t.py", ["no option --nproc-per-nod", "did you mean --nproc-per-node"]),
        ("--nproc 2 t.py", ["no option --nproc; did you mean --nproc-per-node?"]),
        ("--nodes 2 t.py", ["no option --nodes", "did you mean --nnodes?"]),
        ("--bogus-thing t.py", ["no option --bogus-thing", "--help"]),
        (
            "--steps 2 t.py",
            ["no option --steps; the script's own options come after the script; see"],
        ),
        ("-z t.py", ["-z"]),
        ("--tee", ["--tee", "argument"]),
        ("-m", ["-m needs the name of a module"]),
        ("--standalone --nnodes 2 t.py", ["--standalone", "--local-nodes"]),
        ("--nnodes 2 launch.nnodes=3 t.py", ["--nnodes", "launch.nnodes=3", "leave one"]),
        ("--cfg all t.py", ["--cfg", "job"]),
    ],
)
def test_refused_in_one_sentence(line: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_launch(line.split())
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_help_explains_by_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_launch(["--help"])
    shown = capsys.readouterr().out
    assert EXAMPLES in shown
    assert "faults      chaos, hang_rank" in shown
    lines = [line.partition("(")[0] for line in EXAMPLES.splitlines()]
    examples = [line.split()[2:] for line in lines if line.startswith("  ftrain launch")]
    assert len(examples) >= 5
    for example in examples[1:]:  # the first is the scheme
        resolve(parse_launch(example).overrides)
