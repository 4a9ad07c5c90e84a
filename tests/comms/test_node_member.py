"""The agent's machine, input by input; whole worlds of them are in tests/simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftrain.comms.errors import LocalProtocolError
from ftrain.comms.protocol.effects import (
    Exit,
    FinishCaptures,
    FlushVersion,
    ForkRanks,
    HoldRanks,
    KillRanks,
    ReleaseRanks,
    UpdatePeers,
)
from ftrain.comms.protocol.messages import (
    Directive,
    Formation,
    Held,
    NodePlace,
    NodeReport,
    NodeState,
    Order,
    Phases,
    RankFailure,
    RestorePlan,
    VersionId,
)
from ftrain.comms.protocol.node import Event, NodeMember, Phase

HELD = (Held(VersionId(1, 9), 0, "", (), True, -1),)
DEAD = RankFailure(1, "signal", "SIGKILL", 5)


def formation(epoch: int, incarnation: int = 1) -> Formation:
    place = NodePlace(0, incarnation, 0, 2, "h", "h:1")
    return Formation(epoch, (place,), "h", 1, RestorePlan("fresh"), 0)


def run(epoch: int, incarnation: int = 1) -> Directive:
    return Directive(epoch, Order.RUN, formation(epoch, incarnation))


class Node:
    """A member whose outputs are taken after every input."""

    def __init__(self) -> None:
        self.member = NodeMember(node=0, incarnation=1, local_world=2, host="h")
        self.member.ready()

    def gives(self, *effects: object) -> NodeReport:
        """The effects are these; returns the report as it stands."""
        assert self.member.ready().effects == effects
        return self.member.report

    def running(self, epoch: int = 1) -> None:
        self.member.receive(run(epoch))
        self.gives(ForkRanks(formation(epoch)))
        self.member.ranks_forked(epoch)
        self.member.ranks_stepped(epoch, Phases(stepped_ns=3))
        assert self.gives().state is NodeState.RUNNING


@pytest.fixture
def node() -> Node:
    return Node()


def test_a_life_with_one_failure(node: Node) -> None:
    node.running()
    node.member.rank_failed(1, DEAD)
    report = node.gives(FinishCaptures(1, (1,)))
    assert (report.state, report.failures) == (NodeState.RUNNING, (DEAD,))
    node.member.captures_finished(1, HELD)
    assert node.gives().held == HELD  # and nobody is killed unasked
    node.member.receive(Directive(1, Order.STOP))
    node.gives(KillRanks(1))
    node.member.ranks_gone(1, HELD)
    assert node.gives().state is NodeState.STOPPED
    node.member.receive(run(2))
    report = node.gives(ForkRanks(formation(2)))
    assert (report.failures, report.held) == ((), ())


def test_stop_comes_before_captures_are_finished(node: Node) -> None:
    node.running()
    node.member.receive(Directive(1, Order.STOP))
    node.gives(FinishCaptures(1, ()))
    node.member.receive(Directive(1, Order.STOP))
    node.gives()
    node.member.captures_finished(1, HELD)
    node.gives(KillRanks(1))


def test_old_ranks_go_before_a_newer_epoch_runs(node: Node) -> None:
    node.running()
    node.member.receive(run(3))
    node.gives(FinishCaptures(1, ()))
    node.member.captures_finished(1, HELD)
    node.gives(KillRanks(1))
    node.member.ranks_gone(1, HELD)
    node.gives(ForkRanks(formation(3)))


@pytest.mark.parametrize(
    "stale",
    [run(1), run(2), Directive(1, Order.STOP), Directive(1, Order.FINISH, exit_code=1)],
    ids=lambda d: f"{d.order.value}{d.epoch}",
)
def test_the_past_is_not_obeyed(node: Node, stale: Directive) -> None:
    node.running(2)
    node.member.receive(stale)
    assert node.gives().state is NodeState.RUNNING


def test_a_stopped_epoch_is_not_run_again(node: Node) -> None:
    node.member.receive(Directive(4, Order.STOP))
    report = node.gives()
    assert (report.state, report.epoch) == (NodeState.STOPPED, 4)
    node.member.receive(run(4))
    node.gives()
    node.member.receive(run(5))
    node.gives(ForkRanks(formation(5)))


def test_orders_for_an_earlier_incarnation_are_not_obeyed() -> None:
    node = Node()
    node.member.receive(run(1, incarnation=0))
    assert node.gives().state is NodeState.IDLE


def test_graceful_stop(node: Node) -> None:
    node.running()
    node.member.receive(Directive(1, Order.PAUSE))
    node.gives(HoldRanks(1))
    node.member.receive(Directive(1, Order.PAUSE))
    node.member.holding(1, [7, 8])
    report = node.gives()
    assert (report.pausing, report.boundaries) == (True, (7, 8))
    node.member.receive(Directive(1, Order.STOP_AT, stop_step=8))
    node.gives(ReleaseRanks(1, 8))
    node.member.receive(Directive(1, Order.PAUSE))  # late
    node.gives()
    node.member.ranks_done(1, 8)
    report = node.gives()
    assert (report.state, report.stopped_at) == (NodeState.DONE, 8)


def test_stop_at_without_pause_holds_first(node: Node) -> None:
    node.running()
    node.member.receive(Directive(1, Order.STOP_AT, stop_step=8))
    node.gives(HoldRanks(1), ReleaseRanks(1, 8))


def test_flushes_one_at_a_time_the_newest_next(node: Node) -> None:
    node.running()
    first, second, third = (VersionId(1, s) for s in (10, 20, 30))
    for version in (first, first, second, third):
        node.member.receive(Directive(1, Order.FLUSH, flush=version, fence=1))
    node.gives(FlushVersion(first, 1))
    node.member.flushed(VersionId(1, 11))
    report = node.gives(FlushVersion(third, 1))
    assert (report.flush, report.fence, report.prepared) == (first, 1, (VersionId(1, 11),))
    node.member.flush_refused("disk full")
    report = node.gives()
    assert (report.flush, report.refused) == (third, "disk full")
    assert report.prepared == (VersionId(1, 11),)
    node.member.receive(Directive(1, Order.FLUSH, flush=third, fence=1))
    node.gives()  # answered already
    node.member.receive(Directive(1, Order.FLUSH, flush=third, fence=2))
    node.gives(FlushVersion(third, 2))
    node.member.flushed(third)
    assert node.gives().prepared == (third,)  # of this fence alone


def test_finish_kills_first(node: Node) -> None:
    node.running()
    node.member.receive(Directive(1, Order.FINISH, exit_code=75))
    node.gives(KillRanks(1))
    node.member.ranks_gone(1, ())
    node.gives(Exit(75))
    node.member.receive(run(2))
    node.gives()


def test_a_new_address_of_a_peer_is_passed_on(node: Node) -> None:
    node.running()
    places = (replace(formation(1).places[0], smp_address="h:2"),)
    moved = replace(formation(1), places=places)
    for _ in range(2):
        node.member.receive(Directive(1, Order.RUN, moved))
    node.gives(UpdatePeers(moved))


def test_ranks_that_end_at_once(node: Node) -> None:
    node.member.receive(run(1))
    node.member.ready()
    node.member.ranks_done(1)
    assert node.gives().state is NodeState.DONE


def test_answers_to_the_past_are_dropped(node: Node) -> None:
    node.running(2)
    node.member.rank_failed(1, DEAD)
    node.member.ranks_done(1)
    node.member.ranks_gone(1, ())
    node.member.captures_finished(2, ())
    node.member.holding(2, [1, 2])
    report = node.gives()
    assert (report.state, report.failures, report.pausing) == (NodeState.RUNNING, (), False)


def test_progress_waits_for_the_tick_and_news_does_not(node: Node) -> None:
    node.running()
    node.member.progress(4, 5, 5, VersionId(1, 3), 0.5, 0.1)
    assert node.member.ready().messages == ()
    node.member.tick()
    ((address, report),) = node.member.ready().messages
    assert address == "coordinator"
    assert isinstance(report, NodeReport)
    assert (report.step, report.step_max, report.committed) == (4, 5, VersionId(1, 3))
    node.member.signal("SIGTERM")
    node.member.signal("SIGTERM")
    ((_, news),) = node.member.ready().messages
    assert isinstance(news, NodeReport)
    assert news.signals == ("SIGTERM",)
    assert news.sequence == report.sequence + 1
    for _ in range(5):
        node.member.tick()
    assert len(node.member.ready().messages) == 1  # now and then, changed or not


def test_what_the_table_does_not_have_is_a_bug(node: Node) -> None:
    with pytest.raises(LocalProtocolError, match="can't happen while idle: a bug in ftrain"):
        node.member._enter(Event.GONE)
    assert node.member.phase is Phase.IDLE
