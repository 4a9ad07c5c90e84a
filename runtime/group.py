"""This rank's place among the ranks, and which ranks hold which bytes in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from ftrain.comms.protocol.messages import Share


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


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor on this rank behind a parameter or moment (a DTensor's local shard)."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        local: torch.Tensor = tensor.to_local()
        return local
    return tensor


def dtensor_key(tensor: DTensor) -> str:
    """The ranks whose local shard equals this rank's, by placement."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return key_of([dist.get_rank()])
    index = tuple(
        slice(None) if isinstance(placement, Replicate) else coordinate[dim]
        for dim, placement in enumerate(tensor.placements)
    )
    return key_of(int(rank) for rank in mesh.mesh[index].reshape(-1).tolist())


def share_keys(models: Iterable[torch.nn.Module], rank: int) -> dict[int, str]:
    """Which ranks hold the same bytes, per parameter, by ``id(parameter)``.

    DTensors by their placements, parameters of a DDP module by its process group, everything else
    is taken to be this rank's own.
    """
    keys: dict[int, str] = {}
    for model in models:
        for parameter in model.parameters():
            keys[id(parameter)] = (
                dtensor_key(parameter) if isinstance(parameter, DTensor) else key_of([rank])
            )
    for model in models:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                key = key_of(dist.get_process_group_ranks(module.process_group))
                ignored = module.parameters_to_ignore
                for name, parameter in module.module.named_parameters():
                    if name not in ignored and not isinstance(parameter, DTensor):
                        keys[id(parameter)] = key
    return keys
