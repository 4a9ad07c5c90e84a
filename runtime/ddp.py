"""DistributedDataParallel buckets that do not depend on how long ago the process started.

DDP reduces the first step in one layout and lays its buckets out again by the order in which
gradients arrived.  With three or more ranks the layout decides the order of summation, so a
restarted process would differ from the undisturbed one in the last bits of its first step.  We keep
the arrival order with the version and give it to the new process before its first step.

Private names of torch are used here and nowhere else; :func:`supported` says whether they exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

_REDUCER_NAMES = ("_rebuild_buckets", "_push_all_rebuilt_params", "_remove_autograd_hooks")
_DDP_NAMES = (
    "_ddp_init_helper",
    "_build_params_for_reducer",
    "_get_ddp_logging_data",
    "_build_debug_param_to_name_mapping",
)


def supported() -> bool:
    """Whether this torch has the private names that bit-exact resumption of DDP needs."""
    reducer = getattr(torch.distributed, "Reducer", None)
    return (
        reducer is not None
        and all(hasattr(reducer, name) for name in _REDUCER_NAMES)
        and all(hasattr(DistributedDataParallel, name) for name in _DDP_NAMES)
    )


def will_rebuild(module: DistributedDataParallel) -> bool:
    """Whether DDP lays this module's buckets out again after its first backward."""
    return bool(module.static_graph) or not module.find_unused_parameters


def settle_buckets(module: DistributedDataParallel) -> list[int] | None:
    """Lay the buckets out by arrival order now, and return that order.

    To be called by every rank at the boundary after the first backward (the layout is broadcast).
    Returns parameter indices in arrival order, or None when DDP has not seen a backward yet.
    """
    ddp: Any = module
    ddp.reducer._rebuild_buckets()
    if ddp.logger is not None:
        ddp.logger.set_runtime_stats_and_log()  # which is when the layout is written down
    buckets = ddp._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", "")
    if not buckets:
        return None
    return [int(index) for bucket in buckets.split(",") for index in bucket.split()]


def restore_buckets(module: DistributedDataParallel, order: list[int]) -> bool:
    """Give a fresh DDP module the layout that ``order`` (parameter indices) once led to.

    To be called by every rank before the first step.  Returns False when the module's parameters
    do not fit the order; the layout then stays as DDP made it.
    """
    ddp: Any = module
    parameters, expect_sparse = ddp._build_params_for_reducer()
    if sorted(order) != list(range(len(parameters))):
        return False
    if ddp._comm_hooks or ddp.mixed_precision is not None:
        return False  # the new reducer would not have them
    names = ddp._build_debug_param_to_name_mapping(parameters)
    if ddp.reducer is not None:
        ddp.reducer._remove_autograd_hooks()
    ddp._ddp_init_helper(
        [parameters[index] for index in order],
        [expect_sparse[index] for index in order],
        {position: names[index] for position, index in enumerate(order) if index in names},
        ddp.static_graph,
    )
    reducer: Any = module.reducer  # a new one
    if ddp.static_graph:
        reducer._set_static_graph()
    reducer._push_all_rebuilt_params()
    return bool(reducer._rebuild_buckets())


def modules_of(models: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Every DDP module among ``models`` and their children."""
    return [
        module
        for model in models
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
    ]
