"""Tensors of somewhere else, on their way into a version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.files import page_buffer
from ftrain.checkpoint.tensors import tensor_in


@dataclass(frozen=True, slots=True)
class Origin:
    """What there is, type and shape by name, and how to get one of them: what it holds may be gone
    when the next one is asked for."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of all of them."""
        return sum(map(_nbytes, self.tensors.values()))


class Reused:
    """Memory for one of these tensors, type and shape of each, used again for the next."""

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        self._nbytes = max(map(_nbytes, tensors), default=0)
        self._memory: memoryview | None = None  # until the first is wanted

    def tensor(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that may hold anything; what the one before holds is lost."""
        if self._memory is None:
            self._memory = page_buffer(self._nbytes)
        return tensor_in(self._memory, dtype, shape)


def _nbytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = tensor
    return prod(shape) * item_bytes(dtype)
