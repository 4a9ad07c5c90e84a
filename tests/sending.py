"""Copies of durable versions in an object store, made with the real store."""

from __future__ import annotations

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import DurableVersion
from ftrain.checkpoint.remote.store import RemoteStore, RemoteVersion


def send(remote: RemoteStore, version: DurableVersion) -> RemoteVersion:
    """Upload and publish a version from disk, as the records of the fences there say."""
    remote.begin_fences(DurableStore(version.path.parent.parent).fence_files())
    files = []
    for rank in range(version.world_size):
        reader = version.open(rank)
        files.append(remote.upload(version.fence, reader))
        reader.close()
    topology = version.manifest.topology
    return remote.publish(
        version.fence, version.version, "run", topology, version.world_size, files
    )
