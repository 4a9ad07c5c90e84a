"""DeepSpeed's state dicts as a list of tensors and a few bytes, and back, without pickle.

What is in them besides tensors and plain values was found by looking (DeepSpeed 0.19): loss
scalers, addresses of fragments, a stage that is an enum; Megatron's scripts add their arguments.
These few classes are known by name and come back as what they were; of any other class nothing
could be built from a file without trusting it.
"""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ftrain.checkpoint.codec import decode_tree, encode_tree, is_plain
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


class Folder:
    """Takes a state dict apart: its tensors as :attr:`leaves`, and the rest as :attr:`small`, in
    which their names stand for them.

    Raises:
        StateError: something in it can't be saved; its path is named.
    """

    def __init__(self, state: object, name: str) -> None:
        self.leaves: list[Leaf] = []
        self._root = name
        self._index: dict[tuple[Any, ...], str] = {}
        self._names: set[str] = set()
        self.small = encode_tree(self._fold(state, (), 0), name)

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

    def _leaf(self, tensor: torch.Tensor, steps: Steps) -> str:
        """The tensor's name; equal views of the same memory are one tensor."""
        if type(tensor) not in _TENSORS:
            raise StateError(
                f"{self._path(steps)} is a tensor of class {type(tensor).__qualname__}, which "
                "can't be saved: save its local tensor"
            )
        if not is_plain(tensor):
            raise StateError(
                f"{self._path(steps)} is a sparse, nested, quantized or meta tensor, which can't be"
                " saved"
            )
        item_bytes(str(tensor.dtype).removeprefix("torch."))
        view = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in self._index:
            return self._index[view]
        name = self._path(steps).removeprefix(f"{self._root}.")
        while name in self._names:  # "a.b" in one dict, and "b" in the dict "a"
            name += "'"
        self._names.add(name)
        self._index[view] = name
        plain = tensor.detach().resolve_conj().resolve_neg()
        self.leaves.append(Leaf(name, steps, plain))
        return name

    def _path(self, steps: Steps) -> str:
        parts = [f".{step}" if type(step) is str else f"[{step!r}]" for step in steps]
        return self._root + "".join(parts)


_Tensors = Mapping[str, torch.Tensor]


def unfold(small: bytes, tensors: _Tensors, where: str) -> Any:
    """The state dict that a :class:`Folder` took apart; ``CorruptionError``: these are no such
    bytes, or other tensors."""
    try:
        return _unfold(decode_tree(small), tensors)
    except (AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        raise CorruptionError(f"{where} holds no state of DeepSpeed: {error}") from None


def known_classes() -> list[type]:
    """What may be in DeepSpeed's state dicts besides plain values, as far as it is imported."""
    names = [name.rpartition(".") for name in sorted(_OBJECTS | _ENUMS)]
    return [
        getattr(sys.modules[module], attribute)
        for module, _, attribute in names
        if hasattr(sys.modules.get(module), attribute)
    ]


def _unfold(value: Any, tensors: _Tensors) -> Any:
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


def _unfold_object(tensors: _Tensors, name: str, fields: Any) -> Any:
    made: Any = object.__new__(_class(name, _OBJECTS))
    vars(made).update(_unfold(fields, tensors))
    return made


def _unfold_enum(tensors: _Tensors, name: str, member: str) -> Any:
    return _class(name, _ENUMS)[member]


_MARKED: dict[str, Callable[..., Any]] = {
    "tensor": lambda tensors, name: tensors[name],
    "object": _unfold_object,
    "enum": _unfold_enum,
}


def _class(name: str, known: frozenset[str]) -> Any:
    if name not in known:
        raise ValueError(f"the class {name[:80]!r} is unknown")
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
