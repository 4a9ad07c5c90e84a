"""Tensors of somewhere else, on their way into a version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from ftrain.checkpoint.dtypes import item_bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """What there is, type and shape by name, and how to get one of them."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of all of them."""
        return sum(prod(shape) * item_bytes(dtype) for dtype, shape in self.tensors.values())
