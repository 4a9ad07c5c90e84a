"""``ftrain checkpoints prune``: delete versions by the same rules as a run does."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import DurableVersion
from ftrain.checkpoint.retention import Retention
from ftrain.comms.errors import UsageError
from ftrain.launch.place import open_place
from ftrain.launch.words import size_text


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What the user asked for."""

    keep_last: int | None
    keep_every: int
    dry_run: bool
    pin: tuple[int, ...]
    unpin: tuple[int, ...]


def prune(place: str, request: PruneRequest, *, as_json: bool) -> int:
    """Pin and unpin, then delete what is not to be kept; returns 0.

    Only published versions are touched, so a run may go on meanwhile; the newest version stays.

    Raises:
        UsageError: there is nothing to do, or a step is unknown.
        RunDirectoryError: something can't be deleted, or there is no version.
    """
    if request.keep_last is None and not (request.pin or request.unpin):
        raise UsageError("say how many versions to keep: --keep-last 3 (try it with --dry-run)")
    if request.keep_last is None and request.keep_every:
        raise UsageError("--keep-every is what to keep besides --keep-last: give that as well")
    store = open_place(place).store
    pins = [(store.find(step), True) for step in request.pin]
    pins += [(store.find(step), False) for step in request.unpin]
    pinned = set(store.pinned())
    for version, wanted in pins:
        (pinned.add if wanted else pinned.discard)(version.key)
        if not request.dry_run:
            store.pin(version, pinned=wanted)
    doomed = _doomed(store, request, frozenset(pinned))
    if doomed and not request.dry_run:
        store.remove(doomed)
    kept = [v.step for v in store.versions() if v not in doomed]
    if as_json:
        told = {
            "dry_run": request.dry_run,
            "removed": [{"step": v.step, "fence": v.fence, "bytes": v.nbytes} for v in doomed],
            "kept": kept,
            "pinned": sorted(step for _, step in pinned),
        }
        print(json.dumps(told, indent=2))
        return 0
    would = "would be deleted" if request.dry_run else "deleted"
    for version in doomed:
        print(f"step {version.step} {would}: {size_text(version.nbytes)}")
    if request.keep_last is not None:
        total = size_text(sum(version.nbytes for version in doomed))
        print(f"{len(doomed)} versions of {total} {would}; kept: {', '.join(map(str, kept))}")
    for version, wanted in pins:
        print(f"step {version.step} is {'pinned' if wanted else 'no longer pinned'}")
    return 0


def _doomed(
    store: DurableStore, request: PruneRequest, pinned: frozenset[tuple[int, int]]
) -> list[DurableVersion]:
    if request.keep_last is None:
        return []
    try:
        policy = Retention(request.keep_last, request.keep_every)
    except UsageError:
        raise UsageError(
            f"--keep-last {request.keep_last} --keep-every {request.keep_every}: at least the "
            "newest version stays, and steps are counted from 1"
        ) from None
    survey = store.survey()
    retired = policy.retired(version.key for version in survey.versions) - pinned
    doomed = [version for version in survey.versions if version.key in retired]
    if policy.satisfied(version.key for version in survey.versions):
        doomed += [version for version in survey.superseded if version.key not in pinned]
    return doomed
