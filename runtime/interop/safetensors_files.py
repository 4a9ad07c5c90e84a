"""safetensors, as Hugging Face's loaders read and write it: shards and an index.

A file is the length of its header (uint64), the header (JSON: type, shape and place of each tensor)
and the tensors' bytes without gaps.  It is written here, because the package's own writer wants all
tensors of a file in memory; it is read by the package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ftrain.checkpoint.files import NewFile
from ftrain.checkpoint.tensors import tensor_view
from ftrain.comms.errors import CorruptionError, StateError, UsageError
from ftrain.runtime.interop.outline import Item, each
from ftrain.runtime.interop.source import Origin
from ftrain.runtime.interop.target import Progress, appearing
from ftrain.runtime.interop.whole import WholeVersion

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_INDEX = "model.safetensors.index.json"


def write_safetensors(
    version: WholeVersion, items: Sequence[Item], out: Path, shard_bytes: int, progress: Progress
) -> None:
    """Make the folder ``out`` of shards of at most ``shard_bytes``, or of one tensor.

    Values that are no tensors have no place in it and are left out.

    Raises:
        StateError: a tensor has a type that safetensors does not have.
        RunDirectoryError: ``out`` is there already, or can't be written.
        CorruptionError: as :meth:`WholeVersion.read`.
    """
    tensors = [item for item in items if item.is_tensor]
    for item in tensors:
        if item.dtype not in _NAMES:
            raise StateError(
                f"{item.name} is {item.dtype}, which safetensors does not have: export --to torch"
            )
    shards = _cut(tensors, shard_bytes)
    total = sum(item.nbytes for item in tensors)
    with appearing(out, total) as folder:
        folder.mkdir()
        weights: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = (
                f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                if len(shards) > 1
                else "model.safetensors"
            )
            _write_shard(version, shard, folder / name, progress)
            weights |= dict.fromkeys((item.name for item in shard), name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
            content = json.dumps(index, indent=2).encode() + b"\n"
            with NewFile(folder / _INDEX, direct=False) as file:
                file.write_at(0, content)
                file.sync()


def read_safetensors(path: Path) -> Origin:
    """The tensors of a file, or of a folder with or without index.

    Raises:
        UsageError: there is none, or the package is not installed.
        CorruptionError: it is none, or the index names what is not there.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UsageError(
            "reading safetensors needs the package of this name: pip install 'ftrain[interop]'"
        ) from None
    places: dict[str, Any] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    known = {theirs: ours for ours, theirs in _NAMES.items()}
    for name in _files(path):
        try:
            file: Any = safe_open(name, framework="pt")
            for tensor in file.keys():  # noqa: SIM118 - no mapping
                piece = file.get_slice(tensor)
                dtype = known.get(piece.get_dtype())
                if dtype is None:
                    raise StateError(
                        f"{name}: {tensor} is of type {piece.get_dtype()}, unknown here"
                    )
                if tensor in places:
                    raise CorruptionError(f"{name}: {tensor} is in another file as well")
                places[tensor] = file
                shapes[tensor] = (dtype, tuple(piece.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CorruptionError(f"{name} can't be read as safetensors ({error})") from None

    def read(name: str) -> torch.Tensor:
        found: torch.Tensor = places[name].get_tensor(name)
        return found

    if any(name.startswith("optimizer.state.") for name in shapes):  # exported with --all
        inner = {n.removeprefix("model."): n for n in shapes if n.startswith("model.")}
        return Origin(
            {name: shapes[n] for name, n in inner.items()}, lambda name: read(inner[name])
        )
    return Origin(shapes, read)


def _cut(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    held = 0
    for item in items:
        if shards[-1] and held + item.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(item)
        held += item.nbytes
    return shards


def _write_shard(
    version: WholeVersion, items: Sequence[Item], path: Path, progress: Progress
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    # The widest first, so that each lies at a multiple of its size.
    for item in sorted(items, key=lambda item: (-_width(item), item.name)):
        places[item.name] = end
        header[item.name] = {
            "dtype": _NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [end, end + item.nbytes],
        }
        end += item.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    begin = 8 + len(head)
    with NewFile(path, begin + end, direct=False) as file:
        file.write_at(0, struct.pack("<Q", len(head)) + head)
        for item, tensor in each(version, items):
            file.write_at(begin + places[item.name], tensor_view(tensor))
            progress(item.nbytes)
        file.sync()


def _width(item: Item) -> int:
    return torch.empty((), dtype=getattr(torch, item.dtype)).element_size()


def _files(path: Path) -> list[Path]:
    """The files that belong together at ``path``."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"there is no {path}")
    index = path / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CorruptionError(f"{index} is no index of safetensors ({error!r})") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (path / name).is_file():
                raise CorruptionError(f"{index} names the file {name!r}, which is not there")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise UsageError(f"there is no safetensors file in {path}")
    return found
