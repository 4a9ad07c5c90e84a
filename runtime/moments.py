"""What optimizers will keep for their parameters, before their first step has made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.optim.optimizer as optimizers

from ftrain.runtime.group import local_part

_SHAPE = (2, 3)  # of a parameter to try with, like nothing that is no moment


def is_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is a ZeroRedundancyOptimizer: each rank keeps the moments of its own parameters,
    in an optimizer inside of this one (ZeRO-1)."""
    return hasattr(optimizer, "consolidate_state_dict")


def kept_by(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """What it keeps for its parameters on this rank: the live dictionary."""
    inner: Any = optimizer
    found: dict[Any, Any] = inner.optim.state if is_zero(optimizer) else optimizer.state
    return found


def moments_ahead(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[torch.Tensor, str, torch.Tensor]]:
    """Parameter, key and tensor (on the device ``meta``, where it takes no memory) of what the
    first step will add to the optimizer's state, as far as that can be known: of torch's own
    kinds."""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return  # to make another one of it may have any effect
    for group in optimizer.param_groups:
        waiting = [p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)]
        for dtype in {parameter.dtype for parameter in waiting}:
            made = _state_after_a_step(optimizer, group, dtype)
            for parameter in waiting:
                if parameter.dtype is dtype:
                    for key, value in made.items():
                        yield parameter, key, _like(value, parameter)


def _state_after_a_step(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What an optimizer of this kind keeps for a small parameter: moments and plain numbers."""
    if getattr(optimizers, "_global_optimizer_pre_hooks", None) or getattr(
        optimizers, "_global_optimizer_post_hooks", None
    ):
        return {}  # the script's; they would take this step for one of training
    parameter = torch.zeros(_SHAPE, dtype=dtype, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    options = {**group, "params": [parameter]}
    if "capturable" in options:
        options["capturable"] = False  # that is for other devices
    kind: Any = type(optimizer)
    try:
        trial = kind([options])
        trial.step()
    except Exception:  # whatever this kind or these options want that is not here
        return {}
    return {
        str(key): value
        for key, value in trial.state[parameter].items()
        if isinstance(value, torch.Tensor) and tuple(value.shape) in ((), _SHAPE)
    }


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    shape = tuple(local_part(parameter).shape) if value.dim() else ()
    return torch.empty(shape, dtype=value.dtype, device="meta")
