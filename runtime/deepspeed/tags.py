"""A checkpoint's folder: DeepSpeed's names, our files, and the manifest that makes it exist.

::

    <save_dir>/latest                              names the newest complete tag
    <save_dir>/<tag>/ftrain.json                   names every file of the tag, with its digest
    <save_dir>/<tag>/mp_rank_00_model_states.pt    a segment file (docs/checkpoint_format.md)
    <save_dir>/<tag>/<name>.<save>.new             one that is being written

A tag without a manifest is not complete.  A tag may be saved again: the new files lie beside the
old ones until the new manifest is there, and only then take their names, so that whoever is killed
in between leaves either the one or the other.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ftrain.checkpoint.directory import replace_file
from ftrain.checkpoint.files import LocalFile, sync_folder
from ftrain.checkpoint.manifest import FORMAT, decode_record, encode_record
from ftrain.checkpoint.segment import MAGIC
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.comms.errors import CorruptionError, FtrainError, RestoreError

MANIFEST = "ftrain.json"
LATEST = "latest"
_FileName = Annotated[str, msgspec.Meta(pattern=r"^[^/\0]{1,255}$")]


@dataclass(frozen=True, slots=True)
class TagFile:
    """One file of a tag."""

    nbytes: Annotated[int, msgspec.Meta(ge=0)]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]  # of its footer


@dataclass(frozen=True, slots=True, kw_only=True)
class TagManifest:
    """What makes a tag complete."""

    format: Literal[2] = FORMAT
    save: Annotated[str, msgspec.Meta(pattern="^[0-9a-f-]{1,64}$")]  # which attempt this was
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    written_s: float  # Unix time
    files: dict[_FileName, TagFile]
    xxh3: str = ""  # of the encoding in which this is empty


def new_path(path: Path, save: str) -> Path:
    """Where the file for ``path`` is written."""
    return path.with_name(f"{path.name}.{save}.new")


def clear(path: Path, run: str) -> None:
    """Settle what runs before ``run`` left of ``path``: what a manifest names takes its place, the
    rest goes.  What this run itself wrote may be about to be published.  Raises OSError."""
    own = f"{path.name}.{run}-"
    found = path.parent.glob(f"{path.name}.*.new")
    leftovers = [leftover for leftover in found if not leftover.name.startswith(own)]
    if not leftovers:
        return
    with suppress(FtrainError):
        manifest = read_manifest(path.parent)
        if manifest is not None and path.name in manifest.files:
            _settle(path, manifest.save)
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)


def place(path: Path, save: str) -> None:
    """Give a written and synced file its name, unless an older one has it; raises OSError."""
    new = new_path(path, save)
    try:
        os.link(new, path)  # unlike a rename, never over another one
    except FileExistsError:
        pass  # until the manifest is there
    else:
        new.unlink()
    sync_folder(path.parent)


def publish(folder: Path, save: str, world_size: int, files: dict[str, TagFile]) -> None:
    """Make the tag exist, with these files, which are durable; raises OSError."""
    manifest = TagManifest(save=save, world_size=world_size, written_s=time.time(), files=files)
    replace_file(folder / MANIFEST, encode_record(manifest))
    for name in files:
        _settle(folder / name, save)
    sync_folder(folder)


def name_latest(save_dir: Path, tag: str) -> None:
    """Let ``latest`` name ``tag``: it names the old or the new one, whenever one is killed."""
    replace_file(save_dir / LATEST, tag.encode())


def discard(folder: Path, save: str, files: dict[str, TagFile]) -> None:
    """Remove what a save that failed has written, and nothing else: not what a manifest names, be
    it that only its folder could not be synced any more."""
    with suppress(FtrainError):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.save == save:
            return
    for name, file in files.items():
        path = folder / name
        with suppress(OSError):
            new_path(path, save).unlink(missing_ok=True)
        with suppress(FtrainError, OSError):
            if _is(path, file):
                path.unlink()
    with suppress(OSError):
        folder.rmdir()  # if nothing else is in it


def read_manifest(folder: Path) -> TagManifest | None:
    """The manifest of a tag; None: there is none.

    Raises:
        CorruptionError, StateError, RunDirectoryError: as checkpoint/manifest.py raises them.
    """
    try:
        return decode_record(folder / MANIFEST, TagManifest)
    except FileNotFoundError:
        return None


def is_published(folder: Path, save: str) -> bool:
    """Whether the tag is there, as this save wrote it."""
    with suppress(FtrainError):
        manifest = read_manifest(folder)
        return manifest is not None and manifest.save == save
    return False


def check(save_dir: Path, tag: str, part: int, parts: int) -> None:
    """Compare one of ``parts`` parts of a tag's files with their digests, byte by byte.  Nothing
    is known of the files of DeepSpeed's own engine.

    Raises:
        CorruptionError, RestoreError, StateError: it can't be loaded.
    """
    folder = save_dir / tag
    if not tag or not folder.is_dir():
        raise RestoreError(f"{folder} does not exist")
    manifest = read_manifest(folder)
    if manifest is None:
        if any(map(is_segment, folder.glob("*.pt*"))):
            raise RestoreError(f"{folder} is not complete: the save was interrupted")
        return
    for name in sorted(manifest.files)[part::parts]:
        reader = _open(folder / name, manifest)
        try:
            reader.verify()
        finally:
            reader.close()


def complete_tags(save_dir: Path, before: str = "") -> list[str]:
    """Tags whose manifest and files are there, newest first; what is in the files is not read.

    Args:
        save_dir: where they are.
        before: a tag; those that were written after it are left out.
    """
    found: list[tuple[float, str]] = []
    written_s = float("inf")
    with suppress(OSError):
        for folder in save_dir.iterdir():
            with suppress(FtrainError):
                manifest = read_manifest(folder)
                if manifest is not None and all(_is_there(folder, manifest)):
                    found.append((manifest.written_s, folder.name))
                if manifest is not None and folder.name == before:
                    written_s = manifest.written_s
    return [tag for when_s, tag in sorted(found, reverse=True) if when_s <= written_s]


def open_file(path: Path) -> SegmentReader | None:
    """The file that ``path`` stands for; None: DeepSpeed's own engine wrote it.

    Raises:
        CorruptionError: it is damaged, or not the one that the manifest names.
        RestoreError: its tag is not complete.
    """
    manifest = read_manifest(path.parent)
    if manifest is None:
        if is_segment(path):
            raise RestoreError(
                f"{path.parent} is not complete: the save was interrupted; {advice(path.parent)}"
            )
        return None
    file = manifest.files.get(path.name)
    if file is None:
        raise RestoreError(
            f"{path} is not part of the checkpoint that {path.parent / MANIFEST} names; "
            f"{advice(path.parent)}"
        )
    try:
        return _open(path, manifest)
    except CorruptionError as error:
        raise CorruptionError(f"{error}; {advice(path.parent)}") from None


def _open(path: Path, manifest: TagManifest) -> SegmentReader:
    """A file that the manifest names; raises CorruptionError."""
    file, new = manifest.files[path.name], new_path(path, manifest.save)
    local = LocalFile(new if new.exists() else path)
    try:
        if local.nbytes != file.nbytes:
            raise CorruptionError(f"{local.where} has {local.nbytes} of {file.nbytes} bytes")
        return SegmentReader(local, file.digest)
    except BaseException:  # whatever it was: the descriptor goes with it
        local.close()
        raise


def is_segment(path: Path) -> bool:
    """Whether a file begins as our files do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def advice(folder: Path) -> str:
    """Which tag to load instead of the one in ``folder``."""
    others = [tag for tag in complete_tags(folder.parent) if tag != folder.name]
    if not others:
        return f"no other tag in {folder.parent} is complete"
    return f"load another tag, such as {others[0]!r}"


def _is_there(folder: Path, manifest: TagManifest) -> list[bool]:
    found = []
    for name, file in manifest.files.items():
        sizes = []
        for path in (folder / name, new_path(folder / name, manifest.save)):
            with suppress(OSError):
                sizes.append(path.stat().st_size)
        found.append(file.nbytes in sizes)
    return found


def _is(path: Path, file: TagFile) -> bool:
    """Whether this very file is there."""
    local = LocalFile(path)
    try:
        return SegmentReader(local).digest == file.digest
    finally:
        local.close()


def _settle(path: Path, save: str) -> None:
    with suppress(FileNotFoundError):
        os.replace(new_path(path, save), path)
