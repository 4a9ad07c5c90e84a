"""``ftrain checkpoints prune``: delete versions by the same rules as a run does."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from ftrain.checkpoint.manifest import PublishedVersion
from ftrain.checkpoint.retention import Retention, VersionKey
from ftrain.checkpoint.versions import Survey, VersionStore, find_version
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
        ObjectStoreError: the store can't be used.
    """
    if request.keep_last is None and not (request.pin or request.unpin):
        raise UsageError("say how many versions to keep: --keep-last 3 (try it with --dry-run)")
    if request.keep_last is None and request.keep_every:
        raise UsageError("--keep-every is what to keep besides --keep-last: give that as well")
    with open_place(place) as store:
        return _prune(store, request, as_json=as_json)


def _prune(store: VersionStore, request: PruneRequest, *, as_json: bool) -> int:
    survey = store.survey()
    pinned = set(store.pinned())
    pins = [(find_version(survey, store.name, step).key, True) for step in request.pin]
    pins += [(key, False) for step in request.unpin for key in _pinned_at(step, pinned, store.name)]
    for key, wanted in pins:
        (pinned.add if wanted else pinned.discard)(key)
        if not request.dry_run:
            store.pin(key, pinned=wanted)
    doomed = _doomed(survey, request, frozenset(pinned))
    if doomed and not request.dry_run:
        store.remove(doomed)
    kept = [version.step for version in survey.versions if version not in doomed]
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
        count = f"{len(doomed)} version{'s' if len(doomed) != 1 else ''}"
        print(f"{count} of {total} {would}; kept: {', '.join(map(str, kept)) or 'none'}")
    is_ = "would be" if request.dry_run else "is"
    for (_, step), wanted in pins:
        print(f"step {step} {is_} {'pinned' if wanted else 'no longer pinned'}")
    return 0


def _pinned_at(step: int, pinned: Collection[VersionKey], name: str) -> list[VersionKey]:
    """Every pinned version of a step, also one that is damaged or left the history since."""
    found = sorted(key for key in pinned if key[1] == step)
    if not found:
        there = ", ".join(str(step) for _, step in sorted(pinned)) or "nothing"
        raise UsageError(f"no version of step {step} is pinned in {name}: {there} is")
    return found


def _doomed(
    survey: Survey[PublishedVersion], request: PruneRequest, pinned: frozenset[VersionKey]
) -> list[PublishedVersion]:
    if request.keep_last is None:
        return []
    try:
        policy = Retention(request.keep_last, request.keep_every)
    except UsageError:
        raise UsageError(
            f"--keep-last {request.keep_last} --keep-every {request.keep_every}: at least the "
            "newest version stays, with --keep-last 1; --keep-every is 0 or more"
        ) from None
    retired = policy.retired(version.key for version in survey.versions) - pinned
    doomed = [version for version in survey.versions if version.key in retired]
    if policy.satisfied(version.key for version in survey.versions):
        doomed += [version for version in survey.superseded if version.key not in pinned]
    return doomed
