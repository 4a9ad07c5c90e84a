"""Durable versions with something to compress, and what to compare them by."""

from __future__ import annotations

import struct
from pathlib import Path

from image_samples import content, make_identity

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.image import ImageWriter
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.checkpoint.manifest import DurableVersion, read_manifest
from ftrain.comms.protocol.messages import Share, VersionId

SMALL = b"random numbers and counters" * 10


def weights(nbytes: int, seed: int) -> bytes:
    """float32 numbers below 1, whose exponents repeat as those of real weights do."""
    noise = content(nbytes // 4, seed)
    return b"".join(struct.pack("<f", 0.03 * (byte - 127.3) / 255) for byte in noise)


def save(
    store: DurableStore,
    fence: int,
    step: int,
    *,
    world_size: int = 2,
    numbers: int = 50_000,
    chunk_bytes: int = 65_536,
) -> DurableVersion:
    """A published version on disk: a tensor of weights and one of noise for each rank."""
    store.begin_fence(fence, "run", None)
    for rank in range(world_size):
        segments = lay_out(
            Segment(name, kind, shape, "0-1", 0, nbytes, Placement.whole(shape))
            for name, kind, shape, nbytes in (
                ("model/a.weight", "float32", (numbers,), 4 * numbers),
                ("model/b.noise", "uint8", (150_001,), 150_001),
            )
        )
        plan = ImagePlan(segments, (Share("0-1", 1, 0, 2),), 1000, chunk_bytes)
        buffer = bytearray(plan.total_bytes)
        identity = make_identity(step, rank, world_size, epoch=fence)
        writer = ImageWriter(buffer, plan, identity, collectives=42)
        writer.begin(SMALL)
        seed = step * 100 + rank
        for segment in segments:
            part = slice(segment.offset, segment.offset + segment.nbytes)
            made = weights if segment.dtype == "float32" else content
            writer.data[part] = made(segment.nbytes, seed)
        for chunk in range(writer.chunks):
            writer.finish_chunk(chunk)
        writer.seal()
        store.write_image(fence, VersionId(fence, step), rank, buffer)
    return read_manifest(store.publish_written(fence, VersionId(fence, step), "run", world_size))


def segments_of(folder: Path) -> dict[str, bytes]:
    """Every segment file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.seg"))}


def names_in(folder: Path) -> set[str]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
