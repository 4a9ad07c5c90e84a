"""One file, as ``torch.save`` makes it and ``torch.load(weights_only=True)`` reads it."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrain.checkpoint.codec import is_plain
from ftrain.comms.errors import CorruptionError, StateError, UsageError
from ftrain.runtime.interop.outline import Item, each, tree_of
from ftrain.runtime.interop.source import Origin
from ftrain.runtime.interop.target import Progress, appearing, failed_in_torch
from ftrain.runtime.interop.whole import WholeVersion

_ALIGNMENT = 64
_FOREIGN = re.compile(r"GLOBAL (\S+)")  # in what torch says of a class or function in a pickle
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")


def write_torch(
    version: WholeVersion, items: Sequence[Item], out: Path, progress: Progress
) -> None:
    """Make the file ``out``, one tensor after the other.

    ``torch.save`` itself wants the whole state in memory.  So it is asked to save tensors without
    memory, which gives the list of contents; the contents follow, by the writer that it uses.

    Raises:
        RunDirectoryError: ``out`` is there already, or can't be written.
        CorruptionError: as :meth:`WholeVersion.read`.
    """
    tensors = [item for item in items if item.is_tensor]
    total = sum(item.nbytes for item in tensors)
    with appearing(out, total) as path:
        try:
            contents, keys, others = _contents(items, path)
            file: Any = torch._C.PyTorchFileWriter(str(path), True, _ALIGNMENT)
            for name, content in (
                ("data.pkl", contents),
                (".format_version", b"1"),
                (".storage_alignment", str(_ALIGNMENT).encode()),
                ("byteorder", sys.byteorder.encode()),
            ):
                file.write_record(name, content, len(content))
            for item, tensor in each(version, tensors):
                storage = tensor.untyped_storage()
                file.write_record(f"data/{keys[item.path]}", storage, item.nbytes)
                progress(item.nbytes)
            for number, plain in others.items():
                nbytes = plain.numel() * plain.element_size()
                file.write_record(f"data/{number}", plain.untyped_storage(), nbytes)
            file.write_end_of_file()
        except RuntimeError as error:
            raise failed_in_torch(error) from error
        with path.open("rb") as written:
            os.fsync(written.fileno())


def read_torch(path: Path) -> Origin:
    """The tensors of a model's ``state_dict``, or of one under "model" or "state_dict" in the file.

    Raises:
        UsageError: there is no such file, or no such thing in it.
        StateError: a tensor is not just numbers in memory.
        CorruptionError: it can't be read without running what is in it, or at all.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory: name a file of torch.save, or say --from dcp")
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    tree = _load(path)
    for candidate in (tree, *(tree.get(key) for key in _MODEL_KEYS if isinstance(tree, Mapping))):
        if _is_state(candidate):
            odd = next((name for name, tensor in candidate.items() if not is_plain(tensor)), None)
            if odd is not None:
                raise StateError(
                    f"{path}: {odd} is a sparse, nested, quantized or meta tensor, which a version "
                    "can't hold: save the model's state_dict() without it"
                )
            tensors = {
                str(name): (str(t.dtype).removeprefix("torch."), tuple(t.shape))
                for name, t in candidate.items()
            }
            return Origin(tensors, lambda name: candidate[name])  # noqa: B023 - returned at once
    raise UsageError(
        f"{path} holds no tensors by name, neither by itself nor under {' or '.join(_MODEL_KEYS)}: "
        "save the model's state_dict()"
    )


def _contents(
    items: Sequence[Item], path: Path
) -> tuple[bytes, dict[tuple[str | int, ...], int], dict[int, torch.Tensor]]:
    """The file's list of contents, the number of each item in it that is a tensor, and the tensors
    within other items by their numbers.

    ``path`` is used for a file that takes no space.
    """
    with FakeTensorMode():
        values = {
            item.path: torch.empty(item.shape, dtype=getattr(torch, item.dtype))
            if item.is_tensor
            else item.value
            for item in items
        }
    tree = tree_of(items, values)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tree, path)
    with zipfile.ZipFile(path) as file:
        (name,) = [name for name in file.namelist() if name.endswith("/data.pkl")]
        contents = file.read(name)
    path.unlink()
    found = dict(enumerate(_tensors(tree)))
    numbers = {id(tensor): number for number, tensor in found.items()}
    keys = {item.path: numbers[id(values[item.path])] for item in items if item.is_tensor}
    own = set(keys.values())
    return contents, keys, {number: t for number, t in found.items() if number not in own}


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """In the order in which they are saved."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # of before torch 1.6
    except Exception as error:  # whatever a damaged file makes of torch's reader
        text = str(error).strip()
        foreign = _FOREIGN.search(text)
        if foreign is not None:
            raise CorruptionError(
                f"{path} holds {foreign[1]}, and nothing but tensors and plain values is read: "
                "save the model's state_dict()"
            ) from None
        # What torch says of pickles is advice to run what is in them.
        is_advice = type(error).__name__ == "UnpicklingError"
        why = "" if is_advice or not text else f" ({text.splitlines()[0].partition('. ')[0]})"
        raise CorruptionError(
            f"{path} can't be read as tensors and plain values{why}: it is damaged, or no file of "
            "torch.save"
        ) from None


def _is_state(found: Any) -> TypeGuard[Mapping[str, torch.Tensor]]:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(name, str) for name in found)
        and all(isinstance(value, torch.Tensor) for value in found.values())
    )
