"""Writes outside the optimizer, found by comparing live memory with what was captured of it.

They can't be seen in ``Tensor._version`` (an EMA swap, ``.data``, an optimizer inside backward):
fused updates do not count it up.  So at every barrier a stretch of memory is compared, another one
each time.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftrain.checkpoint.copying import bytes_of
from ftrain.checkpoint.gpu_streams import Marks
from ftrain.checkpoint.image_plan import ImagePlan
from ftrain.checkpoint.tensors import Changes, StateTensor

# Without giving up the GIL: to get it back may take longer than it does.
_memcmp = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memcmp", ctypes.pythonapi)
)
_COMPARED_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a live tensor, and where they are in an image."""

    tensor: StateTensor
    start: int
    at: int
    nbytes: int

    @property
    def on_gpu(self) -> bool:
        """Whether it has to be fetched first."""
        return self.tensor.tensor.is_cuda

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.tensor.name

    def equals(self, image: memoryview) -> bool:
        """Whether the image has the bytes that are in memory now."""
        return _equal(image, self.at, self.tensor.tensor.data_ptr() + self.start, self.nbytes)


class Fetched:
    """The bytes of a stretch as they were in the course of a GPU's current stream."""

    def __init__(self, stretch: Stretch, home: torch.Tensor) -> None:
        """``home`` is page-locked memory, nobody else's until :meth:`equals` was called."""
        self.name = stretch.name
        self._home = home
        self._stretch = stretch
        part = bytes_of(stretch.tensor.tensor)[stretch.start : stretch.start + stretch.nbytes]
        home[: stretch.nbytes].copy_(part, non_blocking=True)
        self._arrived = Marks([part.device])

    def equals(self, image: memoryview) -> bool:
        """Whether the image has them; waits until they are here."""
        self._arrived.synchronize()
        return _equal(image, self._stretch.at, self._home.data_ptr(), self._stretch.nbytes)


class SpotChecks:
    """Which stretch is next, of the tensors of ``plan`` that change in the optimizer only."""

    def __init__(self, plan: ImagePlan, tensors: Sequence[StateTensor]) -> None:
        self._tensors = {t.name: t for t in tensors if t.changes is Changes.IN_STEP}
        self._segments = [s for s in plan.segments if s.name in self._tensors]  # the first ones
        self._offsets = [segment.offset for segment in self._segments]
        self._data_offset = plan.layout.data_offset
        self._cursor = 0
        self._home = torch.empty(0, dtype=torch.uint8)

    def next(self) -> Stretch | None:
        """The next one; None: it can't be compared."""
        if not self._segments:
            return None
        last = self._segments[-1]
        place = self._cursor * _COMPARED_BYTES % max(1, last.offset + last.nbytes)
        self._cursor += 1
        segment = self._segments[bisect_right(self._offsets, place) - 1]
        tensor = self._tensors[segment.name]
        here = tensor.tensor.device.type in ("cpu", "cuda")
        if not here or not tensor.tensor.is_contiguous():
            return None
        size = min(segment.nbytes, _COMPARED_BYTES)
        if not size:
            return None
        skip = min(place - segment.offset, segment.nbytes - size)
        return Stretch(
            tensor, segment.start + skip, self._data_offset + segment.offset + skip, size
        )

    def fetch(self, stretch: Stretch) -> Fetched:
        """Have the GPU send it before anything that is launched later."""
        if not len(self._home):
            self._home = torch.empty(_COMPARED_BYTES, dtype=torch.uint8, pin_memory=True)
        return Fetched(stretch, self._home)


def _equal(image: memoryview, at: int, address: int, nbytes: int) -> bool:
    copy = ctypes.addressof(ctypes.c_char.from_buffer(image, at))
    return not _memcmp(copy, address, nbytes)
