"""Adding up chunks: one thread, the interpreter lock released, results the same everywhere.

NumPy does what it has a fast kernel for.  Half precision goes to torch, in pieces that are too
small for torch to spread over threads, which would take cores from training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from ftrain.comms.errors import UsageError

_PIECE = 32768  # elements: torch's grain size


class Reduction(IntEnum):
    """How chunks are combined."""

    SUM = 1
    AVG = 2
    MIN = 3
    MAX = 4
    PROD = 5


_NUMPY = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
}
_HALVES = (torch.float16, torch.bfloat16)
_UFUNCS = {
    Reduction.SUM: np.add,
    Reduction.AVG: np.add,
    Reduction.MIN: np.minimum,
    Reduction.MAX: np.maximum,
    Reduction.PROD: np.multiply,
}
_TORCH: dict[Reduction, Callable[..., torch.Tensor]] = {
    Reduction.SUM: torch.add,
    Reduction.AVG: torch.add,
    Reduction.MIN: torch.minimum,
    Reduction.MAX: torch.maximum,
    Reduction.PROD: torch.mul,
}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One reduction of one dtype.

    Raises:
        UsageError: a dtype that can't be reduced, or an average of integers.
    """

    reduction: Reduction
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in _NUMPY and self.dtype not in _HALVES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*_NUMPY, *_HALVES))
            raise UsageError(f"tensors of {self.dtype} can't be reduced; these can: {known}")
        if self.reduction is Reduction.AVG and not self.dtype.is_floating_point:
            raise UsageError(f"integers ({self.dtype}) have no average: reduce them with 'sum'")

    def combine(self, left: memoryview, right: memoryview, target: memoryview) -> None:
        """``target`` becomes both combined, ``left`` first; equally long, whole elements."""
        if not target.nbytes:
            return
        if self.dtype in _NUMPY:
            kind = _NUMPY[self.dtype]
            views = [np.frombuffer(view, kind) for view in (left, right, target)]
            with np.errstate(all="ignore"):  # inf and nan are values like others
                _UFUNCS[self.reduction](views[0], views[1], out=views[2])
            return
        tensors = [torch.frombuffer(view, dtype=self.dtype) for view in (left, right, target)]
        for start in range(0, tensors[0].numel(), _PIECE):
            a, b, c = (tensor[start : start + _PIECE] for tensor in tensors)
            _TORCH[self.reduction](a, b, out=c)

    def finish(self, result: memoryview, ranks: int) -> None:
        """Make the result of all ranks what was asked for."""
        if self.reduction is not Reduction.AVG or not result.nbytes:
            return
        if self.dtype in _NUMPY:
            values = np.frombuffer(result, _NUMPY[self.dtype])
            np.divide(values, values.dtype.type(ranks), out=values)
            return
        tensor = torch.frombuffer(result, dtype=self.dtype)
        for start in range(0, tensor.numel(), _PIECE):
            tensor[start : start + _PIECE].div_(ranks)
