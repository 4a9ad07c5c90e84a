"""Makes a version of a model from elsewhere, for a Session to begin with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.checkpoint.manifest import DurableVersion, read_manifest
from ftrain.checkpoint.tensors import tensor_view
from ftrain.comms.errors import CorruptionError, RunDirectoryError, StateError
from ftrain.comms.protocol.messages import Share, VersionId
from ftrain.configs.schema import SnapshotConfig
from ftrain.runtime.imported import imported_state
from ftrain.runtime.interop.source import Origin, Reused
from ftrain.runtime.interop.target import Progress
from ftrain.runtime.modules import plain_name

_RUN_ID = "imported"
_SHARE = "0"


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What becomes one tensor of the version."""

    source: str  # its name where it comes from
    segment: Segment


def import_model(
    kind: str,
    path: str,
    store: DurableStore,
    origin: Origin,
    *,
    model: str = "model",
    dtype: str = "",
    progress: Progress = lambda nbytes: None,
) -> DurableVersion:
    """Make the version of step 0, and its directory, from the tensors at ``path``.

    Args:
        kind: what ``path`` is, for people.
        path: where the tensors are, for people.
        store: has to be empty, so that nothing is hidden by what is imported.
        origin: the tensors.
        model: what the Session calls the model.
        dtype: of the floating-point tensors in the version; "": as they are.
        progress: told of the bytes written.

    Raises:
        RunDirectoryError: there are versions already, or the directory can't be written.
        StateError: a tensor can't be part of a version.
        CorruptionError: one can't be read.
    """
    survey = store.survey()
    if survey.versions or survey.hidden or survey.problems:
        raise RunDirectoryError(
            f"{store.directory} holds versions already: import into a new directory"
        )
    tensors = _plan(origin, model, dtype)
    fence = survey.fence + 1
    version = VersionId(fence, 0)
    identity = ImageIdentity(_RUN_ID, "", version, 0, 1, 0, os.getpid())
    plan = ImagePlan(
        tuple(tensor.segment for tensor in tensors),
        (Share(_SHARE, 0, 0, 1),),
        0,
        SnapshotConfig().chunk_bytes,
    )
    small = encode_tree(imported_state(model, kind, path))
    record = store.write_tensors(fence, identity, plan, _parts(origin, tensors, progress), small)
    store.begin_fence(fence, _RUN_ID, None)
    return read_manifest(store.publish(fence, version, _RUN_ID, "", 1, [record], {"from": kind}))


def _plan(origin: Origin, model: str, dtype: str) -> list[_Tensor]:
    segments: list[Segment] = []
    sources: dict[str, str] = {}
    for source, (own, shape) in origin.tensors.items():
        name = f"{model}/{plain_name(source)}"
        if name in sources:
            raise StateError(f"{source} and {sources[name]} would both be {name}")
        sources[name] = source
        kind = dtype if dtype and getattr(torch, own).is_floating_point else own
        nbytes = prod(shape) * item_bytes(kind)
        place = Placement.whole(shape)
        segments.append(Segment(name, kind, shape, _SHARE, 0, nbytes, place))
    return [_Tensor(sources[segment.name], segment) for segment in lay_out(segments)]


def _parts(origin: Origin, tensors: list[_Tensor], progress: Progress) -> Iterator[memoryview]:
    memory = Reused(
        (wanted.segment.dtype, wanted.segment.place.shape)
        for wanted in tensors
        if wanted.segment.dtype != origin.tensors[wanted.source][0]
    )
    for wanted in tensors:
        try:
            tensor = origin.read(wanted.source)
        except OSError as error:  # not of the directory that is written
            raise CorruptionError(f"{wanted.source} can't be read ({error})") from error
        found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != origin.tensors[wanted.source]:
            raise CorruptionError(f"{wanted.source} is {found}, not what the list of contents says")
        if found[0] != wanted.segment.dtype:
            tensor = memory.tensor(wanted.segment.dtype, found[1]).copy_(tensor.detach())
        yield tensor_view(tensor)
        progress(wanted.segment.nbytes)
