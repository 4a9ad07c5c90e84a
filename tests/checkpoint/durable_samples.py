"""Durable versions for the tests, made with the real store."""

from __future__ import annotations

from image_samples import make_identity, make_image

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import DurableVersion, read_manifest
from ftrain.checkpoint.segment_reader import Scratch
from ftrain.comms.protocol.messages import VersionId


def save(
    store: DurableStore, fence: int, step: int, world_size: int = 2, run_id: str = "run"
) -> DurableVersion:
    """Write and publish a version with random data, of a run that began in ``fence``."""
    if fence not in {record.fence for record in store.fence_files()}:
        store.begin_fence(fence, run_id, None)
    for rank in range(world_size):
        identity = make_identity(step, rank, world_size, run_id, epoch=fence)
        image = make_image(identity, seed=step * 10 + rank)
        store.write_image(fence, VersionId(fence, step), rank, image)
    return read_manifest(store.publish_written(fence, VersionId(fence, step), run_id, world_size))


def data_of(version: DurableVersion, rank: int) -> bytes:
    """A rank's data, every byte of its file verified."""
    reader = version.open(rank)
    try:
        reader.verify()
        scratch = Scratch()
        return b"".join(bytes(reader.read(chunk, scratch)) for chunk in range(reader.chunks))
    finally:
        reader.close()


def files(store: DurableStore) -> set[str]:
    return {
        str(path.relative_to(store.directory))
        for path in store.directory.rglob("*")
        if path.is_file() and path.name != "fence.json"
    }
