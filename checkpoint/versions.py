"""What looking at versions, moving and deleting them needs of a store, wherever it is.

:class:`~ftrain.checkpoint.durable.DurableStore` and
:class:`~ftrain.checkpoint.remote.store.RemoteStore` are such stores: the commands and exports know
no other differences between them than these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ftrain.checkpoint.manifest import PublishedVersion
from ftrain.checkpoint.protocol.lineage import Fence
from ftrain.checkpoint.retention import VersionKey
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.comms.errors import CorruptionError, RunDirectoryError, UsageError

_V = TypeVar("_V", bound=PublishedVersion)
_V_co = TypeVar("_V_co", bound=PublishedVersion, covariant=True)
_NAMED_MAX = 20  # steps in an error

Files = Sequence[SegmentReader | CorruptionError]  # of all ranks; an error where one can't be used


@dataclass(frozen=True, slots=True)
class Damaged(Generic[_V_co]):
    """A version whose manifest can be read, but whose files are not there as it says."""

    version: _V_co
    damage: str  # what is wrong first, in a sentence


@dataclass(frozen=True, slots=True)
class Survey(Generic[_V_co]):
    """What a store holds."""

    versions: tuple[_V_co, ...]  # complete, of the history; newest first by (fence, step)
    hidden: tuple[_V_co, ...]  # complete, published by what was over, or never granted
    damaged: tuple[Damaged[_V_co], ...]
    problems: tuple[str, ...]  # a sentence for each that does not count, the newest version's first
    fence: int  # highest that anything is filed under; 0: nothing is
    granted: int = 0  # newest that was begun; 0: none was

    @property
    def superseded(self) -> tuple[_V_co, ...]:
        """The hidden ones, once nobody can need them: the newest epoch has a version of its own.

        What it only goes on from may be removed at any time by a sweep that knows the hidden ones
        as newer versions, because it began before the epoch.
        """
        own = any(version.fence == self.granted for version in self.versions)
        return tuple(v for v in self.hidden if v not in self.unrecorded) if own else ()

    @property
    def unrecorded(self) -> tuple[_V_co, ...]:
        """The hidden ones that came after the newest record: they are not over, theirs was lost."""
        return tuple(version for version in self.hidden if version.fence > self.granted)


class VersionStore(Protocol):
    """Published versions at one place.

    Besides what is said here all methods raise RunDirectoryError or ObjectStoreError when the
    place can't be used, and StateError when it holds versions in another format.
    """

    @property
    def name(self) -> str:
        """The place, for people: nothing secret is in it. A manifest lies at
        ``<name>/<fence>/<step>.json``."""
        ...

    @property
    def level(self) -> str:
        """L3: on a file system; L4: an object store."""
        ...

    def survey(self) -> Survey[PublishedVersion]:
        """Every version whose manifest can be read, and what is wrong with the rest."""
        ...

    def find(self, step: int | None = None) -> PublishedVersion:
        """See :func:`find_version`."""
        ...

    def opened(self, version: PublishedVersion) -> AbstractContextManager[Files]:
        """Every rank's file, its footer verified, or why it can't be used."""
        ...

    def pinned(self) -> frozenset[VersionKey]:
        """(fence, step) of the versions that are never deleted."""
        ...

    def pin(self, key: VersionKey, *, pinned: bool = True) -> None:
        """Never delete this version, or do again as the policy says."""

    def remove(self, versions: Iterable[PublishedVersion]) -> None:
        """Delete versions: the manifests first, so that nobody can find them."""


def survey_of(
    name: str,
    found: Iterable[tuple[_V, str]],
    fences: Mapping[int, Fence],
    latest: Fence | None,
    problems: Iterable[str],
    highest: int,
) -> Survey[_V]:
    """What a store holds, put in order.

    Args:
        name: of the store.
        found: each version with what is wrong with its files; "": nothing.
        fences: those that were granted.
        latest: the one that settles what the history is.
        problems: what else is wrong.
        highest: fence that anything is filed under.
    """
    shown: list[_V] = []
    hidden: list[_V] = []
    damaged: list[Damaged[_V]] = []
    for version, damage in sorted(found, key=lambda pair: pair[0].key, reverse=True):
        if damage:
            damaged.append(Damaged(version, damage))
        elif latest and version.fence in fences and latest.shows(version.version):
            shown.append(version)
        else:
            hidden.append(version)
    granted = max(fences, default=0)
    unbegun = {v.fence for v in hidden if v.fence not in fences}
    lost = [
        f"{name}/{fence}/fence.json is missing, without which no version in {name}/{fence} counts"
        for fence in sorted(unbegun, reverse=True)
        if fence > granted or not shown  # else it was swept, and what came after is here
    ]
    if hidden and not (shown or lost):
        lost = [
            f"{name}/{hidden[0].fence}/{hidden[0].step}.json is not of the history that epoch "
            f"{granted} goes on from, of which nothing is left"
        ]
    return Survey(
        tuple(shown),
        tuple(hidden),
        tuple(damaged),
        (*lost, *(one.damage for one in damaged), *problems),
        highest,
        granted,
    )


def find_version(survey: Survey[_V], name: str, step: int | None) -> _V:
    """The newest version of the history, or that of ``step``; ``name``: of the store.

    Raises:
        RunDirectoryError: there is none.
        UsageError: there are others only.
    """
    if not survey.versions:
        why = f": {survey.problems[0]}" if survey.problems else ""
        raise RunDirectoryError(f"there is no complete version in {name}{why}")
    for version in survey.versions:
        if step is None or version.step == step:
            return version
    there = ", ".join(str(version.step) for version in survey.versions[:_NAMED_MAX])
    why = next((f" ({one.damage})" for one in survey.damaged if one.version.step == step), "")
    if any(version.step == step for version in survey.hidden):
        why = " that is of the run's history"
    raise UsageError(f"there is no version of step {step} in {name}{why}: it has {there}")


def all_readable(files: Files) -> list[SegmentReader]:
    """The files; raises the first ``CorruptionError`` that is in the place of one."""
    readers = []
    for file in files:
        if isinstance(file, CorruptionError):
            raise file
        readers.append(file)
    return readers
