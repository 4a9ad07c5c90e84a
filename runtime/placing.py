"""Copies bytes of an image to where they belong in live tensors, however those are laid out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from ftrain.checkpoint.boxes import Box, Copy, copies, disjoint, hull
from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.image_plan import Piece
from ftrain.checkpoint.scatter import Home, memory_at
from ftrain.checkpoint.tensors import StateTensor

Span = tuple[int, int]
"""First byte of a shard, and the one behind the last."""

_NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


@dataclass(slots=True)
class Target:
    """A live tensor that is being filled, and what it still lacks.

    It may come from one shard, as it was laid out when it was saved, or from several; ``gaps`` are
    what is missing of each shard met so far, in bytes of that shard, and not being read.
    """

    tensor: StateTensor
    item: int
    gaps: dict[Box, list[Span]] = field(default_factory=dict)
    broken: dict[Box, list[Span]] = field(default_factory=dict)  # found damaged somewhere
    live: torch.Tensor = field(init=False)  # contiguous; the tensor itself wherever that is
    box: Box = field(init=False)  # the part of the global tensor that is wanted
    memory: memoryview | None = field(init=False)  # of ``live``; None: on a device

    def __post_init__(self) -> None:
        """A tensor that is not contiguous is filled through a copy that is."""
        self.live = self.tensor.tensor.contiguous()
        self.box = self.tensor.box
        nbytes = self.live.numel() * self.item
        self.memory = None if self.live.is_cuda else memory_at(self.live.data_ptr(), nbytes)

    @staticmethod
    def of(tensor: StateTensor) -> Target:
        """Nothing of it is there."""
        return Target(tensor, item_bytes(tensor.dtype))

    @property
    def whole(self) -> bool:
        """Whether everything is there."""
        if len(self.gaps) == 1 and self.box in self.gaps:  # the common case: laid out as it was
            return not self.gaps[self.box]
        return self.covered and not any(self.gaps.values())

    @property
    def covered(self) -> bool:
        """Whether the shards met so far make up all of it."""
        parts = [common for box in self.gaps if (common := box.intersection(self.box))]
        return sum(part.volume for part in parts) == self.box.volume and disjoint(parts)

    @property
    def missing_bytes(self) -> int:
        """How much is missing, if shards are not counted that nobody has met."""
        known = sum(common.volume for box in self.gaps if (common := box.intersection(self.box)))
        gaps = sum(stop - start for spans in self.gaps.values() for start, stop in spans)
        return (self.box.volume - known) * self.item + gaps

    def claim(self, piece: Piece) -> list[Span]:
        """What of a piece's bytes is missing here, which nobody else is given from now on: bytes
        that were compared in place must not be written to again."""
        box = piece.segment.box
        gaps = self.gaps.get(box)
        if gaps is None:
            first, last = hull(box, self.box)
            gaps = [(first * self.item, last * self.item)] if first < last else []
        wanted = (piece.start, piece.start + piece.nbytes)
        if gaps == [wanted]:  # the common case: all of it, for the first time
            self.gaps[box] = []
            return [wanted]
        self.gaps[box] = _without(gaps, wanted)
        return _common(gaps, wanted)

    def give_back(self, box: Box, span: Span) -> None:
        """What was claimed is damaged there: it is missing as before."""
        self.gaps[box].append(span)
        self.broken.setdefault(box, []).append(span)

    def was_broken(self, box: Box, span: Span) -> bool:
        """Whether some of these bytes were damaged somewhere else."""
        return bool(self.broken) and bool(_common(self.broken.get(box, ()), span))

    def copies(self, box: Box, span: Span) -> list[Copy]:
        """How the bytes ``span`` of a shard get here."""
        return copies(box, span[0] // self.item, span[1] // self.item, self.box)

    def home(self, copy: Copy, first: int) -> Home | None:
        """Where the bytes of a copy belong, if they can lie there as they lie in the shard; byte
        ``first`` of the shard is the first one of the chunk."""
        if self.memory is None or copy.source_strides != (1,) or copy.target_strides != (1,):
            return None
        start = copy.target * self.item
        memory = self.memory[start : start + copy.shape[0] * self.item]
        return Home(copy.source * self.item - first, memory)

    def put(self, source: memoryview, first: int, copy: Copy) -> None:
        """Copy from a chunk, whose first byte is byte ``first`` of the shard, what has no home."""
        if self.memory is None:
            self._put_on_device(source, first, copy)
        else:
            self._put_strided(self.memory, source, first, copy)

    def finish(self) -> None:
        """Nothing more comes."""
        if self.live.data_ptr() != self.tensor.tensor.data_ptr():
            with torch.no_grad():
                self.tensor.tensor.copy_(self.live)

    def _put_strided(self, memory: memoryview, source: memoryview, first: int, copy: Copy) -> None:
        target = np.ndarray(
            copy.shape,
            _NUMPY[self.item],
            memory,
            copy.target * self.item,
            tuple(stride * self.item for stride in copy.target_strides),
        )
        target[...] = self._strided(source, first, copy)

    def _put_on_device(self, source: memoryview, first: int, copy: Copy) -> None:
        if copy.source_strides == (1,):  # pageable memory is copied once, by the driver
            start = copy.source * self.item - first
            plain = np.frombuffer(source, np.uint8, copy.shape[0] * self.item, start)
        else:
            plain = np.ascontiguousarray(self._strided(source, first, copy)).view(np.uint8)
        # By address, because torch warns of memory that it must not write to.
        memory = memory_at(plain.ctypes.data, plain.nbytes)
        host = torch.frombuffer(memory, dtype=self.live.dtype).reshape(copy.shape)
        with torch.no_grad():
            self.live.as_strided(copy.shape, copy.target_strides, copy.target).copy_(host)

    def _strided(self, source: memoryview, first: int, copy: Copy) -> np.ndarray:
        return np.ndarray(
            copy.shape,
            _NUMPY[self.item],
            source,
            copy.source * self.item - first,
            tuple(stride * self.item for stride in copy.source_strides),
        )


def _common(spans: Iterable[Span], with_: Span) -> list[Span]:
    start, stop = with_
    found = [(max(first, start), min(last, stop)) for first, last in spans]
    return [(first, last) for first, last in found if first < last]


def _without(spans: Iterable[Span], taken: Span) -> list[Span]:
    start, stop = taken
    rest = []
    for first, last in spans:
        rest += [(first, min(last, start)), (max(first, stop), last)]
    return [(first, last) for first, last in rest if first < last]
