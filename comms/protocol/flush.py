"""One attempt to get one version into durable files on every node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftrain.comms.protocol.messages import NodeReport, VersionId
from ftrain.comms.protocol.quorum import Tally


class FlushRound:
    """Collects the nodes' answers to one FLUSH order.

    Each node writes the first version that it sees committed from ``target`` on, so nodes may
    differ; the round succeeds when one version is prepared by all, under this fence.
    """

    def __init__(
        self,
        target: VersionId,
        fence: int,
        nodes: Sequence[int],
        margin: int = 0,
        attempt: int = 0,
        every: int = 0,
    ) -> None:
        self.target = target
        self.fence = fence
        self.attempt = attempt
        self.margin = margin  # boundaries that the target lay ahead; doubled for the next attempt
        self.every = every  # > 0: the target has to be a multiple of it
        self.age_ticks = 0
        self._tally = Tally(nodes)
        self._refusals: dict[int, str] = {}
        self.write_failed = False  # a node could not write: more than that the version was passed
        self._prepared: set[int] = set()

    def tick(self, reached: int, *, over: bool) -> None:
        """One unit of logical time has passed, which counts once the target can be written: the
        ranks have come to boundary ``reached``, or (``over``) to their end."""
        if over or not self.waits(reached):
            self.age_ticks += 1

    def waits(self, reached: int) -> bool:
        """Whether it is for a boundary that ranks at ``reached`` may be long away from."""
        return bool(self.every) and reached < self.target.step

    def hear(self, report: NodeReport) -> None:
        """Take what a report says about this order; what it says about others does not count."""
        if (report.flush, report.fence) != (self.target, self.fence):
            return
        if report.flush_attempt != self.attempt:
            return  # the answer to an earlier attempt at the same
        if report.refused:
            self._refusals[report.node] = report.refused
            self.write_failed = self.write_failed or report.write_failed
        for version in report.prepared:
            if version >= self.target:
                self._tally.vote(report.node, version)
                self._prepared.add(report.node)

    @property
    def answered(self) -> set[int]:
        """The nodes that have prepared something or refused."""
        return self._prepared | self._refusals.keys()

    def prepared(self) -> VersionId | None:
        """The newest version that all nodes prepared."""
        return self._tally.newest()

    def silence(self) -> str:
        """That nodes did not answer for very long, in words."""
        silent = sorted(self._tally.members - self.answered)
        nodes = ", ".join(f"node {node}" for node in silent)
        return f"{nodes} did not write step {self.target.step} in time"

    def failure(self) -> str:
        """Why no version can come of this round, in words; empty while one still may."""
        if self.prepared() is not None:
            return ""
        if self._refusals:
            return "; ".join(f"node {n}: {why}" for n, why in sorted(self._refusals.items()))
        if self._tally.members <= self._prepared:
            return "the nodes wrote different versions"
        return ""


@dataclass(slots=True)
class Wish:
    """A durable version that somebody asked for and gets, of that boundary or a later one."""

    waits: VersionId | None = None  # until there is time
    written: VersionId | None = None  # what is being written is for it

    def begin(self, at: VersionId) -> None:
        """It is being written from now on, for all who asked up to ``at``."""
        self.waits, self.written = None, at

    def broken_off(self) -> None:
        """The ranks end: what is written for it may never be whole."""
        self.waits, self.written = self.waits or self.written, None

    def renew(self, at: VersionId) -> None:
        """Ranks of another epoch go on from ``at``; nobody will ask again."""
        self.waits = self.waits and at

    def fulfil(self, durable: VersionId) -> None:
        """This version is durable."""
        if self.waits is not None and self.waits <= durable:
            self.waits = None
        self.written = None


def due(
    at: VersionId, committed: VersionId | None, durable: VersionId | None, margin: int, every: int
) -> VersionId:
    """The version to order when the ranks of an epoch have reached the boundary ``at``.

    ``every`` 0: one a little ahead.  Else the next that is a multiple of it: what is committed may
    still be had, and what is durable is not written twice.
    """
    if not every:
        return VersionId(at.epoch, at.step + margin)
    known = committed.step if committed is not None and committed.epoch == at.epoch else 1
    saved = durable.step + 1 if durable is not None else 1
    return VersionId(at.epoch, -(-(max(known, saved) + margin) // every) * every)
