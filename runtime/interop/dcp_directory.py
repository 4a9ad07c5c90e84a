"""A directory of torch's Distributed Checkpoint (DCP), read and written without our code in it.

Torch keeps the list of contents (``.metadata``) as a pickle.  Of a directory from elsewhere it is
read by an unpickler that knows the classes of this list and no others; the tensors are read by
``torch.load(weights_only=True)``, as torch itself does it.
"""

from __future__ import annotations

import collections
import io
import os
import pathlib
import pickle
import warnings
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ftrain.checkpoint.boxes import Box, disjoint
from ftrain.comms.errors import CorruptionError, FtrainError, UsageError
from ftrain.runtime.interop.outline import Item, each, tree_of
from ftrain.runtime.interop.source import Origin, Reused
from ftrain.runtime.interop.target import Progress, appearing, failed_in_torch
from ftrain.runtime.interop.whole import WholeVersion

_METADATA_BYTES_MAX = 1 << 30
_DATA = "__0_0.distcp"  # as torch calls the first file of rank 0


def write_dcp(version: WholeVersion, items: Sequence[Item], out: Path, progress: Progress) -> None:
    """Make the directory ``out``, which ``torch.distributed.checkpoint.load`` reads.

    Raises:
        RunDirectoryError: ``out`` is there already, or can't be written.
        CorruptionError: as :meth:`WholeVersion.read`.
    """
    tensors = [item for item in items if item.is_tensor]
    values = {
        item.path: torch.empty(item.shape, dtype=getattr(torch, item.dtype), device="meta")
        if item.is_tensor
        else item.value
        for item in items
    }
    with appearing(out, sum(item.nbytes for item in tensors)) as folder:
        writer = _OneByOne(folder, version, tensors, progress)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is no process group
                save(tree_of(items, values), storage_writer=writer, no_dist=True)
        except CheckpointException as error:  # not even an Exception
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, FtrainError | OSError):
                raise cause from None
            raise failed_in_torch(cause) from error


def read_dcp(path: Path) -> Origin:
    """The tensors under "model" in such a directory, or all if there is nothing of that name.

    Raises:
        UsageError: there is no such directory.
        CorruptionError: it is damaged, incomplete, or asks for other classes than DCP's own.
    """
    if not (path / ".metadata").is_file():
        raise UsageError(f"{path} is no directory of torch's DCP: it has no .metadata")
    found = _metadata(path / ".metadata")
    names = _model_names(found)
    reader = FileSystemReader(path)
    reader.set_up_storage_reader(found, True)
    shapes = {}
    for name, key in names.items():
        told = found.state_dict_metadata[key]
        assert isinstance(told, TensorStorageMetadata)
        dtype = str(told.properties.dtype).removeprefix("torch.")
        shapes[name] = (dtype, tuple(told.size))
    memory = Reused(shapes.values())

    def read(name: str) -> torch.Tensor:
        key = names[name]
        tensor = memory.tensor(*shapes[name])
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({key: tensor}, found, True)
        try:
            reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # whatever a damaged file makes of torch's reader
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CorruptionError(f"{path}: {name} can't be read ({first})") from error
        return tensor

    return Origin(shapes, read)


class _OneByOne(FileSystemWriter):
    """Writes tensors as they come; in the state that is saved they have no memory.

    Torch's own ``write_data`` keeps every tensor of a file until the file is complete.
    """

    def __init__(
        self, folder: Path, version: WholeVersion, tensors: Sequence[Item], progress: Progress
    ) -> None:
        super().__init__(folder)
        self._file = folder / _DATA
        self._version = version
        self._tensors = tensors
        self._progress = progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """The same file as torch's own: first what is here already, then the tensors."""
        by_name = {item.index.fqn: item for item in plan.items}
        coming = [by_name.pop(item.name) for item in self._tensors]
        results: list[WriteResult] = []
        with self._file.open("xb") as file:

            def put(item: WriteItem, data: torch.Tensor | io.BytesIO) -> None:
                begin = file.tell()
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    torch.save(data, file)
                nbytes = file.tell() - begin
                place = filesystem._StorageInfo(_DATA, begin, nbytes)
                results.append(WriteResult(item.index, nbytes, place))

            for item in by_name.values():
                put(item, planner.resolve_data(item))
            tensors = each(self._version, self._tensors)
            for item, (source, tensor) in zip(coming, tensors, strict=True):
                put(item, tensor)
                self._progress(source.nbytes)
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes values of :data:`_CLASSES`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if it is one of DCP's list of contents."""
        found = _CLASSES.get((module, name))
        if found is None:
            raise ValueError(f"it asks for {module}.{name}")
        return found


def _metadata(path: Path) -> Metadata:
    if path.stat().st_size > _METADATA_BYTES_MAX:
        raise CorruptionError(f"{path} is too large to be a list of contents")
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        _check(found)
    except Exception as error:  # whatever a damaged or hostile file makes of the unpickler
        raise CorruptionError(f"{path} is no list of contents of torch's DCP ({error})") from None
    checked: Metadata = found
    return checked


def _check(found: Any) -> None:
    """ValueError unless all tensors are there, in files of this directory."""
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, Mapping):
        raise ValueError("it is something else")
    for name, told in found.state_dict_metadata.items():
        if not isinstance(told, TensorStorageMetadata):
            continue
        boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in told.chunks]
        boxes = [box for box in boxes if box.volume]
        if sum(box.volume for box in boxes) != prod(told.size) or not disjoint(boxes):
            raise ValueError(f"it does not tell where all of {name} is")
    for index, info in found.storage_data.items():
        name = info.relative_path
        if pathlib.PurePosixPath(name).name != name:
            raise ValueError(f"{index.fqn} is said to be in {name!r}, outside the directory")


def _model_names(found: Metadata) -> dict[str, str]:
    """The model's tensors: name in the model -> key in the directory."""
    keys = [
        key
        for key, told in found.state_dict_metadata.items()
        if isinstance(told, TensorStorageMetadata)
    ]
    paths = found.planner_data or {}
    inner = {
        ".".join(map(str, paths[key][1:])): key
        for key in keys
        if len(paths.get(key, ())) > 1 and paths[key][0] == "model"
    }
    return inner or {key: key for key in keys}
