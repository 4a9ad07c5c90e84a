"""``ftrain checkpoints export | import``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrain.checkpoint.dtypes import ITEM_BYTES
from ftrain.checkpoint.lock import held_versions
from ftrain.comms.errors import CorruptionError, RunDirectoryError, UsageError
from ftrain.launch.place import is_address, new_place, open_place
from ftrain.launch.words import parse_size, progress_bar, size_text

if TYPE_CHECKING:
    from ftrain.runtime.interop.outline import Item
    from ftrain.runtime.interop.whole import WholeVersion


def export_version(
    place: str,
    out: str,
    kind: str,
    *,
    step: int | None,
    everything: bool,
    model: str,
    shard_size: str,
) -> dict[str, Any]:
    """Write a version as ``kind`` to ``out``; returns what was done, and ``text`` for people.

    Raises:
        RunDirectoryError: ``out`` is there already or can't be written, or there is no version.
        CorruptionError: a part is damaged, and there is no other copy of it; without ``step``: nor
            an older version.
        ObjectStoreError: the store can't be used.
        UsageError, StateError: it can't be exported so.
    """
    shard_bytes = parse_size("--shard-size", shard_size)
    _refuse_address("OUT", out)
    target = Path(out)
    if target.exists():  # before a version is looked for in a large directory
        raise RunDirectoryError(f"{out} exists already: choose a new name, nothing is overwritten")
    from ftrain.runtime.interop.outline import all_items, model_items
    from ftrain.runtime.interop.whole import whole_version

    with open_place(place) as store:
        version = store.find(step)
        survey = store.survey() if step is None else None
        older = [v for v in survey.versions if v.key < version.key] if survey else []
        passed = list(survey.problems) if survey else []
        while True:
            try:
                with whole_version(store.opened(version)) as whole:
                    items = all_items(whole) if everything else model_items(whole, model)
                    tensors = [item for item in items if item.is_tensor]
                    total = sum(item.nbytes for item in tensors)
                    with progress_bar(f"exporting step {version.step}", total) as progress:
                        _write(kind, whole, items, target, shard_bytes, progress)
                    repaired = list(whole.repaired)
                break
            except CorruptionError as error:
                if not older:
                    raise
                passed.append(str(error))
                version, *older = older
    text = [f"not used: {problem}" for problem in passed]
    text += [f"{text}: taken from another copy" for text in repaired]
    text.append(
        f"step {version.step}: {len(tensors)} tensors, {size_text(total)}, written to {out}"
    )
    return {
        "step": version.step,
        "out": out,
        "format": kind,
        "tensors": len(tensors),
        "bytes": total,
        "repaired": repaired,
        "text": text,
    }


def _write(
    kind: str,
    whole: WholeVersion,
    items: list[Item],
    target: Path,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> None:
    if kind == "safetensors":
        from ftrain.runtime.interop.safetensors_files import write_safetensors

        write_safetensors(whole, items, target, shard_bytes, progress)
    elif kind == "torch":
        from ftrain.runtime.interop.torch_file import write_torch

        write_torch(whole, items, target, progress)
    else:
        from ftrain.runtime.interop.dcp_directory import write_dcp

        write_dcp(whole, items, target, progress)


def _refuse_address(name: str, text: str) -> None:
    """What other formats are read from and written to is on a file system."""
    if is_address(text):
        raise UsageError(f"{name} is an address: name a file or directory of this machine")


def import_version(path: str, place: str, kind: str, *, model: str, dtype: str) -> dict[str, Any]:
    """Make the first version of a new run from ``path``; returns what was done.

    Raises:
        RunDirectoryError: the run has versions already, or can't be written.
        UsageError, CorruptionError, StateError: ``path`` is not what it is said to be.
    """
    if dtype and (dtype not in ITEM_BYTES or "float" not in dtype):
        floats = ", ".join(name for name in ITEM_BYTES if "float" in name)
        raise UsageError(f"--dtype {dtype} is no floating-point type: it is one of {floats}")
    _refuse_address("PATH", path)
    store = new_place(place)
    from ftrain.runtime.interop.importing import import_model

    if kind == "safetensors":
        from ftrain.runtime.interop.safetensors_files import read_safetensors as read
    elif kind == "torch":
        from ftrain.runtime.interop.torch_file import read_torch as read
    else:
        from ftrain.runtime.interop.dcp_directory import read_dcp as read
    origin = read(Path(path))
    with (
        held_versions(store.directory, "import into a new directory"),
        progress_bar("importing", origin.nbytes) as progress,
    ):
        version = import_model(
            kind, path, store, origin, model=model, dtype=dtype, progress=progress
        )
    text = [
        f"{len(origin.tensors)} tensors of {model}, {size_text(version.nbytes)}, are step 0 in "
        f"{store.directory}",
        "The model only: optimizer, scheduler, data and random numbers begin anew.",
        f"Begin with: ftrain launch --run-dir {shlex.quote(place)} train.py",
    ]
    return {
        "step": 0,
        "directory": str(store.directory),
        "format": kind,
        "tensors": len(origin.tensors),
        "bytes": version.nbytes,
        "text": text,
    }
