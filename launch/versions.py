"""``ftrain checkpoints list | show | verify``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ftrain.checkpoint.catalogue import SavedTensor, catalogue
from ftrain.checkpoint.manifest import PublishedVersion
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.versions import VersionStore, all_readable
from ftrain.comms.errors import CorruptionError, ObjectStoreError, UsageError
from ftrain.launch.place import copies_of, open_place, place_text
from ftrain.launch.words import age_text, print_table, progress_bar, size_text

_COLUMNS = ("step", "age", "level", "ranks", "size", "complete", "verified", "")


@dataclass(slots=True)
class _Row:
    """A version whose manifest can be read."""

    store: VersionStore
    version: PublishedVersion
    counts: bool = True  # as part of the run's history; of a damaged one it is not asked
    damage: str = ""  # a file that is missing or has another size
    pinned: bool = False
    found: list[str] | None = None  # damage that was found in reading all of it; None: not read

    def told(self, now_s: float) -> dict[str, Any]:
        """For programs."""
        manifest = self.version.manifest
        return {
            "step": manifest.step,
            "fence": manifest.fence,
            "epoch": manifest.epoch,
            "run_id": manifest.run_id,
            "written_s": manifest.written_s,
            "age_s": now_s - manifest.written_s,
            "level": self.store.level,
            "world_size": manifest.world_size,
            "bytes": self.version.nbytes,
            "complete": not self.damage,
            "verified": None if self.found is None else not self.found,
            "damage": self.found or [],
            "counts": self.counts,
            "pinned": self.pinned,
            "manifest": f"{_folder(self.store, self.version)}.json",
        }

    def cells(self, now_s: float) -> tuple[str, ...]:
        """For people."""
        remarks = ["pinned"] * self.pinned + ["not of the run's history"] * (not self.counts)
        verified = "" if self.found is None else ("no" if self.found else "yes")
        return (
            str(self.version.step),
            age_text(now_s - self.version.manifest.written_s),
            self.store.level,
            str(self.version.world_size),
            size_text(self.version.nbytes),
            "no" if self.damage else "yes",
            verified,
            ", ".join(remarks),
        )


def list_versions(place: str, *, remote: bool, verify: bool, as_json: bool) -> int:
    """Print which versions there are; returns 1 if something is damaged, else 0.

    ``remote``: also those that the run copied to its ``checkpoint.remote``; 1 as well if that can't
    be looked at.

    Raises:
        RunDirectoryError, StateError, UsageError, ObjectStoreError: as :func:`open_place` and
            :class:`VersionStore`, or the run has no copies.
    """
    copies = copies_of(place)
    if remote and not copies:
        raise UsageError(f"no copies are known of: {place_text(place)} has no checkpoint.remote")
    with ExitStack() as stack:
        store = stack.enter_context(open_place(place, patient=verify))
        rows, problems = _rows(store)
        places = [store.name]
        if remote:
            copied = stack.enter_context(open_place(copies, patient=verify))
            places.append(copied.name)
            try:
                more, wrong = _rows(copied)
            except ObjectStoreError as error:
                more, wrong = [], [str(error)]
            rows += more
            problems += wrong
            rows.sort(key=lambda row: row.version.key, reverse=True)
        if verify:
            problems += _verify(rows)
        _print_list(rows, problems, places, "" if remote else copies, as_json=as_json)
    return 1 if problems else 0


def _print_list(
    rows: list[_Row], problems: list[str], places: list[str], copies: str, *, as_json: bool
) -> None:
    """``copies``: URI of what is not among the rows."""
    now_s = time.time()
    if as_json:
        told = [row.told(now_s) for row in rows]
        print(json.dumps({"places": places, "versions": told, "problems": problems}, indent=2))
        return
    if rows:
        print_table([_COLUMNS, *(row.cells(now_s) for row in rows)])
    held = {row.store.name for row in rows}
    empty = [place for place in places if place not in held]
    if empty and not (rows and problems):  # else it is told why nothing is seen there
        print(f"no version in {' or '.join(empty)}")
    if copies:
        print(f"copies are in {place_text(copies)}: list them too with --remote")
    for problem in problems:
        print(problem)


def verify_versions(place: str, step: int | None, *, as_json: bool) -> int:
    """Read every byte of one version, or of all; prints one line for each damage and returns 1 if
    there is any, else 0.

    Raises:
        RunDirectoryError, StateError, UsageError, ObjectStoreError: as :func:`open_place` and
            :class:`VersionStore`, or there is none.
    """
    with open_place(place) as store:
        rows, problems = _rows(store)
        if step is not None:
            rows = [row for row in rows if row.version.step == step]
            problems = [row.damage for row in rows if row.damage]
        unlisted = len(problems) > sum(bool(row.damage) for row in rows)
        if not rows:
            store.find(step)  # says what there is
        began_s = time.monotonic()
        problems += _verify(rows)
        took_s = time.monotonic() - began_s
    if as_json:
        told = [row.told(time.time()) for row in rows]
        print(json.dumps({"versions": told, "damage": problems, "seconds": took_s}, indent=2))
        return 1 if problems else 0
    for problem in problems:
        print(problem)
    total = sum(row.version.nbytes for row in rows if row.found is not None)
    good = sum(row.found == [] for row in rows)
    rate = f", {size_text(int(total / took_s))}/s" if took_s > 0.1 else ""
    what = "versions" if not unlisted else "versions whose manifests can be read"
    print(
        f"{good} of {len(rows)} {what} {'are' if len(rows) != 1 else 'is'} sound: "
        f"{size_text(total)} read in {took_s:.1f} s{rate}"
    )
    return 1 if problems else 0


def _verify(rows: list[_Row]) -> list[str]:
    """Read all of those whose files are there; what is wrong with them.  What was deleted meanwhile
    is taken out of ``rows``."""
    whole = [row for row in rows if not row.damage]
    problems: list[str] = []
    gone: list[_Row] = []
    with progress_bar("verifying", sum(row.version.nbytes for row in whole)) as progress:
        for row in whole:
            row.found = damage_of(row.store, row.version, progress)
            if row.found and not _is_there(row):
                gone.append(row)  # the run swept it meanwhile
            else:
                problems += row.found
    rows[:] = [row for row in rows if row not in gone]
    return problems


def _is_there(row: _Row) -> bool:
    """Whether the version is still published."""
    survey = row.store.survey()
    known = [*survey.versions, *survey.hidden, *(one.version for one in survey.damaged)]
    return any(version.key == row.version.key for version in known)


def damage_of(
    store: VersionStore, version: PublishedVersion, progress: Callable[[int], None]
) -> list[str]:
    """One sentence for everything in a version's files that is not as it was written."""
    found: list[str] = []
    with store.opened(version) as files:
        readers = [file for file in files if isinstance(file, SegmentReader)]
        found += [str(file) for file in files if isinstance(file, CorruptionError)]
        for reader in readers:
            found += [str(error) for error in reader.damage(progress)]
        if len(readers) == len(files):
            found += _lacking(f"{_folder(store, version)}.json", readers)
    return found


def show_version(place: str, step: int | None, *, as_json: bool) -> int:
    """Print what is in a version; returns 0.

    Raises:
        RunDirectoryError, StateError, UsageError, ObjectStoreError: as :func:`open_place` and
            :class:`VersionStore`, or there is none.
        CorruptionError: the end of a file, which says what is in it, is damaged.
    """
    with ExitStack() as stack:
        store = stack.enter_context(open_place(place))
        version = store.find(step)
        passed = store.survey().problems if step is None else ()
        readers = all_readable(stack.enter_context(store.opened(version)))
        tensors = catalogue(readers)
        told = _told(store, version, readers, tensors) | {"not_used": list(passed)}
    if as_json:
        print(json.dumps(told, indent=2))
        return 0
    manifest = version.manifest
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.written_s))
    print(
        f"step {manifest.step} of run {manifest.run_id}, written {written} by "
        f"{manifest.world_size} ranks in epoch {manifest.epoch} (fence {manifest.fence})"
    )
    print(f"{size_text(version.nbytes)} in {_folder(store, version)}")
    for key, value in manifest.extra.items():
        print(f"{key}: {value}")
    print()
    print_table([("file", "size", "tensors", "small state", "footer"), *_file_cells(readers)])
    print()
    rows = [
        (t.label, t.dtype, str(list(t.shape)), size_text(t.nbytes), layout_text(t)) for t in tensors
    ]
    print_table([("tensor", "type", "shape", "size", "saved as"), *rows])
    for problem in passed:
        print(f"not used: {problem}")
    return 0


def layout_text(tensor: SavedTensor) -> str:
    """How the ranks had a tensor, in words."""
    boxes = tensor.boxes
    if tensor.owner:
        return f"ranks {tensor.owner}'s own"
    if len(boxes) < 2:
        files = len({(s.share, s.start) for s in tensor.segments if s.nbytes})
        return "whole" if files < 2 else f"whole, in {files} pieces"
    cut = [d for d in range(len(tensor.shape)) if len({box.origin[d] for box in boxes}) > 1]
    dims = ", ".join(str(d) for d in cut)
    return f"{len(boxes)} shards along dimension {dims}"


def _rows(store: VersionStore) -> tuple[list[_Row], list[str]]:
    """Every version whose manifest can be read, newest first, and a sentence for each damage."""
    survey = store.survey()
    pinned = store.pinned()
    rows = [_Row(store, version) for version in survey.versions]
    rows += [_Row(store, version, counts=False) for version in survey.hidden]
    rows += [_Row(store, one.version, damage=one.damage) for one in survey.damaged]
    for row in rows:
        row.pinned = row.version.key in pinned
    rows.sort(key=lambda row: row.version.key, reverse=True)
    return rows, list(survey.problems)


def _folder(store: VersionStore, version: PublishedVersion) -> str:
    """Where its files lie; the manifest lies beside it."""
    return f"{store.name}/{version.fence}/{version.step}"


def _lacking(manifest: str, readers: Iterable[SegmentReader]) -> Iterator[str]:
    try:
        for tensor in catalogue(readers):
            if tensor.missing_bytes:
                gap = f"{tensor.missing_bytes} bytes of {tensor.label}"
                yield f"{manifest}: {gap} are in no file"
    except CorruptionError as error:
        yield str(error)


def _file_cells(readers: Sequence[SegmentReader]) -> Iterator[tuple[str, ...]]:
    for rank, reader in enumerate(readers):
        names = {segment.name for segment in reader.segments}
        small = size_text(reader.footer.small_bytes)
        yield f"rank{rank}", size_text(reader.nbytes), str(len(names)), small, reader.digest


def _told(
    store: VersionStore,
    version: PublishedVersion,
    readers: Sequence[SegmentReader],
    tensors: Sequence[SavedTensor],
) -> dict[str, Any]:
    """What :func:`show_version` shows, for programs."""
    row = _Row(store, version, pinned=version.key in store.pinned())
    files = [
        {
            "rank": reader.identity.rank,
            "bytes": reader.nbytes,
            "data_bytes": reader.footer.data_bytes,
            "small_bytes": reader.footer.small_bytes,
            "footer": reader.digest,
            "codecs": dict(Counter(chunk.codec for chunk in reader.footer.chunks)),
        }
        for reader in readers
    ]
    return {
        **row.told(time.time()),
        "topology": version.manifest.topology,
        "extra": version.manifest.extra,
        "files": files,
        "tensors": [
            {
                "name": t.label,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "bytes": t.nbytes,
                "owner": t.owner,
                "boxes": [[list(box.origin), list(box.shape)] for box in t.boxes],
            }
            for t in tensors
        ],
    }
