"""The durable level in an object store: what :class:`~ftrain.checkpoint.durable.DurableStore` is
on a file system.

The layout is the same, under a URI.  Segments are compressed copies, so a manifest names other
sizes and digests than the one on disk.  There is no conditional write: who may publish under a
fence is settled by whoever grants it, and what others publish is not of the history
(protocol/lineage.py).  An object counts only by a manifest that names it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ftrain.checkpoint.durable import NEW_SEGMENT_NAMES, SEGMENT_NAMES
from ftrain.checkpoint.manifest import (
    FenceFile,
    FileRecord,
    Manifest,
    PublishedVersion,
    parse_fence,
    parse_manifest,
    require_place,
)
from ftrain.checkpoint.pace import Pace
from ftrain.checkpoint.protocol.lineage import Fence, completed, newest
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.reading import RemoteFile
from ftrain.checkpoint.remote.upload import object_name, require_object, upload
from ftrain.checkpoint.retention import Retention, VersionKey
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.versions import Files, Survey, find_version, survey_of
from ftrain.comms.errors import CorruptionError, StateError
from ftrain.comms.protocol.messages import VersionId

_NUMBER = r"(0|[1-9]\d{0,17})"
_FENCE = re.compile(rf"{_NUMBER}/fence\.json")
_MANIFEST = re.compile(rf"{_NUMBER}/{_NUMBER}\.json")
_PIN = re.compile(rf"{_NUMBER}/{_NUMBER}\.pin")
_IN_VERSION = re.compile(rf"{_NUMBER}/{_NUMBER}/(.*)")
_NEW_RECORD = re.compile(rf"{_NUMBER}/({_NUMBER}|fence)\.json\.\d+\.new")


@dataclass(frozen=True, slots=True)
class RemoteVersion(PublishedVersion):
    """A published version."""

    where: str  # the manifest's URI, without anything secret
    manifest: Manifest


class RemoteStore:
    """Durable versions under a URI.  All methods raise ObjectStoreError besides what they say."""

    level = "L4"

    def __init__(self, place: Place) -> None:
        self.place = place
        self._pace = Pace(place.limits.bytes_per_s)

    @property
    def name(self) -> str:
        """The URI, without anything secret."""
        return self.place.name

    # ---- writing

    def begin_fences(self, records: Iterable[FenceFile]) -> None:
        """Say here too what each epoch goes on from, by the records that are on disk.

        One that is here already stays as it is; a damaged one is put anew.

        Raises:
            StateError: the place belongs to another run.
        """
        there = {file.fence: file for file in self.fence_files()}
        for record in records:
            found = there.get(record.fence)
            if found is None:
                self.place.put(f"{record.fence}/fence.json", record.encode())
            elif (found.run_id, found.ancestors) != (record.run_id, record.ancestors):
                raise StateError(
                    f"{self.place.name} has another epoch {record.fence}, of run {found.run_id!r},"
                    f" than run {record.run_id!r} has: give each run a place of its own"
                )

    def upload(
        self,
        fence: int,
        source: SegmentReader,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> FileRecord:
        """Make an object of a rank's durable file; returns what the manifest has to say about it.

        An object with that content that is there already, from an upload that was cut off later, is
        left as it is.  ``progress`` is told how many bytes more were written, those of failed
        attempts included.

        Raises:
            CorruptionError: the source is damaged.
            StateError: another content is published there.
        """
        return upload(self.place, self._pace, fence, source, progress)

    def publish(
        self,
        fence: int,
        version: VersionId,
        run_id: str,
        topology: str,
        world_size: int,
        files: Iterable[FileRecord],
        extra: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> RemoteVersion:
        """Make a version exist. Again with the same files is fine; as DurableStore.publish.

        Raises:
            StateError: something else is published there, or the fence was never begun.
            CorruptionError: an object is not there as stated.
        """
        manifest = Manifest(
            run_id=run_id,
            topology=topology,
            fence=fence,
            epoch=version.epoch,
            step=version.step,
            world_size=world_size,
            written_s=time.time(),
            files=tuple(sorted(files, key=lambda record: record.rank)),
            extra=dict(extra or {}),
        )
        name = f"{fence}/{version.step}.json"
        where = self.place.where(name)
        manifest.require_all_ranks(where)
        if self._published(name) is None:
            self._publish(name, manifest)
        there = self._published(name)  # another one's, if somebody was there first or just now
        if there is None or not there.same_files(manifest):
            raise StateError(f"{where} exists already and differs: nothing is published twice")
        return RemoteVersion(where, there)

    def _publish(self, name: str, manifest: Manifest) -> None:
        fence, step = manifest.fence, manifest.step
        if not self._readable(f"{fence}/fence.json"):
            raise StateError(f"fence {fence} was not begun in {self.place.name}")
        self.place.side_by_side(
            lambda record: require_object(
                self.place, object_name(fence, step, record.rank), record
            ),
            manifest.files,
        )
        self.place.put(name, manifest.encode())

    # ---- reading

    def survey(self) -> Survey[RemoteVersion]:
        """Every version whose manifest can be read, and what is wrong with the rest.

        Raises:
            StateError: it holds versions in another format.
        """
        return self._survey(self.place.sizes())

    def versions(self) -> tuple[RemoteVersion, ...]:
        """The versions of :meth:`survey`, newest first."""
        return self.survey().versions

    def find(self, step: int | None = None) -> RemoteVersion:
        """The newest version, or that of ``step``.

        Raises:
            RunDirectoryError: there is none.
            UsageError: there are others only.
            StateError: as :meth:`survey`.
        """
        return find_version(self.survey(), self.name, step)

    def open(self, version: PublishedVersion, rank: int) -> SegmentReader:
        """A rank's object, read over the network as it is asked for; its footer verified.

        Raises:
            CorruptionError: it is missing, cut off or another one.
        """
        expected = version.manifest.files[rank]
        file = RemoteFile(self.place, object_name(version.fence, version.step, rank))
        try:
            if file.nbytes != expected.nbytes:
                raise CorruptionError(f"{file.where} has {file.nbytes} of {expected.nbytes} bytes")
            reader = SegmentReader(file, expected.digest)
            version.require(reader.identity, rank, reader.where)
        except BaseException:  # whatever it was: the connection goes with it
            file.close()
            raise
        return reader

    @contextmanager
    def opened(self, version: PublishedVersion) -> Iterator[Files]:
        """Every rank's object, or why it can't be used; closed in the end."""

        def open_one(rank: int) -> SegmentReader | CorruptionError:
            try:
                return self.open(version, rank)
            except CorruptionError as error:
                return error

        # When the store fails in one, pyarrow closes the others with the last reference to them.
        found = self.place.side_by_side(open_one, range(version.world_size))
        try:
            yield found
        finally:
            for file in found:
                if isinstance(file, SegmentReader):
                    file.close()

    def fence_files(self) -> tuple[FenceFile, ...]:
        """The records of the fences that were granted, but for damaged ones; oldest first."""
        return tuple(self._fences(self.place.sizes())[1])

    # ---- tidying

    def remove(self, versions: Iterable[PublishedVersion]) -> None:
        """Delete published versions: the manifest first, so that nobody can find them."""
        sizes = self.place.sizes()
        for version in versions:
            folder = f"{version.fence}/{version.step}"
            inside = [name for name in sizes if name.startswith(f"{folder}/")]
            names = [name[len(folder) + 1 :] for name in inside]
            self.place.remove(f"{folder}.json")
            self._remove_segments(folder, names, SEGMENT_NAMES)

    def pin(self, key: VersionKey, *, pinned: bool = True) -> None:
        """Never delete this version, or do again as the policy says."""
        fence, step = key
        name = f"{fence}/{step}.pin"
        if pinned:
            self.place.put(name, b"")
        else:
            self.place.remove(name)

    def pinned(self) -> frozenset[VersionKey]:
        """(fence, step) of the versions that are never deleted."""
        return _keys(_PIN, self.place.sizes())

    def sweep(
        self, policy: Retention, run_id: str, *, active: Collection[VersionKey] = ()
    ) -> tuple[str, ...]:
        """Remove this run's versions that are not kept, and what uploads that were cut off left.

        As DurableStore.sweep.  Parts of uploads that never became objects can't be seen from here:
        the bucket needs a lifecycle rule for incomplete multipart uploads.

        Returns:
            The names of the objects that were removed.
        """
        sizes = self.place.sizes()
        survey = self._survey(sizes)
        mine = [v.key for v in survey.versions if v.manifest.run_id == run_id]
        keep = policy.remaining(mine, (version.key for version in survey.hidden))
        keep |= {version.key for version in survey.unrecorded}
        keep |= frozenset(active) | _keys(_PIN, sizes)
        removed: list[str] = []
        manifests = _keys(_MANIFEST, sizes)
        for fence, step in sorted(manifests - keep):
            name = f"{fence}/{step}.json"
            if self._run_of(name) == run_id:
                self.place.remove(name)  # first nobody can find it, then it goes
                removed.append(name)
                manifests -= {(fence, step)}
        newest = max([(survey.granted, 0), *(version.key for version in survey.versions)])
        removed += self._sweep_segments(sizes, manifests, keep, newest)
        for found in filter(None, map(_NEW_RECORD.fullmatch, sizes)):
            if (int(found[1]), int(found[3] or 0)) <= newest:
                self.place.remove(found[0])
                removed.append(found[0])
        left = sizes.keys() - set(removed)
        for fence in sorted({int(m[1]) for m in map(_FENCE.fullmatch, left) if m}):
            inside = [name for name in left if name.startswith(f"{fence}/")]
            if fence < survey.granted and inside == [f"{fence}/fence.json"]:
                self.place.remove_folder(str(fence))
                removed += inside
        return tuple(removed)

    def _sweep_segments(
        self,
        sizes: Collection[str],
        manifests: frozenset[VersionKey],
        keep: frozenset[VersionKey],
        newest: VersionKey,
    ) -> list[str]:
        """Remove the segments of what is neither published nor kept, and those never finished; what
        is newer than all that was published and begun somebody else may be copying just now."""
        folders: dict[VersionKey, list[str]] = {}
        for match in filter(None, map(_IN_VERSION.fullmatch, sizes)):
            folders.setdefault((int(match[1]), int(match[2])), []).append(match[3])
        removed = []
        for (fence, step), names in sorted(folders.items()):
            published = (fence, step) in manifests
            if not published and ((fence, step) in keep or (fence, step) >= newest):
                continue
            folder = f"{fence}/{step}"
            if not published and self.place.size(f"{folder}.json") is not None:
                continue  # meanwhile
            pattern = NEW_SEGMENT_NAMES if published else SEGMENT_NAMES
            removed += self._remove_segments(folder, names, pattern)
        return removed

    def _remove_segments(
        self, folder: str, names: Collection[str], pattern: re.Pattern[str]
    ) -> list[str]:
        """Remove what is called so of the ``names`` that a version's folder holds."""
        ours = [name for name in sorted(names) if pattern.fullmatch(name)]
        if self.place.names_in(folder) <= set(ours):  # looked at again: others write there too
            self.place.remove_folder(folder)
        else:  # somebody put something of his own there
            for name in ours:
                self.place.remove(f"{folder}/{name}")
        return [f"{folder}/{name}" for name in ours]

    # ---- helpers

    def _survey(self, sizes: Mapping[str, int]) -> Survey[RemoteVersion]:
        fences, _, problems = self._fences(sizes)
        names = [name for name in sizes if _MANIFEST.fullmatch(name)]
        stated = self.place.side_by_side(self._stated, names)
        for name, one in zip(names, stated, strict=True):
            if isinstance(one, CorruptionError) and self.place.size(name) is not None:
                problems.append(str(one))  # else it was swept a moment ago
        versions = [found for found in stated if isinstance(found, RemoteVersion)]
        found = [(version, self._lacking(version, sizes)) for version in versions]
        numbers = (name.partition("/")[0] for name in sizes)
        highest = max((int(n) for n in numbers if re.fullmatch(_NUMBER, n)), default=0)
        return survey_of(
            self.name, found, fences, newest(fences.values()), sorted(problems), highest
        )

    def _fences(
        self, sizes: Mapping[str, int]
    ) -> tuple[dict[int, Fence], list[FenceFile], list[str]]:
        """The fences that were granted, their records, and what is wrong with the others."""
        numbers = sorted(int(m[1]) for m in map(_FENCE.fullmatch, sizes) if m)
        found = self.place.side_by_side(self._fence, numbers)
        files = [file for file in found if isinstance(file, FenceFile)]
        problems = [str(file) for file in found if isinstance(file, CorruptionError)]
        records: dict[int, Fence | None] = dict.fromkeys(numbers)
        records |= {file.fence: file.record for file in files}
        return completed(records), files, problems

    def _fence(self, fence: int) -> FenceFile | CorruptionError:
        name = f"{fence}/fence.json"
        try:
            return parse_fence(self._content(name), self.place.where(name), str(fence))
        except CorruptionError as error:
            return error

    def _stated(self, name: str) -> RemoteVersion | CorruptionError:
        """What a manifest publishes, without a look at the objects."""
        where = self.place.where(name)
        try:
            manifest = parse_manifest(self._content(name), where)
            folder, _, last = name.partition("/")
            require_place(manifest, folder, last, where)
            manifest.require_all_ranks(where)
        except CorruptionError as error:
            return error
        return RemoteVersion(where, manifest)

    def _lacking(self, version: RemoteVersion, sizes: Mapping[str, int]) -> str:
        """What is wrong with the objects that a manifest names; "": nothing."""
        for record in version.manifest.files:
            name = object_name(version.fence, version.step, record.rank)
            nbytes = sizes.get(name)
            if nbytes != record.nbytes:
                has = "is missing"
                if nbytes is not None:
                    has = f"has {nbytes} of {record.nbytes} bytes"
                return f"{self.place.where(name)} {has}: take the next older version"
        return ""

    def _content(self, name: str) -> bytes:
        content = self.place.get(name)
        if content is None:
            raise CorruptionError(f"{self.place.where(name)} is missing")
        return content

    def _published(self, name: str) -> Manifest | None:
        """The manifest that is there; one that was cut off is none."""
        content = self.place.get(name)
        if content is None:
            return None
        try:
            return parse_manifest(content, self.place.where(name))
        except CorruptionError:
            return None

    def _readable(self, name: str) -> bool:
        return isinstance(self._fence(int(name.partition("/")[0])), FenceFile)

    def _run_of(self, name: str) -> str | None:
        try:
            manifest = self._published(name)
        except StateError:  # in another format
            return None
        return manifest.run_id if manifest else None


def _keys(pattern: re.Pattern[str], names: Iterable[str]) -> frozenset[VersionKey]:
    return frozenset((int(m[1]), int(m[2])) for m in map(pattern.fullmatch, names) if m)
