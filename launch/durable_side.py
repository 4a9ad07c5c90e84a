"""What the coordinator asks of the durable versions between their publications."""

from __future__ import annotations

from collections.abc import Callable

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.retention import Retention, VersionKey
from ftrain.comms.errors import FtrainError
from ftrain.comms.events import EventLog
from ftrain.comms.job import JobSpec
from ftrain.launch.remote_copies import RemoteCopies
from ftrain.launch.vanished import all_problems
from ftrain.recovery.protocol.bad_versions import BadVersions
from ftrain.recovery.protocol.plan import DurableVersion


class DurableSide:
    """Looks for versions, and deletes those that nobody wants; each call blocks on the disk."""

    def __init__(
        self,
        job: JobSpec,
        store: DurableStore,
        bad: BadVersions,
        events: EventLog,
        *,
        published: VersionKey | None,
        copies: RemoteCopies | None,
    ) -> None:
        """``published``: the newest version that the run's history knows of."""
        self._job = job
        self._store = store
        self._bad = bad
        self._events = events
        self._published = published
        self._copies = copies

    def versions(self) -> tuple[list[DurableVersion], tuple[str, ...]]:
        """The versions, newest first, and a sentence for each that does not count."""
        if not self._job.config.checkpoint.enabled:
            return [], ()
        survey = self._store.survey()
        problems = all_problems(self._store, survey, self._published)
        for problem in problems:
            self._events.write("warning", text=problem)
        versions = [
            DurableVersion(
                found.fence, found.step, str(found.path), found.world_size, found.version.epoch
            )
            for found in survey.versions
        ]
        return versions, problems

    def sweep(self) -> None:
        """Delete versions beyond ``checkpoint.keep_last``."""
        config = self._job.config.checkpoint
        policy = Retention(config.keep_last, config.keep_every)
        active = self._copies.active if self._copies is not None else ()
        bad, run_id = self._bad.withdrawn, self._job.run_id
        self._try(
            lambda: self._store.sweep(policy, run_id, active=active, withdrawn=bad),
            "old versions can't be deleted",
        )

    def remove_withdrawn(self) -> None:
        """At once, and nothing else: an older version, which a sweep takes for what a killed writer
        left, may be being written in its place."""
        bad, run_id = self._bad.withdrawn, self._job.run_id

        def remove() -> None:
            found = self._store.survey().versions
            mine = [v for v in found if v.version in bad and v.manifest.run_id == run_id]
            self._store.remove(mine)

        self._try(remove, "withdrawn versions can't be deleted")

    def _try(self, call: Callable[[], object], failed: str) -> None:
        try:
            call()
        except FtrainError as error:
            self._events.write("warning", text=f"{failed}: {error}")
