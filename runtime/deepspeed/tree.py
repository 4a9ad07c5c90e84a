"""DeepSpeed's state dicts as a list of tensors and a few bytes, and back, without pickle.

What is in them besides tensors and plain values was found by looking (DeepSpeed 0.19): loss
scalers, addresses of fragments, a stage that is an enum; Megatron's scripts add their arguments.
These few classes are known by name and come back as what they were; of any other class nothing
could be built from a file without trusting it.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ftrain.checkpoint.codec import decode_tree, encode_tree
from ftrain.checkpoint.dtypes import item_bytes
from ftrain.comms.errors import CorruptionError, StateError

_MARK = "\0ftrain"  # first item of a tuple that stands for something else
_DEPTH_MAX = 60
_SCALER = "deepspeed.runtime.fp16.loss_scaler"
# Instances come back with the attributes that they had.
_OBJECTS = frozenset(
    {
        "argparse.Namespace",
        "types.SimpleNamespace",
        "deepspeed.utils.tensor_fragment.fragment_address",
        f"{_SCALER}.LossScaler",
        f"{_SCALER}.DynamicLossScaler",
        f"{_SCALER}.LossScaleConfig",
    }
)
_ENUMS = frozenset({"deepspeed.runtime.zero.config.ZeroStageEnum", f"{_SCALER}.LossScaleProfile"})
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

Steps = tuple[Any, ...]  # keys from the top of the dict to a value


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of a state dict."""

    name: str  # its path, unlike every other leaf's
    steps: Steps
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """What a file says of a tensor besides its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its elements; ``StateError`` for an unknown type."""
        return prod(self.shape) * item_bytes(self.dtype)


class Folder:
    """Takes a state dict apart.

    Raises:
        StateError: something in it can't be saved; its path is named.
    """

    def __init__(self, state: object, name: str) -> None:
        self.leaves: list[Leaf] = []
        self._root = name
        self._index: dict[tuple[Any, ...], int] = {}
        self._names: set[str] = set()
        tree = encode_tree(self._fold(state, (), 0), name)
        places = [[leaf.name, _dtype(leaf.tensor), leaf.tensor.shape] for leaf in self.leaves]
        self.small = encode_tree({"state": tree, "tensors": places}, name)

    def _fold(self, value: Any, steps: Steps, depth: int) -> Any:
        kind = type(value)
        if depth > _DEPTH_MAX:
            raise StateError(f"{self._path(steps)} is nested too deeply, or contains itself")
        if isinstance(value, torch.Tensor):
            return (_MARK, "tensor", self._leaf(value, steps))
        if kind in (dict, OrderedDict, defaultdict):
            make = OrderedDict if kind is OrderedDict else dict
            return make((k, self._fold(v, (*steps, k), depth + 1)) for k, v in value.items())
        if kind in (list, tuple):
            if kind is tuple and value and type(value[0]) is str and value[0] == _MARK:
                raise StateError(f"{self._path(steps)} begins with a word that ftrain keeps")
            return kind(self._fold(v, (*steps, i), depth + 1) for i, v in enumerate(value))
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _OBJECTS:
            fields = self._fold(dict(vars(value)), steps, depth + 1)
            return (_MARK, "object", name, fields)
        if name in _ENUMS:
            return (_MARK, "enum", name, value.name)
        return value

    def _leaf(self, tensor: torch.Tensor, steps: Steps) -> int:
        """The tensor's number; equal views of the same memory are one tensor."""
        if type(tensor) not in _TENSORS:
            raise StateError(
                f"{self._path(steps)} is a tensor of class {type(tensor).__qualname__}, which "
                "can't be saved: save its local tensor"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise StateError(
                f"{self._path(steps)} is a sparse, quantized or meta tensor, which can't be saved"
            )
        item_bytes(_dtype(tensor))
        view = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in self._index:
            return self._index[view]
        number = self._index[view] = len(self.leaves)
        name = self._path(steps).removeprefix(f"{self._root}.")
        while name in self._names:  # "a.b" in one dict, and "b" in the dict "a"
            name += "'"
        self._names.add(name)
        plain = tensor.detach().resolve_conj().resolve_neg()
        self.leaves.append(Leaf(name, steps, plain))
        return number

    def _path(self, steps: Steps) -> str:
        parts = [f".{step}" if type(step) is str else f"[{step!r}]" for step in steps]
        return self._root + "".join(parts)


class Skeleton:
    """A state dict without its tensors' bytes, out of a file.

    Raises:
        CorruptionError: these bytes are none.
    """

    def __init__(self, small: bytes, where: str) -> None:
        self._where = where
        try:
            tree = decode_tree(small)
            self._tree = decode_tree(tree["state"])
            self.places = tuple(
                TensorPlace(str(name), str(dtype), tuple(map(int, shape)))
                for name, dtype, shape in tree["tensors"]
            )
        except (CorruptionError, LookupError, TypeError, ValueError) as error:
            raise CorruptionError(f"{where} holds no state of DeepSpeed: {error}") from None

    def state(self, tensors: list[torch.Tensor]) -> Any:
        """The state dict, with these tensors in the places; ``CorruptionError``."""
        try:
            return _unfold(self._tree, tensors)
        except (AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
            raise CorruptionError(f"{self._where} holds an impossible state: {error}") from None


def _unfold(value: Any, tensors: list[torch.Tensor]) -> Any:
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key in value:
            value[key] = _unfold(value[key], tensors)
        return value
    if kind is list:
        return [_unfold(item, tensors) for item in value]
    if kind is not tuple:
        return value
    if not value or type(value[0]) is not str or value[0] != _MARK:
        return tuple(_unfold(item, tensors) for item in value)
    return _MARKED[value[1]](tensors, *value[2:])


def _unfold_object(tensors: list[torch.Tensor], name: str, fields: Any) -> Any:
    made: Any = object.__new__(_class(name, _OBJECTS))
    vars(made).update(_unfold(fields, tensors))
    return made


def _unfold_enum(tensors: list[torch.Tensor], name: str, member: str) -> Any:
    return _class(name, _ENUMS)[member]


_MARKED: dict[str, Callable[..., Any]] = {
    "tensor": lambda tensors, number: tensors[number],
    "object": _unfold_object,
    "enum": _unfold_enum,
}


def _class(name: str, known: frozenset[str]) -> Any:
    if name not in known:
        raise ValueError(f"the class {name[:80]!r} is unknown")
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
