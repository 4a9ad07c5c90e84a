"""Images for the tests, made with the real writer."""

from __future__ import annotations

import random

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageWriter
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.comms.protocol.messages import Share, VersionId

CHUNK_BYTES = 4096
SMALL = b"random numbers and counters"
TOPOLOGY = "0123456789abcdef" * 2


def make_identity(
    step: int = 7, rank: int = 0, world_size: int = 2, run_id: str = "run", epoch: int = 3
) -> ImageIdentity:
    """An identity that differs in what the test is about."""
    return ImageIdentity(run_id, TOPOLOGY, VersionId(epoch, step), rank, world_size, 1, 12345)


def make_plan(sizes: tuple[int, ...] = (100, 5000, 3000), small_bytes_max: int = 1000) -> ImagePlan:
    """Byte tensors of these sizes, in two shares."""
    segments = lay_out(
        Segment(
            f"model/{i}.weight",
            "uint8",
            (size + i,),
            "0-1" if i % 2 else "0",
            i,
            size,
            Placement.whole((size + i,)),
        )
        for i, size in enumerate(sizes)
    )
    shares = (Share("0-1", 1, 0, 2), Share("0", 1, 0, 1))
    return ImagePlan(segments, shares, small_bytes_max, CHUNK_BYTES)


def content(nbytes: int, seed: int = 0) -> bytes:
    """Reproducible bytes."""
    return random.Random(seed).randbytes(nbytes)


def make_image(
    identity: ImageIdentity | None = None,
    plan: ImagePlan | None = None,
    small: bytes = SMALL,
    seed: int = 0,
) -> bytearray:
    """A sealed image with random data."""
    plan = plan or make_plan()
    buffer = bytearray(plan.total_bytes)
    writer = ImageWriter(buffer, plan, identity or make_identity(), collectives=42)
    writer.begin(small)
    writer.data[:] = content(len(writer.data), seed)
    for chunk in range(writer.chunks):
        writer.finish_chunk(chunk)
    writer.seal()
    return buffer
