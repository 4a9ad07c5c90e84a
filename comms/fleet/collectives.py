"""Collectives of tensors among the members of a fleet."""

from __future__ import annotations

from dataclasses import replace

import torch

from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
from ftrain.comms.collectives.quantise import Quantisation
from ftrain.comms.collectives.work import Work
from ftrain.comms.errors import UsageError
from ftrain.comms.fleet.fleet import Fleet, Make
from ftrain.comms.fleet.operations import FleetHandle
from ftrain.comms.protocol.ring import Kind

_NOTHING = memoryview(b"")


def all_reduce(
    fleet: Fleet,
    tensor: torch.Tensor,
    how: Reduction = Reduction.SUM,
    *,
    out: torch.Tensor | None = None,
    tag: int = 0,
    retry: bool = True,
    restore: bool = True,
    priority: int = 0,
    quantise: Quantisation | None = None,
) -> FleetHandle:
    """Reduce ``tensor`` over all members, into ``out`` or in place.

    In place, what the result overwrites is copied first, so that it can be put back when a member
    is lost in the middle; that takes as much memory again, from a pool.  With ``restore=False`` the
    tensor holds anything after an operation that was undone, and it is not tried again.

    Args:
        tensor: contiguous, on the CPU, of any shape; of the same size and dtype on all members.
        out: the same, for the result; ``tensor`` stays as it is.
        retry: see :meth:`Fleet.begin`.

    Raises UsageError for tensors that can't be reduced.
    """
    target = tensor if out is None else out
    if (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
        raise UsageError(f"out has to be {tensor.dtype} of shape {tuple(tensor.shape)}")
    work = Work(
        Kind.ALL_REDUCE,
        tensor.numel(),
        tensor.element_size(),
        memory(tensor),
        memory(target),
        Arithmetic(how, tensor.dtype),
        quantise=quantise,
        priority=priority,
    )
    saves = out is None and restore

    def make(rank: int, ranks: int) -> Work:
        return replace(work, backup=fleet.backups.take(work.target.nbytes)) if saves else work

    return fleet.begin(make, tag=tag, retry=retry and (saves or out is not None))


def reduce_scatter(
    fleet: Fleet,
    tensor: torch.Tensor,
    out: torch.Tensor,
    how: Reduction = Reduction.SUM,
    *,
    tag: int = 0,
) -> FleetHandle:
    """Reduce ``tensor`` over all members and leave each its segment of the result, flat.

    Segments are cut as :class:`~ftrain.comms.protocol.ring.Layout` says.  An operation that a
    change undoes is not tried again, because the segments' sizes depend on how many there are.
    """
    work = Work(
        Kind.REDUCE_SCATTER,
        tensor.numel(),
        tensor.element_size(),
        memory(tensor),
        memory(out),
        Arithmetic(how, tensor.dtype),
    )
    return fleet.begin(_always(work), tag=tag, retry=False)


def all_gather(
    fleet: Fleet, tensor: torch.Tensor, out: torch.Tensor, *, tag: int = 0
) -> FleetHandle:
    """Put all members' segments, flat, into ``out``; not tried again, as :func:`reduce_scatter`."""
    work = Work(Kind.ALL_GATHER, out.numel(), out.element_size(), memory(tensor), memory(out))
    return fleet.begin(_always(work), tag=tag, retry=False)


def broadcast(fleet: Fleet, tensor: torch.Tensor, root: int, *, tag: int = 0) -> FleetHandle:
    """Send ``tensor`` from member ``root`` to all; not tried again when that one is lost."""
    data = memory(tensor)

    def make(rank: int, ranks: int) -> Work:
        members = fleet.members
        if root not in members:
            raise UsageError(f"member {root}, which broadcasts, is not in the fleet: {members}")
        place = members.index(root)
        source, target = (data, _NOTHING) if rank == place else (_NOTHING, data)
        count, size = tensor.numel(), tensor.element_size()
        return Work(Kind.BROADCAST, count, size, source, target, root=place)

    return fleet.begin(make, tag=tag, retry=False)


def memory(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes; UsageError unless it is contiguous and on the CPU."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise UsageError("a collective among replica groups takes contiguous tensors on the CPU")
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().view(-1).view(torch.uint8).numpy().data.cast("B")


def _always(work: Work) -> Make:
    return lambda rank, ranks: work
