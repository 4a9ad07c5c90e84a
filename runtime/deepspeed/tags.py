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
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.files import LocalFile, NewFile, sync_folder
from ftrain.checkpoint.segment import HEADER
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.comms.errors import CorruptionError, RestoreError, StateError

MANIFEST = "ftrain.json"
LATEST = "latest"
_FORMAT: Final = 1
_MANIFEST_BYTES_MAX = 64 * 1024 * 1024
_FileName = Annotated[str, msgspec.Meta(pattern=r"^[^/\0]{1,255}$")]


class TagFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a tag."""

    nbytes: Annotated[int, msgspec.Meta(ge=0)]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]  # of its footer


class TagManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What makes a tag complete."""

    format: Literal[1] = _FORMAT
    save: Annotated[str, msgspec.Meta(pattern="^[0-9a-f-]{1,64}$")]  # which attempt this was
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    written_s: float  # Unix time
    files: dict[_FileName, TagFile]
    xxh3: str = ""  # of the encoding in which this is empty

    def encode(self) -> bytes:
        """As JSON, its own digest included."""
        plain = msgspec.structs.replace(self, xxh3="")
        digest = digest_of(msgspec.json.encode(plain)).hex()
        return msgspec.json.format(
            msgspec.json.encode(msgspec.structs.replace(self, xxh3=digest)), indent=1
        )


def new_path(path: Path, save: str) -> Path:
    """Where the file for ``path`` is written."""
    return path.with_name(f"{path.name}.{save}.new")


def clear(path: Path) -> None:
    """Settle what earlier attempts left of ``path``: what a manifest names takes its place, the
    rest goes.  Raises OSError."""
    leftovers = list(path.parent.glob(f"{path.name}.*.new"))
    if not leftovers:
        return
    with suppress(CorruptionError, StateError):
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
    _replace(folder / MANIFEST, manifest.encode())
    for name in files:
        _settle(folder / name, save)
    sync_folder(folder)


def name_latest(save_dir: Path, tag: str) -> None:
    """Let ``latest`` name ``tag``: it names the old or the new one, whenever one is killed."""
    _replace(save_dir / LATEST, tag.encode())


def discard(folder: Path, save: str, files: dict[str, TagFile]) -> None:
    """Remove what a save that failed has written, and nothing else."""
    for name, file in files.items():
        path = folder / name
        with suppress(OSError):
            new_path(path, save).unlink(missing_ok=True)
        with suppress(CorruptionError, StateError, OSError):
            if _is(path, file):
                path.unlink()
    with suppress(OSError):
        folder.rmdir()  # if nothing else is in it


def read_manifest(folder: Path) -> TagManifest | None:
    """The manifest of a tag; None: there is none.

    Raises:
        CorruptionError: it can't be read or is damaged.
        StateError: of another format.
    """
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            content = file.read(_MANIFEST_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptionError(f"{path} can't be read ({error.strerror})") from None
    try:
        head = msgspec.json.decode(content, type=_Head)
        if head.format != _FORMAT:
            raise StateError(
                f"{path} is of format {head.format}, this ftrain reads format {_FORMAT}: use the "
                "ftrain that wrote it"
            )
        manifest = msgspec.json.decode(content, type=TagManifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptionError(f"{path} is damaged ({error}): load an older tag") from None
    if manifest.encode() != content:
        raise CorruptionError(f"{path} does not match its digest: load an older tag")
    return manifest


class _Head(msgspec.Struct):
    format: int


def complete_tags(save_dir: Path) -> list[str]:
    """Tags whose manifest and files are there, newest first; what is in the files is not read."""
    found: list[tuple[float, str]] = []
    with suppress(OSError):
        for folder in save_dir.iterdir():
            with suppress(CorruptionError, StateError):
                manifest = read_manifest(folder)
                if manifest is not None and all(_is_there(folder, manifest)):
                    found.append((manifest.written_s, folder.name))
    return [tag for _, tag in sorted(found, reverse=True)]


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
                f"{path.parent} is not complete: the save was interrupted; {_others(path.parent)}"
            )
        return None
    file = manifest.files.get(path.name)
    if file is None:
        raise RestoreError(
            f"{path} is not part of the checkpoint that {path.parent / MANIFEST} names; "
            f"{_others(path.parent)}"
        )
    new = new_path(path, manifest.save)
    source = new if new.exists() else path
    local = LocalFile(source)
    try:
        if local.nbytes != file.nbytes:
            raise CorruptionError(f"{source} has {local.nbytes} of {file.nbytes} bytes")
        return SegmentReader(local, file.digest)
    except CorruptionError as error:
        local.close()
        raise CorruptionError(f"{error}; {advice(path)}") from None
    except BaseException:  # whatever it was: the descriptor goes with it
        local.close()
        raise


def is_segment(path: Path) -> bool:
    """Whether a file begins as our files do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(HEADER)) == HEADER
    except OSError:
        return False


def advice(path: Path) -> str:
    """Which tag to load instead of the one that a file is of."""
    return _others(path.parent)


def forget(path: Path) -> None:
    """Remove a half file, as far as that is possible."""
    with suppress(OSError):
        path.unlink()


def free_bytes(folder: Path) -> str:
    """How much room there is, in words."""
    try:
        return f"{shutil.disk_usage(folder).free} bytes are free"
    except OSError:
        return "how much is free is unknown"


def _others(folder: Path) -> str:
    tags = [tag for tag in complete_tags(folder.parent) if tag != folder.name]
    if not tags:
        return f"no other tag in {folder.parent} is complete"
    return f"load another tag, such as {tags[0]!r}"


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


def _replace(path: Path, content: bytes) -> None:
    """A small file's new content: it or the old one is there, whenever one is killed."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.unlink(missing_ok=True)
    try:
        with NewFile(fresh, direct=False) as file:
            file.write_at(0, content)
            file.sync()
        os.replace(fresh, path)
    except BaseException:  # whatever it was: the half file goes
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
