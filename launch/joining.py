"""How another host's launch joins the job: what must be equal, and what must be shared.

The first message of a joining front carries what has to be the same on every host; the coordinator
answers with the one difference, or with the name of a file that it put into the checkpoint
directory.  A host that does not see the file writes its durable versions where nobody finds them.
"""

from __future__ import annotations

import asyncio
import os
import time
from importlib import metadata
from pathlib import Path

import msgspec

import ftrain
from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import JoinAnswer, JoinRequest

# What may differ from host to host: each one's own place, addresses, folders, output and size.
_OWN_KEYS = frozenset(
    (
        *("launch.node_rank", "launch.rdzv_endpoint", "launch.bind", "launch.host"),
        *("launch.run_dir", "launch.log_dir", "launch.tee", "launch.redirects", "checkpoint.dir"),
        *("launch.preload", "launch.threads_per_rank", "launch.stop_grace_s"),
        # Only the coordinator's host copies, and the URI may hold secrets.
        *("checkpoint.remote", "checkpoint.remote_every_s", "checkpoint.remote_keep_last"),
        *("checkpoint.remote_keep_every", "checkpoint.remote_bytes_per_s_max"),
        *("checkpoint.remote_every_steps", "checkpoint.remote_end_s"),
        *("launch.join_timeout_s", "launch.rejoin_timeout_s", "snapshot.memory_share_max"),
        *("snapshot.rack", "snapshot.scrub_every_s", "snapshot.parity_bytes_per_s_max"),
    )
)
_OWN_GROUPS = ("events", "faults")
_SEEN_S = 3.0  # a network file system may show a new file late
_LOOK_AGAIN_S = 0.1


def is_spread(job: JobSpec) -> bool:
    """Whether the job's nodes are launched one by one, on hosts of their own."""
    return job.config.launch.nnodes > 1 and not job.config.launch.local_nodes


def join_request(job: JobSpec) -> JoinRequest:
    """What this host's launch says of itself."""
    groups = msgspec.to_builtins(job.config)
    facts = {
        "ftrain": ftrain.__version__,
        "torch": metadata.version("torch"),
        "the digest of the script": job.script_digest,
        "seed": str(groups.pop("seed")),
    }
    for group, values in groups.items():
        if group not in _OWN_GROUPS:
            facts |= {f"{group}.{name}": str(value) for name, value in values.items()}
    shared = {name: value for name, value in facts.items() if name not in _OWN_KEYS}
    return JoinRequest(job.config.launch.node_rank, tuple(sorted(shared.items())))


def difference(joining: JoinRequest, ours: JoinRequest) -> str:
    """What differs between the hosts, as one sentence for the one that joins; empty: nothing."""
    theirs, wanted = dict(joining.facts), dict(ours.facts)
    said = [
        f"{name} is {theirs.get(name, 'not known')} here and {wanted.get(name, 'not known')} there"
        for name in dict.fromkeys((*theirs, *wanted))
        if theirs.get(name) != wanted.get(name)
    ]
    if not said:
        return ""
    return (
        f"node {joining.node} differs from the host of the coordinator: {'; '.join(said)}: make it"
        " equal on every node"
    )


def leave_mark(job: JobSpec, launch: str) -> str:
    """Put this launch's file into the checkpoint directory; returns its name.

    Empty when there is nothing to find: no durable versions, or no room for a file.
    """
    if not (job.config.checkpoint.enabled and is_spread(job)):
        return ""
    folder = Path(job.config.checkpoint.dir)
    name = f"{job.run_id}@{launch}.launch"  # a new name: no host can have cached that it is absent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.launch"):
            if old.name.startswith(f"{job.run_id}@") and old.name != name:
                old.unlink(missing_ok=True)
        (folder / name).touch()
    except OSError:
        return ""
    return name


async def find_mark(job: JobSpec, answer: JoinAnswer) -> str:
    """Look for the coordinator's file; what is wrong as one sentence, empty when it is there."""
    folder = Path(job.config.checkpoint.dir)
    deadline_s = time.monotonic() + _SEEN_S
    while answer.mark and not os.path.exists(folder / answer.mark):  # False on any error
        if time.monotonic() > deadline_s:
            return (
                f"node {job.config.launch.node_rank} does not see the checkpoint directory of the"
                f" other hosts in {folder}: give every node the same directory on a shared file"
                " system with --run-dir or checkpoint.dir, or switch durable versions off with"
                " checkpoint=off"
            )
        await asyncio.sleep(_LOOK_AGAIN_S)
    return ""
