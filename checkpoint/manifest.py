"""What publishes a durable version: a small JSON file that names all of its files.

``<directory>/<fence>/<step>.json`` beside ``<directory>/<fence>/<step>/rank<r>.ftr``.  A version
without its manifest does not exist.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ftrain.checkpoint.image import ImageReader, ImageState
from ftrain.checkpoint.retention import VersionKey
from ftrain.comms.errors import CorruptionError, RunDirectoryError, StateError
from ftrain.comms.protocol.messages import VersionId

MANIFEST_BYTES_MAX = 64 * 1024 * 1024
_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One rank's file of a durable version."""

    rank: _Natural
    nbytes: _Natural
    digest: _Digest  # of the image's header, and through it of everything in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest's content. The files are those of the ranks 0 to ``world_size`` - 1."""

    format: Literal[1] = 1
    run_id: str
    topology: str
    fence: _Natural  # epoch under which it was published
    epoch: _Natural  # epoch in which it was captured
    step: _Natural
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    files: tuple[FileRecord, ...]

    def encode(self) -> bytes:
        """As JSON for people and programs."""
        return msgspec.json.format(msgspec.json.encode(self)) + b"\n"


@dataclass(frozen=True, slots=True)
class DurableVersion:
    """A published version whose files are there."""

    path: Path  # of the manifest
    manifest: Manifest

    @property
    def key(self) -> VersionKey:
        """(fence, step): what versions are ordered by."""
        return self.manifest.fence, self.manifest.step

    @property
    def version(self) -> VersionId:
        """The version's identity in the group."""
        return VersionId(self.manifest.epoch, self.manifest.step)

    @property
    def fence(self) -> int:
        """Epoch under which it was published."""
        return self.manifest.fence

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.manifest.step

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return self.manifest.world_size

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(record.nbytes for record in self.manifest.files)

    def file(self, rank: int) -> Path:
        """Path of a rank's file."""
        return self.path.with_suffix("") / file_name(rank)

    def check(self) -> None:
        """Look whether every rank's file has the stated size; ``CorruptionError`` if not."""
        ranks = [record.rank for record in self.manifest.files]
        if not ranks or ranks != list(range(self.manifest.world_size)):
            raise CorruptionError(f"{self.path} does not name one file for each of its ranks")
        for record in self.manifest.files:
            path = self.file(record.rank)
            nbytes = _size(path)
            if nbytes is None:
                raise CorruptionError(f"{path} is missing: take the next older version")
            if nbytes != record.nbytes:
                raise CorruptionError(
                    f"{path} has {nbytes} of {record.nbytes} bytes: take the next older version"
                )

    def load(self, rank: int, *, verify: bool = True) -> ImageReader:
        """A rank's image, mapped read-only; the map lives as long as its views.

        Args:
            rank: of the world that wrote it.
            verify: compare every byte with its digest now. Otherwise only header and index are
                compared, and the caller verifies what it reads.

        Raises:
            CorruptionError: the file is missing, cut off or damaged; take the next older version.
        """
        path = self.file(rank)
        record = self.manifest.files[rank]
        reader = map_image(path)
        if _size(path) != record.nbytes or reader.digest != record.digest:
            raise CorruptionError(f"{path} is not the file that {self.path} names")
        manifest, identity = self.manifest, reader.identity
        if (
            (identity.run_id, identity.topology) != (manifest.run_id, manifest.topology)
            or (identity.version, identity.rank) != (self.version, rank)
            or (identity.world_size, reader.state) != (manifest.world_size, ImageState.SEALED)
        ):
            raise CorruptionError(f"{path} is of another run, version or rank than {self.path}")
        if verify:
            reader.verify()
        return reader


def file_name(rank: int) -> str:
    """Name of a rank's file in its version's folder."""
    return f"rank{rank}.ftr"


def map_image(path: Path) -> ImageReader:
    """The image in a file, mapped read-only; ``CorruptionError`` when there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            nbytes = os.fstat(fd).st_size
            mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if nbytes else b""
        finally:
            os.close(fd)
    except OSError as error:
        raise CorruptionError(f"{path} can't be read ({error.strerror})") from None
    try:
        return ImageReader(mapped, where=str(path))
    except StateError as error:
        raise CorruptionError(str(error)) from None


def decode_manifest(path: Path) -> Manifest:
    """What a manifest says, without a look at the files; ``CorruptionError``."""
    try:
        with path.open("rb") as file:
            content = file.read(MANIFEST_BYTES_MAX)
        return msgspec.json.decode(content, type=Manifest)
    except OSError as error:
        raise CorruptionError(f"{path} can't be read ({error.strerror})") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptionError(f"{path} is no manifest: {error}") from None


def read_manifest(path: str | os.PathLike[str]) -> DurableVersion:
    """The version that ``path`` publishes.

    Raises:
        CorruptionError: no manifest, or a file that it names is missing or has another size.
    """
    path = Path(path)
    manifest = decode_manifest(path)
    if (path.parent.name, path.name) != (str(manifest.fence), f"{manifest.step}.json"):
        raise CorruptionError(
            f"{path} is the manifest of step {manifest.step} under fence {manifest.fence}, "
            "moved from its place"
        )
    version = DurableVersion(path, manifest)
    version.check()
    return version


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunDirectoryError(f"{path} can't be looked at: {error.strerror}") from None
