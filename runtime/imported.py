"""A run that begins with weights from elsewhere: a version that holds a model and nothing else.

``ftrain checkpoints import`` makes it.  A Session takes parameters and buffers from it, in whatever
layout they are here; optimizer, scheduler, data and random numbers begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ftrain.checkpoint.tensors import StateTensor
from ftrain.comms.errors import StateError
from ftrain.runtime.group import key_of, local_part
from ftrain.runtime.modules import buffers_of, plain_name
from ftrain.runtime.state import TrainingState

IMPORTED = "imported"  # the key of the small state that tells such a version


def imported_state(model: str, kind: str, source: str) -> dict[str, Any]:
    """The small state of a version that holds what was imported as ``model``."""
    return {IMPORTED: {"model": model, "kind": kind, "source": source}}


def take_model(
    state: TrainingState,
    fill: Callable[[Sequence[StateTensor]], None],
    saved: frozenset[str],
    told: Mapping[str, Any],
) -> None:
    """Fill one model's parameters and buffers.

    A parameter that the model has under several names is taken from any of them.

    Args:
        state: has the model.
        fill: fills tensors from the version.
        saved: names of the tensors in it.
        told: what the small state says of it.

    Raises:
        StateError: the script has no such model, or it has other tensors.
        CorruptionError, RestoreError: as ``fill`` raises.
    """
    name = told["model"]
    module = state.models.get(name)
    if module is None:
        raise StateError(
            f"the version was imported as {name!r}, this script registers {sorted(state.models)}: "
            "import it again with --model"
        )
    aliases: dict[int, list[str]] = {}
    for inner, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(f"{name}/{plain_name(inner)}")
    wanted = _parameters(state, aliases, saved)
    everyone = key_of(range(state.world_size))
    for inner, buffer in buffers_of(module.named_modules()):
        wanted.append(StateTensor.whole(f"{name}/{inner}", buffer, everyone))
    _refuse_difference(
        {t.name for t in wanted}, {alias for names in aliases.values() for alias in names}, saved
    )
    with torch.no_grad():
        fill(wanted)


def telling(told: Mapping[str, Any]) -> str:
    """What a script's user should know about a run that begins so."""
    return (
        f"{told['model']} begins as imported from {told['source']} ({told['kind']}); optimizer, "
        "scheduler, data and random numbers begin anew"
    )


def _parameters(
    state: TrainingState, aliases: Mapping[int, list[str]], saved: frozenset[str]
) -> list[StateTensor]:
    """The model's parameters as this rank holds them, under the names that the version has."""
    by_name = {tensor.name: tensor for tensor in state.layout().tensors}
    found = []
    for names in aliases.values():
        tensor = next(by_name[name] for name in names if name in by_name)
        name = next((name for name in names if name in saved), tensor.name)
        found.append(StateTensor(name, local_part(tensor.tensor), tensor.share, tensor.place))
    return found


def _refuse_difference(wanted: set[str], aliases: set[str], saved: frozenset[str]) -> None:
    lacking = sorted(wanted - saved)
    odd = sorted(saved - wanted - aliases)
    if lacking:
        raise StateError(
            f"the imported version lacks {lacking[0]}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            + ": was it made from another model?"
        )
    if odd:
        raise StateError(
            f"the imported version holds {odd[0]}"
            + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
            + ", which this script's model does not have: was it made from another model?"
        )
