"""A script that steps as a Session would, seen from outside, but trains nothing.

Writes its telemetry page, obeys the words for a graceful stop, and steps until the file ``finish``
appears in its directory, or as often as its first argument says.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ftrain.comms.environment import rank_environment
from ftrain.comms.telemetry import Phase, TelemetryPage, Word

environment = rank_environment()
assert environment.context is not None
page = TelemetryPage(environment.context.telemetry_fd)
total = int(sys.argv[1]) if len(sys.argv) > 1 else 0
page[Word.TOTAL_STEPS] = total
page[Word.STEP_MEDIAN_NS] = 5_000_000
page[Word.FORMED_NS] = time.monotonic_ns()
page[Word.RESTORED_NS] = time.monotonic_ns()
print(f"rank {environment.rank} restart {environment.restart_count}", flush=True)


def held(step: int) -> bool:
    """Hold at this boundary if asked to; whether it is the one to stop at."""
    if page[Word.PAUSE] and not page[Word.STOP_AT]:
        page[Word.HELD_AT] = step + 1
        page.set_phase(Phase.HOLDING, time.monotonic_ns())
        while page[Word.PAUSE]:
            time.sleep(0.001)
        page[Word.HELD_AT] = 0
    return page[Word.STOP_AT] == step + 1


step = 0
while not (total and step >= total) and not Path("finish").exists():
    page.set_phase(Phase.STEP, time.monotonic_ns())
    time.sleep(0.005)
    if Path(f"raise{environment.rank}").exists():
        raise ValueError("told to")
    if os.getppid() == 1:
        raise RuntimeError("the agent is gone and this rank is not")
    step += 1
    page[Word.STEP] = step
    page[Word.FIRST_STEP_NS] = page[Word.FIRST_STEP_NS] or time.monotonic_ns()
    if held(step):
        page.set_phase(Phase.STOPPED, time.monotonic_ns())
        print(f"stopped at {step}", flush=True)
        break
else:
    page.set_phase(Phase.FINISHED, time.monotonic_ns())
