"""Gradients of one optimizer's parameters, packed into a few flat tensors to travel in.

A parameter's own ``grad`` keeps what backward left there until the average is known: so an average
that was undone is begun anew by packing once more, and costs no second copy of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ftrain.runtime.group import local_part

BUCKET_BYTES = 25 * 1024 * 1024  # as DDP's


class Bucket:
    """Some parameters' gradients, one dtype, in one flat tensor; behind them ``words`` numbers of
    whoever sends it."""

    def __init__(
        self, parameters: Sequence[torch.Tensor], words: int = 0, dtype: torch.dtype | None = None
    ) -> None:
        self.parameters = list(parameters)
        sizes = [local_part(parameter).numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes) + words, dtype=dtype or parameters[0].dtype)
        *views, self.words = torch.split(self.flat, [*sizes, words])
        self._views = [
            view.view(local_part(parameter).shape)
            for view, parameter in zip(views, parameters, strict=True)
        ]

    def pack(self) -> None:
        """Copy the gradients in; 0 where there is none."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(local_part(parameter.grad))

    def unpack(self, weight: float, wanted: Sequence[bool]) -> None:
        """Make the sum over all members the gradients, divided by ``weight``; where nobody had one
        (not ``wanted``) there stays none."""
        for parameter, view, has in zip(self.parameters, self._views, wanted, strict=True):
            if not has:
                parameter.grad = None
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.div(view, weight, out=local_part(parameter.grad))


def make_buckets(
    parameters: Iterable[torch.Tensor], words: int, bucket_bytes: int = BUCKET_BYTES
) -> list[Bucket]:
    """Buckets of parameters that need gradients, last ones first, as backward makes them.

    The last one has room for ``words`` numbers, and one for each parameter.
    """
    groups = _groups(parameters, bucket_bytes)
    words += sum(map(len, groups))
    if not groups or groups[-1][0].dtype is not torch.float32:
        groups.append([])
    last = Bucket(groups.pop(), words, torch.float32)
    return [*map(Bucket, groups), last]


def _groups(parameters: Iterable[torch.Tensor], bucket_bytes: int) -> list[list[torch.Tensor]]:
    groups: list[list[torch.Tensor]] = []
    pending: dict[torch.dtype, list[torch.Tensor]] = {}
    nbytes: dict[torch.dtype, int] = {}
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        dtype, size = parameter.dtype, local_part(parameter).numel() * parameter.element_size()
        if pending.get(dtype) and nbytes[dtype] + size > bucket_bytes:
            groups.append(pending.pop(dtype))
        if dtype not in pending:
            pending[dtype], nbytes[dtype] = [], 0
        pending[dtype].append(parameter)
        nbytes[dtype] += size
    return groups + list(pending.values())
