"""Which durable versions are of the run's history: pure.

Whoever is granted an epoch says, before anything is captured in it, which version it goes on from
(:class:`Fence`).  The newest such record settles what the history is: all of its own epoch, and of
each epoch before it what came up to the version that its successor went on from.  So whatever a
process of an epoch that is over still publishes later than that can't be seen, whenever it arrives
and wherever it is put; no lock and no conditional write is needed.

A record also says which durable version was the newest of that history when it was made.  It
settles nothing while its epoch has published nothing and that version's manifest is gone
(:func:`settling`): a process of the epoch before did not know of the record yet when it swept, and
had newer versions.  Those are the history then, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from ftrain.comms.protocol.messages import VersionId

_ANCESTORS_MAX = 1000
_STEP_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Fence:
    """An epoch that was granted, and the history that it goes on from."""

    fence: int
    ancestors: tuple[VersionId, ...] = ()  # by epoch: the last version of each that counts
    # Newest of them that was durable then. None: nothing was; of its own epoch: only others were.
    rests_on: VersionId | None = None

    def stands(self, durable: Collection[VersionId]) -> bool:
        """Whether it can settle the history, if there are manifests of these versions."""
        if self.rests_on is None or self.rests_on in durable:
            return True
        return any(version.epoch == self.fence for version in durable)

    def shows(self, version: VersionId) -> bool:
        """Whether ``version`` is of the history up to now, if this is the newest fence."""
        if version.epoch == self.fence:
            return True
        return any(
            version.epoch == last.epoch and version.step <= last.step for last in self.ancestors
        )


def filed(fence: int, version: VersionId) -> set[VersionId]:
    """What a manifest under ``fence`` says of durable versions.

    What is saved from memory, once no rank runs, was captured in an earlier epoch than the one that
    it is published under, whose record it makes stand all the same.
    """
    return {version, VersionId(fence, version.step)}


def newest(fences: Iterable[Fence]) -> Fence | None:
    """The record that settles what the history is in a place where not every version comes, so
    that one that is missing says nothing."""
    return max(fences, key=lambda fence: fence.fence, default=None)


def settling(fences: Iterable[Fence], durable: Collection[VersionId]) -> Fence | None:
    """The record that settles what the history is, if there are manifests of these versions: the
    newest one that stands.  None shows nothing: there is nothing."""
    return newest(fence for fence in fences if fence.stands(durable))


def next_fence(
    fence: int,
    parent: VersionId | None,
    before: Iterable[Fence],
    durable: Iterable[VersionId] = (),
) -> Fence:
    """The record of an epoch that goes on from ``parent`` (None: begins anew), after those
    ``before``, when there are manifests of the versions ``durable``."""
    earlier, durable = list(before), set(durable)
    settled = settling(earlier, durable)
    record = Fence(fence, _ancestors(parent, earlier))
    seen = {version for version in durable if settled is not None and settled.shows(version)}
    shown = [version for version in seen if record.shows(version)]
    if seen and not shown:  # published, or chosen among, while the epoch was being granted
        return replace(record, rests_on=VersionId(fence, 0))
    return replace(record, rests_on=max(shown, default=None))


def _ancestors(parent: VersionId | None, before: Iterable[Fence]) -> tuple[VersionId, ...]:
    if parent is None:
        return ()
    known = sorted(before, key=lambda record: (record.shows(parent), record.fence))
    older = known[-1].ancestors if known else ()  # the newest record that has ``parent``
    kept = [last for last in older if last.epoch < parent.epoch]
    return (*kept[1 - _ANCESTORS_MAX :], parent)


def completed(found: Mapping[int, Fence | None]) -> dict[int, Fence]:
    """The records that were found, with something in place of those that are damaged (None).

    Better to see too much of the epoch before than nothing of the damaged one's own.
    """
    fences: dict[int, Fence] = {}
    for number in sorted(found):
        record = found[number]
        if record is None:
            parent = VersionId(max(fences), _STEP_MAX) if fences else None
            record = next_fence(number, parent, fences.values())
        fences[number] = record
    return fences
