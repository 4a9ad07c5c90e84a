"""A rank's durable file as an object: compressed, streamed, and not sent again if it is there."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ftrain.checkpoint.manifest import FileRecord, file_name, parse_manifest
from ftrain.checkpoint.pace import Pace
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.reading import RemoteFile
from ftrain.checkpoint.segment import TRAILER_BYTES, Footer, place_of_footer
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.segment_writer import copy_segment
from ftrain.comms.errors import CorruptionError, StateError

_PIECE_BYTES = 1024 * 1024  # written, counted and paced at a time


def object_name(fence: int, step: int, rank: int) -> str:
    """Name of a rank's object, relative to the place."""
    return f"{fence}/{step}/{file_name(rank)}"


def upload(
    place: Place,
    pace: Pace,
    fence: int,
    source: SegmentReader,
    progress: Callable[[int], None],
) -> FileRecord:
    """See :meth:`RemoteStore.upload`."""
    identity = source.identity
    name = object_name(fence, identity.version.step, identity.rank)
    there = _same_content(place, name, source)
    if there is not None:
        return there
    manifest = f"{fence}/{identity.version.step}.json"
    if place.size(manifest) is not None:
        if _is_named(place, manifest, identity.rank, name):
            raise StateError(
                f"{place.where(name)} is published with another content: nothing is written twice"
            )
        place.remove(manifest)  # it lost an object: what it names is copied again

    def send() -> tuple[str, int]:
        with place.writing(name) as sink:

            def write(data: memoryview | bytes) -> None:
                view = memoryview(data)
                for start in range(0, len(view), _PIECE_BYTES):
                    piece = view[start : start + _PIECE_BYTES]
                    pace.wait(len(piece))
                    sink(piece)
                    progress(len(piece))

            return copy_segment(source, write, compress=True)

    digest, nbytes = place.again(f"uploading {place.where(name)}", send)
    record = FileRecord(identity.rank, nbytes, digest)
    require_object(place, name, record)
    return record


def require_object(place: Place, name: str, record: FileRecord) -> None:
    """Look whether an object has the size and the footer that ``record`` says, without reading it.

    Raises:
        CorruptionError: it has not.
        ObjectStoreError: it can't be looked at.
    """
    file = RemoteFile(place, name)
    try:
        if file.nbytes != record.nbytes:
            raise CorruptionError(f"{file.where} has {file.nbytes} of {record.nbytes} bytes")
        trailer = memoryview(bytearray(TRAILER_BYTES))
        file.read_into(max(0, file.nbytes - TRAILER_BYTES), [trailer])
        _, _, digest = place_of_footer(bytes(trailer), file.nbytes, file.where)
    finally:
        file.close()
    if digest.hex() != record.digest:
        raise CorruptionError(f"{file.where} is not the file that was uploaded: upload it again")


def _is_named(place: Place, manifest: str, rank: int, name: str) -> bool:
    """Whether the object is there as the manifest says, as far as its size tells."""
    content = place.get(manifest)
    if content is None:
        return False
    try:
        found = parse_manifest(content, place.where(manifest))
    except CorruptionError:
        return False
    return place.size(name) in {record.nbytes for record in found.files if record.rank == rank}


def _same_content(place: Place, name: str, source: SegmentReader) -> FileRecord | None:
    """The record of an object that has what ``source`` has, however it is encoded.

    Its footer lies at its end: an upload that was cut off has none.
    """
    if place.size(name) is None:
        return None
    try:
        file = RemoteFile(place, name)
    except CorruptionError:  # gone just now
        return None
    try:
        there = SegmentReader(file)
    except (CorruptionError, StateError):
        return None
    finally:
        file.close()
    if content_of(there.footer) != content_of(source.footer):
        return None
    return FileRecord(source.identity.rank, there.nbytes, there.digest)


def content_of(footer: Footer) -> tuple[Footer, list[tuple[int, str]]]:
    """What a footer says about the file's content, apart from how it is stored."""
    chunks = [(chunk.raw, chunk.xxh3) for chunk in footer.chunks]
    return msgspec.structs.replace(footer, chunks=[]), chunks
