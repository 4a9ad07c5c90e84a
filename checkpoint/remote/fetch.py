"""A version from an object store into the directory of durable files, as it was there before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ftrain.checkpoint.directory import explained, fresh_name, make_folders, put_once
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.files import LocalFile, NewFile, sync_folder
from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.checkpoint.manifest import FileRecord, decode_manifest
from ftrain.checkpoint.remote.store import RemoteStore, RemoteVersion
from ftrain.checkpoint.remote.upload import object_name
from ftrain.checkpoint.segment import HEADER, padded
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.checkpoint.segment_writer import RawCopy, plan_copy
from ftrain.comms.errors import CorruptionError, StateError


def fetch(
    store: RemoteStore,
    version: RemoteVersion,
    target: DurableStore,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Path:
    """Put ``version`` into ``target`` and publish it there, under the same fence and step.

    The files are what they were before they were uploaded, byte for byte.  Chunks are read side by
    side, each is compared with its digest; a file that is there and right is not read again.  The
    fences' records come along, so that the version is of the history there as well, and epochs go
    on from the highest.

    ``progress`` is told how many bytes more were read from the store; 0 while a file that is there
    already is compared.

    Returns:
        The manifest's path in ``target``.

    Raises:
        CorruptionError: an object is missing or damaged.
        StateError: something else is published there.
        RunDirectoryError: no space, or the directory can't be written to.
        ObjectStoreError: the store does not give it.
    """
    _refuse_another(store, version, target)
    fetch_fences(store, target)
    files = [
        _fetch_file(store, version, rank, target, progress) for rank in range(version.world_size)
    ]
    manifest = version.manifest
    return target.publish(
        version.fence,
        version.version,
        manifest.run_id,
        manifest.topology,
        version.world_size,
        files,
        manifest.extra,
    )


def _refuse_another(store: RemoteStore, version: RemoteVersion, target: DurableStore) -> None:
    """StateError if something else is published there: none of its files may be replaced."""
    try:
        there = decode_manifest(target.directory / f"{version.fence}/{version.step}.json")
    except (FileNotFoundError, CorruptionError):
        return
    mine = {record.rank: record.digest for record in there.files}
    for rank in range(version.world_size):
        source = store.open(version, rank)
        try:
            same = mine.get(rank) == plan_copy(source).tail.digest
        finally:
            source.close()
        if not same or there.world_size != version.world_size:
            raise StateError(
                f"{target.directory} has another step {version.step} of epoch {version.fence}, of "
                f"run {there.run_id}: use another run directory"
            )


def fetch_fences(store: RemoteStore, target: DurableStore) -> None:
    """Put the records of the fences into ``target``, where they are not there.

    Raises:
        RunDirectoryError, ObjectStoreError: as :func:`fetch`.
    """
    for record in store.fence_files():
        folder = target.directory / str(record.fence)
        with explained(folder, 0):
            make_folders(folder)
            put_once(folder / "fence.json", record.encode())


def _fetch_file(
    store: RemoteStore,
    version: RemoteVersion,
    rank: int,
    target: DurableStore,
    progress: Callable[[int], None],
) -> FileRecord:
    source = store.open(version, rank)
    try:
        planned = plan_copy(source)
        path = target.directory / object_name(version.fence, version.step, rank)
        if not _is_right(path, planned, progress):
            _write(source, planned, path, store.place.limits.threads, progress)
    finally:
        source.close()
    return FileRecord(rank, planned.nbytes, planned.tail.digest)


def _is_right(path: Path, planned: RawCopy, progress: Callable[[int], None]) -> bool:
    """Whether the file is there already, every byte of it."""
    if not path.exists():
        return False
    try:
        file = LocalFile(path)
    except CorruptionError:
        return False
    try:
        SegmentReader(file, planned.tail.digest).verify(lambda nbytes: progress(0))
    except (CorruptionError, StateError):
        return False
    finally:
        file.close()
    return True


def _write(
    source: SegmentReader,
    planned: RawCopy,
    path: Path,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    local = threading.local()

    def copy_chunk(chunk: int) -> None:
        if not hasattr(local, "scratch"):
            local.scratch = Scratch()  # two chunks for each thread: that is all the memory it takes
        row = planned.rows[chunk]
        data = source.read(chunk, local.scratch)
        if row.raw % PAGE_BYTES:
            data = memoryview(bytes(data).ljust(padded(row.raw), b"\0"))
        file.write_at(row.at, data)
        progress(source.footer.chunks[chunk].stored)

    with explained(path.parent, planned.nbytes):
        make_folders(path.parent)
        fresh = fresh_name(path)
        try:
            with NewFile(fresh, planned.nbytes) as file:
                file.write_at(0, HEADER)
                with ThreadPoolExecutor(threads, "ftrain-fetch") as pool:
                    list(pool.map(copy_chunk, range(len(planned.rows))))
                file.write_at(planned.tail_at, planned.tail.content)
                file.sync()
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
        sync_folder(path.parent)
