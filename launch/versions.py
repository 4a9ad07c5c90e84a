"""``ftrain checkpoints list | show | verify``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ftrain.checkpoint.catalogue import SavedTensor, catalogue
from ftrain.checkpoint.directory import numbered
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import DurableVersion, decode_manifest, open_files
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.comms.errors import CorruptionError
from ftrain.launch.place import Place, open_place
from ftrain.launch.words import age_text, print_table, progress_bar, size_text

_COLUMNS = ("step", "age", "level", "ranks", "size", "complete", "verified", "")


@dataclass(slots=True)
class _Row:
    """A version whose manifest can be read."""

    version: DurableVersion
    counts: bool  # as part of the run's history
    damage: str = ""  # a file that is missing or has another size
    pinned: bool = False
    found: list[str] | None = None  # damage that was found in reading all of it; None: not read

    def told(self, level: str, now_s: float) -> dict[str, Any]:
        """For programs."""
        manifest = self.version.manifest
        return {
            "step": manifest.step,
            "fence": manifest.fence,
            "epoch": manifest.epoch,
            "run_id": manifest.run_id,
            "written_s": manifest.written_s,
            "age_s": now_s - manifest.written_s,
            "level": level,
            "world_size": manifest.world_size,
            "bytes": self.version.nbytes,
            "complete": not self.damage,
            "verified": None if self.found is None else not self.found,
            "damage": self.found or [],
            "counts": self.counts,
            "pinned": self.pinned,
            "manifest": str(self.version.path),
        }

    def cells(self, level: str, now_s: float) -> tuple[str, ...]:
        """For people."""
        remarks = ["pinned"] * self.pinned + ["not of the run's history"] * (not self.counts)
        verified = "" if self.found is None else ("no" if self.found else "yes")
        return (
            str(self.version.step),
            age_text(now_s - self.version.manifest.written_s),
            level,
            str(self.version.world_size),
            size_text(self.version.nbytes),
            "no" if self.damage else "yes",
            verified,
            ", ".join(remarks),
        )


def list_versions(place: str, *, verify: bool, as_json: bool) -> int:
    """Print which versions there are; returns 1 if something is damaged, else 0.

    Raises:
        RunDirectoryError, StateError, UsageError: as :func:`open_place`, or there is none.
    """
    opened = open_place(place)
    rows, problems = _rows(opened.store)
    if verify:
        whole = [row for row in rows if not row.damage]
        total = sum(row.version.nbytes for row in whole)
        with progress_bar("verifying", total) as progress:
            for row in whole:
                row.found = damage_of(row.version, progress)
                problems += row.found
    now_s = time.time()
    if as_json:
        told = [row.told(opened.level, now_s) for row in rows]
        directory = str(opened.store.directory)
        print(
            json.dumps({"directory": directory, "versions": told, "problems": problems}, indent=2)
        )
    else:
        if rows:
            print_table([_COLUMNS, *(row.cells(opened.level, now_s) for row in rows)])
        else:
            print(f"no version in {opened.store.directory}")
        for problem in problems:
            print(problem)
    return 1 if problems else 0


def verify_versions(place: str, step: int | None, *, as_json: bool) -> int:
    """Read every byte of one version, or of all; prints one line for each damage and returns 1 if
    there is any, else 0.

    Raises:
        RunDirectoryError, StateError, UsageError: as :func:`open_place`, or there is none.
    """
    opened = open_place(place)
    rows, problems = _rows(opened.store)
    if step is not None:
        rows = [row for row in rows if row.version.step == step]
        problems = [row.damage for row in rows if row.damage]
    if not rows:
        opened.store.find(step)  # says what there is
    whole = [row for row in rows if not row.damage]
    total = sum(row.version.nbytes for row in whole)
    began_s = time.monotonic()
    with progress_bar("verifying", total) as progress:
        for row in whole:
            row.found = damage_of(row.version, progress)
            problems += row.found
    took_s = time.monotonic() - began_s
    if as_json:
        told = [row.told(opened.level, time.time()) for row in rows]
        print(json.dumps({"versions": told, "damage": problems, "seconds": took_s}, indent=2))
        return 1 if problems else 0
    for problem in problems:
        print(problem)
    good = sum(row.found == [] for row in rows)
    rate = f", {size_text(int(total / took_s))}/s" if took_s > 0.1 else ""
    print(
        f"{good} of {len(rows)} versions {'are' if len(rows) != 1 else 'is'} sound: "
        f"{size_text(total)} read in {took_s:.1f} s{rate}"
    )
    return 1 if problems else 0


def damage_of(version: DurableVersion, progress: Callable[[int], None]) -> list[str]:
    """One sentence for everything in a version's files that is not as it was written."""
    found: list[str] = []
    with open_files(version) as files:
        readers = [file for file in files if isinstance(file, SegmentReader)]
        found += [str(file) for file in files if isinstance(file, CorruptionError)]
        for reader in readers:
            found += [str(error) for error in reader.damage(progress)]
        if len(readers) == len(files):
            found += _lacking(version, readers)
    return found


def show_version(place: str, step: int | None, *, as_json: bool) -> int:
    """Print what is in a version; returns 0.

    Raises:
        RunDirectoryError, StateError, UsageError: as :func:`open_place`, or there is none.
        CorruptionError: the end of a file, which says what is in it, is damaged.
    """
    opened = open_place(place)
    version = opened.store.find(step)
    with open_files(version) as files:
        readers = []
        for file in files:
            if isinstance(file, CorruptionError):
                raise file
            readers.append(file)
        tensors = catalogue(readers)
        told = _told(opened, version, readers, tensors)
    if as_json:
        print(json.dumps(told, indent=2))
        return 0
    manifest = version.manifest
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.written_s))
    print(
        f"step {manifest.step} of run {manifest.run_id}, written {written} by "
        f"{manifest.world_size} ranks in epoch {manifest.epoch} (fence {manifest.fence})"
    )
    print(f"{size_text(version.nbytes)} in {version.path.with_suffix('')}")
    for key, value in manifest.extra.items():
        print(f"{key}: {value}")
    print()
    print_table([("file", "size", "tensors", "small state", "footer"), *_file_cells(readers)])
    print()
    rows = [
        (t.label, t.dtype, str(list(t.shape)), size_text(t.nbytes), layout_text(t)) for t in tensors
    ]
    print_table([("tensor", "type", "shape", "size", "saved as"), *rows])
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


def _rows(store: DurableStore) -> tuple[list[_Row], list[str]]:
    """Every version whose manifest can be read, newest first, and a sentence for each damage."""
    survey = store.survey()
    counting = {version.key for version in survey.versions}
    pinned = store.pinned()
    rows: list[_Row] = []
    for _, folder in numbered(store.directory, ""):
        for _, path in numbered(folder, ".json"):
            try:
                version = DurableVersion(path, decode_manifest(path))
            except CorruptionError:  # one of the problems
                continue
            row = _Row(version, version.key in counting, pinned=version.key in pinned)
            try:
                version.check()
            except CorruptionError as error:
                row.damage = str(error)
                row.counts = True  # as far as one can tell
            rows.append(row)
    return rows, list(survey.problems)


def _lacking(version: DurableVersion, readers: Iterable[SegmentReader]) -> Iterator[str]:
    try:
        for tensor in catalogue(readers):
            if tensor.missing_bytes:
                gap = f"{tensor.missing_bytes} bytes of {tensor.label}"
                yield f"{version.path}: {gap} are in no file"
    except CorruptionError as error:
        yield str(error)


def _file_cells(readers: Sequence[SegmentReader]) -> Iterator[tuple[str, ...]]:
    for rank, reader in enumerate(readers):
        names = {segment.name for segment in reader.segments}
        small = size_text(reader.footer.small_bytes)
        yield f"rank{rank}", size_text(reader.nbytes), str(len(names)), small, reader.digest


def _told(
    place: Place,
    version: DurableVersion,
    readers: Sequence[SegmentReader],
    tensors: Sequence[SavedTensor],
) -> dict[str, Any]:
    """What :func:`show_version` shows, for programs."""
    row = _Row(version, counts=True, pinned=version.key in place.store.pinned())
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
        **row.told(place.level, time.time()),
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
