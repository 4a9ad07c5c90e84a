"""The coordinator's machine when no restart helps, and when no version gets durable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinated_job import STOPPED, Job, running

from ftrain.comms.protocol.effects import Announce, EndJob, Form, Publish
from ftrain.comms.protocol.messages import (
    Formation,
    Held,
    NodeState,
    Order,
    RankFailure,
    RestorePlan,
    VersionId,
)
from ftrain.comms.protocol.transitions import Phase


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
        order = job.directives[0]
        say(
            flush=order.flush,
            flush_attempt=order.flush_attempt,
            fence=epoch,
            refused="the disk is full",
            write_failed=True,
        )
    assert told[0] == "no durable version could be written: node 0: the disk is full"
    assert 2 <= len(told) <= 4
    assert "times so far" in told[-1]


def test_the_end_is_written_again_when_the_disk_takes_it_by_then() -> None:
    """An answer to the first attempt is not taken for one to the second."""
    job, epoch = running(save_at_end=True)
    version = VersionId(epoch, 8)
    job.say(step_max=8, kept_max=8, committed=version, state=NodeState.DONE)
    attempts = {job.directives[0].flush_attempt}
    job.say(flush=version, fence=epoch, refused="the disk is full", write_failed=True)
    assert job.effects == []
    for _ in range(20):
        job.say()  # nodes repeat what they said
        job.tick()
    attempts.add(job.directives[0].flush_attempt)
    assert len(attempts) == 2, "the second attempt has to be told from the first"
    assert job.effects == []
    job.say(flush=version, fence=epoch, refused="", write_failed=False, prepared=(version,))
    assert job.effects == [Publish(epoch, version, (0, 1))]
    job.machine.published(epoch, version)
    job.take()
    assert job.effects[-1] == EndJob(0, "every rank is done")


def test_a_finished_run_that_was_saved_without_a_launcher_is_finished() -> None:
    """Nobody told this coordinator of the durable version that the run goes on from."""
    job = Job(save_at_end=True)
    for node in range(2):
        job.say(node)
    form = job.effects.pop()
    assert isinstance(form, Form)
    plan = RestorePlan("durable", VersionId(1, 100), fence=1, path="…/1/100.json")
    formation = Formation(form.epoch, form.places, "h", 1, plan, 0)
    job.machine.formed(form.epoch, formation)
    job.take()
    done = {"state": NodeState.DONE, "step": 100, "step_max": 100, "kept_max": 100}
    job.say(epoch=form.epoch, **done)
    assert job.effects == [EndJob(0, "every rank is done")]
