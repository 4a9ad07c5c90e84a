"""The conversation with the process that uses an object store (worker.py), over a local socket.

First :class:`StoreSetup`, then one request at a time, each answered by one of the answers or by
:class:`StoreFailed`.  :class:`StoreProgress` and :class:`StoreTold` come in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.comms.protocol.messages import VersionId

# ---------------------------------------------------------------- to the process


@dataclass(frozen=True, slots=True)
class StoreSetup:
    """The first message: the place that all requests are about."""

    uri: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class StoreBeginFences:
    """Say what epochs go on from, as it is recorded in ``directory``.

    Answer: :class:`StoreDone`.
    """

    directory: str


@dataclass(frozen=True, slots=True)
class StoreUpload:
    """Upload files of the version that is published in ``directory``.

    Answer: :class:`StoreUploaded`.
    """

    directory: str
    fence: int
    step: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreFile:
    """An object as the store's manifest names it."""

    rank: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class StorePublish:
    """Publish a version whose objects are all there. Answer: :class:`StoreDone`."""

    fence: int
    version: VersionId
    run_id: str
    topology: str
    world_size: int
    files: tuple[StoreFile, ...]


@dataclass(frozen=True, slots=True)
class StoreAskVersions:
    """Answer: :class:`StoreVersions`."""


@dataclass(frozen=True, slots=True)
class StoreFetch:
    """Put a version into ``directory`` and publish it there. Answer: :class:`StoreDone`."""

    directory: str
    fence: int
    step: int


@dataclass(frozen=True, slots=True)
class StoreFetchFences:
    """Record in ``directory`` what epochs go on from, as it is said in the store.

    :class:`StoreFetch` does so as well. Answer: :class:`StoreDone`.
    """

    directory: str


@dataclass(frozen=True, slots=True)
class StoreSweep:
    """Remove what is not to be kept. Answer: :class:`StoreDone`."""

    keep_last: int
    keep_every: int
    run_id: str
    active: tuple[tuple[int, int], ...]  # (fence, step) that are being uploaded


Request = (
    StoreBeginFences
    | StoreUpload
    | StorePublish
    | StoreAskVersions
    | StoreFetch
    | StoreFetchFences
    | StoreSweep
)

# ---------------------------------------------------------------- from the process


@dataclass(frozen=True, slots=True)
class StoreProgress:
    """How far the request is; a few times a second at most."""

    done_bytes: int
    total_bytes: int  # at most; less when chunks shrink or are there already


@dataclass(frozen=True, slots=True)
class StoreTold:
    """An attempt failed and is made again: a sentence for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class StoreDone:
    """It is done. ``names``: the manifest's place, or what was removed."""

    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreUploaded:
    """All of the files are there."""

    files: tuple[StoreFile, ...]


@dataclass(frozen=True, slots=True)
class StoreVersion:
    """A version in the store whose objects are all there."""

    fence: int
    version: VersionId
    run_id: str
    topology: str
    world_size: int
    nbytes: int
    written_s: float  # Unix time


@dataclass(frozen=True, slots=True)
class StoreVersions:
    """What the store holds; as :class:`~ftrain.checkpoint.versions.Survey`."""

    versions: tuple[StoreVersion, ...]
    hidden: tuple[StoreVersion, ...]
    problems: tuple[str, ...]
    fence: int


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """The request could not be done."""

    kind: str  # name of a type in comms/errors.py
    text: str


Answer = StoreDone | StoreUploaded | StoreVersions

MESSAGES: tuple[type, ...] = (
    StoreSetup,
    StoreBeginFences,
    StoreUpload,
    StorePublish,
    StoreAskVersions,
    StoreFetch,
    StoreFetchFences,
    StoreSweep,
    StoreProgress,
    StoreTold,
    StoreDone,
    StoreUploaded,
    StoreVersions,
    StoreFailed,
)
