"""The tensors of a version, and which part of them each rank captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod

import torch

from ftrain.checkpoint.boxes import Box, Placement
from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.comms.protocol.messages import Share

_PART_ALIGNMENT_BYTES = 4096


class Changes(Enum):
    """When a tensor changes, as far as the Session knows."""

    IN_STEP = "inside the step of a registered optimizer"
    ANYTIME = "whenever the script writes to it"
    NEVER = "it is frozen"


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor that is part of every version.

    ``tensor`` is the rank's local shard (any device), which lies at ``place`` in the global tensor;
    ``share`` names the ranks that hold the same bytes (see
    :class:`~ftrain.comms.protocol.messages.Share`).
    """

    name: str
    tensor: torch.Tensor
    share: str
    place: Placement
    changes: Changes = Changes.IN_STEP

    @staticmethod
    def whole(
        name: str, tensor: torch.Tensor, share: str, changes: Changes = Changes.IN_STEP
    ) -> StateTensor:
        """One that the rank has all of."""
        return StateTensor(name, tensor, share, Placement.whole(tuple(tensor.shape)), changes)

    @property
    def dtype(self) -> str:
        """Type of the elements, as files name it."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def box(self) -> Box:
        """The part of the global tensor that ``tensor`` is."""
        return Box(self.place.origin, tuple(self.tensor.shape))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Size of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def tensor_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's elements in order: in place on the CPU, else of a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if not plain.numel():
        return memoryview(b"")
    return plain.view(torch.uint8).numpy().data.cast("B")


def tensor_in(
    memory: memoryview, dtype: str, shape: tuple[int, ...], offset: int = 0
) -> torch.Tensor:
    """A tensor whose elements, and no others, are the bytes of ``memory`` from ``offset`` on."""
    kind = getattr(torch, dtype)
    if not prod(shape):
        return torch.empty(shape, dtype=kind)  # torch.frombuffer wants elements
    return torch.frombuffer(memory, dtype=kind, count=prod(shape), offset=offset).reshape(shape)


def plan_image(
    tensors: Sequence[StateTensor],
    share_of: Callable[[str], Share],
    small_bytes_max: int,
    chunk_bytes: int,
) -> ImagePlan:
    """What this rank captures: of every share, its part of the concatenated bytes (REFT).

    Frozen tensors come last, in chunks of their own.
    """
    by_key: dict[tuple[str, Changes], list[StateTensor]] = {}
    for kind in Changes:
        for tensor in tensors:
            if tensor.changes is kind:
                by_key.setdefault((tensor.share, kind), []).append(tensor)
    moving: list[Segment] = []
    frozen: list[Segment] = []
    shares = {key: share_of(key) for key, _ in by_key}
    for (key, kind), members in by_key.items():
        found = _segments_of(members, shares[key])
        (frozen if kind is Changes.NEVER else moving).extend(found)
    placed = lay_out(moving)
    if frozen:
        end = placed[-1].offset + placed[-1].nbytes if placed else 0
        placed += lay_out(frozen, -(-end // chunk_bytes) * chunk_bytes)
    return ImagePlan(placed, tuple(shares.values()), small_bytes_max, chunk_bytes)


def _segments_of(members: Sequence[StateTensor], share: Share) -> Iterator[Segment]:
    """One rank's part of these tensors, one behind the other."""
    total = sum(tensor_bytes(member.tensor) for member in members)
    first, last = (_bound(total, part, share.parts) for part in (share.part, share.part + 1))
    at = 0
    for member in members:
        size, item = tensor_bytes(member.tensor), item_bytes(member.dtype)
        # No element is cut in two, wherever the bound lies.
        start, stop = (min(max(bound - at, 0), size) // item * item for bound in (first, last))
        # One without elements has no bytes to restore, and is there for those who read it by name.
        empty = 0 in member.place.shape and share.part == 0
        if start < stop or empty:
            shape = tuple(member.tensor.shape)
            nbytes, place = stop - start, member.place
            yield Segment(member.name, member.dtype, shape, share.key, start, nbytes, place)
        at += size


def _bound(total: int, part: int, parts: int) -> int:
    if part == parts:
        return total
    return total * part // parts // _PART_ALIGNMENT_BYTES * _PART_ALIGNMENT_BYTES
