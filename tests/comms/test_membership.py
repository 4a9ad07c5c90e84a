"""The coordinator's machine, input by input; whole worlds are in tests/simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from coordinated_job import DONE, IDLE, LEASE, RUNNING, STARTING, STOPPED, Job, running

from ftrain.comms.errors import LocalProtocolError
from ftrain.comms.protocol.effects import (
    EndJob,
    Form,
    Incident,
    Obstacle,
    Publish,
)
from ftrain.comms.protocol.messages import (
    Formation,
    Held,
    NodeGone,
    NodeReport,
    Order,
    RankFailure,
    RestorePlan,
    StopRequest,
    VersionId,
)
from ftrain.comms.protocol.records import MembershipHard
from ftrain.comms.protocol.transitions import Event, Phase


def test_all_nodes_then_an_epoch_then_run() -> None:
    job = Job()
    job.say(0)
    assert (job.machine.phase, job.effects) == (Phase.GATHERING, [])
    assert job.machine.reason == "waiting for 2 nodes: node 1 has not reported yet"
    job.say(1)
    (form,) = job.effects
    assert (form.epoch, [p.first_rank for p in form.places]) == (1, [0, 1])
    assert job.disk is not None
    assert job.disk.epoch == 1
    assert job.run() == 1
    job.say(state=DONE)
    assert job.effects == [EndJob(0, "every rank is done")]
    assert job.order is Order.FINISH


def test_a_failure_is_one_incident_with_its_steps() -> None:
    job, _ = running()
    job.say(0, step_max=9, committed=VersionId(1, 8))
    job.fail(1)
    assert job.run(step=8) == 2
    (incident,) = job.effects
    assert isinstance(incident, Incident)
    assert (incident.epoch, incident.new_epoch, incident.step) == (1, 2, 9)
    assert (incident.cause, incident.steps_recomputed) == (
        "rank 1 (node 1) raised ValueError: bad shape",
        1,
    )


GLOO = "RuntimeError: [pair.cc:598] Connection closed by peer [10.0.0.2]:5"


@pytest.mark.parametrize("how", ["silent", "gone", "anew and then gone"])
def test_a_lost_node_explains_what_its_peers_said_first(how: str) -> None:
    job, _ = running()
    job.say(0, failures=(RankFailure(0, "exception", GLOO, 5),))
    assert job.machine.phase is Phase.STOPPING
    assert job.machine.hard.incident is not None
    assert GLOO in job.machine.hard.incident.cause
    job.say(0, state=STOPPED)
    if how == "silent":
        for _ in range(LEASE + 1):
            job.say(0)
            job.tick()
    elif how == "anew and then gone":
        job.say(1, incarnation=2, epoch=0, state=IDLE)
    job.give(NodeGone(1, 1, "SIGKILL")) if how != "silent" else None
    job.say(1, incarnation=2, epoch=job.directives[0].epoch, state=STOPPED)
    job.run()
    why = "it is silent for longer than its lease" if how == "silent" else "SIGKILL"
    assert job.effects[0].cause == f"node 1 was lost: {why}"
    assert [f.cause for f in job.effects[0].failures] == [GLOO]  # kept, but not told


def test_a_signal_explains_what_its_peers_said_first() -> None:
    job, _ = running(nodes=3)
    job.say(0, failures=(RankFailure(0, "exception", GLOO, 5),))
    job.say(1, state=STOPPED, failures=(RankFailure(1, "oom", "killed for memory", 6),))
    job.start()  # also for the next coordinator
    job.say(state=STOPPED)
    job.run()
    assert job.effects[0].cause == "rank 1 (node 1) died: killed for memory"


def test_what_nothing_explains_is_told_of_all_it_happened_to() -> None:
    job, _ = running()
    job.say(0, failures=(RankFailure(0, "exception", GLOO, 5),))
    job.say(1, failures=(RankFailure(1, "exception", GLOO, 6),))
    job.say(state=STOPPED)
    job.run()
    assert job.effects[0].cause == f"rank 0 (node 0), rank 1 (node 1) raised {GLOO}"


def test_failures_in_a_row_end_the_job_in_words() -> None:
    job, epoch = running(max_restarts=2)
    for _ in range(2):
        job.fail(epoch)
        epoch = job.run()
    job.effects.clear()
    job.fail(epoch)
    (end,) = job.effects
    assert end.exit_code == 1
    assert "3 failures in a row with no new version in between, 3 of them the very same" in (
        end.reason
    )
    assert job.order is Order.FINISH


def test_a_committed_version_breaks_the_row() -> None:
    job, epoch = running(max_restarts=1)
    for step in range(1, 6):
        job.say(0, committed=VersionId(epoch, step))
        job.fail(epoch)
        epoch = job.run()
    assert job.machine.phase is Phase.RUNNING
    assert job.disk is not None
    assert job.disk.failures_in_row == 1


def test_no_restarts_allowed() -> None:
    job, epoch = running(max_restarts=0)
    job.fail(epoch)
    assert job.machine.phase is Phase.FINISHED


def test_a_failure_is_counted_once_whatever_dies() -> None:
    job, epoch = running(max_restarts=1)
    job.say(1, failures=(RankFailure(1, "signal", "SIGKILL", 5),))
    for _ in range(3):
        job.start()
        job.say()
    assert job.machine.hard.failures_in_row == 1
    job.say(state=STOPPED)
    assert job.run() == epoch + 1


@pytest.mark.parametrize("news", ["gone", "silent", "anew", "foreign epoch"])
def test_a_lost_node_stops_the_others(news: str) -> None:
    job, _ = running()
    if news == "gone":
        job.give(NodeGone(1, 1, "SIGKILL"))
    elif news == "silent":
        for _ in range(LEASE + 1):
            job.say(0)
            job.tick()
    elif news == "anew":
        job.say(1, incarnation=2, epoch=0, state=IDLE)
    else:
        job.say(1, epoch=7)
    assert job.machine.phase is Phase.STOPPING
    assert job.directives[0].order is Order.STOP
    job.say(0, state=STOPPED, epoch=job.directives[0].epoch)
    job.say(1, incarnation=3, state=STOPPED, epoch=job.directives[0].epoch)
    assert job.run() == (8 if news == "foreign epoch" else 2)
    assert job.effects[0].nodes[0][0] == 1


def test_what_a_dead_agent_said_does_not_count() -> None:
    job = Job()
    job.give(NodeGone(1, 1, "SIGKILL"))
    job.say()
    assert job.effects == []
    assert "node 1 was lost: SIGKILL" in job.machine.reason
    job.say(1, incarnation=2)
    assert isinstance(job.effects[0], Form)


def test_stops_are_awaited() -> None:
    job, _ = running()
    job.say(1, failures=(RankFailure(1, "signal", "SIGKILL", 5),))
    job.say(1, state=STOPPED)
    assert job.machine.phase is Phase.STOPPING
    job.say(0, state=STOPPED)
    assert job.machine.phase is Phase.FORMING


def test_formations_that_fail() -> None:
    job = Job(max_restarts=1)
    job.say()
    for epoch in (1, 2):
        job.machine.formed(job.effects.pop().epoch, Obstacle("no port is free"))
        job.take()
        if epoch == 1:
            job.tick(3)
            job.say(state=STOPPED, epoch=1)  # as told meanwhile
    (end,) = job.effects
    assert (end.exit_code, end.reason) == (1, "the group can't be formed: no port is free")


def test_an_obstacle_that_lasts_ends_the_job_at_once() -> None:
    job = Job(max_restarts=5)
    job.say()
    job.machine.formed(job.effects.pop().epoch, Obstacle("no version can be used", lasting=True))
    job.take()
    (end,) = job.effects
    assert (end.exit_code, end.reason) == (1, "no version can be used")


def test_stale_formations_are_not_taken() -> None:
    job = Job()
    job.say()
    form = job.effects.pop()
    job.say(1, incarnation=2)
    job.say(epoch=1, state=STOPPED)
    assert job.effects[-1].epoch == 2
    job.machine.formed(1, Formation(1, form.places, "h", 1, RestorePlan("fresh"), 0))
    assert job.machine.phase is Phase.FORMING


# ------------------------------------------------------------------ coordinator restarts


def test_a_new_coordinator_leaves_a_running_group_alone() -> None:
    job, _ = running()
    before = job.disk
    job.start()
    assert job.machine.phase is Phase.RECOVERING
    job.say()
    assert (job.machine.phase, job.effects, job.disk) == (Phase.RUNNING, [], before)


def test_a_new_coordinator_waits_for_the_lease() -> None:
    job, _ = running()
    job.start()
    for _ in range(LEASE):
        job.say(0)
        job.tick()
        assert job.machine.phase is Phase.RECOVERING
    job.tick()
    assert job.machine.phase is Phase.STOPPING


def test_a_group_that_had_formed_may_go_on_starting() -> None:
    job, _ = running()
    job.start()
    job.say(0)
    job.say(1, state=STARTING)
    assert job.machine.phase is Phase.STARTING
    job.say(1, state=RUNNING)
    assert job.machine.phase is Phase.RUNNING


def test_a_group_that_was_forming_starts_again_uncounted() -> None:
    job = Job(max_restarts=0)
    job.say()
    epoch = job.form()
    job.say(epoch=epoch, state=STARTING)
    job.start()  # the store of the formation died with the process
    job.say()
    assert job.machine.phase is Phase.STOPPING
    job.say(state=STOPPED)
    assert job.run() == epoch + 1


def test_the_end_is_told_again() -> None:
    job, _ = running()
    job.say(state=DONE)
    job.start()
    assert job.effects == [EndJob(0, "every rank is done")]
    job.say()
    assert job.order is Order.FINISH


def test_another_launch_keeps_epoch_and_durable_alone() -> None:
    job, _ = running()
    job.give(StopRequest("force: second Ctrl-C"))
    assert job.effects == [EndJob(130, "stopped by force: force: second Ctrl-C")]
    job.start(launch="second")
    assert job.machine.hard == MembershipHard(launch="second", epoch=1)
    job.say(epoch=0, state=IDLE, incarnation=5)
    assert job.effects == []  # told first that nothing of epoch 1 may start any more
    job.say(epoch=1, state=STOPPED)
    assert job.run() == 2


# ------------------------------------------------------------------ stopping and saving


def stopped_at(job: Job, epoch: int) -> None:
    """Ask for a stop; the ranks end at the highest boundary."""
    job.give(StopRequest("SIGTERM"))
    assert job.order is Order.PAUSE
    job.say(0, pausing=True, boundaries=(7,))
    job.say(1, pausing=True, boundaries=(8,))
    assert job.order is Order.STOP_AT
    assert job.directives[0].stop_step == 8
    job.say(state=DONE, stopped_at=8)
    assert job.order is Order.FLUSH
    assert (job.directives[0].flush, job.directives[0].fence) == (VersionId(epoch, 8), epoch)


def test_a_graceful_stop_saves_one_boundary() -> None:
    job, epoch = running()
    stopped_at(job, epoch)
    version = VersionId(epoch, 8)
    job.say(0, flush=version, fence=epoch, prepared=(version,))
    assert job.effects == []
    job.say(1, flush=version, fence=epoch, prepared=(version,))
    assert job.effects == [Publish(epoch, version, (0, 1))]
    job.machine.published(epoch, version)
    job.take()
    assert job.effects[-1] == EndJob(75, "stopped (SIGTERM) with step 8 saved")
    assert job.disk is not None
    assert job.disk.durable == version


def test_a_stop_goes_on_where_it_stood_under_a_new_coordinator() -> None:
    job, _ = running()
    job.give(StopRequest("SIGTERM"))
    job.say(0, pausing=True, boundaries=(7,))
    job.say(1, pausing=True, boundaries=(8,))
    job.start()
    job.say()
    assert (job.order, job.directives[0].stop_step) == (Order.STOP_AT, 8)


@pytest.mark.parametrize("heard", ["while they run", "after their end", "while it is saved"])
def test_a_stop_after_the_last_step_saves_it_and_the_run_is_done(heard: str) -> None:
    job, epoch = running(save_at_end=True)
    job.say(step_max=9, kept_max=9, committed=VersionId(epoch, 9))
    if heard == "while they run":
        job.give(StopRequest("SIGTERM"))
        job.say(pausing=True, boundaries=(9,))
        assert job.order is Order.STOP_AT
    job.say(0, state=DONE, stopped_at=-1)
    if heard == "after their end":
        job.give(StopRequest("SIGTERM"))
    job.say(1, state=DONE, stopped_at=-1)
    if heard == "while it is saved":
        job.give(StopRequest("SIGTERM"))
    job.say(pausing=True, boundaries=(9,))
    last = VersionId(epoch, 9)
    assert (job.order, job.directives[0].flush) == (Order.FLUSH, last)
    job.say(flush=last, fence=epoch, prepared=(last,))
    assert job.effects == [Publish(epoch, last, (0, 1))]
    job.machine.published(epoch, last)
    job.take()
    assert job.effects[-1] == EndJob(0, "every rank is done")


def test_files_under_another_fence_do_not_count() -> None:
    job, epoch = running()
    stopped_at(job, epoch)
    version = VersionId(epoch, 8)
    job.say(flush=version, fence=epoch - 1, prepared=(version,))
    job.say(flush=VersionId(epoch, 7), fence=epoch, prepared=(version,))
    assert job.effects == []


def test_a_death_while_stopping_saves_what_all_hold() -> None:
    job, epoch = running()
    job.give(StopRequest("SIGTERM"))

    def held(node: int, step: int) -> Held:
        return Held(VersionId(epoch, step), node, "", (), True, -1)

    job.say(1, failures=(RankFailure(1, "signal", "SIGKILL", 5),))
    job.say(0, state=STOPPED, held=(held(0, 4), held(0, 5), held(0, 6)))
    job.say(1, state=STOPPED, held=(held(1, 4), held(1, 5), replace(held(1, 6), whole=False)))
    assert job.machine.phase is Phase.SAVING
    assert job.directives[0].flush == VersionId(epoch, 5)
    job.say(flush=VersionId(epoch, 5), fence=epoch, refused="disk full")
    job.say(state=STOPPED)
    job.say(flush=VersionId(epoch, 5), fence=epoch, refused="disk full")
    job.say(flush=VersionId(epoch, 5), fence=epoch, refused="disk full")
    (end,) = job.effects
    assert end.exit_code == 1
    assert "node 0: disk full" in end.reason


def test_what_a_node_that_a_new_coordinator_never_hears_of_may_hold_is_not_called_saved() -> None:
    job, epoch = running()
    job.machine.request_flush()
    job.take()
    target = job.directives[0].flush
    assert target is not None
    job.say(flush=target, fence=epoch, prepared=(target,))
    job.machine.published(epoch, target)
    job.take()
    job.start()
    job.tick(LEASE + 1)
    job.give(StopRequest("SIGTERM"))
    (end,) = job.effects
    assert end == EndJob(1, "stopped (SIGTERM), but no node's memory has all of a version to save")


def test_a_stop_before_anything_ran() -> None:
    job = Job()
    job.give(StopRequest("Ctrl-C"))
    assert job.effects == [EndJob(75, "stopped (Ctrl-C) with nothing to save")]


def test_a_stop_before_a_step_after_a_durable_restart_finds_everything_saved() -> None:
    job, epoch = running()
    stopped_at(job, epoch)
    version = VersionId(epoch, 8)
    job.say(flush=version, fence=epoch, prepared=(version,))
    job.machine.published(epoch, version)
    job.take()
    job.start(launch="second")
    job.reports = {n: NodeReport(n, 2, 0, 0, IDLE, 1, f"h{n}", f"h{n}:1") for n in range(job.nodes)}
    job.say(epoch=epoch, state=STOPPED)
    second = job.form(step=8)
    job.say(epoch=second, state=STARTING)
    job.give(StopRequest("SIGTERM"))
    job.say(state=STOPPED)
    assert job.effects[-1] == EndJob(75, "stopped (SIGTERM): step 8 was saved before")


def test_a_signal_at_a_node_is_a_stop() -> None:
    job, _ = running()
    job.say(1, signals=("SIGUSR1",))
    assert (job.order, job.machine.hard.stop_cause) == (Order.PAUSE, "SIGUSR1 at node 1")


def test_periodic_flushes_aim_further_until_all_meet() -> None:
    job, epoch = running(flush_margin=2)
    job.say(step_max=10)
    job.machine.request_flush()
    job.take()
    assert job.directives[0].flush == VersionId(epoch, 12)
    job.say(0, flush=VersionId(epoch, 12), fence=epoch, refused="passed over")
    assert job.directives[0].flush == VersionId(epoch, 14)
    target = VersionId(epoch, 14)
    job.say(0, flush=target, refused="", prepared=(target,))
    job.say(1, flush=target, fence=epoch, prepared=(VersionId(epoch, 15),))
    assert job.directives[0].flush == VersionId(epoch, 18)  # they wrote different ones
    target = VersionId(epoch, 18)
    job.say(flush=target, fence=epoch, prepared=(target,))
    assert job.effects == [Publish(epoch, target, (0, 1))]


def written(job: Job, epoch: int, target: VersionId) -> None:
    """All nodes write this version, and it is published."""
    job.say(flush=target, fence=epoch, prepared=(target,))
    assert job.effects.pop() == Publish(epoch, target, (0, 1))
    job.machine.published(epoch, target)
    job.take()
    job.effects.clear()


def test_a_users_wish_waits_for_what_is_being_written() -> None:
    job, epoch = running(flush_margin=2)
    job.say(step_max=10)
    job.machine.request_flush(kept=True)
    job.machine.request_flush(kept=True)  # as every rank does
    job.say(step_max=13)
    job.machine.request_flush(kept=True)
    job.machine.request_flush()
    job.take()
    written(job, epoch, VersionId(epoch, 12))  # of before the last wish
    job.tick()
    assert job.directives[0].flush == VersionId(epoch, 15)
    written(job, epoch, VersionId(epoch, 15))
    job.tick()
    assert job.directives[0].flush is None


def test_what_is_written_for_a_wish_answers_all_that_came_before_it() -> None:
    job, epoch = running(flush_margin=2)
    job.say(step_max=10)
    job.machine.request_flush(kept=True)
    job.machine.request_flush(kept=True)  # the other node's ranks
    job.take()
    for step in range(11, 15):  # writing takes a while
        job.say(step_max=step)
        job.tick()
    written(job, epoch, VersionId(epoch, 12))
    job.tick()
    assert job.directives[0].flush is None


@pytest.mark.parametrize("step", [10, 13])
def test_a_users_wish_outlives_a_failure(step: int) -> None:
    """The script is past the boundary at which it asked; it will not ask again."""
    job, epoch = running(flush_margin=2)
    job.say(step_max=step)
    job.machine.request_flush(kept=True)
    if step == 13:
        job.machine.request_flush(kept=True)
    job.take()
    job.fail(epoch)
    again = job.run(step=8)
    job.tick()
    flush = job.directives[0].flush
    assert flush is not None
    assert flush.epoch == again


def test_a_users_wish_comes_before_a_boundary_far_ahead() -> None:
    job, epoch = running(flush_margin=2)
    job.say(step_max=10)
    job.machine.request_flush(1000)
    job.take()
    assert job.directives[0].flush == VersionId(epoch, 1000)
    job.machine.request_flush()
    job.machine.request_flush(kept=True)
    job.take()
    assert job.directives[0].flush == VersionId(epoch, 12)
    written(job, epoch, VersionId(epoch, 12))
    job.machine.request_flush(1000)
    job.take()
    assert job.directives[0].flush == VersionId(epoch, 1000)


def test_writing_is_late_only_once_its_boundary_came() -> None:
    job, _ = running(flush_ticks=5)
    job.say(step_max=10)
    job.machine.request_flush(1000)
    for _ in range(50):
        job.tick()
        job.say()
    attempt = job.directives[0].flush_attempt
    job.say(step_max=1000)
    for _ in range(7):
        job.tick()
        job.say()
    assert job.directives[0].flush_attempt == attempt + 1


def test_no_epoch_is_granted_while_a_version_is_being_published() -> None:
    job, epoch = running()
    job.machine.request_flush()
    job.take()
    target = job.directives[0].flush
    assert target is not None
    job.say(flush=target, fence=epoch, prepared=(target,))
    job.fail(epoch)
    assert job.machine.phase is Phase.GATHERING
    job.machine.published(epoch, target)
    job.take()
    assert job.machine.phase is Phase.FORMING


# ------------------------------------------------------------------ directives


def test_directives_are_repeated_until_followed() -> None:
    job = Job(resend_ticks=3)
    job.say()
    epoch = job.form()

    def sent_in(ticks: int) -> int:
        count = 0
        for _ in range(ticks):
            job.machine.tick()
            count += len(job.machine.ready().messages)
        return count

    assert sent_in(9) == 6
    job.say(epoch=epoch, state=STARTING)
    assert sent_in(9) == 0


def test_a_snapshot_managers_new_address_reaches_the_others() -> None:
    job, _ = running()
    job.say(1, smp_address="h1:2")
    formation = job.directives[0].formation
    assert formation is not None
    assert [p.smp_address for p in formation.places] == ["h0:1", "h1:2"]


def test_what_the_table_does_not_have_is_a_bug() -> None:
    with pytest.raises(LocalProtocolError, match="can't happen while gathering: a bug in ftrain"):
        Job().machine._enter(Event.FORMED, "")
