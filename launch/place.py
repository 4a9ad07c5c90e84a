"""What the user means by RUN_OR_URI: a run's directory, or one of versions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftrain.checkpoint.directory import numbered
from ftrain.checkpoint.durable import DurableStore
from ftrain.comms.errors import RunDirectoryError, UsageError
from ftrain.comms.job import read_job

_VERSIONS = "checkpoints"  # in a run directory, unless checkpoint.dir says something else


@dataclass(frozen=True, slots=True)
class Place:
    """Where versions are kept."""

    store: DurableStore
    level: str


def open_place(text: str) -> Place:
    """The place of that name, which has to be there.

    Raises:
        UsageError: it is of a kind that can't be opened.
        RunDirectoryError: there is nothing, or nothing of ours.
    """
    path = _path(text)
    if not path.is_dir():
        what = "is no directory" if path.exists() else "does not exist"
        raise RunDirectoryError(f"{text} {what}: name a run directory, or one of versions")
    for folder in _folders(path):
        if folder.is_dir():
            return Place(DurableStore(folder), "L3")
    raise RunDirectoryError(
        f"{text} is neither a run directory nor one of versions: it has neither {_VERSIONS}/ nor a "
        "numbered directory"
    )


def new_place(text: str) -> Place:
    """The place of that name, which need not be there yet; raises as :func:`open_place`."""
    path = _path(text)
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{text} is no directory: name a run directory")
    return Place(DurableStore(_folders(path)[0]), "L3")


def _path(text: str) -> Path:
    if "://" in text:
        raise UsageError(f"{text} is an address: this command takes directories")
    return Path(text)


def _folders(path: Path) -> list[Path]:
    """Where the versions may be, the likeliest first."""
    if (path / "job.json").is_file():
        named = read_job(path / "job.json").config.checkpoint.dir
        return [Path(named) if named else path / _VERSIONS]
    if path.is_dir() and numbered(path, ""):
        return [path]
    return [path / _VERSIONS]
