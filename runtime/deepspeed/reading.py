"""State dicts out of files: of ours, every byte compared with its digest; of torch's, no object
built that is not one of the few that DeepSpeed saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.image_plan import Segment
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.comms.errors import CorruptionError
from ftrain.runtime.deepspeed.tree import known_classes, unfold


def read_state(reader: SegmentReader, map_location: Any = None) -> Any:
    """The state dict in a file; beyond it one chunk is held in memory.

    Args:
        reader: of the file.
        map_location: as ``torch.load`` takes it; a function leaves the tensors on the CPU.

    Raises:
        CorruptionError: the file is damaged.
    """
    small = reader.small
    if len({segment.name for segment in reader.segments}) != len(reader.segments):
        raise CorruptionError(f"{reader.where} holds parts of a tensor: it is no file of DeepSpeed")
    tensors = {segment.name: _empty(segment, reader.where) for segment in reader.segments}
    targets = {
        name: tensor.reshape(-1).view(torch.uint8).numpy().data
        for name, tensor in tensors.items()
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
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return unfold(small, tensors, reader.where)


def read_torch_file(path: Path, map_location: Any = None) -> Any:
    """The state dict in a file that DeepSpeed's own engine wrote; raises CorruptionError."""
    try:
        with torch.serialization.safe_globals(list(known_classes())):
            return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise  # DeepSpeed looks for some files under two names
    except Exception as error:  # whatever a damaged file makes of torch's reader
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorruptionError(
            f"{path} can't be read as tensors and plain values ({first}): it is damaged, or holds "
            "objects of other kinds, which a script without ftrain.runtime.deepspeed.use() loads"
        ) from None


def _empty(segment: Segment, where: str) -> torch.Tensor:
    """Room for a tensor; no more is taken than the file has bytes for."""
    dtype = getattr(torch, segment.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CorruptionError(f"{where}: this torch has no {segment.dtype}")
    if (segment.start, segment.nbytes) != (0, segment.box.volume * item_bytes(segment.dtype)):
        raise CorruptionError(f"{where} holds a part of {segment.name} only")
    return torch.empty(segment.shape, dtype=dtype)


def _device(map_location: Any) -> torch.device | None:
    if isinstance(map_location, str | torch.device):
        device = torch.device(map_location)
        return None if device.type == "cpu" else device
    return None
