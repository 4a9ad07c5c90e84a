"""The durable level on a file system: one file per rank and version, published by a manifest.

Several processes, of several nodes, may write files into the same directory; one of them publishes.
Nothing is ever overwritten: a file appears under its name complete and synced, a manifest appears
once.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ftrain.checkpoint.directory import (
    explained,
    fresh_name,
    make_folders,
    names_in,
    numbered,
    put_once,
    remove_empty,
    remove_matching,
    sync_if_there,
)
from ftrain.checkpoint.files import LocalFile, NewFile, sync_folder
from ftrain.checkpoint.header import PAGE_BYTES, ImageIdentity, ImageState
from ftrain.checkpoint.image import ImageReader
from ftrain.checkpoint.image_plan import ImagePlan
from ftrain.checkpoint.manifest import (
    DurableVersion,
    FenceFile,
    FileRecord,
    Manifest,
    PublishedVersion,
    decode_fence,
    decode_manifest,
    file_name,
    open_files,
    stated_version,
)
from ftrain.checkpoint.pace import Pace
from ftrain.checkpoint.protocol.lineage import Fence, completed, filed, next_fence, settling
from ftrain.checkpoint.retention import Retention, VersionKey
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.segment_writer import plan_file, write_file, write_parts
from ftrain.checkpoint.versions import Files, Survey, find_version, survey_of
from ftrain.comms.errors import CorruptionError, RunDirectoryError, StateError
from ftrain.comms.protocol.messages import VersionId

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LISTINGS_MAX = 20  # of a directory that is being swept meanwhile
_WRITERS = 2  # one compares a chunk with its digest while the other one writes
SEGMENT_NAMES = re.compile(r"rank\d{1,10}\.seg(\.\d+\.new)?")
NEW_SEGMENT_NAMES = re.compile(r"rank\d{1,10}\.seg\.\d+\.new")
_NEW_RECORD = re.compile(r"(\d{1,19}|fence)\.(?:json|pin)\.\d+\.new")
_FENCE = "fence.json"
_PIN = ".pin"


def none_usable_text(directory: Path, problems: Sequence[str]) -> str:
    """Why training does not begin anew where there are versions, and what to do."""
    return (
        f"no version in {directory} can be used ({_named(problems)}): put back what `ftrain "
        f"checkpoints verify {directory}` names, or move {directory} away to begin at step 0"
    )


def not_all_usable_text(directory: Path, problems: Sequence[str], step: int) -> str:
    """What is wrong with some of the versions there; training goes on from ``step``."""
    return (
        f"not every version in {directory} can be used ({_named(problems)}): training goes on "
        f"from step {step}; `ftrain checkpoints verify {directory}` names what is damaged"
    )


def _counted(stated: Iterable[DurableVersion], fences: Collection[int]) -> set[VersionId]:
    """The versions that can settle what the history is: of fences that were granted."""
    counted = (filed(v.fence, v.version) for v in stated if v.fence in fences)
    return set().union(*counted)


def _named(problems: Sequence[str]) -> str:
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"


class DurableStore:
    """Durable versions under ``directory``, which is created when first written to.

    ``pace`` limits how fast images are written.
    """

    level = "L3"

    def __init__(self, directory: str | os.PathLike[str], pace: Pace | None = None) -> None:
        self.directory = Path(directory)
        self._pace = pace or Pace()

    @property
    def name(self) -> str:
        """The directory, for people."""
        return str(self.directory)

    # ---- writing

    def begin_fence(self, fence: int, run_id: str, parent: VersionId | None) -> Fence:
        """Say what epoch ``fence`` goes on from, before anything is captured in it.

        From then on nothing that an earlier epoch published later than ``parent`` is seen.  Again
        with the same fence changes nothing.

        Raises:
            RunDirectoryError: the directory can't be written to, or another run begins there too.
        """
        folder = self.directory / str(fence)
        fences = self._fences()[0]
        earlier = [record for record in fences.values() if record.fence < fence]
        record = next_fence(fence, parent, earlier, _counted(self._stated()[0], fences))
        content = FenceFile(
            run_id=run_id,
            fence=fence,
            ancestors=record.ancestors,
            rests_on=record.rests_on,
            began_s=time.time(),
        ).encode()
        with explained(folder, len(content)):
            make_folders(folder)
            if not put_once(folder / _FENCE, content):
                _require_of_run(folder / _FENCE, run_id)
            sync_folder(self.directory)  # who made the folder may have died before doing so
        return record

    def require_begun(
        self, fence: int, latest: tuple[int, str, VersionId | None] | None = None
    ) -> None:
        """Raise ``RunDirectoryError`` if what is published under ``fence`` would not count, or
        another run began the newest one.

        ``latest``: what :meth:`begin_fence` was called with last; it is again if the record is
        gone, or could not be made then.
        """
        if latest is not None and not self._has_begun(latest[0]):
            self.begin_fence(*latest)
        elif latest is not None:
            _require_of_run(self.directory / str(latest[0]) / _FENCE, latest[1])
        if not self._has_begun(fence):
            raise RunDirectoryError(
                f"{self.directory / str(fence) / _FENCE} was deleted, without which no version "
                "there counts: end this launch and run it again"
            )

    def write_image(
        self,
        fence: int,
        version: VersionId,
        rank: int,
        buffer: Buffer,
        workers: Executor | None = None,
    ) -> FileRecord:
        """Write a rank's sealed image to its file; returns when it is on the disk.

        Each chunk is compared with its digest before it is written, so that what went bad in memory
        does not become durable.  ``workers``: threads to do it; None: some of its own.

        Raises:
            StateError: ``buffer`` is not that version's sealed image, or it is published already.
            CorruptionError: the image does not match its digests.
            RunDirectoryError: no space, or the directory can't be written to. Nothing stays behind.
        """
        reader = ImageReader(buffer, where=f"rank {rank}'s image of step {version.step}")
        reader.require(rank=rank, state=ImageState.SEALED)
        if reader.identity.version != version:
            raise StateError(f"{reader.where} is of {reader.identity.version}")
        planned = plan_file(reader)
        with self._fresh_segment(fence, version.step, rank, planned.nbytes) as file:
            pool = nullcontext(workers) if workers else ThreadPoolExecutor(_WRITERS, "ftrain-write")
            with pool as executor:
                write_file(planned, file, executor, self._pace)
        return FileRecord(rank, planned.nbytes, planned.tail.digest)

    def write_tensors(
        self,
        fence: int,
        identity: ImageIdentity,
        plan: ImagePlan,
        parts: Iterable[Buffer],
        small: bytes,
    ) -> FileRecord:
        """Write a rank's file of tensors that are given one by one; returns when it is on the disk.

        ``parts``: the bytes of each of the plan's segments, in order; each is asked for when the
        one before is in the file or in a chunk that is being filled.

        Raises as :meth:`write_image`, and what ``parts`` raises but for OSError.
        """
        version, rank = identity.version, identity.rank
        nbytes = PAGE_BYTES + plan.layout.data_bytes  # without the end, which is not known yet
        with self._fresh_segment(fence, version.step, rank, nbytes) as file:
            digest, nbytes = write_parts(file, identity, plan, parts, small)
        return FileRecord(rank, nbytes, digest)

    def file_record(self, fence: int, version: VersionId, rank: int) -> FileRecord:
        """Record of a rank's file, from its footer; ``CorruptionError`` if it is not that."""
        return _record(self._written(fence, version, rank))

    def publish(
        self,
        fence: int,
        version: VersionId,
        run_id: str,
        topology: str,
        world_size: int,
        files: Iterable[FileRecord],
        extra: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> Path:
        """Make a version exist; returns the manifest's path. Again with the same files is fine.

        Args:
            fence: epoch under which it is published; :meth:`begin_fence` was called for it.
            version: what the files are of.
            run_id: whose files they are.
            topology: digest of the model's shape.
            world_size: number of ranks, each of which has one file.
            files: records of all of them.
            extra: what else is worth knowing about it.

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
            written_s=time.time(),
            files=tuple(sorted(files, key=lambda record: record.rank)),
            extra=dict(extra or {}),
        )
        DurableVersion(path, manifest).check()
        content = manifest.encode()
        with explained(folder, len(content)):
            # Every name on the way to a file: who made it may have died before it was synced.
            for place in (folder, folder.parent, self.directory):
                sync_folder(place)
            with suppress(PermissionError):  # somebody else's, and then he made the directory
                sync_folder(self.directory.parent)
            if not put_once(path, content) and not _says_the_same(path, manifest):
                raise StateError(f"{path} exists already and differs: nothing is published twice")
        return path

    def publish_written(self, fence: int, version: VersionId, run_id: str, world_size: int) -> Path:
        """Publish what the footers of the written files say; returns the manifest's path.

        Raises:
            CorruptionError: a rank's file is missing, damaged or of something else.
            StateError, RunDirectoryError: as :meth:`publish`.
        """
        if world_size < 1:
            raise StateError("a version of no ranks can't be published")
        readers = [self._written(fence, version, rank) for rank in range(world_size)]
        expected = (run_id, readers[0].identity.topology, world_size)
        for reader in readers:
            identity = reader.identity
            if (identity.run_id, identity.topology, identity.world_size) != expected:
                raise CorruptionError(f"{reader.where} is of {identity}, not of {expected}")
        files = [_record(reader) for reader in readers]
        return self.publish(fence, version, run_id, expected[1], world_size, files)

    # ---- reading

    def survey(self) -> Survey[DurableVersion]:
        """Every version whose manifest can be read, and what is wrong with the rest.

        Raises:
            RunDirectoryError: the directory can't be read.
            StateError: it holds versions in another format.
        """
        fences, problems = self._fences()
        stated, unreadable = self._stated()
        found: list[tuple[DurableVersion, str]] = []
        for _ in range(_LISTINGS_MAX):
            found = [(version, _damage(version)) for version in stated]
            if all(version.path.exists() for version, damage in found if damage):
                break
            stated, unreadable = self._stated()  # what some were swept for was published since
        highest = max((fence for fence, _ in numbered(self.directory, "")), default=0)
        record = settling(fences.values(), _counted(stated, fences))
        return survey_of(self.name, found, fences, record, [*problems, *unreadable], highest)

    def versions(self) -> tuple[DurableVersion, ...]:
        """The versions of :meth:`survey`, newest first."""
        return self.survey().versions

    def find(self, step: int | None = None) -> DurableVersion:
        """The newest version, or that of ``step``.

        Raises:
            RunDirectoryError: there is none, or the directory can't be read.
            UsageError: there are others only.
            StateError: as :meth:`survey`.
        """
        survey = self.survey()
        if survey.fence == 0 and not survey.problems and (why := self._why_nothing()):
            raise RunDirectoryError(f"there is no complete version in {self.name}: {why}")
        return find_version(survey, self.name, step)

    def opened(self, version: PublishedVersion) -> AbstractContextManager[Files]:
        """Every rank's file, its footer verified, or why it can't be used; closed in the end."""
        return open_files(DurableVersion(self._manifest(version), version.manifest))

    def counts(self, fence: int, version: VersionId) -> bool:
        """Whether ``version`` would be of the history, if it were here; ``RunDirectoryError``."""
        fences = self._fences()[0]
        durable = _counted(self._stated()[0], fences)
        record = settling(fences.values(), durable | filed(fence, version))
        return record is not None and record.shows(version)

    def fence_files(self) -> tuple[FenceFile, ...]:
        """The records of the fences that were granted, but for damaged ones; oldest first.

        Raises:
            RunDirectoryError: the directory can't be read.
        """
        found = []
        for _, folder in reversed(numbered(self.directory, "")):
            with suppress(CorruptionError, FileNotFoundError):
                found.append(decode_fence(folder / _FENCE))
        return tuple(found)

    # ---- tidying

    def sweep(
        self,
        policy: Retention,
        run_id: str,
        *,
        active: Collection[VersionKey] = (),
        withdrawn: Collection[VersionId] = (),
    ) -> tuple[Path, ...]:
        """Remove this run's versions that are not kept, and what killed writers left.

        Manifests that can't be read or are of another run stay, with their files, and so does every
        file of a foreign name.  Versions that are not of the history go once the policy has enough
        of those that are, and one of them is of the newest epoch.  What is newer than all that was
        published and begun may be being written by somebody else right now, and stays.

        Any process may sweep at any time, also one of an epoch that is over: whatever it removes,
        it keeps a version that is newer by (fence, step), so the newest one that any sweep keeps is
        removed by none.

        Args:
            policy: which of the complete versions to keep.
            run_id: whose versions may be removed.
            active: (fence, step) of older versions that are being written now.
            withdrawn: what was captured wrongly, and is not kept.

        Returns:
            The manifests and files that were removed.

        Raises:
            RunDirectoryError: something can't be removed.
        """
        listed = self._manifests()  # before the survey: what is published after it stays
        survey = self.survey()
        bad = {v.key for v in survey.versions if v.version in withdrawn}
        mine = [v.key for v in survey.versions if v.manifest.run_id == run_id and v.key not in bad]
        keep = (policy.kept(mine) | frozenset(active) | self.pinned()) - bad
        superseded = {v.key for v in survey.superseded} if policy.satisfied(mine) else set()
        keep |= {version.key for version in survey.hidden} - superseded
        doomed = [path for key, path in listed if key not in keep and _run_of(path) == run_id]
        removed: list[Path] = []
        with explained(self.directory, 0):
            self._make_safe()
            for manifest in doomed:
                manifest.unlink(missing_ok=True)
                sync_if_there(manifest.parent)  # first nobody can find it, then it goes
                removed.append(manifest)
            for fence, folder in numbered(self.directory, ""):
                removed += self._sweep_leftovers(fence, folder, survey, keep)
        return tuple(removed)

    def remove(self, versions: Iterable[PublishedVersion]) -> None:
        """Delete published versions: the manifest first, so that nobody can find them.

        Raises:
            RunDirectoryError: something can't be removed.
        """
        with explained(self.directory, 0):
            self._make_safe()
            for version in versions:
                manifest = self._manifest(version)
                folder = manifest.with_suffix("")
                manifest.unlink(missing_ok=True)
                sync_if_there(manifest.parent)
                remove_matching(folder, SEGMENT_NAMES.fullmatch)
                remove_empty(folder)

    def pin(self, key: VersionKey, *, pinned: bool = True) -> None:
        """Never delete this version, or do again as the policy says; ``RunDirectoryError``."""
        path = _manifest_path(self._folder(*key)).with_suffix(_PIN)
        with explained(path, 0):
            if pinned:
                put_once(path, b"")
            else:
                path.unlink(missing_ok=True)
                sync_folder(path.parent)

    def pinned(self) -> frozenset[VersionKey]:
        """(fence, step) of the versions that are never deleted."""
        return frozenset(
            (fence, step)
            for fence, folder in numbered(self.directory, "")
            for step, _ in numbered(folder, _PIN)
        )

    # ---- helpers

    @contextmanager
    def _fresh_segment(self, fence: int, step: int, rank: int, nbytes: int) -> Iterator[NewFile]:
        """A file that gets its name, synced, when all went well; otherwise nothing stays."""
        folder = self._folder(fence, step)
        with explained(folder, nbytes):
            _refuse_published(folder)
            make_folders(folder)
            path = folder / file_name(rank)
            fresh = fresh_name(path)
            try:
                with NewFile(fresh, nbytes) as file:
                    yield file
                    file.sync()
                _refuse_published(folder)  # in the meantime
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
            sync_folder(folder)

    def _why_nothing(self) -> str:
        """Why nobody can have put a version there; empty: it may be."""
        inside = self.directory / "checkpoints"
        if inside.is_dir():
            return f"it is a run's directory, whose versions are in {inside}"
        return "" if self.directory.is_dir() else "there is no such directory"

    def _has_begun(self, fence: int) -> bool:
        return (self.directory / str(fence) / _FENCE).is_file()

    def _make_safe(self) -> None:
        """Sync the names of all records and manifests, before anything is removed because of them:
        whoever made one may have died before it was safe."""
        for _, folder in numbered(self.directory, ""):
            sync_if_there(folder)
        sync_folder(self.directory)

    def _sweep_leftovers(
        self, fence: int, folder: Path, survey: Survey[DurableVersion], keep: Collection[VersionKey]
    ) -> list[Path]:
        """Remove what belongs to no version, and nobody can still want to publish."""
        removed: list[Path] = []
        newest = max([(survey.granted, 0), *(version.key for version in survey.versions)])
        for step, files in numbered(folder, ""):
            if _manifest_path(files).exists():
                removed += remove_matching(files, NEW_SEGMENT_NAMES.fullmatch)
            elif (fence, step) < newest and (fence, step) not in keep:
                removed += remove_matching(files, SEGMENT_NAMES.fullmatch)
                remove_empty(files)

        def is_leftover(name: str) -> bool:
            found = _NEW_RECORD.fullmatch(name)
            step = 0 if found is None or found[1] == "fence" else int(found[1])
            return found is not None and (fence, step) <= newest

        removed += remove_matching(folder, is_leftover)
        if fence < survey.granted:
            if names_in(folder) == [_FENCE]:
                removed += remove_matching(folder, _FENCE.__eq__)
            remove_empty(folder)
        return removed

    def _fences(self) -> tuple[dict[int, Fence], list[str]]:
        """The fences that were granted, and what is wrong with their records."""
        found: dict[int, Fence | None] = {}
        problems: list[str] = []
        for fence, folder in reversed(numbered(self.directory, "")):
            path = folder / _FENCE
            try:
                found[fence] = decode_fence(path).record
            except FileNotFoundError:
                continue
            except CorruptionError as error:
                problems.append(str(error))
                found[fence] = None
        return completed(found), problems

    def _stated(self) -> tuple[list[DurableVersion], list[str]]:
        """The versions whose manifests can be read, and what is wrong with the others."""
        found: list[DurableVersion] = []
        problems: list[str] = []
        for _ in range(_LISTINGS_MAX):
            found, problems, swept = [], [], False
            for _, path in self._manifests():
                try:
                    found.append(stated_version(path))
                except CorruptionError as error:
                    swept = swept or not path.exists()
                    problems += [str(error)] if path.exists() else []
            if not swept:  # else what it was swept for was published after the listing
                break
        return found, problems

    def _manifests(self) -> list[tuple[VersionKey, Path]]:
        """What is named like a manifest, with the (fence, step) of its place."""
        return [
            ((fence, step), path)
            for fence, folder in numbered(self.directory, "")
            for step, path in numbered(folder, ".json")
        ]

    def _written(self, fence: int, version: VersionId, rank: int) -> SegmentReader:
        """A rank's file, not verified beyond its footer; closed, so that only that can be read."""
        file = LocalFile(self._folder(fence, version.step) / file_name(rank))
        try:
            reader = SegmentReader(file)
        finally:
            file.close()
        if (reader.identity.version, reader.identity.rank) != (version, rank):
            raise CorruptionError(f"{reader.where} is of {reader.identity}")
        return reader

    def _folder(self, fence: int, step: int) -> Path:
        if fence < 0 or step < 0:
            raise StateError(f"fence {fence} and step {step} can't be negative")
        return self.directory / str(fence) / str(step)

    def _manifest(self, version: PublishedVersion) -> Path:
        return _manifest_path(self._folder(version.fence, version.step))


def _damage(version: DurableVersion) -> str:
    """What is wrong with the files that a manifest names; "": nothing."""
    try:
        version.check()
    except CorruptionError as error:
        return str(error)
    return ""


def _record(reader: SegmentReader) -> FileRecord:
    return FileRecord(reader.identity.rank, reader.nbytes, reader.digest)


def _manifest_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _says_the_same(path: Path, manifest: Manifest) -> bool:
    """Whether the manifest that is there names the same files."""
    return decode_manifest(path).same_files(manifest)


def _refuse_published(folder: Path) -> None:
    manifest = _manifest_path(folder)
    if manifest.exists():
        raise StateError(f"{manifest} is published already: its files are never written again")


def _require_of_run(record: Path, run_id: str) -> None:
    """RunDirectoryError if another run began this fence: it is granted to one."""
    with suppress(CorruptionError, FileNotFoundError):  # which is told by who reads it
        found = decode_fence(record).run_id
        if found != run_id:
            raise RunDirectoryError(
                f"{record} is of run {found}, this is run {run_id}: two runs save into one "
                "directory; give each its own with checkpoint.dir"
            )


def _run_of(manifest: Path) -> str | None:
    try:
        return decode_manifest(manifest).run_id
    except (FileNotFoundError, CorruptionError, StateError):
        return None
