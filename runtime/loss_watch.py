"""Whether a loss that is not finite speaks against the version that was restored."""

from __future__ import annotations

import math

from ftrain.comms.environment import RankEnvironment
from ftrain.comms.errors import SuspectError


class LossWatch:
    """Looks at the logged losses of the first boundaries after a restore.

    A script whose loss was not finite shortly before the version was captured has its own reasons
    for that, and its versions are not suspected: each carries :attr:`odd`.
    """

    def __init__(self, steps: int) -> None:
        """``steps``: how many boundaries are "soon" and "shortly"; 0: nothing is suspected."""
        self._steps = steps
        self._restored = -1  # boundary that was restored and can be suspected; -1: none
        self._step = 0  # boundary of the newest logged loss
        self._odd_step = -1  # ... of the newest one that was not finite; -1: none

    @classmethod
    def of(cls, environment: RankEnvironment) -> LossWatch:
        """The one for this rank: only where the launcher can choose an older version."""
        context = environment.context
        if context is None or not context.smp_socket or context.formation.restore.trusted:
            return cls(0)
        detection = context.config.detection
        return cls(detection.suspect_steps if detection.enabled else 0)

    def restored(self, step: int, *, odd: bool) -> None:
        """The version of boundary ``step`` was put back; ``odd``: as it was when captured."""
        if odd:
            self._step = self._odd_step = step
        elif self._steps > 0:
            self._restored = step

    def odd(self, step: int) -> bool:
        """Whether, at boundary ``step``, losses were not finite of late."""
        if self._odd_step < 0:
            return False
        return self._odd_step == self._step or step - self._odd_step < self._steps

    def see(self, step: int, loss: float) -> None:
        """Take the loss logged before boundary ``step``.

        Raises:
            SuspectError: it is not finite, too soon after the restore to be a coincidence.
        """
        self._step = step
        if math.isfinite(loss):
            return
        self._odd_step = step
        since = step - self._restored
        if self._restored >= 0 and since <= self._steps:
            raise SuspectError(
                f"the loss is {loss} at step {step}, {since} step{'s' if since > 1 else ''} after "
                f"step {self._restored} was restored: that version is suspected",
                step,
            )
