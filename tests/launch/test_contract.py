from __future__ import annotations

import os
from pathlib import Path

import pytest

from ftrain.comms.environment import rank_environment
from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import Formation, NodePlace, RestorePlan
from ftrain.configs.schema import FtrainConfig, LaunchConfig
from ftrain.launch.contract import (
    own_environment,
    place_of,
    seats,
    server_environment,
    shared_environment,
    threads_per_rank,
)

FORMATION = Formation(
    epoch=7,
    places=(
        NodePlace(0, 4, 0, 2, "10.0.0.1", "10.0.0.1:5"),
        NodePlace(1, 9, 2, 2, "10.0.0.2", "10.0.0.2:5"),
    ),
    store_host="10.0.0.1",
    store_port=4321,
    restore=RestorePlan("fresh"),
    restarts=3,
)


def make_job(tmp_path: Path, **launch: object) -> JobSpec:
    return JobSpec(
        run_id="run",
        secret="00" * 16,
        run_dir=str(tmp_path),
        config=FtrainConfig(launch=LaunchConfig(nnodes=2, nproc_per_node=2, **launch)),
        argv=("train.py",),
        module=False,
        script_digest="0" * 32,
        coordinator="127.0.0.1:1",
        front_pid=os.getpid(),
    )


def test_environment_is_torchruns(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    place = place_of(FORMATION, 1)
    seat = seats(job, FORMATION, place)[1]
    shared = shared_environment(job, FORMATION, place, smp_socket="/s", threads=2)
    context = shared["FTRAIN_CONTEXT"]
    values = {**shared, **own_environment(seat)}
    error_file = str(tmp_path / "logs" / "run" / "attempt_7" / "3" / "error.json")
    assert {name: values[name] for name in values if name != "FTRAIN_CONTEXT"} == {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4321",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_NAME": "default",
        "ROLE_RANK": "3",
        "ROLE_WORLD_SIZE": "4",
        "TORCHELASTIC_RESTART_COUNT": "3",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "run",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": error_file,
        "OMP_NUM_THREADS": "2",
    }
    read = rank_environment(values)
    assert (read.rank, read.local_rank, read.node) == (3, 1, 1)
    assert read.context is not None
    assert read.context.formation == FORMATION
    assert read.context.incarnation == 9
    assert job.secret in context


def test_a_node_without_a_place_is_an_error() -> None:
    with pytest.raises(LookupError, match="node 5 has no place in epoch 7"):
        place_of(FORMATION, 5)


def test_spares_are_no_nodes_of_the_ranks(tmp_path: Path) -> None:
    job = make_job(tmp_path, local_nodes=2, spares=1)
    assert (job.nodes, job.all_nodes, job.local_agents) == (2, 3, 3)
    job = make_job(tmp_path, spares=2)  # on hosts of their own
    assert (job.nodes, job.all_nodes, job.local_agents) == (2, 4, 1)


def test_threads_are_a_fair_share(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(make_job(tmp_path)) == max(1, cores // 2)
    assert threads_per_rank(make_job(tmp_path, local_nodes=2)) == max(1, cores // 4)
    assert threads_per_rank(make_job(tmp_path, threads_per_rank=5)) == 5
    assert server_environment({"A": "b"}, 5) == {
        "A": "b",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "OMP_NUM_THREADS": "5",
        "MKL_NUM_THREADS": "5",
        "OPENBLAS_NUM_THREADS": "1",
    }
