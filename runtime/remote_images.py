"""A version's copies in the object store, for what is damaged in its files on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftrain.checkpoint.files import Seen, unseen
from ftrain.checkpoint.manifest import DurableVersion
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.comms.errors import CorruptionError, FtrainError
from ftrain.runtime.restore import Found

if TYPE_CHECKING:
    from ftrain.checkpoint.remote.reading import RemoteFile

# A copy that is slow is better than an older version, one that does not answer is not.
_CONNECT_S_MAX, _SILENT_S_MAX, _ATTEMPTS = 5.0, 15.0, 3


class RemoteImages:
    """Opens the copies when they are asked for: usually nobody does.

    Args:
        uri: ``checkpoint.remote``; "": there are none.
        version: what is restored.
    """

    def __init__(self, uri: str, version: DurableVersion) -> None:
        self._uri = uri
        self._version = version
        self._open: list[_Copy] = []
        self.lost: CorruptionError | None = None  # the store went away: it is not asked again

    def __call__(self) -> Found:
        """The files of all ranks, as they are in the store; an error for what can't be used.

        Once: nothing more after that.
        """
        if not self._uri:
            return []
        uri, self._uri = self._uri, ""
        try:
            return self._find(uri)
        except FtrainError as error:
            return [CorruptionError(f"no copy can be used: {error}")]

    def close(self) -> None:
        """Close what was opened."""
        for file in self._open:
            file.close()
        self._open.clear()

    def _find(self, uri: str) -> list[SegmentReader | CorruptionError]:
        # Whoever does not need it need not load pyarrow.
        from ftrain.checkpoint.remote.place import Place
        from ftrain.checkpoint.remote.protocol.limits import Limits
        from ftrain.checkpoint.remote.reading import RemoteFile
        from ftrain.checkpoint.remote.store import RemoteStore
        from ftrain.checkpoint.remote.upload import object_name

        limits = Limits(
            connect_timeout_s=_CONNECT_S_MAX, request_timeout_s=_SILENT_S_MAX, attempts=_ATTEMPTS
        )
        store = RemoteStore(Place(uri, limits))
        survey = store.survey()
        ours = self._version
        copies = [
            copy
            for copy in (*survey.versions, *survey.hidden)
            if copy.key == ours.key and copy.version == ours.version
        ]
        found: list[SegmentReader | CorruptionError] = []
        for copy in copies:
            for record in copy.manifest.files:
                name = object_name(copy.fence, copy.step, record.rank)
                try:
                    file = _Copy(RemoteFile(store.place, name), self)
                    self._open.append(file)
                    reader = SegmentReader(file, record.digest)
                    ours.require(reader.identity, record.rank, reader.where)
                except CorruptionError as error:
                    found.append(error)
                else:
                    found.append(reader)
        return found


class _Copy:
    """A remote file whose store's troubles are troubles of the file: another copy may do."""

    def __init__(self, file: RemoteFile, images: RemoteImages) -> None:
        self._file = file
        self._images = images
        self.where = file.where
        self.nbytes = file.nbytes

    def read_into(self, offset: int, parts: Sequence[memoryview], seen: Seen = unseen) -> None:
        """See :class:`~ftrain.checkpoint.files.ReadableFile`."""
        if self._images.lost is not None:  # each chunk would wait for it as long
            raise self._images.lost
        try:
            self._file.read_into(offset, parts, seen)
        except CorruptionError:
            raise
        except FtrainError as error:
            self._images.lost = CorruptionError(str(error))
            raise self._images.lost from None

    def close(self) -> None:
        """Close it."""
        self._file.close()
