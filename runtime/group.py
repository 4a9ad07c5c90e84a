"""This rank's place among the ranks, and which ranks hold which bytes in common."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ftrain.checkpoint.boxes import Placement
from ftrain.comms.protocol.messages import Share

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


@dataclass(frozen=True, slots=True)
class GroupView:
    """A rank's place in its replica group."""

    rank: int
    world_size: int
    node: int
    local_ranks: tuple[int, ...]  # global ranks on this node

    def share(self, key: str) -> Share:
        """This rank's part of what the ranks in ``key`` hold in common, on this node."""
        members = [rank for rank in ranks_of(key) if rank in self.local_ranks]
        return Share(key, self.node, members.index(self.rank), len(members))


def key_of(ranks: Iterable[int]) -> str:
    """The name of a set of ranks: "0-3" for a run, "0,2" otherwise."""
    ordered = sorted(set(ranks))
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]}-{ordered[-1]}"
    return ",".join(str(rank) for rank in ordered)


def ranks_of(key: str) -> list[int]:
    """The set of ranks that :func:`key_of` named."""
    if "-" in key:
        first, last = key.split("-")
        return list(range(int(first), int(last) + 1))
    return [int(rank) for rank in key.split(",")]


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor.  Their module is not imported for that, which takes 0.7 s: who has
    one has imported it."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor on this rank behind a parameter or moment (a DTensor's local shard)."""
    tensor = tensor.detach()
    if is_dtensor(tensor):
        local: torch.Tensor = tensor.to_local()
        return local
    return tensor


def dtensor_holding(tensor: DTensor, world_size: int) -> Holding:
    """What this rank's shard is, and which ranks have the same one, by placement.

    A tensor whose mesh has not all ranks may be another one elsewhere, as a plain one may.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = tuple(tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        key = key_of([dist.get_rank()])
        return Holding(key, Placement.whole(tuple(local_part(tensor).shape), key))
    mesh = tensor.device_mesh
    _, origin = compute_local_shape_and_global_offset(shape, mesh, tensor.placements)
    owner = "" if mesh.size() == world_size else key_of(mesh.mesh.reshape(-1).tolist())
    place = Placement(shape, tuple(origin) or (0,) * len(shape), owner)
    return Holding(_dtensor_key(tensor), place)


def _dtensor_key(tensor: DTensor) -> str:
    """The ranks whose local shard equals this rank's."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return key_of([dist.get_rank()])
    index = tuple(
        slice(None) if placement.is_replicate() else coordinate[dim]
        for dim, placement in enumerate(tensor.placements)
    )
    return key_of(int(rank) for rank in mesh.mesh[index].reshape(-1).tolist())


@dataclass(frozen=True, slots=True)
class Holding:
    """Which ranks hold the same bytes of a tensor, and what part of the job's tensor they are."""

    key: str
    place: Placement

    @staticmethod
    def of_plain(tensor: torch.Tensor, ranks: Collection[int], world_size: int) -> Holding:
        """Of a tensor that ``ranks`` have all of.

        What not all ranks have may be another tensor on the others, though of the same name, as
        with the stages of a pipeline.
        """
        key = key_of(ranks)
        owner = "" if len(ranks) == world_size else key
        return Holding(key, Placement.whole(tuple(tensor.shape), owner))


def holdings(models: Iterable[torch.nn.Module], rank: int, world_size: int) -> dict[int, Holding]:
    """Who holds what of each parameter, by ``id(parameter)``.

    DTensors by their placements, parameters of a DDP module by its process group, everything else
    is taken to be this rank's own.
    """
    found: dict[int, Holding] = {}
    for model in models:
        for parameter in model.parameters():
            found[id(parameter)] = (
                dtensor_holding(parameter, world_size)
                if is_dtensor(parameter)
                else Holding.of_plain(parameter, [rank], world_size)
            )
    for model in models:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                ranks = dist.get_process_group_ranks(module.process_group)
                ignored = module.parameters_to_ignore
                for name, parameter in module.module.named_parameters():
                    if name not in ignored and not is_dtensor(parameter):
                        found[id(parameter)] = Holding.of_plain(parameter, ranks, world_size)
    return found


def moment_holding(
    parameter: torch.Tensor, holding: Holding, value: torch.Tensor, world_size: int, own: str = ""
) -> Holding:
    """Who holds what of an optimizer's tensor for ``parameter``, which ``holding`` tells of.

    ``own``: the ranks' key, if each rank keeps the moments of parameters of its own (ZeRO-1).
    """
    if is_dtensor(value):
        return dtensor_holding(value, world_size)
    if is_dtensor(parameter):
        if value.shape == local_part(parameter).shape:
            return holding
        # Step counts and the like are equal wherever the parameter is; the rest is the shard's own.
        owner = holding.place.owner if value.numel() == 1 else holding.key
        return Holding(holding.key, Placement.whole(tuple(value.shape), owner))
    place = Placement.whole(tuple(value.shape), holding.place.owner)
    return Holding(own or holding.key, place)
