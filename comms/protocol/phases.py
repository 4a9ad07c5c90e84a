"""What a rank's main thread is doing: the values of two telemetry words, as pure enums."""

from __future__ import annotations

from enum import IntEnum


class Phase(IntEnum):
    """What the rank's main thread is doing, as far as the Session knows."""

    STARTING = 0  # forked, the script has not made a Session yet
    RESTORING = 1
    STEP = 2  # between two boundaries, in the user's code
    OPTIMIZER = 3  # inside optimizer.step
    BOUNDARY = 4  # inside Session.steps()
    DECLARED = 5  # inside session.phase("…"): slowness is expected
    HOLDING = 6  # held at a boundary, waiting to be told where to stop
    STOPPED = 7  # ended at the agreed stop boundary
    FINISHED = 8  # every step done, or the loop was left; the script may still run


class Where(IntEnum):
    """Where the main thread's Python stack stood when it was last sampled."""

    USER = 0
    BACKWARD = 1
    COLLECTIVE = 2  # inside torch.distributed
