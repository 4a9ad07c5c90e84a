"""How far the run is, as a notice for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ftrain.comms.protocol.messages import NodeReport, Notice
from ftrain.launch.exposure import protected_everywhere
from ftrain.launch.incidents import Account


class Rate:
    """Steps per second between two looks."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def update(self, step: int, now_s: float) -> float:
        """The rate since the look before; 0 at the first."""
        last, self._last = self._last, (step, now_s)
        if last is None or now_s <= last[1]:
            return 0.0
        return max(0.0, (step - last[0]) / (now_s - last[1]))


class Progress:
    """Makes the progress notice out of the nodes' reports, and keeps the account's step."""

    def __init__(self, account: Account) -> None:
        self.total_steps = 0  # 0: not known
        self._account = account
        self._rate = Rate()

    def begin(self) -> None:
        """The ranks run again: the steps before say nothing about the rate from now on."""
        self._rate = Rate()

    def notice(self, reports: Sequence[NodeReport], now_s: float) -> Notice:
        """Where the run is; ``reports``: of all nodes, at least one."""
        step = min(report.step for report in reports)
        self._account.step = step
        committed = [r.committed.step for r in reports if r.committed is not None]
        protected = protected_everywhere(reports)
        data: dict[str, object] = {
            "step": step,
            "total_steps": self.total_steps,
            "steps_per_s": self._rate.update(step, now_s),
            "loss": reports[0].loss,
            "snapshot_step": min(committed, default=-1),
            "protected_step": -1 if protected is None else protected.step,
            "incidents": self._account.incidents,
        }
        return Notice("progress", f"step {step}", data)
