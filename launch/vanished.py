"""A version that the event log knows as published, and whose manifest was taken away by hand."""

from __future__ import annotations

from ftrain.checkpoint.directory import names_in
from ftrain.checkpoint.durable import SEGMENT_NAMES, DurableStore
from ftrain.checkpoint.manifest import DurableVersion
from ftrain.checkpoint.retention import VersionKey
from ftrain.checkpoint.versions import Survey


def all_problems(
    store: DurableStore, survey: Survey[DurableVersion], published: VersionKey | None
) -> tuple[str, ...]:
    """Those of the survey, and before them: that the files of what was ``published`` last are there
    and its manifest is not.

    They are no version any more, and the next sweep takes them for what a killed writer left.
    """
    if published is None or any(version.key >= published for version in survey.versions):
        return survey.problems
    fence, step = published
    manifest = store.directory / str(fence) / f"{step}.json"
    left = any(map(SEGMENT_NAMES.fullmatch, names_in(manifest.with_suffix(""))))
    if manifest.exists() or not left:
        return survey.problems
    return f"{manifest} is gone, whose files are still there", *survey.problems
