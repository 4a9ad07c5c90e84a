"""A stand-in for a rank: ``python rank_child.py PARENT BEHAVIOUR PAGE_FD``, with a page and a beat.

``train`` goes through steps of a few ms and commits the faults that are armed for it; the others
hang, or are slow, in one particular way after a first healthy moment.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import sys
import tempfile
import threading
import time

from ftrain.comms.process import die_with_parent
from ftrain.comms.telemetry import Phase, TelemetryPage, Where, Word
from ftrain.recovery.faults import FaultKind, poll_fault
from ftrain.recovery.observer import STACK_SIGNAL

BEAT_S = 0.02


def beat(page: TelemetryPage) -> None:
    while True:
        page[Word.GIL_BEAT] += 1
        time.sleep(BEAT_S)


def train(page: TelemetryPage) -> None:
    page.set_phase(Phase.RESTORING, time.monotonic_ns())
    for _ in range(50):
        poll_fault(page, 0, Phase.RESTORING)
        time.sleep(0.002)
    page[Word.STEP_MEDIAN_NS] = 6_000_000
    collectives = 0
    for step in range(1_000_000):
        page.set_phase(Phase.BOUNDARY, time.monotonic_ns())
        page[Word.STEP] = step
        page.record_boundary(step, collectives, time.monotonic_ns())
        poll_fault(page, step, Phase.BOUNDARY)
        page.set_phase(Phase.STEP, time.monotonic_ns())
        skipping = poll_fault(page, step, Phase.STEP) is FaultKind.SKIP_COLLECTIVE
        collectives += 1 if skipping else 2
        page[Word.COLLECTIVES] = collectives
        time.sleep(0.004)
        page.set_phase(Phase.OPTIMIZER, time.monotonic_ns())
        poll_fault(page, step, Phase.OPTIMIZER)
        time.sleep(0.0005)
        page[Word.STEPS_DONE] += 1


def sleep_with_gil(page: TelemetryPage) -> None:
    ctypes.PyDLL(None).sleep(60)


def burn_with_gil(page: TelemetryPage) -> None:
    sum(range(10**11))  # one C call, which never lets the GIL go


def burn(page: TelemetryPage) -> None:
    while True:
        pass


def sleep(page: TelemetryPage) -> None:
    time.sleep(60)


def wait_in_collective(page: TelemetryPage) -> None:
    page[Word.WHERE] = Where.COLLECTIVE
    page[Word.COLLECTIVES] += 1
    time.sleep(60)


def pass_the_collective(page: TelemetryPage) -> None:
    page[Word.STEP] += 1
    time.sleep(60)


def write(page: TelemetryPage) -> None:
    with tempfile.TemporaryFile() as file:
        while True:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    page = TelemetryPage(int(sys.argv[3]))
    behaviour = globals()[sys.argv[2]]
    page[Word.PID] = os.getpid()
    if behaviour is not train:
        page[Word.STEP] = 10
        page[Word.STEPS_DONE] = 10
        page[Word.COLLECTIVES] = 20
        page.record_boundary(10, 20, time.monotonic_ns())
        page.set_phase(Phase.STEP, time.monotonic_ns())
    threading.Thread(target=beat, args=(page,), daemon=True).start()
    time.sleep(2 * BEAT_S)
    page[Word.SESSION_NS] = time.monotonic_ns()
    behaviour(page)


if __name__ == "__main__":
    main()
