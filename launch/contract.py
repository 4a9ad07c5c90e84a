"""What a rank finds in its environment: torchrun's contract, and ftrain's context on top."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ftrain.comms.environment import CONTEXT_VARIABLE, RankContext, encode_context
from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import Formation, NodePlace
from ftrain.launch.worker_messages import TELEMETRY_FD


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's place in a formation, as its node sees it."""

    rank: int
    local_rank: int
    directory: Path  # its logs and its error file

    @property
    def error_file(self) -> str:
        """Where an uncaught exception is described."""
        return str(self.directory / "error.json")


def place_of(formation: Formation, node: int) -> NodePlace:
    """The node's place; LookupError when it has none."""
    for place in formation.places:
        if place.node == node:
            return place
    raise LookupError(f"node {node} has no place in epoch {formation.epoch}")


def seats(job: JobSpec, formation: Formation, place: NodePlace) -> tuple[Seat, ...]:
    """The node's ranks, in order; their directories are as torchrun lays them out."""
    logs = Path(job.config.launch.log_dir or Path(job.run_dir, "logs"))
    attempt = logs / job.run_id / f"attempt_{formation.epoch}"
    ranks = range(place.first_rank, place.first_rank + place.local_world)
    return tuple(Seat(rank, local, attempt / str(rank)) for local, rank in enumerate(ranks))


def threads_per_rank(job: JobSpec) -> int:
    """Threads that each rank computes with: a fair share of this machine's cores."""
    launch = job.config.launch
    if launch.threads_per_rank > 0:
        return launch.threads_per_rank
    ranks = job.local_world * max(1, launch.local_nodes)
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def server_environment(base: dict[str, str], threads: int) -> dict[str, str]:
    """The worker server's environment: numeric libraries read it once, when they are loaded."""
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # A restarted rank touches all its memory anew in its first step: with huge pages (where the
    # kernel grants them on request) that is a fifth of the page faults. A user's tunables stay.
    tunables = base.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    # OpenBLAS starts its threads at import, and a process with threads can't be forked.
    return {**base, **limits, "OPENBLAS_NUM_THREADS": "1", "GLIBC_TUNABLES": tunables}


def shared_environment(
    job: JobSpec,
    formation: Formation,
    place: NodePlace,
    *,
    smp_socket: str,
    threads: int,
) -> dict[str, str]:
    """The variables that are equal in all ranks of a node."""
    context = RankContext(
        job_id=job.run_id,
        epoch=formation.epoch,
        incarnation=place.incarnation,
        node=place.node,
        formation=formation,
        config=job.config,
        run_dir=job.run_dir,
        smp_socket=smp_socket,
        telemetry_fd=TELEMETRY_FD,
        secret=job.secret,
        start_ns=time.monotonic_ns(),
    )
    world_size = formation.world_size
    return {
        "MASTER_ADDR": formation.store_host,
        "MASTER_PORT": str(formation.store_port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world),
        "GROUP_RANK": str(formation.places.index(place)),
        "GROUP_WORLD_SIZE": str(len(formation.places)),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RESTART_COUNT": str(formation.restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(job.config.launch.max_restarts),
        "TORCHELASTIC_RUN_ID": job.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(threads),
        CONTEXT_VARIABLE: encode_context(context),
    }


def own_environment(seat: Seat) -> dict[str, str]:
    """The variables that differ between the ranks of a node."""
    return {
        "RANK": str(seat.rank),
        "LOCAL_RANK": str(seat.local_rank),
        "ROLE_RANK": str(seat.rank),
        "TORCHELASTIC_ERROR_FILE": seat.error_file,
    }
