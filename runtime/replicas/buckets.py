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
    """Some parameters' gradients, one dtype, in one flat tensor."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = list(parameters)
        sizes = [local_part(parameter).numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype)
        self._views = [
            view.view(local_part(parameter).shape)
            for view, parameter in zip(torch.split(self.flat, sizes), parameters, strict=True)
        ]

    def pack(self) -> None:
        """Copy the gradients in; 0 where there is none."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(local_part(parameter.grad))

    def clear(self) -> None:
        """Bring nothing into the average."""
        self.flat.zero_()

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
    parameters: Iterable[torch.Tensor], bucket_bytes: int = BUCKET_BYTES
) -> list[Bucket]:
    """Buckets of parameters that need gradients, last ones first, as backward makes them."""
    buckets: list[Bucket] = []
    pending: dict[torch.dtype, list[torch.Tensor]] = {}
    nbytes: dict[torch.dtype, int] = {}
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        dtype, size = parameter.dtype, local_part(parameter).numel() * parameter.element_size()
        if pending.get(dtype) and nbytes[dtype] + size > bucket_bytes:
            buckets.append(Bucket(pending.pop(dtype)))
        if dtype not in pending:
            pending[dtype], nbytes[dtype] = [], 0
        pending[dtype].append(parameter)
        nbytes[dtype] += size
    return buckets + [Bucket(rest) for rest in pending.values()]
