"""What an optimizer's first step makes is known before it, so that there is room for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ftrain.checkpoint.tensors import StateTensor, plan_image
from ftrain.comms.protocol.messages import Share
from ftrain.runtime.state import TrainingState

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"fused": True}),
    ("AdamW", {"lr": torch.tensor(0.01), "capturable": False}),
    ("Adam", {"amsgrad": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adagrad", {}),  # has its state from the beginning
    ("NAdam", {}),
    ("Adamax", {}),
    ("Rprop", {}),
]


def made(kind: type[Any], options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, TrainingState]:
    model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Linear(50, 7)).to(dtype)
    model[1].bias.requires_grad_(False)
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    optimizer = kind(groups, **options)
    return model, TrainingState({"model": model}, {"optimizer": optimizer}, {}, 0)


def step(model: Any, state: TrainingState) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    state.optimizers["optimizer"].step()


def rows(tensors: tuple[StateTensor, ...]) -> set[tuple[object, ...]]:
    return {(t.name, tuple(t.tensor.shape), t.dtype, t.share, t.place) for t in tensors}


def image_bytes(tensors: tuple[StateTensor, ...]) -> int:
    return plan_image(tensors, lambda key: Share(key, 0, 0, 1), 100, 4096).total_bytes


@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_after_the_first_step_is_foreseen(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model, state = made(getattr(torch.optim, name), options, dtype)
    random_before = torch.get_rng_state()
    expected = state.expected()
    assert torch.equal(torch.get_rng_state(), random_before)
    step(model, state)
    found = state.layout().tensors
    assert rows(expected) == rows(found)
    assert image_bytes(expected) == image_bytes(found)
    assert rows(state.expected()) == rows(found)  # nothing is ahead any more


class Odd(torch.optim.AdamW):
    """Somebody's own: to make another one of it might do anything."""

    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Odd.made += 1


def test_an_unknown_kind_is_left_alone() -> None:
    _, state = made(Odd, {}, torch.float32)
    assert state.expected() == state.layout().tensors
    assert Odd.made == 1


def test_a_kind_that_wants_something_else_is_no_error() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.LBFGS(model.parameters())  # its step wants a closure
    state = TrainingState({"model": model}, {"optimizer": optimizer}, {}, 0)
    assert state.expected() == state.layout().tensors


def test_hooks_of_all_optimizers_see_no_step_of_ours() -> None:
    seen: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda *args: seen.append(args))
    try:
        _, state = made(torch.optim.AdamW, {}, torch.float32)
        assert state.expected() == state.layout().tensors
    finally:
        handle.remove()
    assert not seen
