"""What a registered model's modules hold besides their parameters, under plain names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch

from ftrain.comms.errors import SessionError, StateError
from ftrain.runtime.group import is_dtensor, local_part

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers put into it."""
    changed = True
    while changed:
        changed = False
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name, changed = name[len(wrapper) :], True
    for wrapper in _WRAPPERS:
        name = name.replace("." + wrapper, ".")
    return name


def same(objects: Sequence[object], before: Sequence[object]) -> bool:
    """Whether they are the very same objects."""
    return len(objects) == len(before) and all(map(is_, objects, before))


def buffers_of(
    modules: Iterable[tuple[str, torch.nn.Module]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The persistent buffers of modules, under plain names."""
    for prefix, module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                path = f"{prefix}.{name}" if prefix else name
                yield plain_name(path), local_part(buffer)


class Modules:
    """A model's modules; they are walked through only when one of them changed."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.sharded = any(map(is_dtensor, model.parameters()))
        self._model = model
        self._children: list[Mapping[str, Any]] = []  # of each module, by name
        self._kept: list[Mapping[str, Any]] = []  # the buffers of each
        self._parameters: list[Mapping[str, Any]] = []  # of each; none of a model that is sharded
        self._known: list[object] = []  # nothing: not looked at yet, or there is nothing to know
        self._holders: list[tuple[str, torch.nn.Module]] = []  # modules with buffers, their paths
        self._special: list[tuple[str, torch.nn.Module]] = []  # with a state of their own

    def changed(self) -> bool:
        """Whether a module, a buffer or a parameter was added, exchanged or taken away since this
        was asked last.

        Raises:
            SessionError: two buffers have the same plain name.
        """
        if self._known and same(self._tree(), self._known):
            return False
        named = list(self._model.named_modules())
        self._children = [module._modules for _, module in named]
        self._kept = [module._buffers for _, module in named]
        self._parameters = [] if self.sharded else [module._parameters for _, module in named]
        self._known = self._tree()
        self._holders = [(path, module) for path, module in named if module._buffers]
        self._special = [(path, module) for path, module in named if _has_extra_state(module)]
        names = Counter(name for name, _ in buffers_of(self._holders))
        if twins := [name for name, count in names.items() if count > 1]:
            raise SessionError(
                f"two buffers are called {twins[0]} once the names of wrappers are left out: give "
                "one of their modules another name than `module`"
            )
        return True

    def buffers(self) -> dict[str, torch.Tensor]:
        """The persistent buffers as they are, under plain names."""
        return dict(buffers_of(self._holders))

    def extra_state(self) -> dict[str, Any]:
        """What modules keep besides (``get_extra_state``), by their plain paths."""
        return {_plain_path(path): module.get_extra_state() for path, module in self._special}

    def load(
        self, name: str, buffers: Mapping[str, torch.Tensor], extra: Mapping[str, Any]
    ) -> None:
        """Put both back into the model called ``name``; ``StateError`` for what does not fit."""
        named = list(self._model.named_modules())
        mine = dict(buffers_of(named))
        if set(mine) != set(buffers):
            odd = sorted(set(mine) ^ set(buffers))[0]
            raise StateError(
                f"{name}'s buffer {odd!r} is only on one side of this script and the run"
            )
        with torch.no_grad():
            for path, buffer in mine.items():
                if buffer.shape != buffers[path].shape:
                    raise StateError(
                        f"{name}'s buffer {path!r} is {tuple(buffer.shape)} here and "
                        f"{tuple(buffers[path].shape)} in the saved run: another model's run "
                        "directory?"
                    )
                buffer.copy_(buffers[path])
        special = {_plain_path(path): module for path, module in named if _has_extra_state(module)}
        if set(special) != set(extra):
            odd = sorted(set(special) ^ set(extra))[0]
            raise StateError(
                f"the extra state of {name}'s module {odd!r} is only on one side of this script "
                "and the run"
            )
        for path, module in special.items():
            module.set_extra_state(extra[path])

    def _tree(self) -> list[object]:
        children = [child for modules in self._children for child in modules.values()]
        parameters = [p for of_module in self._parameters for p in of_module.values()]
        names = [name for buffers in self._kept for name in buffers]
        return children + parameters + names


def _plain_path(path: str) -> str:
    """A module's path without wrappers; that of what a wrapper wraps is the wrapper's."""
    return plain_name(f"{path}.").removesuffix(".")


def _has_extra_state(module: torch.nn.Module) -> bool:
    """Whether its class says what it keeps besides parameters and buffers."""
    return type(module).get_extra_state is not torch.nn.Module.get_extra_state
