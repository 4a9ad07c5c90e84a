"""What the tensors of a version are called elsewhere: torch's names for the state of a job.

A Session's version holds ``model/<parameter>`` and ``optimizer/model/<parameter>/<key>``; buffers,
parameter groups and step counts are in the small state.  Put together, they are what
``torch.distributed.checkpoint.state_dict.get_state_dict`` gives, all tensors whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ftrain.checkpoint.catalogue import SavedTensor
from ftrain.checkpoint.codec import decode_tree
from ftrain.comms.errors import UsageError
from ftrain.runtime.imported import IMPORTED
from ftrain.runtime.interop.whole import WholeVersion

DCP = "dcp"  # the key of the small state of a version that torch's DCP saved (runtime/dcp.py)

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One value at its place in the tree: a tensor of the version, or one that is here already."""

    path: Path
    tensor: SavedTensor | None = None
    value: Any = None

    @property
    def name(self) -> str:
        """The path as DCP and safetensors write it."""
        return ".".join(map(str, self.path))

    @property
    def is_tensor(self) -> bool:
        """Whether the value is a tensor."""
        return self.tensor is not None or isinstance(self.value, torch.Tensor)

    @property
    def dtype(self) -> str:
        """Of a tensor: the type of its elements, without torch's prefix."""
        return self.tensor.dtype if self.tensor else str(self.value.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a tensor."""
        return self.tensor.shape if self.tensor else tuple(self.value.shape)

    @property
    def nbytes(self) -> int:
        """Of a tensor: size of its elements."""
        return self.tensor.nbytes if self.tensor else self.value.numel() * self.value.element_size()


def model_items(version: WholeVersion, model: str = "") -> list[Item]:
    """Parameters and buffers of one model, by their names in its ``state_dict``.

    Args:
        version: where they are.
        model: as the Session calls it; "": the one called "model", or the only one.

    Raises:
        UsageError: there is no such model.
    """
    small = version.small(0)
    if DCP in small:
        return _saved_by_dcp(version, tensors_only=True)
    chosen = _choose(_models(small), model)
    items = [
        Item((tensor.label.removeprefix(f"{chosen}/"),), tensor)
        for tensor in version.tensors
        if tensor.name.startswith(f"{chosen}/")
    ]
    return items + [
        Item((name,), value=buffer) for name, buffer in _buffers(version, chosen).items()
    ]


def all_items(version: WholeVersion) -> list[Item]:
    """Everything that has a place in a ``state_dict`` of torch: each model under its name, each
    optimizer with ``state`` and ``param_groups``."""
    small = version.small(0)
    if DCP in small:
        return _saved_by_dcp(version)
    models = _models(small)
    main = "model" if "model" in models else models[0]
    items: list[Item] = []
    for model in models:
        items += [
            Item((model, *item.path), item.tensor, item.value)
            for item in model_items(version, model)
        ]
    if IMPORTED in small:
        return items
    state = small["state"]
    for optimizer, groups in state["groups"].items():
        prefix = f"{optimizer}/"
        for tensor in version.tensors:
            if tensor.name.startswith(prefix) and not _is_parameter(tensor.name, models):
                inner, _, key = tensor.label.removeprefix(prefix).rpartition("/")
                items.append(Item((optimizer, "state", _fqn(inner, models, main), key), tensor))
        for path, numbers in state["numbers"].items():
            if path.startswith(prefix):
                fqn = _fqn(path.removeprefix(prefix), models, main)
                items += [Item((optimizer, "state", fqn, k), value=v) for k, v in numbers.items()]
        names = _group_names(small, optimizer)
        for number, (group, members) in enumerate(zip(groups, names, strict=True)):
            at = (optimizer, "param_groups", number)
            fqns = [_fqn(inner, models, main) for inner in members]
            items.append(Item((*at, "params"), value=fqns))
            items += [Item((*at, key), value=value) for key, value in group.items()]
    return items


def tree_of(items: Iterable[Item], values: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dicts and lists that the items' paths tell; ``values`` by path."""
    tree: dict[str, Any] = {}
    for item in items:
        place: Any = tree
        for part, following in pairwise(item.path):
            fresh: Any = [] if isinstance(following, int) else {}
            if isinstance(part, int):
                _lengthen(place, part)
                place[part] = fresh if place[part] is None else place[part]
                place = place[part]
            else:
                place = place.setdefault(part, fresh)
        last = item.path[-1]
        if isinstance(last, int):
            _lengthen(place, last)
        place[last] = values[item.path]
    return tree


def _lengthen(place: list[Any], to: int) -> None:
    place += [None] * (to + 1 - len(place))


def each(version: WholeVersion, items: Sequence[Item]) -> Iterator[tuple[Item, torch.Tensor]]:
    """The tensors of these items, one after the other, in their order.

    Each has a storage of its own, of just its elements; what it holds is gone when the next one is
    asked for.
    """
    stored = version.read(item.tensor for item in items if item.tensor is not None)
    for item in items:
        if item.tensor is not None:
            yield item, next(stored)
        elif item.is_tensor:
            yield item, item.value.contiguous().clone()


def _saved_by_dcp(version: WholeVersion, *, tensors_only: bool = False) -> list[Item]:
    """As it was given to ``torch.distributed.checkpoint.save``."""
    paths: dict[str, Path] = {}
    values: dict[str, Any] = {}
    for rank in range(len(version.files)):
        told = version.small(rank)[DCP]
        paths |= told["paths"]
        values |= told["values"]
    if tensors_only:
        return [Item((tensor.label,), tensor) for tensor in version.tensors]
    items = [Item(paths.get(t.label, (t.label,)), t) for t in version.tensors]
    return items + [Item(paths.get(k, (k,)), value=value) for k, value in values.items()]


def _models(small: Mapping[str, Any]) -> list[str]:
    if IMPORTED in small:
        return [small[IMPORTED]["model"]]
    return list(small["state"]["buffers"])


def _buffers(version: WholeVersion, model: str) -> dict[str, torch.Tensor]:
    """The model's buffers, each as the first rank had it that has one of this name; what was
    imported has them among the tensors."""
    found: dict[str, torch.Tensor] = {}
    for rank in range(len(version.files)):
        small = version.small(rank)
        if "state" in small:
            found = small["state"]["buffers"][model] | found
    return found


def _choose(models: list[str], wanted: str) -> str:
    if wanted and wanted not in models:
        raise UsageError(f"the version holds no model {wanted!r}: choose one of {models}")
    if wanted or "model" in models or len(models) == 1:
        return wanted or ("model" if "model" in models else models[0])
    raise UsageError(f"the version holds the models {models}: choose one with --model")


def _is_parameter(name: str, models: Iterable[str]) -> bool:
    return any(name.startswith(f"{model}/") for model in models)


def _fqn(inner: str, models: Iterable[str], main: str) -> str:
    """A parameter's name in torch's state of an optimizer; of other models with the model's."""
    for model in models:
        if inner.startswith(f"{model}/"):
            rest = inner.removeprefix(f"{model}/")
            return rest if model == main else f"{model}.{rest}"
    return inner


def _group_names(small: Mapping[str, Any], optimizer: str) -> list[list[str]]:
    names: list[list[str]] = decode_tree(small["state"]["layout"])[optimizer]["groups"]
    return names
