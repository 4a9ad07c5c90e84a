"""torch's Distributed Checkpoint on our store: verified when it is read, published by a manifest.

::

    from ftrain.runtime.dcp import FtrainReader, FtrainWriter

    writer = FtrainWriter("checkpoints")
    dcp.save({"model": model, "optimizer": optimizer}, storage_writer=writer, checkpoint_id="100")
    dcp.load({"model": model, "optimizer": optimizer}, storage_reader=FtrainReader("checkpoints"))

``checkpoint_id`` is the step.  Nothing is pickled: what is no tensor is kept as plain values
(checkpoint/codec.py), and refused by name if it is anything else.  The reader reads what a Session
saved as well, under the names that ``torch.distributed.checkpoint.state_dict`` uses.

What DCP raises, ``CheckpointException``, is a BaseException: ``except Exception`` does not see it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.catalogue import SavedTensor
from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.checkpoint.manifest import DurableVersion, FileRecord
from ftrain.checkpoint.retention import Retention
from ftrain.checkpoint.tensors import StateTensor, tensor_view
from ftrain.comms.errors import FtrainError, RestoreError, StateError, UsageError
from ftrain.comms.protocol.messages import Share, VersionId
from ftrain.configs.schema import SnapshotConfig
from ftrain.runtime.interop.outline import DCP, all_items
from ftrain.runtime.interop.whole import WholeVersion, whole_version

_log = logging.getLogger("ftrain.dcp")

CheckpointId = str | os.PathLike[str] | int | None


@dataclass(frozen=True, slots=True)
class _Order:
    """What the coordinator tells each rank about the version that is being written."""

    fence: int
    step: int
    rank: int
    world_size: int
    topology: str


class FtrainWriter(StorageWriter):
    """Writes versions for ``torch.distributed.checkpoint.save`` and ``async_save``.

    A version exists when every rank's file is on the disk and its manifest is published.  Each
    writer is an epoch of its own: it is refused once another one has begun, and what it still
    publishes is not seen.

    Args:
        directory: of the store; all ranks have to see the same one.
        step: of the version; ``checkpoint_id`` says it as well, for each save.
        run_id: whose versions they are.
        keep_last: how many to keep; 0: all.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        step: int | None = None,
        *,
        run_id: str = DCP,
        keep_last: int = 0,
    ) -> None:
        self._store = DurableStore(directory)
        self._step = step
        self._run_id = run_id
        self._keep_last = keep_last
        self._fence = 0  # of this writer, known where it coordinates
        self._order: _Order | None = None

    @property
    def checkpoint_id(self) -> str:
        """Where the version goes, for logs."""
        return f"{self._store.directory} step {self._step}"

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        """Another version begins: ``checkpoint_id`` is its step."""
        self._step = _step(checkpoint_id, self._step)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse what can't be done: ``UsageError``."""
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "FtrainWriter publishes a version of all ranks: save with use_collectives=True"
            )
        if self._step is None:
            raise UsageError("say which step is saved: checkpoint_id=str(step)")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin this writer's epoch if it is the first version, and number the ranks."""
        assert self._step is not None
        if not all(getattr(plan, "usable", True) for plan in plans):
            raise UsageError(
                "FtrainWriter needs every save's whole plan: give dcp.save no planner, or a "
                "DefaultSavePlanner without enable_plan_caching"
            )
        if not self._fence:
            survey = self._store.survey()
            newest = survey.versions[0].version if survey.versions else None
            fence = survey.fence + 1
            self._store.begin_fence(fence, self._run_id, newest)
            self._fence = fence
        self._require_newest()
        topology = _topology(plans)
        self._order = _Order(self._fence, self._step, 0, len(plans), topology)
        orders = [replace(self._order, rank=rank) for rank in range(len(plans))]
        return [
            replace(plan, storage_data=order) for plan, order in zip(plans, orders, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; it is on the disk when this returns."""
        order = plan.storage_data
        assert isinstance(order, _Order)
        identity = ImageIdentity(
            self._run_id,
            order.topology,
            VersionId(order.fence, order.step),
            order.rank,
            order.world_size,
            0,
            os.getpid(),
        )
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        share = Share(str(order.rank), 0, 0, 1)
        segments = lay_out(_segment(item, share.key) for item in tensors)
        image = ImagePlan(segments, (share,), 0, SnapshotConfig().chunk_bytes)
        small = {DCP: {"values": _values(plan, planner), "paths": dict(plan.planner_data or {})}}
        record = self._store.write_tensors(
            order.fence,
            identity,
            image,
            (_bytes(planner, item) for item in tensors),
            encode_tree(small, "the state"),
        )
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(f"rank{record.rank}"), record.nbytes, record)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the version: every rank's file is there."""
        order = self._order
        assert order is not None
        files = [result.storage_data for of_rank in results for result in of_rank]
        assert all(isinstance(record, FileRecord) for record in files)
        version = VersionId(order.fence, order.step)
        self._require_newest()  # still
        self._store.publish(
            order.fence, version, self._run_id, order.topology, order.world_size, files
        )
        if self._keep_last:
            try:
                self._store.sweep(Retention(self._keep_last), self._run_id)
            except FtrainError as error:  # the new one is saved all the same
                _log.warning("ftrain: old versions can't be deleted: %s", error)

    def _require_newest(self) -> None:
        """StateError if another writer has begun since: nobody would see what is saved here."""
        newest = max((file.fence for file in self._store.fence_files()), default=0)
        if newest > self._fence:
            raise StateError(
                f"another FtrainWriter has begun in {self._store.directory} since this one: what "
                "this one saves would not be seen; save with one writer, or make a new one"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a step."""
        return os.fspath(checkpoint_id).isdecimal()

    def storage_meta(self) -> StorageMeta | None:
        """Which version it is, for logs."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)


class FtrainReader(StorageReader):
    """Reads versions for ``torch.distributed.checkpoint.load``, into any layout.

    Every byte that is used is compared with its digest, and repaired from another rank's copy where
    there is one.

    Args:
        directory: of the store, as the writer's, or ``<run directory>/checkpoints``.
        step: which version; None: the newest. ``checkpoint_id`` says it as well.
    """

    def __init__(self, directory: str | os.PathLike[str], step: int | None = None) -> None:
        self._store = DurableStore(directory)
        self._step = step
        self._version: DurableVersion | None = None
        self._tensors: dict[str, SavedTensor] = {}
        self._values: dict[str, Any] = {}
        self.repaired: list[str] = []  # what was damaged in the last load, in words

    @property
    def checkpoint_id(self) -> str:
        """Where the version is, for logs."""
        return f"{self._store.directory} step {'newest' if self._step is None else self._step}"

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        """Another load begins: ``checkpoint_id`` is the step."""
        self._step = _step(checkpoint_id, self._step)

    def read_metadata(self) -> Metadata:
        """What is in the version.

        Raises:
            RunDirectoryError, UsageError: there is no such version.
            CorruptionError: its files are damaged.
        """
        self._version = self._store.find(self._step)
        with whole_version(self._store.opened(self._version)) as whole:
            items = all_items(whole)
        self._tensors = {item.name: item.tensor for item in items if item.tensor is not None}
        self._values = {item.name: item.value for item in items if item.tensor is None}
        told: dict[str, Any] = {name: _told(t) for name, t in self._tensors.items()}
        for name, value in self._values.items():
            # What a Session keeps with its small state is a tensor to whoever loads it.
            told[name] = (
                _told_of(tuple(value.shape), value.dtype)
                if isinstance(value, torch.Tensor)
                else BytesStorageMetadata()
            )
        return Metadata(
            told,
            planner_data={item.name: item.path for item in items},
            storage_meta=StorageMeta(checkpoint_id=self.checkpoint_id),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say which version this rank sees."""
        assert self._version is not None
        return replace(plan, storage_data=self._version.key)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse ranks that do not see the same version: ``RestoreError``."""
        seen = {plan.storage_data for plan in plans}
        if len(seen) > 1:
            steps = sorted({step for _, step in seen})
            raise RestoreError(
                f"the ranks see different versions in {self._store.directory} (steps {steps}): "
                "name the step, and give all of them the same directory"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read, verify and put in place what this rank wants; raises as :meth:`read_metadata`."""
        assert self._version is not None
        stored: list[ReadItem] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                _give(planner, item, self._values[name])
            elif name in self._tensors:
                stored.append(item)
            else:
                _copy(planner, item, self._values[name])
        with whole_version(self._store.opened(self._version)) as whole:
            for batch in _batches(stored):
                self._fill(whole, batch, planner)
            self.repaired = whole.repaired
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, whole: WholeVersion, items: list[ReadItem], planner: LoadPlanner) -> None:
        live = [planner.resolve_tensor(item).detach() for item in items]
        targets = []
        for item, tensor in zip(items, live, strict=True):
            wanted = self._tensors[item.storage_index.fqn]
            # DCP copies with a conversion where the types differ.
            memory = tensor if _dtype(tensor) == wanted.dtype else _like(tensor, wanted.dtype)
            place = Placement(wanted.shape, tuple(item.storage_offsets), wanted.owner)
            targets.append(StateTensor(wanted.name, memory, "all", place))
        whole.fill(targets)
        for item, tensor, target in zip(items, live, targets, strict=True):
            if target.tensor is not tensor:
                tensor.copy_(target.tensor)
            planner.commit_tensor(item, tensor)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a step."""
        return os.fspath(checkpoint_id).isdecimal()


def _step(checkpoint_id: CheckpointId, before: int | None) -> int | None:
    if checkpoint_id is None:
        return before
    text = str(checkpoint_id) if isinstance(checkpoint_id, int) else os.fspath(checkpoint_id)
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(
            f"checkpoint_id={text!r} has to be the step, such as '100': the directory is the "
            "writer's and reader's first argument"
        )
    return int(text)


def _topology(plans: list[SavePlan]) -> str:
    """Names, shapes and types of the tensors, as 32 hex characters."""
    tensors = {
        f"{item.index.fqn} {tuple(item.tensor_data.size)} {item.tensor_data.properties.dtype}"
        for plan in plans
        for item in plan.items
        if item.tensor_data is not None
    }
    return hashlib.blake2b("\n".join(sorted(tensors)).encode(), digest_size=16).hexdigest()


def _segment(item: WriteItem, share: str) -> Segment:
    told = item.tensor_data
    assert told is not None
    dtype = str(told.properties.dtype).removeprefix("torch.")
    shape = tuple(told.chunk.sizes)
    place = Placement(tuple(told.size), tuple(told.chunk.offsets))
    nbytes = prod(shape) * item_bytes(dtype)
    return Segment(item.index.fqn, dtype, shape, share, 0, nbytes, place)


def _bytes(planner: SavePlanner, item: WriteItem) -> memoryview:
    found = planner.resolve_data(item)
    assert isinstance(found, torch.Tensor)
    return tensor_view(found)


def _values(plan: SavePlan, planner: SavePlanner) -> dict[str, Any]:
    """What of the plan is no tensor, as it is: planners themselves would pickle it."""
    names = [item.index for item in plan.items if item.type == WriteItemType.BYTE_IO]
    look_up = getattr(planner, "lookup_object", None)
    if names and look_up is None:
        raise StateError(
            f"{names[0].fqn} is no tensor, and a {type(planner).__name__} does not tell its value: "
            "use a planner that is derived from DefaultSavePlanner"
        )
    values = {index.fqn: look_up(index) for index in names} if look_up else {}
    for name, value in values.items():
        encode_tree(value, name)  # refuses by this name
    return values


def _give(planner: LoadPlanner, item: ReadItem, value: Any) -> None:
    """Hand over a value that is no tensor.

    Planners take pickled bytes.  The usual one is gone around; another one is given bytes that were
    made here and now, never any that were read.
    """
    usual = type(planner).load_bytes is DefaultLoadPlanner.load_bytes
    if isinstance(planner, DefaultLoadPlanner) and usual:
        name = item.dest_index.fqn
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], value)
        else:
            planner.state_dict[name] = value
        return
    content = io.BytesIO()
    torch.save(value, content)
    content.seek(0)
    planner.load_bytes(item, content)


def _copy(planner: LoadPlanner, item: ReadItem, value: torch.Tensor) -> None:
    """Hand over a tensor that is here already."""
    live = planner.resolve_tensor(item).detach()
    live.copy_(narrow_tensor_by_index(value, item.storage_offsets, item.lengths))
    planner.commit_tensor(item, live)


def _batches(items: list[ReadItem]) -> Iterator[list[ReadItem]]:
    """The items so that no tensor is twice in one list."""
    while items:
        batch: dict[str, ReadItem] = {}
        rest = [i for i in items if batch.setdefault(i.storage_index.fqn, i) is not i]
        yield list(batch.values())
        items = rest


def _told(tensor: SavedTensor) -> TensorStorageMetadata:
    return _told_of(tensor.shape, getattr(torch, tensor.dtype))


def _told_of(shape: tuple[int, ...], dtype: torch.dtype) -> TensorStorageMetadata:
    """One chunk, whatever it lies in: which bytes those are is found out by ourselves."""
    whole = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [whole])


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _like(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=getattr(torch, dtype), device=tensor.device)
