"""How long versions were without parity: from the loss of a node until a new one is protected."""

from __future__ import annotations

from collections.abc import Sequence

from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import Formation, NodeReport, Notice, VersionId
from ftrain.launch.protection import protection_text

WORTH = "worth"  # kind of the notice that says what parity is worth


class Exposure:
    """What is told of parity as a whole: once what it is worth, and after each loss of a node when
    everything is protected again."""

    def __init__(self, job: JobSpec, *, told: bool) -> None:
        """``told``: what parity is worth was said, by a coordinator before this one."""
        self._job = job
        self._told = told
        self._since: tuple[float, int] | None = None  # when, and the epoch that was lost
        self._over = 0  # newest epoch whose loss is made good

    def lost(self, now_s: float, epoch: int) -> None:
        """A node of ``epoch`` was lost; may be said again."""
        if self._told and self._since is None and epoch > self._over:
            self._since = now_s, epoch

    def hear(
        self, reports: Sequence[NodeReport], formation: Formation | None, now_s: float
    ) -> list[Notice]:
        """The nodes' newest reports; what is news in them."""
        protected = protected_everywhere(reports)
        if protected is None or formation is None:
            return []
        notices = []
        if not self._told:
            self._told = True
            text = protection_text(formation.places, self._job.config.snapshot)
            notices.append(Notice(WORTH, text, {}))
        if self._since is not None and formation.epoch > self._since[1]:
            # The base of the new epoch counts as well: it is of an older one.
            fresh = [r.protected_in for r in reports]
            if min(fresh, default=0) >= formation.epoch:
                exposed_s, self._over = now_s - self._since[0], self._since[1]
                self._since = None
                text = f"step {protected.step} is protected: {exposed_s:.2f} s without parity"
                data: dict[str, object] = {"step": protected.step, "exposed_s": exposed_s}
                notices.append(Notice("protected", text, data))
        return notices


def protected_everywhere(reports: Sequence[NodeReport]) -> VersionId | None:
    """The newest version of which every node said that all have its parity."""
    found = [report.protected for report in reports]
    known = [version for version in found if version is not None]
    return min(known) if known and len(known) == len(found) else None
