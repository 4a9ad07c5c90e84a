"""A training state begins with an imported model, or says what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import open_files
from ftrain.comms.errors import RunDirectoryError, StateError
from ftrain.runtime.imported import IMPORTED
from ftrain.runtime.interop.importing import import_model
from ftrain.runtime.interop.source import Origin
from ftrain.runtime.restore import Restoration, restore
from ftrain.runtime.state import TrainingState


class Model(nn.Module):
    """Tied weights, a buffer, and an optimizer that has state before its first step."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, width)
        self.last.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(2))


def state_of(model: nn.Module, name: str = "model") -> TrainingState:
    optimizer = torch.optim.Adagrad(model.parameters())
    return TrainingState({name: model}, {"optimizer": optimizer}, {}, 0)


def origin_of(tensors: dict[str, torch.Tensor]) -> Origin:
    told = {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()
    }
    return Origin(told, lambda name: tensors[name])


def begin(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    state: TrainingState,
    *,
    model: str = "model",
    dtype: str = "",
) -> None:
    """Import the tensors, and put them into the state as a Session does."""
    store = DurableStore(folder)
    version = import_model("test", "here", store, origin_of(tensors), model=model, dtype=dtype)
    with open_files(version) as files:
        small = restore(state, Restoration(files), 0)
    assert small[IMPORTED] == {"model": model, "kind": "test", "source": "here"}


TENSORS = {
    "first.weight": torch.arange(25.0).reshape(5, 5),
    "last.bias": torch.arange(5.0),
    "seen": torch.tensor([7.0, 8.0]),
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_parameters_and_buffers_are_taken_and_the_optimizer_is_left(
    tmp_path: Path, prefix: str
) -> None:
    model = Model()
    state = state_of(model)
    begin(tmp_path, {f"{prefix}{name}": t for name, t in TENSORS.items()}, state)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in TENSORS.items())
    assert all(not values["sum"].any() for values in state.optimizers["optimizer"].state.values())


def test_tied_weights_are_found_under_any_of_their_names(tmp_path: Path) -> None:
    tensors = {**TENSORS, "last.weight": TENSORS["first.weight"]}
    for left_out in ("last.weight", "first.weight", ""):
        model = Model()
        found = {name: t for name, t in tensors.items() if name != left_out}
        begin(tmp_path / f"without {left_out}", found, state_of(model))
        assert torch.equal(model.last.weight, TENSORS["first.weight"])


def test_floating_point_tensors_are_converted_if_asked(tmp_path: Path) -> None:
    model = Model()
    tensors = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    with pytest.raises(StateError, match=r"bfloat16 in the saved run and .* float32 here"):
        begin(tmp_path / "as they are", tensors, state_of(model))
    begin(tmp_path / "converted", tensors, state_of(model), dtype="float32")
    assert torch.equal(model.first.weight, TENSORS["first.weight"])


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    few = {name: tensor for name, tensor in TENSORS.items() if name != "seen"}
    with pytest.raises(StateError, match="lacks model/seen: was it made from another model"):
        begin(tmp_path / "1", few, state_of(Model()))
    many = {**TENSORS, "odd": torch.ones(1), "other": torch.ones(1)}
    with pytest.raises(StateError, match=r"holds model/odd and 1 more, which this script's"):
        begin(tmp_path / "2", many, state_of(Model()))
    with pytest.raises(StateError, match=r"first.weight is \[5, 5\] float32 .* \[6, 6\] float32"):
        begin(tmp_path / "3", TENSORS, state_of(Model(6)))
    with pytest.raises(StateError, match=r"imported as 'model', this script registers \['ema'\]"):
        begin(tmp_path / "4", TENSORS, state_of(Model(), "ema"))
    begin(tmp_path / "5", TENSORS, state_of(Model(), "ema"), model="ema")


def test_what_can_not_be_imported_is_refused(tmp_path: Path) -> None:
    twins = {"w": torch.ones(1), "module.w": torch.ones(1)}
    with pytest.raises(StateError, match=r"module\.w and w would both be model/w"):
        begin(tmp_path / "1", twins, state_of(Model()))
    begin(tmp_path / "2", TENSORS, state_of(Model()))
    with pytest.raises(RunDirectoryError, match="holds versions already"):
        begin(tmp_path / "2", TENSORS, state_of(Model()))
