from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.api import (
    RendezvousParameters,
    RendezvousTimeoutError,
)

from ftrain.launch.rendezvous import create_handler

SCRIPT = """
    import os, signal, sys, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    rank, restarts = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for step in range(5):
        value = torch.full((4,), float(rank))
        dist.all_reduce(value)
        if step == 2 and restarts == 0 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    with open(f"done{rank}-{restarts}", "w") as file:
        file.write(str(value[0].item()))
    dist.destroy_process_group()
"""


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=ftrain", *options]


def run_once(place: Path) -> None:
    place.mkdir()
    (place / "train.py").write_text(textwrap.dedent(SCRIPT))
    command = torchrun("--nproc-per-node=2", "--max-restarts=3", "train.py")
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    # on the first restart, and on no other
    assert sorted(p.name for p in place.glob("done*")) == ["done0-1", "done1-1"]
    assert (place / "done0-1").read_text() == "1.0"


@pytest.mark.slow
def test_sigkilled_rank_comes_back_on_the_first_restart(tmp_path: Path) -> None:
    run_once(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.soak
def test_a_sigkilled_rank_comes_back_every_time(tmp_path: Path) -> None:
    for number in range(5):
        run_once(tmp_path / f"run{number}")


@pytest.mark.slow
def test_two_agents_meet_at_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    port = 20000 + os.getpid() % 10000
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=x"]
    command = torchrun(*options, f"--rdzv-endpoint=127.0.0.1:{port}", "train.py")
    agents = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [agent.communicate(timeout=100)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    names = sorted(path.name for path in tmp_path.glob("done*"))
    assert [name[:5] for name in names] == ["done0", "done1"]


def parameters(nodes: str, endpoint: str = "", **more: object) -> RendezvousParameters:
    least, most = (int(word) for word in nodes.split(":"))
    return RendezvousParameters("ftrain", endpoint, "run", least, most, **more)


def test_every_round_has_a_fresh_store() -> None:
    handler = create_handler(parameters("1:1"))
    first, second = handler.next_rendezvous(), handler.next_rendezvous()
    assert (first.rank, first.world_size) == (second.rank, second.world_size) == (0, 1)
    assert first.bootstrap_store_info is not None
    assert second.bootstrap_store_info is not None
    assert first.bootstrap_store_info.master_port != second.bootstrap_store_info.master_port
    first.store.set("key", "1")
    assert not second.store.check(["key"])
    assert not handler.is_closed()
    assert handler.shutdown()
    assert handler.is_closed()


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed number"):
        create_handler(parameters("1:2"))
    with pytest.raises(ValueError, match="needs --rdzv-endpoint"):
        create_handler(parameters("2:2"))
    with pytest.raises(ValueError, match="not an address"):
        create_handler(parameters("2:2", "nowhere"))
    with pytest.raises(ValueError, match=r"that is the loopback address 127\.0\.0\.1"):
        create_handler(parameters("2:2", "127.1:0"))
    handler = create_handler(parameters("2:2", "127.0.0.1:0", join_timeout=0.1))
    with pytest.raises(RendezvousTimeoutError, match="1 of 2 nodes came"):
        handler.next_rendezvous()
    assert handler.num_nodes_waiting() == 0
