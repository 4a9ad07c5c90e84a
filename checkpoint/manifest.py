"""What publishes a durable version: a small JSON file that names all of its files.

``<directory>/<fence>/<step>.json`` beside ``<directory>/<fence>/<step>/rank<r>.seg``.  A version
without its manifest does not exist.  ``<directory>/<fence>/fence.json`` says which history the
epoch goes on from (protocol/lineage.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

import msgspec

from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.files import LocalFile, open_plain, unreadable
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.protocol.lineage import Fence
from ftrain.checkpoint.retention import VersionKey
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.comms.errors import CorruptionError, StateError
from ftrain.comms.protocol.messages import VersionId
from ftrain.comms.wire import BAD_INPUT

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT: Final = 2
MANIFEST_BYTES_MAX = 16 * 1024 * 1024
_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_T = TypeVar("_T", bound="DataclassInstance")
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One rank's file of a durable version."""

    rank: _Natural
    nbytes: _Natural
    digest: _Digest  # of the file's footer, and through it of everything in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest's content. The files are those of the ranks 0 to ``world_size`` - 1."""

    format: Literal[2] = FORMAT
    run_id: str
    topology: str
    fence: _Natural  # epoch under which it was published
    epoch: _Natural  # epoch in which it was captured
    step: _Natural
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    written_s: float = 0.0  # Unix time
    files: tuple[FileRecord, ...]
    extra: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    xxh3: str = ""  # of the encoding in which this is empty

    def encode(self) -> bytes:
        """As JSON for people and programs."""
        return encode_record(self)

    def same_files(self, other: Manifest) -> bool:
        """Whether both publish the same: when it was written and what else is known may differ."""
        plain = [replace(m, written_s=0.0, extra={}, xxh3="") for m in (self, other)]
        return plain[0] == plain[1]

    def require_all_ranks(self, where: str) -> None:
        """Raise ``CorruptionError`` unless there is one file for each of the ranks."""
        ranks = [record.rank for record in self.files]
        if len(ranks) != self.world_size or ranks != list(range(len(ranks))):
            raise CorruptionError(f"{where} does not name one file for each of its ranks")


class PublishedVersion:
    """What a manifest says about its version, wherever the files lie."""

    __slots__ = ()
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

    def require(self, identity: ImageIdentity, rank: int, where: str) -> None:
        """Raise ``CorruptionError`` unless the file at ``where`` is this version's of ``rank``."""
        manifest = self.manifest
        if (
            (identity.run_id, identity.topology) != (manifest.run_id, manifest.topology)
            or (identity.version, identity.rank) != (self.version, rank)
            or identity.world_size != manifest.world_size
        ):
            raise CorruptionError(f"{where} is of another run, version or rank than its manifest")


@dataclass(frozen=True, slots=True)
class DurableVersion(PublishedVersion):
    """A published version whose files are there."""

    path: Path  # of the manifest
    manifest: Manifest

    def file(self, rank: int) -> Path:
        """Path of a rank's file."""
        return self.path.with_suffix("") / file_name(rank)

    def check(self) -> None:
        """Look whether every rank's file has the stated size; ``CorruptionError`` if not."""
        self.manifest.require_all_ranks(str(self.path))
        for record in self.manifest.files:
            path = self.file(record.rank)
            nbytes = _size(path)
            if nbytes is None:
                raise CorruptionError(f"{path} is missing")
            if nbytes != record.nbytes:
                raise CorruptionError(f"{path} has {nbytes} of {record.nbytes} bytes")

    def open(self, rank: int) -> SegmentReader:
        """A rank's file, of the world that wrote it; its footer verified, its chunks not yet.

        Raises:
            CorruptionError: the file is missing, cut off or another one; take another copy, or the
                next older version.
            RunDirectoryError: this process may not open it, or no more files.
        """
        path = self.file(rank)
        record = self.manifest.files[rank]
        file = LocalFile(path)
        try:
            if file.nbytes != record.nbytes:
                raise CorruptionError(
                    f"{path} has {file.nbytes} of {record.nbytes} bytes: take another copy"
                )
            reader = SegmentReader(file, record.digest)
            self.require(reader.identity, rank, reader.where)
        except BaseException:  # whatever it was: the descriptor goes with it
            file.close()
            raise
        return reader


@contextmanager
def open_files(version: DurableVersion) -> Iterator[list[SegmentReader | CorruptionError]]:
    """Every rank's file, or why it can't be used; closed in the end."""
    found: list[SegmentReader | CorruptionError] = []
    try:
        for rank in range(version.world_size):
            try:
                found.append(version.open(rank))
            except CorruptionError as error:
                found.append(error)
        yield found
    finally:
        for reader in found:
            if isinstance(reader, SegmentReader):
                reader.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceFile:
    """The content of ``fence.json``."""

    format: Literal[2] = FORMAT
    run_id: str
    fence: _Natural
    ancestors: tuple[VersionId, ...]
    rests_on: VersionId | None = None
    began_s: float  # Unix time
    xxh3: str = ""  # as in the manifest

    @property
    def record(self) -> Fence:
        """What it says."""
        return Fence(self.fence, self.ancestors, self.rests_on)

    def encode(self) -> bytes:
        """As JSON for people and programs."""
        return encode_record(self)


def file_name(rank: int) -> str:
    """Name of a rank's file in its version's folder."""
    return f"rank{rank}.seg"


def decode_manifest(path: Path) -> Manifest:
    """What a manifest says, without a look at the files.

    Raises:
        FileNotFoundError: there is none.
        CorruptionError: it can't be read, or is none.
        StateError: it is in another format.
        RunDirectoryError: this user may not read it.
    """
    return parse_manifest(_content(path), str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """What the manifest at ``where`` says; raises as :func:`decode_manifest`."""
    return _decode(where, content, Manifest)


def decode_fence(path: Path) -> FenceFile:
    """What a ``fence.json`` says; raises as :func:`decode_manifest`."""
    return parse_fence(_content(path), str(path), path.parent.name)


def parse_fence(content: bytes, where: str, folder: str) -> FenceFile:
    """What the ``fence.json`` at ``where``, in a folder of that name, says."""
    found = _decode(where, content, FenceFile)
    if folder != str(found.fence):
        raise CorruptionError(f"{where} is of fence {found.fence}, moved from its place")
    return found


def encode_record(content: DataclassInstance) -> bytes:
    """A small file's content, as JSON with its digest in ``xxh3``; the only encoding of it that
    :func:`decode_record` accepts."""
    plain = replace(content, xxh3="")
    digest = digest_of(msgspec.json.encode(plain)).hex()
    return msgspec.json.format(msgspec.json.encode(replace(plain, xxh3=digest))) + b"\n"


def _content(path: Path) -> bytes:
    try:
        with open(open_plain(path), "rb") as file:
            content = file.read(MANIFEST_BYTES_MAX + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    if len(content) > MANIFEST_BYTES_MAX:
        raise CorruptionError(f"{path} is longer than any manifest: it is damaged")
    return content


def decode_record(path: Path, kind: type[_T]) -> _T:
    """What :func:`encode_record` made; raises as :func:`decode_manifest`."""
    return _decode(str(path), _content(path), kind)


def _decode(where: str, content: bytes, kind: type[_T]) -> _T:
    try:
        found = msgspec.json.decode(content, type=kind)
    except BAD_INPUT as error:
        number = _other_format(content)
        if number is None:
            raise CorruptionError(f"{where} is damaged: {error}") from None
        raise StateError(
            f"{where} is in format {number}, this ftrain reads format {FORMAT}: use the ftrain "
            "that wrote it, or another directory"
        ) from None
    if encode_record(found) != content:
        raise CorruptionError(f"{where} does not match its digest: it is damaged")
    return found


def _other_format(content: bytes) -> int | None:
    """In which other format a sound record is; None: it is damaged."""
    try:
        fields = msgspec.json.decode(content)
    except BAD_INPUT:
        return None
    number = fields.get("format") if isinstance(fields, dict) else None
    if type(number) is not int or number == FORMAT:
        return None
    if number < FORMAT and "xxh3" not in fields:
        return number  # had no digest
    digest = digest_of(msgspec.json.encode(fields | {"xxh3": ""})).hex()
    return number if fields.get("xxh3") == digest else None


def read_manifest(path: str | os.PathLike[str]) -> DurableVersion:
    """The version that ``path`` publishes.

    Raises:
        CorruptionError: no manifest, or a file that it names is missing or has another size.
        StateError: a manifest in another format.
    """
    version = stated_version(Path(path))
    version.check()
    return version


def stated_version(path: Path) -> DurableVersion:
    """The same, without a look at the files; raises as :func:`read_manifest`."""
    try:
        manifest = decode_manifest(path)
    except FileNotFoundError as error:
        raise unreadable(path, error) from None
    require_place(manifest, path.parent.name, path.name, str(path))
    manifest.require_all_ranks(str(path))
    return DurableVersion(path, manifest)


def require_place(manifest: Manifest, folder: str, name: str, where: str) -> None:
    """Raise ``CorruptionError`` unless it lies where a manifest of its fence and step does."""
    if (folder, name) != (str(manifest.fence), f"{manifest.step}.json"):
        raise CorruptionError(
            f"{where} is the manifest of step {manifest.step} under fence {manifest.fence}, "
            "moved from its place"
        )


def _size(path: Path) -> int | None:
    """Size of a plain file in a plain folder; None: there is none."""
    try:
        folder, file = path.parent.lstat(), path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from None
    plain = stat.S_ISDIR(folder.st_mode) and stat.S_ISREG(file.st_mode)
    return file.st_size if plain else None
