"""The durable level: one file per rank and version, published by a manifest.

Several processes, of several nodes, may write files into the same directory; one of them publishes.
Nothing is ever overwritten: a file appears under its name complete and synced, a manifest appears
once.  This is the seam behind which a faster writer can come.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftrain.checkpoint.image import ImageReader, ImageState
from ftrain.checkpoint.manifest import (
    DurableVersion,
    FileRecord,
    Manifest,
    decode_manifest,
    file_name,
    map_image,
    read_manifest,
)
from ftrain.checkpoint.retention import KeepLast, VersionKey
from ftrain.comms.errors import CorruptionError, FtrainError, RunDirectoryError, StateError
from ftrain.comms.protocol.messages import VersionId

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WRITE_BYTES = 8 * 1024 * 1024
_IMAGE = re.compile(r"rank\d{1,10}\.ftr(\.\d+\.new)?")
_NEW_IMAGE = re.compile(r"rank\d{1,10}\.ftr\.\d+\.new")
_NEW_MANIFEST = re.compile(r"\d{1,19}\.json\.\d+\.new")
_NUMBER = re.compile(r"0|[1-9]\d{0,18}")


@dataclass(frozen=True, slots=True)
class Survey:
    """What a directory holds."""

    versions: tuple[DurableVersion, ...]  # complete ones, newest first by (fence, step)
    problems: tuple[str, ...]  # one sentence for each manifest that does not count


class DurableStore:
    """Durable versions under ``directory``, which is created when first written to."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    # ---- writing

    def write_image(self, fence: int, version: VersionId, rank: int, buffer: Buffer) -> FileRecord:
        """Write a rank's sealed image to its file; returns when it is on the disk.

        Each part is compared with its digest before it is written, so that what went bad in memory
        does not become durable.

        Raises:
            StateError: ``buffer`` is not that version's sealed image, or it is published already.
            CorruptionError: the image does not match its digests.
            RunDirectoryError: no space, or the directory can't be written to. Nothing stays behind.
        """
        reader = ImageReader(buffer, where=f"rank {rank}'s image of step {version.step}")
        reader.require(rank=rank, state=ImageState.SEALED)
        if reader.identity.version != version:
            raise StateError(f"{reader.where} is of {reader.identity.version}")
        folder = self._folder(fence, version.step)
        with _explained(folder, reader.total_bytes):
            _refuse_published(folder)
            _make_folders(folder)
            path = folder / file_name(rank)
            fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
            try:
                _write_image(fresh, reader)
                _refuse_published(folder)  # in the meantime
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
            _sync_folder(folder)
        return FileRecord(rank, reader.total_bytes, reader.digest)

    def file_record(self, fence: int, version: VersionId, rank: int) -> FileRecord:
        """Record of a rank's file, from its header; ``CorruptionError`` if it is not that."""
        reader = self._written(fence, version, rank)
        return FileRecord(rank, reader.total_bytes, reader.digest)

    def publish(
        self,
        fence: int,
        version: VersionId,
        run_id: str,
        topology: str,
        world_size: int,
        files: Iterable[FileRecord],
    ) -> Path:
        """Make a version exist; returns the manifest's path. Again with the same content is fine.

        Args:
            fence: epoch under which it is published.
            version: what the files are of.
            run_id: whose files they are.
            topology: digest of the model's and the group's shape.
            world_size: number of ranks, each of which has one file.
            files: records of all of them.

        Raises:
            StateError: something else is published under this fence and step.
            CorruptionError: a file is not there as stated.
            RunDirectoryError: the manifest can't be written.
        """
        folder = self._folder(fence, version.step)
        path = _manifest_path(folder)
        manifest = Manifest(
            run_id=run_id,
            topology=topology,
            fence=fence,
            epoch=version.epoch,
            step=version.step,
            world_size=world_size,
            files=tuple(sorted(files, key=lambda record: record.rank)),
        )
        DurableVersion(path, manifest).check()
        content = manifest.encode()
        with _explained(folder, len(content)):
            _make_folders(folder.parent)
            fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
            try:
                with _new_file(fresh) as fd:
                    _write_at(fd, content, 0)
                try:
                    os.link(fresh, path)  # unlike a rename, never over another one
                except FileExistsError:
                    if path.read_bytes() != content:
                        raise StateError(
                            f"{path} exists already and differs: nothing is published twice"
                        ) from None
            finally:
                fresh.unlink(missing_ok=True)
            _sync_folder(folder.parent)
        return path

    def publish_written(self, fence: int, version: VersionId, run_id: str, world_size: int) -> Path:
        """Publish what the headers of the written files say; returns the manifest's path.

        Raises:
            CorruptionError: a rank's file is missing, damaged or of something else.
            StateError, RunDirectoryError: as :meth:`publish`.
        """
        if world_size < 1:
            raise StateError("a version of no ranks can't be published")
        readers = [self._written(fence, version, rank) for rank in range(world_size)]
        files = []
        for rank, reader in enumerate(readers):
            try:
                reader.require(
                    run_id=run_id, topology=readers[0].identity.topology, world_size=world_size
                )
            except StateError as error:
                raise CorruptionError(str(error)) from None
            files.append(FileRecord(rank, reader.total_bytes, reader.digest))
        topology = readers[0].identity.topology
        return self.publish(fence, version, run_id, topology, world_size, files)

    # ---- reading

    def survey(self, granted: Collection[int] | None = None) -> Survey:
        """Published versions whose files are there, and the manifests that do not count.

        Args:
            granted: fences that were granted; what others wrote is invisible. None: all.

        Raises:
            RunDirectoryError: the directory can't be read.
        """
        versions: list[DurableVersion] = []
        problems: list[str] = []
        for fence, folder in _numbered(self.directory, ""):
            if granted is not None and fence not in granted:
                continue
            for _, path in _numbered(folder, ".json"):
                try:
                    versions.append(read_manifest(path))
                except CorruptionError as error:
                    problems.append(str(error))
        versions.sort(key=lambda version: version.key, reverse=True)
        return Survey(tuple(versions), tuple(problems))

    def versions(self, granted: Collection[int] | None = None) -> tuple[DurableVersion, ...]:
        """The versions of :meth:`survey`, newest first."""
        return self.survey(granted).versions

    def load(
        self,
        version: DurableVersion | str | os.PathLike[str],
        rank: int,
        *,
        verify: bool = True,
    ) -> ImageReader:
        """A rank's image of a version, or of the one that a manifest's path publishes.

        See :meth:`DurableVersion.load`.
        """
        if not isinstance(version, DurableVersion):
            version = read_manifest(version)
        return version.load(rank, verify=verify)

    # ---- tidying

    def sweep(
        self,
        policy: KeepLast,
        run_id: str,
        *,
        granted: Collection[int] | None = None,
        active: Collection[VersionKey] = (),
    ) -> tuple[Path, ...]:
        """Remove this run's versions that are not kept, and what killed writers left.

        Manifests that can't be read or are of another run stay, with their files, and so does every
        file of a foreign name.

        Args:
            policy: which of the complete versions of granted fences to keep.
            run_id: whose versions may be removed.
            granted: as in :meth:`survey`.
            active: (fence, step) of versions that are being written now.

        Returns:
            The manifests and files that were removed.

        Raises:
            RunDirectoryError: something can't be removed.
        """
        mine = (v.key for v in self.versions(granted) if v.manifest.run_id == run_id)
        keep = policy.kept(mine) | frozenset(active)
        removed: list[Path] = []
        with _explained(self.directory, 0):
            for fence, folder in _numbered(self.directory, ""):
                for step, manifest in _numbered(folder, ".json"):
                    if (fence, step) not in keep and _run_of(manifest) == run_id:
                        manifest.unlink()
                        _sync_folder(folder)  # first nobody can find it, then it goes
                        removed.append(manifest)
                for step, images in _numbered(folder, ""):
                    published = _manifest_path(images).exists()
                    if not published and (fence, step) not in keep:
                        removed += _remove(images, _IMAGE)
                    elif published:
                        removed += _remove(images, _NEW_IMAGE)
                removed += _remove(folder, _NEW_MANIFEST)
        return tuple(removed)

    # ---- helpers

    def _written(self, fence: int, version: VersionId, rank: int) -> ImageReader:
        """The sealed image that a rank's file holds, not verified beyond its chunk table."""
        reader = map_image(self._folder(fence, version.step) / file_name(rank))
        if (reader.identity.version, reader.identity.rank) != (version, rank):
            raise CorruptionError(f"{reader.where} is of {reader.identity}")
        if reader.state is not ImageState.SEALED:
            raise CorruptionError(f"{reader.where} is not sealed")
        return reader

    def _folder(self, fence: int, step: int) -> Path:
        if fence < 0 or step < 0:
            raise StateError(f"fence {fence} and step {step} can't be negative")
        return self.directory / str(fence) / str(step)


@contextmanager
def _explained(folder: Path, nbytes: int) -> Iterator[None]:
    """Turn what the file system says into one sentence."""
    try:
        yield
    except FtrainError:
        raise
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} can't be written to ({error.strerror}): {nbytes} bytes were needed, "
            f"{_free_bytes(folder)} are free; make room, or set checkpoint.dir"
        ) from error


def _manifest_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _refuse_published(folder: Path) -> None:
    manifest = _manifest_path(folder)
    if manifest.exists():
        raise StateError(f"{manifest} is published already: its files are never written again")


def _numbered(folder: Path, suffix: str) -> list[tuple[int, Path]]:
    """Entries named by a number and ``suffix``, largest number first; links are passed over."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem = entry.name.removesuffix(suffix)
                is_kind = entry.is_file if suffix else entry.is_dir
                if (
                    entry.name.endswith(suffix)
                    and _NUMBER.fullmatch(stem)
                    and is_kind(follow_symlinks=False)
                ):
                    found.append((int(stem), Path(entry.path)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(f"{folder} can't be read: {error.strerror}") from None
    return sorted(found, reverse=True)


def _run_of(manifest: Path) -> str | None:
    try:
        return decode_manifest(manifest).run_id
    except CorruptionError:
        return None


def _remove(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Remove the files whose names match, then the folder if nothing else is in it."""
    removed = [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)]
    for path in removed:
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    return removed


def _make_folders(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power cut."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """Descriptor of a file made new, synced at the end."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_image(path: Path, reader: ImageReader) -> None:
    reader.verify_sections()
    data_offset = reader.header.layout.data_offset
    with _new_file(path) as fd:
        try:
            os.posix_fallocate(fd, 0, reader.total_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        _write_at(fd, reader.raw[:data_offset], 0)
        for chunk in range(reader.chunks):
            reader.verify_chunk(chunk)
            start, stop = reader.header.layout.chunk_range(chunk)
            _write_at(fd, reader.data[start:stop], data_offset + start)


def _write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + _WRITE_BYTES], offset + done)


def _free_bytes(folder: Path) -> str:
    for place in (folder, *folder.parents):
        try:
            return str(shutil.disk_usage(place).free)
        except OSError:  # not made yet, or not ours to look at
            continue
    return "unknown"
