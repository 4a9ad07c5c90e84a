"""A file's state dict, put together again; every byte is compared with its digest."""

from __future__ import annotations

from typing import Any

import torch

from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.comms.errors import CorruptionError, StateError
from ftrain.runtime.deepspeed.tree import Skeleton, TensorPlace


def read_state(reader: SegmentReader, map_location: Any = None) -> Any:
    """The state dict in a file; beyond it one chunk is held in memory.

    Args:
        reader: of the file.
        map_location: as ``torch.load`` takes it; a function leaves the tensors on the CPU.

    Raises:
        CorruptionError: the file is damaged.
    """
    skeleton = Skeleton(reader.small, reader.where)
    _check(reader, skeleton.places)
    tensors = [_empty(place, reader.where) for place in skeleton.places]
    targets = {
        place.name: tensor.reshape(-1).view(torch.uint8).numpy().data
        for place, tensor in zip(skeleton.places, tensors, strict=True)
        if tensor.numel()
    }
    scratch = Scratch()
    for chunk in range(reader.chunks):
        data = reader.read(chunk, scratch)
        begin = chunk * reader.chunk_bytes
        for piece in reader.plan.pieces(chunk):
            at = piece.offset - begin
            target = targets[piece.segment.name]
            target[piece.start : piece.start + piece.nbytes] = data[at : at + piece.nbytes]
    device = _device(map_location)
    if device is not None:
        tensors = [tensor.to(device) for tensor in tensors]
    return skeleton.state(tensors)


def _check(reader: SegmentReader, places: tuple[TensorPlace, ...]) -> None:
    """CorruptionError unless the file holds each tensor once and whole: before memory is taken."""
    held = {s.name: s for s in reader.segments}
    try:
        fits = len(held) == len(reader.segments) and all(
            min(place.shape, default=1) >= 0
            and (
                (segment := held.pop(place.name, None)) is not None
                and (segment.dtype, segment.shape) == (place.dtype, place.shape)
                and (segment.start, segment.nbytes) == (0, place.nbytes)
                if place.nbytes
                else place.name not in held
            )
            for place in places
        )
    except StateError as error:
        raise CorruptionError(f"{reader.where}: {error}") from None
    if not fits or held:
        raise CorruptionError(f"{reader.where} holds other tensors than its state names")


def _empty(place: TensorPlace, where: str) -> torch.Tensor:
    dtype = getattr(torch, place.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CorruptionError(f"{where}: this torch has no {place.dtype}")
    return torch.empty(place.shape, dtype=dtype)


def _device(map_location: Any) -> torch.device | None:
    if isinstance(map_location, str | torch.device):
        device = torch.device(map_location)
        return None if device.type == "cpu" else device
    return None
