"""The coordinator's machine with more nodes than seats."""

from __future__ import annotations

import pytest
from coordinated_job import DONE, IDLE, LEASE, RUNNING, STARTING, STOPPED, Job

from ftrain.comms.protocol.effects import EndJob, Form, Incident, Publish
from ftrain.comms.protocol.messages import (
    Directive,
    Held,
    NodeGone,
    Order,
    RankFailure,
    StopRequest,
    VersionId,
)
from ftrain.comms.protocol.transitions import Phase


def running(spares: int = 1, **options: object) -> tuple[Job, int]:
    """A group of nodes 0 and 1; the others wait, and have promised what they are told to."""
    job = Job(spares=spares, **options)  # type: ignore[arg-type]
    job.say(*range(2, 2 + spares))
    job.say()
    epoch = job.run()
    job.say(*range(2, 2 + spares), state=STOPPED, epoch=epoch)
    return job, epoch


def lose(job: Job, node: int, incarnation: int = 1) -> None:
    """A node dies; the other members end their ranks as they are told to."""
    job.give(NodeGone(node, incarnation, "SIGKILL"))
    assert job.machine.phase is Phase.STOPPING
    job.say(*(n for n in job.machine.members if n != node), state=STOPPED)


def formed(job: Job) -> tuple[list[tuple[int, int]], list[int]]:
    """Which nodes, from which rank on, the formation that is asked for has; and who holds what."""
    form = job.effects[-1]
    assert isinstance(form, Form)
    return [(p.node, p.first_rank) for p in form.places], [report.node for report in form.reports]


def back(job: Job, node: int, incarnation: int = 2) -> None:
    """A node that was lost is there again, and at rest."""
    job.say(node, incarnation=incarnation, state=IDLE, epoch=0, failures=(), step_max=0)
    job.say(node, state=STOPPED, epoch=job.directives[node].epoch)


def test_a_spare_takes_the_seat_of_a_lost_member_at_once() -> None:
    job, epoch = running()
    assert job.machine.members == (0, 1)
    lose(job, 1)
    assert job.machine.phase is Phase.FORMING  # node 1 was not waited for
    assert formed(job) == ([(0, 0), (2, 1)], [0, 2])
    assert job.run() == epoch + 1
    incident = job.effects[-1]
    assert isinstance(incident, Incident)
    assert incident.cause == "node 1 was lost: SIGKILL"
    assert [node for node, _ in incident.phases] == [0, 2]


def test_a_node_that_comes_back_waits_as_a_spare_and_takes_the_next_seat() -> None:
    job, _ = running()
    lose(job, 1)
    epoch = job.run()
    back(job, 1)
    assert (job.machine.phase, job.machine.members) == (Phase.RUNNING, (0, 2))
    assert job.directives[1].order is Order.STOP
    job.say(0, failures=())  # nothing is wrong
    lose(job, 0)
    assert formed(job) == ([(1, 0), (2, 1)], [1, 2])
    assert job.run() == epoch + 1


@pytest.mark.parametrize("how", ["gone", "silent", "anew", "never there"])
def test_what_becomes_of_a_spare_is_no_trouble(how: str) -> None:
    if how == "never there":
        job = Job(spares=1)
        job.say()
        job.run()
    else:
        job, _ = running()
    before = job.disk
    if how == "gone":
        job.give(NodeGone(2, 1, "SIGKILL"))
    elif how == "anew":
        job.say(2, incarnation=2, epoch=0, state=IDLE)
    for _ in range(LEASE + 1):
        job.say()
        job.tick()
    assert (job.machine.phase, job.disk) == (Phase.RUNNING, before)
    job.say(1, failures=())
    job.say(state=DONE)
    assert job.effects == [EndJob(0, "every rank is done")]


def test_two_lost_with_one_spare_wait_for_the_second() -> None:
    job, _ = running()
    job.give(NodeGone(1, 1, "SIGKILL"))
    job.give(NodeGone(0, 1, "SIGKILL"))
    assert job.machine.phase is Phase.GATHERING
    assert job.machine.reason == "waiting for 2 nodes: node 1 was lost: SIGKILL"
    back(job, 0)
    assert formed(job) == ([(0, 0), (2, 1)], [0, 2])  # its own seat was still free for it


def test_a_new_coordinator_knows_who_sits_where() -> None:
    job, _ = running()
    lose(job, 1)
    job.run()
    back(job, 1)
    before = job.disk
    job.start()
    assert job.machine.members == (0, 2)
    job.say(1)
    assert job.machine.phase is Phase.RECOVERING
    job.say()
    assert (job.machine.phase, job.disk) == (Phase.RUNNING, before)


def test_a_new_coordinator_keeps_the_seat_of_who_has_not_reported_yet() -> None:
    job, epoch = running()
    lose(job, 1)
    job.run()
    back(job, 1)
    job.say(0, failures=(), state=STOPPED)
    job.say(state=STOPPED)
    granted = job.machine.hard.epoch
    assert granted == epoch + 2
    job.start()  # while the formation was being made: its places died with the process
    job.say(0, 1, epoch=granted, state=STOPPED)
    assert job.machine.phase is Phase.GATHERING
    job.say(2, epoch=granted, state=STOPPED)
    assert formed(job) == ([(0, 0), (2, 1)], [0, 1, 2])


def test_nodes_that_start_slowly_find_their_seats_free() -> None:
    job = Job(spares=1)
    job.say(0, 2)
    assert job.machine.reason == "waiting for 2 nodes: node 1 has not reported yet"
    for _ in range(LEASE + 1):
        job.say(0, 2)
        job.tick()
    assert formed(job)[0] == [(0, 0), (2, 1)]


def test_a_spare_is_told_to_be_at_rest_and_not_for_ever() -> None:
    job, epoch = running()
    wanted = Directive(epoch, Order.STOP, reason="it waits as a spare")
    assert job.directives[2] == wanted
    job.machine.request_flush()
    job.take()
    assert job.order is Order.FLUSH
    job.give(StopRequest("SIGTERM"))
    assert job.order is Order.PAUSE
    assert job.directives[2] == wanted
    said = 0
    for _ in range(9):
        job.machine.tick()
        said += sum(node == 2 for node, _ in job.machine.ready().messages)
    assert said <= 1


def test_who_lost_a_seat_while_silent_is_told_to_end_its_ranks() -> None:
    job, epoch = running()
    for _ in range(LEASE + 1):
        job.say(0, 2)
        job.tick()
    assert job.machine.phase is Phase.STOPPING
    job.say(0, state=STOPPED)
    assert job.run() == epoch + 1
    job.say(1)  # it never noticed
    assert job.reports[1].state is RUNNING
    assert job.machine.phase is Phase.RUNNING
    assert (job.directives[1].order, job.directives[1].epoch) == (Order.STOP, epoch + 1)
    job.say(0, failures=(), state=STOPPED)
    job.say(2, state=STOPPED)
    assert job.machine.phase is Phase.STOPPING  # nothing begins before its ranks are gone
    job.say(1, state=STOPPED, epoch=epoch + 1)
    assert job.machine.phase is Phase.FORMING


def test_nothing_begins_before_a_spare_has_promised_to_start_nothing_older() -> None:
    job = Job(spares=1)
    job.say()
    epoch = job.run()
    job.say(2)
    lose(job, 1)
    assert job.machine.phase is Phase.STOPPING
    job.say(2, state=STOPPED, epoch=epoch)
    assert job.machine.phase is Phase.FORMING


def test_a_graceful_stop_saves_what_members_have_and_ends_spares_as_well() -> None:
    job, _ = running()
    lose(job, 1)
    epoch = job.run()
    back(job, 1)
    job.give(StopRequest("SIGTERM"))
    job.say(pausing=True, boundaries=(8,))
    job.say(state=DONE, stopped_at=8)
    version = VersionId(epoch, 8)
    assert (job.order, job.directives[0].flush) == (Order.FLUSH, version)
    job.say(flush=version, fence=epoch, prepared=(version,))
    assert job.effects[-1] == Publish(epoch, version, (0, 2))
    job.machine.published(epoch, version)
    job.take()
    assert job.effects[-1] == EndJob(75, "stopped (SIGTERM) with step 8 saved")
    assert {d.order for d in job.directives.values()} == {Order.FINISH}


def test_with_no_rank_alive_the_members_of_the_last_formation_save() -> None:
    job, _ = running(save_at_end=True)
    lose(job, 1)
    epoch = job.run()
    back(job, 1)
    version = VersionId(epoch, 5)
    job.give(StopRequest("SIGTERM"))
    job.say(2, failures=(RankFailure(1, "signal", "SIGKILL", 5),))
    for rank, node in enumerate((0, 2)):
        job.say(node, state=STOPPED, held=(Held(version, rank, "", (), True, -1),))
    assert (job.order, job.directives[0].flush) == (Order.FLUSH, version)
    assert job.directives[1].order is Order.STOP
    job.say(flush=version, fence=epoch, prepared=(version,))
    assert job.effects[-1] == Publish(epoch, version, (0, 2))


def test_a_formation_that_came_to_nothing_leaves_the_seats_as_they_were() -> None:
    job, epoch = running()
    for _ in range(LEASE + 1):
        job.say(0, 2)
        job.tick()
    job.say(0, state=STOPPED)
    assert formed(job)[0] == [(0, 0), (2, 1)]
    job.say(1, epoch=epoch, state=STARTING)  # it is there again
    job.give(NodeGone(0, 1, "SIGKILL"))
    assert job.machine.phase is Phase.STOPPING
    job.say(2, state=STOPPED, epoch=epoch + 1)
    job.say(1, state=STOPPED, epoch=epoch + 1)
    assert formed(job)[0] == [(2, 0), (1, 1)]  # node 1 has the memory of its seat
