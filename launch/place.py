"""What RUN_OR_URI means: a run's directory, one of versions, or the address of copies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftrain.checkpoint.directory import numbered
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.versions import VersionStore
from ftrain.comms.errors import RunDirectoryError, UsageError
from ftrain.comms.job import read_job

_VERSIONS = "checkpoints"  # in a run directory, unless checkpoint.dir says something else

# Somebody waits for the command: he is told sooner than a run would be that a store is not there.
# pyarrow tries each request three times by itself.
_CONNECT_S_MAX, _SILENT_S_MAX, _ATTEMPTS = 5.0, 15.0, 2
_LOOK_SILENT_S_MAX = 5.0


def is_address(text: str) -> bool:
    """Whether it is a URI, and what it names may not answer."""
    return "://" in text


@contextmanager
def open_place(text: str, *, patient: bool = True) -> Iterator[VersionStore]:
    """The versions at the place of that name, which has to be there if it is a directory.

    ``patient``: ask a store again that does not answer; else it is given up after some 15 s.

    Raises:
        UsageError: no URI of a kind that is known.
        RunDirectoryError: there is no such directory, or nothing of ours in it.
    """
    if not is_address(text):
        yield _directory(text)
        return
    from ftrain.checkpoint.remote.place import Place
    from ftrain.checkpoint.remote.protocol.limits import Limits
    from ftrain.checkpoint.remote.store import RemoteStore

    limits = Limits(
        connect_timeout_s=_CONNECT_S_MAX,
        request_timeout_s=_SILENT_S_MAX if patient else _LOOK_SILENT_S_MAX,
        attempts=_ATTEMPTS if patient else 1,
    )
    place = Place(text, limits, _tell)
    try:
        yield RemoteStore(place)
    finally:
        place.close()


def new_place(text: str) -> DurableStore:
    """The directory of that name, which need not be there yet; raises as :func:`open_place`."""
    if is_address(text):
        raise UsageError(
            f"{place_text(text)} is an address: import into a run directory, and begin that with "
            "ftrain launch --run-dir DIRECTORY checkpoint.remote=URI, which copies it there"
        )
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{text} is no directory: name a run directory")
    return DurableStore(_folders(path)[0])


def place_text(text: str) -> str:
    """RUN_OR_URI for people: nothing secret is in it."""
    from ftrain.checkpoint.remote.filesystems import place_name

    return place_name(text) if is_address(text) else text


def versions_folder(run: Path) -> Path:
    """Where the versions of a run are that was launched; ``RunDirectoryError``.

    ``job.json`` names it as it was at the launch.  In a run's directory that was moved or copied
    since they are those beside it: at the old place may be another run's by now.
    """
    job = read_job(run / "job.json")
    named = Path(job.config.checkpoint.dir or Path(job.run_dir, _VERSIONS))
    inside = named.is_relative_to(job.run_dir)
    return run / named.relative_to(job.run_dir) if inside else named


def copies_of(text: str) -> str:
    """URI of the copies of that run (``checkpoint.remote``); "": it has none.

    It may have something secret in it.
    """
    path = Path(text) / "job.json"
    if is_address(text) or not path.is_file():
        return ""
    return read_job(path).config.checkpoint.remote


def _directory(text: str) -> DurableStore:
    path = Path(text)
    if not text:
        raise UsageError("RUN_OR_URI is empty: name a run directory")
    if not path.is_dir():
        what = "is no directory" if path.exists() else "does not exist"
        raise RunDirectoryError(
            f"{text} {what}: name a run directory, one of versions, or an address such as "
            "s3://bucket/prefix"
        )
    folders = _folders(path)
    launched = (path / "job.json").is_file()  # which makes the folder, for its lock
    for folder in folders:
        if numbered(folder, "") or (folder.is_dir() and not launched):
            return DurableStore(folder)
    if launched:
        raise RunDirectoryError(
            f"{text} is a run without durable versions: there are none in {folders[0]} (yet, or "
            "because of checkpoint=off)"
        )
    raise RunDirectoryError(
        f"{text} is neither a run directory nor one of versions: it has neither {_VERSIONS}/ nor a "
        "numbered directory"
    )


def _folders(path: Path) -> list[Path]:
    """Where the versions may be, the likeliest first."""
    if (path / "job.json").is_file():
        return [versions_folder(path)]
    if path.is_dir() and numbered(path, ""):
        return [path]
    return [path / _VERSIONS]


def _tell(text: str) -> None:
    """Say that an attempt failed, to somebody who sees nothing happen."""
    if sys.stderr.isatty():
        print(f"ftrain: {text}", file=sys.stderr)
