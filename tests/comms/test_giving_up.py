"""The coordinator's machine when no restart helps, and when no version gets durable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinated_job import STOPPED, running

from ftrain.comms.protocol.effects import Announce, EndJob
from ftrain.comms.protocol.membership import Phase
from ftrain.comms.protocol.messages import (
    Held,
    Order,
    RankFailure,
    VersionId,
)


def test_a_job_that_is_given_up_saves_first_and_has_a_limit() -> None:
    job, epoch = running(max_restarts=0, save_at_end=True, grace_ticks=30)
    version = VersionId(epoch, 8)
    job.say(step_max=9, kept_max=9, committed=version)
    held = [(Held(version, n, "d", (), True, 1),) for n in range(2)]
    for node in range(2):
        job.say(node, held=held[node])
    job.fail(epoch)
    assert (job.machine.phase, job.order) == (Phase.SAVING, Order.FLUSH)
    assert job.effects == []
    job.start()  # a new coordinator goes on with it
    for node in range(2):
        job.say(node, state=STOPPED, held=held[node])
    assert (job.machine.phase, job.order) == (Phase.SAVING, Order.FLUSH)
    for _ in range(31):
        job.say()
        job.tick()
    (end,) = job.effects
    assert end.exit_code == 1
    assert "raised ValueError: bad shape" in end.reason
    assert "launch.stop_grace_s" in end.reason


def test_a_mistake_of_the_scripts_is_not_tried_again() -> None:
    job, _ = running(max_restarts=3)
    failure = RankFailure(1, "usage", "Session(counter=…) has no state (train.py, line 4)", 5)
    job.say(1, failures=(failure,))
    assert job.effects == [EndJob(2, f"rank 1 (node 1) can't go on: {failure.cause}")]


def test_failing_writes_are_told_once_and_then_rarely() -> None:
    job, epoch = running(flush_ticks=10**6)
    told: list[str] = []

    def say(**changes: Any) -> None:
        for node in range(2):
            job.sequence += 1
            job.reports[node] = replace(job.reports[node], sequence=job.sequence, **changes)
            job.machine.receive(job.reports[node])
            ready = job.machine.ready()
            job.directives.update(ready.messages)  # type: ignore[arg-type]
            told.extend(e.notice.text for e in ready.effects if isinstance(e, Announce))

    for second in range(150):
        for _ in range(20):
            job.machine.tick()
            say()
        if second % 5 == 0:
            job.machine.request_flush()
        say()
        flush = job.directives[0].flush
        say(flush=flush, fence=epoch, refused="the disk is full", write_failed=True)
    assert told[0] == "no durable version could be written: node 0: the disk is full"
    assert 2 <= len(told) <= 4
    assert "times so far" in told[-1]
