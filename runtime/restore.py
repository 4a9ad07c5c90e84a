"""From images back into live tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ftrain.checkpoint.codec import decode_tree
from ftrain.checkpoint.image import ImageReader, Segment
from ftrain.checkpoint.tensors import StateTensor, tensor_bytes
from ftrain.comms.errors import CorruptionError, RestoreError, StateError
from ftrain.runtime.state import TrainingState


def choose_images(
    keys: Iterable[str], images: Sequence[ImageReader]
) -> tuple[list[tuple[ImageReader, frozenset[str]]], list[str]]:
    """For each share key, the images of one node that together hold all its parts.

    Two nodes may have split the same bytes differently, so parts of one node only are combined.
    Returns the images with the keys to be read from each, and the keys that no node has whole.
    """
    parts: dict[tuple[str, int], dict[int, ImageReader]] = {}
    counts: dict[tuple[str, int], int] = {}
    for image in images:
        if image.whole:
            for share in image.shares:
                parts.setdefault((share.key, share.node), {})[share.part] = image
                counts[share.key, share.node] = share.parts
    chosen: dict[int, tuple[ImageReader, set[str]]] = {}
    missing = []
    for key in dict.fromkeys(keys):
        nodes = [at for at, held in parts.items() if at[0] == key and len(held) == counts[at]]
        if not nodes:
            missing.append(key)
            continue
        for image in parts[nodes[0]].values():
            chosen.setdefault(id(image), (image, set()))[1].add(key)
    return [(image, frozenset(found)) for image, found in chosen.values()], missing


def restore_tensors(
    tensors: Sequence[StateTensor],
    images: Iterable[tuple[ImageReader, frozenset[str]]],
    *,
    verify: bool = True,
) -> int:
    """Fill ``tensors`` from the segments of ``images`` under the given share keys; returns bytes.

    ``images`` comes from :func:`choose_images`.  Every byte of every tensor has to be there.  With
    ``verify``, a chunk's digest is checked before its bytes are used.

    Raises:
        StateError: a tensor has another shape or type in the images, or bytes are missing.
        CorruptionError: a chunk does not match its digest.
    """
    wanted = {(tensor.name, tensor.share): tensor.tensor for tensor in tensors}
    by_name = {tensor.name: tensor for tensor in tensors}
    filled: dict[tuple[str, str], set[tuple[int, int]]] = {key: set() for key in wanted}
    copied = 0
    for image, keys in images:
        checked: set[int] = set()
        for segment in image.segments:
            key = (segment.name, segment.share)
            if segment.share not in keys:
                continue
            _check_known(segment, by_name)
            span = (segment.start, segment.nbytes)
            if key not in wanted or span in filled[key]:
                continue
            _check_shape(segment, wanted[key])
            if verify:
                for chunk in image.chunks_of(segment):
                    if chunk not in checked:
                        image.verify_chunk(chunk)
                        checked.add(chunk)
            _copy_in(wanted[key], segment, image.segment_bytes(segment))
            filled[key].add(span)
            copied += segment.nbytes
    for (name, share), tensor in wanted.items():
        have = sum(nbytes for _, nbytes in filled[name, share])
        if have != tensor_bytes(tensor):
            raise StateError(
                f"{name} has {have} of its {tensor_bytes(tensor)} bytes in the version to restore: "
                "was the run made by another model or another number of ranks?"
            )
    return copied


def restore_from(
    state: TrainingState,
    images: list[ImageReader],
    rank: int,
    *,
    verify: bool,
    more: Callable[[], list[ImageReader]] = list,
) -> dict[str, Any]:
    """Put a version back: small state from the rank's own image, tensors from whoever has them.

    ``more`` is asked for further images while something is missing.

    Raises:
        StateError: the version is not of this script's model.
        RestoreError: nobody has some part of it.
        CorruptionError: bytes of it are damaged.
    """
    mine = None
    while mine is None:
        mine = next((image for image in images if image.identity.rank == rank), None)
        if mine is None:
            further = more()
            if not further:
                raise RestoreError(f"no copy of rank {rank}'s own state is left for this version")
            images = [*images, *further]
    small = decode_tree(mine.small)
    if not isinstance(small, dict):
        raise CorruptionError(f"{mine.where} holds no training state")
    state.load_small(small["state"])
    tensors = state.layout().tensors
    keys = [tensor.share for tensor in tensors]
    chosen, missing = choose_images(keys, images)
    while missing and (further := more()):
        images = [*images, *further]
        chosen, missing = choose_images(keys, images)
    if missing:
        raise RestoreError(f"no node holds every part of what ranks {missing[0]} have in common")
    restore_tensors(tensors, chosen, verify=verify)
    return small


def _check_known(segment: Segment, known: dict[str, StateTensor]) -> None:
    if segment.name not in known:
        raise StateError(
            f"the saved run holds {segment.name}, which this script does not have; use another "
            "run directory for another model"
        )


def _check_shape(segment: Segment, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if segment.shape != tuple(tensor.shape) or segment.dtype != dtype:
        raise StateError(
            f"{segment.name} is {list(segment.shape)} {segment.dtype} in the saved run and "
            f"{list(tensor.shape)} {dtype} here; use another run directory for another model"
        )


def _copy_in(tensor: torch.Tensor, segment: Segment, source: memoryview) -> None:
    if not tensor.is_cuda and tensor.is_contiguous():
        address = np.frombuffer(source, dtype=np.uint8).ctypes.data
        ctypes.memmove(tensor.data_ptr() + segment.start, address, segment.nbytes)
        return
    with torch.no_grad():
        whole = tensor.contiguous()
        flat = whole.reshape(-1).view(torch.uint8)
        flat[segment.start : segment.start + segment.nbytes].copy_(
            torch.from_numpy(np.frombuffer(source, dtype=np.uint8).copy())
        )
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
