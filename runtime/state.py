"""What a version of a training job consists of, read from and written to live objects.

Two kinds of state: tensors (parameters, optimizer state) are copied one by one, and it is said of
each when it changes; everything else is *small* and is taken at the boundary as one tree of plain
values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from ftrain.checkpoint.codec import decode_tree, encode_tree
from ftrain.checkpoint.tensors import Changes, StateTensor
from ftrain.comms.errors import SessionError, StateError
from ftrain.runtime.data import Stateful
from ftrain.runtime.group import (
    Holding,
    holdings,
    is_dtensor,
    key_of,
    local_part,
    moment_holding,
)
from ftrain.runtime.modules import Modules, plain_name, same
from ftrain.runtime.moments import is_zero, kept_by, moments_ahead


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Where the tensors are."""

    tensors: tuple[StateTensor, ...]  # parameters first, in an order that all ranks share
    skeleton: bytes  # encoded: parameter names and the optimizers' tensors, without their bytes
    numbers: bool  # the optimizers' state holds values that are no tensors
    places: _Places


class _Places:
    """Which objects the training state was made of, and where their bytes lay.

    Compared at every boundary, when the step has driven all of it out of the caches: so that
    touches as little memory as can tell, by identity and not by equality.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._optimizers = optimizers
        self._counts, self._objects = self._found(parameters)
        tensors = [*parameters, *_moments(optimizers)]
        self._plain = [t for t in tensors if not is_dtensor(t)]
        self._sharded = [t for t in parameters if is_dtensor(t)]
        self._pointers = self._addresses()

    def unmoved(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether all is as it was."""
        counts, objects = self._found(parameters)
        return (
            counts == self._counts  # first: only then the addresses are those of what is there
            and same(objects, self._objects)
            and self._addresses() == self._pointers
        )

    def _found(self, parameters: Sequence[torch.Tensor]) -> tuple[list[int], list[object]]:
        """All tensors in an order that their numbers, which come first, make unambiguous."""
        states = [kept_by(optimizer) for optimizer in self._optimizers]
        owned = [group["params"] for o in self._optimizers for group in o.param_groups]
        moments = _moments(self._optimizers)
        counts = [len(parameters), *map(len, owned), *map(len, states)]
        counts += [len(values) for values in _values(states)]
        objects: list[object] = [*parameters, *chain(*owned), *chain(*states), *moments]
        return [*counts, len(moments)], objects

    def _addresses(self) -> list[int]:
        sharded = [local_part(tensor).data_ptr() for tensor in self._sharded]
        return [*map(torch.Tensor.data_ptr, self._plain), *sharded]


class TrainingState:
    """The registered objects of one rank.

    ``models`` and ``optimizers`` map a name to the object; ``objects`` are anything else with
    ``state_dict``/``load_state_dict``.  Raises :class:`SessionError` for objects without state.
    """

    def __init__(
        self,
        models: Mapping[str, torch.nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        objects: Mapping[str, Any],
        rank: int,
        world_size: int = 1,
    ) -> None:
        for name, value in objects.items():
            if not isinstance(value, Stateful):
                raise SessionError(
                    f"Session({name}=…) got a {type(value).__name__}, which has no "
                    "state_dict()/load_state_dict(); give it both, or leave it out"
                )
        self.models = dict(models)
        self.optimizers = dict(optimizers)
        self.objects = dict(objects)
        self.rank = rank
        self.world_size = world_size
        self._layout: StateLayout | None = None
        self._holdings: dict[int, Holding] = {}
        self._names: dict[int, str] = {}
        self._modules = {name: Modules(model) for name, model in self.models.items()}
        self._groups: dict[str, int] = {}  # how many the script gave an optimizer by itself
        self._parameters: list[torch.Tensor] = []  # once each; in an order that all ranks share
        self._take_parameters()

    def topology(self) -> str:
        """Names, global shapes and types of the parameters, as 32 hex characters: equal for any
        number of ranks and any way to lay them out, different for another model."""
        digest = hashlib.blake2b(digest_size=16)
        for parameter in self._parameters:
            name = self._names[id(parameter)]
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        return digest.hexdigest()

    # ---- capture

    def layout(self) -> StateLayout:
        """The tensors as they are now; the same object as last time while nothing moved."""
        exchanged = [name for name, modules in self._modules.items() if modules.changed()]
        if exchanged:
            self._take_parameters()
        if self._layout is None or not self._layout.places.unmoved(self._parameters):
            self._layout = self._lay_out()  # some optimizers exchange their tensors
        return self._layout

    def expected(self) -> tuple[StateTensor, ...]:
        """The tensors as they will be after the first step; those that it makes have no memory."""
        layout = self.layout()
        ahead: list[StateTensor] = []
        for name, optimizer in self.optimizers.items():
            for parameter, key, value in moments_ahead(optimizer):
                inner, mine = self._names[id(parameter)], self._holdings[id(parameter)]
                held = moment_holding(parameter, mine, value, self.world_size)
                ahead.append(StateTensor(f"{name}/{inner}/{key}", value, held.key, held.place))
        return (*layout.tensors, *ahead)

    def small(self, layout: StateLayout) -> dict[str, Any]:
        """Everything but the tensors of ``layout``, as a tree of plain values and small tensors."""
        return {
            "layout": layout.skeleton,
            "buffers": {name: modules.buffers() for name, modules in self._modules.items()},
            "extra": {name: modules.extra_state() for name, modules in self._modules.items()},
            "groups": {
                name: [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in optimizer.param_groups
                ]
                for name, optimizer in self.optimizers.items()
            },
            "numbers": self._numbers() if layout.numbers else {},
            "objects": {name: value.state_dict() for name, value in self.objects.items()},
        }

    def _numbers(self) -> dict[str, dict[str, Any]]:
        return {
            f"{name}/{self._names[id(parameter)]}": numbers
            for name, optimizer in self.optimizers.items()
            for parameter, values in kept_by(optimizer).items()
            if (numbers := _numbers(values))
        }

    def _lay_out(self) -> StateLayout:
        tensors: list[StateTensor] = []
        owned = _owned(self.optimizers.values())
        if not self._names.keys() >= set(owned):  # optimizer.add_param_group
            self._take_parameters()
        in_groups = set(owned)
        for parameter in self._parameters:
            changes = Changes.ANYTIME if parameter.requires_grad else Changes.NEVER
            if id(parameter) in in_groups:
                changes = Changes.IN_STEP
            name, holding = self._names[id(parameter)], self._holdings[id(parameter)]
            local = local_part(parameter)
            tensors.append(StateTensor(name, local, holding.key, holding.place, changes))
        skeleton: dict[str, Any] = {}
        for name, optimizer in self.optimizers.items():
            own = key_of([self.rank]) if is_zero(optimizer) else ""
            kept, groups = kept_by(optimizer), []
            self._require_names(name, kept)
            state: dict[str, Any] = {}
            for group in optimizer.param_groups:
                groups.append([self._names[id(parameter)] for parameter in group["params"]])
                for parameter in group["params"]:
                    values = kept.get(parameter, {})
                    inner = self._names[id(parameter)]
                    places = state.setdefault(inner, {})
                    for key, value in values.items():
                        if isinstance(value, torch.Tensor):
                            places[str(key)] = _placeholder(value, parameter)
                            mine = self._holdings[id(parameter)]
                            held = moment_holding(parameter, mine, value, self.world_size, own)
                            path = f"{name}/{inner}/{key}"
                            local = local_part(value)
                            tensors.append(StateTensor(path, local, held.key, held.place))
            skeleton[name] = {"groups": groups, "state": state}
            if own:
                skeleton[name]["own"] = self._own_names(optimizer)
        _refuse_twins(tensors)
        self._forget({*map(id, self._parameters), *owned})
        return StateLayout(
            tuple(tensors),
            encode_tree(skeleton),
            bool(self._numbers()),
            _Places(self._parameters, list(self.optimizers.values())),
        )

    # ---- restore

    def load_small(self, small: Mapping[str, Any]) -> None:
        """Put the small tree back; creates the optimizers' state tensors, still unfilled.

        Raises :class:`StateError` naming the first thing that does not fit.
        """
        skeleton = decode_tree(small["layout"])
        for kind, mine, theirs in (
            ("model", self.models, small["buffers"]),
            ("optimizer", self.optimizers, skeleton),
        ):
            if set(theirs) != set(mine):
                raise StateError(
                    f"the saved run has the {kind}s {sorted(theirs)}, this script registers "
                    f"{sorted(mine)}; use another run directory, or register the same objects"
                )
        for name, modules in self._modules.items():
            modules.load(name, small["buffers"][name], small.get("extra", {}).get(name, {}))
        for name, optimizer in self.optimizers.items():
            self._load_optimizer(name, optimizer, skeleton[name], small["groups"][name])
            for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
                numbers = small["numbers"].get(f"{name}/{self._names[id(parameter)]}")
                if numbers:
                    kept_by(optimizer)[parameter].update(_moved(numbers, parameter.device))
        missing = set(self.objects) - set(small["objects"])
        if missing:
            raise StateError(f"the saved run has no state for {sorted(missing)}")
        for name, value in self.objects.items():
            value.load_state_dict(small["objects"][name])
        self._layout = None

    # ---- details

    def _take_parameters(self) -> None:
        """Name every parameter that has no name yet, and keep it.

        FSDP2's modules do not always show the same ones, between a forward and its backward they
        may show the unsharded copies: of theirs only what an optimizer holds is taken later.
        """
        missing = set(_owned(self.optimizers.values())) - self._names.keys()
        first = not self._names
        found = holdings(self.models.values(), self.rank, self.world_size)
        for name, model in self.models.items():
            sharded = self._modules[name].sharded
            for inner, parameter in model.named_parameters():
                if first or not sharded or id(parameter) in missing:
                    self._keep(parameter, f"{name}/{plain_name(inner)}", found.get(id(parameter)))
        for name, optimizer in self.optimizers.items():
            for group_index, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    self._keep(parameter, f"{name}/{group_index}.{index}", None)

    def _forget(self, known: set[int]) -> None:
        """Of what was replaced nothing stays: another parameter may get its address."""
        for gone in self._names.keys() - known:
            del self._names[gone], self._holdings[gone]

    def _keep(self, parameter: torch.Tensor, name: str, holding: Holding | None) -> None:
        if id(parameter) not in self._names:
            # One of the same name was there before and is not part of the model any more.
            self._parameters = [p for p in self._parameters if self._names[id(p)] != name]
            self._names[id(parameter)] = name
            self._holdings[id(parameter)] = holding or Holding.of_plain(
                parameter, [self.rank], self.world_size
            )
            self._parameters.append(parameter)

    def _load_optimizer(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        skeleton: Mapping[str, Any],
        groups: list[dict[str, Any]],
    ) -> None:
        # What a version that could not be put back added is taken away again.
        del optimizer.param_groups[self._groups.setdefault(name, len(optimizer.param_groups)) :]
        self._add_groups(optimizer, skeleton["groups"], groups)
        mine = [
            [self._names[id(parameter)] for parameter in group["params"]]
            for group in optimizer.param_groups
        ]
        if mine != skeleton["groups"]:
            raise StateError(
                f"{name} holds other parameters here than in the saved run: "
                f"{_first_difference(mine, skeleton['groups'])}; use another run directory for "
                "another model"
            )
        if skeleton.get("own", self._own_names(optimizer)) != self._own_names(optimizer):
            raise StateError(
                f"{name} is a {type(optimizer).__name__}, of which each rank keeps a part, and "
                "this rank's was another one in the saved run: launch with as many ranks as then"
            )
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        kept = kept_by(optimizer)
        kept.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                places = skeleton["state"].get(self._names[id(parameter)])
                if places:
                    kept[parameter] = {
                        key: _materialise(place, parameter) for key, place in places.items()
                    }

    def _own_names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """The parameters whose moments are this rank's, where not every rank has all of them."""
        if not is_zero(optimizer):
            return []
        inner: Any = optimizer
        groups = inner.optim.param_groups
        return sorted(self._names[id(p)] for group in groups for p in group["params"])

    def _require_names(self, name: str, kept: Mapping[Any, Any]) -> None:
        """SessionError for what an optimizer keeps for something else than a parameter of its."""
        for key, values in kept.items():
            if id(key) not in self._names or not isinstance(values, Mapping):
                raise SessionError(
                    f"{name} keeps state for {str(key)[:80]!r}, which is none of its parameters: "
                    "give it to Session apart, as an object with state_dict()/load_state_dict()"
                )

    def _add_groups(
        self,
        optimizer: torch.optim.Optimizer,
        names: Sequence[Sequence[str]],
        values: Sequence[Mapping[str, Any]],
    ) -> None:
        """Do again what the saved run did with ``optimizer.add_param_group`` on its way."""
        known = {self._names[id(parameter)]: parameter for parameter in self._parameters}
        for number in range(len(optimizer.param_groups), len(names)):
            if not known.keys() >= set(names[number]):
                return
            params = [known[name] for name in names[number]]
            optimizer.add_param_group({**values[number], "params": params})


def _refuse_twins(tensors: Iterable[StateTensor]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise SessionError(
                f"two tensors are called {tensor.name}: was a parameter replaced whose predecessor "
                "is still in an optimizer's groups? take that out of them"
            )
        names.add(tensor.name)


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> list[int]:
    """``id()`` of each parameter in the optimizers' groups."""
    return [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]


def _moments(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Every tensor in the optimizers' state."""
    states = [kept_by(optimizer) for optimizer in optimizers]
    return [
        value
        for values in _values(states)
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]


def _values(states: Iterable[Mapping[Any, Any]]) -> list[Mapping[Any, Any]]:
    """What optimizers keep for one parameter each; what is none of that is told elsewhere."""
    return [values for state in states for values in state.values() if isinstance(values, Mapping)]


def _moved(values: Any, device: torch.device) -> Any:
    """Tensors in plain values, which come back on the CPU, where the parameter is."""
    if isinstance(values, torch.Tensor):
        return values.to(device) if values.dim() else values  # step counts stay on the CPU
    if isinstance(values, dict):
        return {key: _moved(value, device) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([_moved(value, device) for value in values])
    return values


def _numbers(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items() if not isinstance(value, torch.Tensor)}


def _first_difference(mine: Sequence[Sequence[str]], saved: Sequence[Sequence[str]]) -> str:
    """Where two optimizers' groups of parameters first differ, in words."""
    here = {inner: None for group in mine for inner in group}
    there = {inner: None for group in saved for inner in group}
    added = next((inner for inner in here if inner not in there), "")
    lacking = next((inner for inner in there if inner not in here), "")
    if added and lacking:
        return f"{added!r} is only here, {lacking!r} only there"
    if added or lacking:
        return f"{added!r} is not there" if added else f"{lacking!r} is not here"
    return "they are the same, in other groups or in another order"


def _placeholder(tensor: torch.Tensor, parameter: torch.Tensor) -> dict[str, Any]:
    shape = local_part(tensor).shape
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(shape),
        "like": shape == local_part(parameter).shape,  # laid out as the parameter, then and now
        "device": tensor.device.type,
    }


def _materialise(place: Mapping[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """An optimizer's state tensor as the placeholder describes it, not filled yet."""
    dtype = getattr(torch, place["dtype"])
    shape = tuple(place["shape"])
    if place["like"]:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    device = "cpu" if place["device"] == "cpu" else parameter.device
    return torch.empty(shape, dtype=dtype, device=device)
