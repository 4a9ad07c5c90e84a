"""Small durable versions, written as a Session's ranks lay them out, for the tests of the CLI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.checkpoint.manifest import DurableVersion, read_manifest
from ftrain.checkpoint.tensors import tensor_view
from ftrain.comms.protocol.messages import Share, VersionId

TOPOLOGY = "0123456789abcdef" * 2
CHUNK_BYTES = 4096


def weights(step: int, rows: int = 400) -> dict[str, torch.Tensor]:
    """The model of a step: cut along its first dimension over the ranks, and a scalar."""
    generator = torch.Generator().manual_seed(step)
    return {
        "layer.weight": torch.randn(rows, 8, generator=generator),
        "layer.bias": torch.randn(rows, generator=generator).bfloat16(),
        "scale": torch.tensor(float(step)),
    }


def save(
    store: DurableStore,
    fence: int,
    step: int,
    world_size: int = 2,
    rows: int = 400,
    left_out: str = "",
) -> DurableVersion:
    """Publish the version of a step; rank 0 alone writes its part of ``left_out``."""
    tensors = weights(step, rows)
    buffers = {"model": {"seen": torch.tensor(step)}}
    layout = encode_tree({})
    state = {"layout": layout, "buffers": buffers, "groups": {}, "numbers": {}, "objects": {}}
    store.begin_fence(fence, "run", None)
    for rank in range(world_size):
        parts: dict[str, torch.Tensor] = {}
        segments = []
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            part, origin = tensor, (0,) * len(shape)
            if shape:
                each = -(-shape[0] // world_size)
                part = tensor[rank * each : (rank + 1) * each]
                origin = (rank * each, *origin[1:])
            if rank and (not shape or name == left_out):
                continue
            parts[f"model/{name}"] = part
            dtype, own = str(tensor.dtype).removeprefix("torch."), tuple(part.shape)
            place = Placement(shape, origin)
            segments.append(Segment(f"model/{name}", dtype, own, "0", 0, part.nbytes, place))
        plan = ImagePlan(lay_out(segments), (Share("0", 0, 0, 1),), 0, CHUNK_BYTES)
        version = VersionId(fence, step)
        identity = ImageIdentity("run", TOPOLOGY, version, rank, world_size, 0, os.getpid())
        store.write_tensors(fence, identity, plan, _views(parts), encode_tree({"state": state}))
    return read_manifest(store.publish_written(fence, VersionId(fence, step), "run", world_size))


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def _views(parts: dict[str, torch.Tensor]) -> Iterator[memoryview]:
    for part in parts.values():
        yield tensor_view(part)
