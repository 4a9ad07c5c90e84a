"""The real machines in a simulated world in which everything breaks.

``pytest -m slow tests/simulation -s`` runs the thousand fixed seeds and prints what was delivered.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from sim_cluster import Cluster, Machines, simulate
from sim_mutants import (
    CountsTheWithdrawn,
    DoesNotWaitForSpares,
    GivesUpUnsaved,
    restores_withdrawn,
)
from sim_schedule import Fault, Options, Schedule, draw
from sim_shrink import failure, shrink

from ftrain.comms.protocol import node as node_module
from ftrain.comms.protocol import transitions
from ftrain.comms.protocol.membership import Membership
from ftrain.comms.protocol.messages import VersionId
from ftrain.comms.protocol.node import NodeMember

QUICK_SEEDS = 60
FIXED_SEEDS = 1000
FRESH_SEEDS = 24
KINDS_EXPECTED = 22


class Rows:
    """Which rows of the transition tables were taken."""

    def __init__(self) -> None:
        self.taken: Counter[Any] = Counter()
        taken = self.taken

        class Coordinator(Membership):
            def _enter(self, event: Any, reason: str) -> None:
                taken[self._phase, event] += 1
                super()._enter(event, reason)

        class Agent(NodeMember):
            def _enter(self, event: Any) -> None:
                taken[self._phase, event] += 1
                super()._enter(event)

        self.machines = Machines(membership=Coordinator, node=Agent)

    def missing(self) -> list[str]:
        """Rows that were never taken."""
        return [
            f"{type(phase).__module__}: {phase.name} {event.name}"
            for module in (transitions, node_module)
            for phase, row in module.TRANSITIONS.items()
            for event in row
            if not self.taken[phase, event]
        ]


def run_seed(seed: int, machines: Machines | None = None) -> Cluster:
    """Simulate a seed; a failure is shrunk and told in full."""
    try:
        return simulate(draw(seed), machines)
    except Exception as error:
        shrunk = shrink(draw(seed))
        raise AssertionError(
            f"seed {seed} fails: {error}\nshrunk from {len(draw(seed).faults)} to "
            f"{len(shrunk.faults)} faults: {shrunk}\n{failure(shrunk)}"
        ) from error


def run_seeds(seeds: range, machines: Machines | None = None) -> Counter[str]:
    """Simulate seeds; returns the faults delivered, by kind."""
    delivered: Counter[str] = Counter()
    for seed in seeds:
        delivered += run_seed(seed, machines).delivered
    return delivered


def test_quick_seeds() -> None:
    delivered = run_seeds(range(QUICK_SEEDS))
    assert delivered.total() >= 5 * QUICK_SEEDS
    assert len(delivered) >= KINDS_EXPECTED


def test_fresh_seeds() -> None:
    first = random.Random(time.time_ns()).randrange(10**6, 10**9)
    print(f"fresh seeds from {first}")
    run_seeds(range(first, first + FRESH_SEEDS))


@pytest.mark.slow
def test_thousand_seeds() -> None:
    rows, began = Rows(), time.process_time()
    delivered = run_seeds(range(FIXED_SEEDS), rows.machines)
    for schedule in RARE:
        simulate(schedule, rows.machines)
    print(f"\n{FIXED_SEEDS} seeds in {time.process_time() - began:.0f} s; faults delivered:")
    for kind, count in delivered.most_common():
        print(f"  {kind:22s} {count:7d}")
    assert delivered.total() >= 5 * FIXED_SEEDS
    assert {kind: n for kind, n in delivered.items() if n < 200} == {}
    assert len(delivered) >= KINDS_EXPECTED
    assert rows.missing() == []


def test_a_seed_is_one_world() -> None:
    first, second = simulate(draw(7)), simulate(draw(7))
    assert first.now == second.now
    assert first.delivered == second.delivered
    assert first.disk == second.disk
    assert first.checkers.published == second.checkers.published


def quiet(*faults: Fault, **options: Any) -> Schedule:
    """A world with good weather but for these faults."""
    return Schedule(1, Options(**options), faults)


# Ways through the tables that random schedules take only now and then.
RARE = (
    *(
        Schedule(seed, Options(nodes=3), (Fault(1, "coordinator_dies", detail="starting"),))
        for seed in range(5)
    ),
    quiet(
        Fault(55, "cut", ticks=40),
        Fault(60, "coordinator_dies", ticks=3, detail="now"),
        Fault(68, "force"),
    ),
)


def test_a_half_started_group_goes_on_under_a_new_coordinator() -> None:
    rows = Rows()
    for schedule in RARE:
        simulate(schedule, rows.machines)
    phases = transitions.Phase
    events = transitions.Event
    assert rows.taken[phases.RECOVERING, events.SOME_RUN]
    assert rows.taken[phases.RECOVERING, events.OVER]


@pytest.mark.parametrize("point", ["now", "before_persist", "after_persist", "mid_send"])
def test_coordinator_death_alone_stops_nobody(point: str) -> None:
    fault = Fault(60, "coordinator_dies", ticks=40, detail=point)
    cluster = simulate(quiet(fault, flush_every_ticks=20))
    assert cluster.checkers.granted == 1
    assert cluster.incidents == []


@pytest.mark.parametrize("seed", range(8))
def test_stop_saves_the_furthest_boundary(seed: int) -> None:
    options = Options(nodes=1 + seed % 3, slots=3)
    cluster = simulate(Schedule(seed, options, (Fault(70, "stop"),)))
    assert cluster.exit_code == 75
    assert cluster.checkers.published[-1] == (1, VersionId(1, cluster.furthest))


@pytest.mark.parametrize("save_at_end", [False, True])
def test_the_end_of_a_run_can_be_durable(save_at_end: bool) -> None:
    cluster = simulate(quiet(steps_total=20, save_at_end=save_at_end))
    assert cluster.exit_code == 0
    assert [v.step for _, v in cluster.checkers.published] == ([20] if save_at_end else [])


def with_writes(seed: int) -> Schedule:
    """A seed's schedule in which ranks now and then find that they captured wrongly."""
    drawn, rng = draw(seed), random.Random(seed)
    writes = tuple(
        Fault(rng.randrange(5, 160), "write_found", rng.randrange(12), rng.randrange(12))
        for _ in range(12)
    )
    return replace(drawn, faults=tuple(sorted(drawn.faults + writes, key=lambda f: f.at)))


def saved_then_withdrawn(seed: int) -> Schedule:
    """Slow steps, each of them durable; what one finds wrong is followed by death and a stop."""
    rng = random.Random(seed)
    nodes, at = rng.choice((1, 2)), rng.randrange(100, 160)
    quick = {"delay_ticks_max": 0, "work_ticks_max": 1, "flush_every_ticks": 4}
    options = Options(nodes=nodes, step_probability=0.2, save_at_end=True, **quick)
    found = [Fault(at, "write_found", node, rank) for node in range(nodes) for rank in range(2)]
    after = [Fault(at + rng.randrange(3), kind, rng.randrange(2)) for kind in ("rank_dies", "stop")]
    return Schedule(seed, options, tuple(sorted(found + after, key=lambda f: f.at)))


def test_a_stop_counts_on_no_version_that_was_withdrawn() -> None:
    delivered: Counter[str] = Counter()
    caught = 0
    for seed in range(60):
        delivered += simulate(saved_then_withdrawn(seed)).delivered
        said = failure(saved_then_withdrawn(seed), Machines(membership=CountsTheWithdrawn))
        caught += "was saved before: only" in said
    assert delivered["write found"] >= 20
    assert caught >= 5


def test_a_withdrawn_version_is_never_restored_from() -> None:
    delivered: Counter[str] = Counter()
    caught = 0
    for seed in range(60):
        delivered += simulate(with_writes(seed)).delivered
        said = failure(with_writes(seed), Machines(choose_restore=restores_withdrawn))
        caught += "was withdrawn" in (said or "")
    assert delivered["write found"] >= 100
    assert caught >= 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_stop_after_the_last_step_saves_it(nodes: int) -> None:
    options = {"steps_total": 5, "evaluate_ticks": 80, "save_at_end": True, "nodes": nodes}
    cluster = simulate(quiet(Fault(70, "stop"), **options))
    assert cluster.delivered["stop asked"] == 1
    assert cluster.exit_code == 0
    assert cluster.checkers.published[-1] == (1, VersionId(1, 5))


def test_stop_survives_the_coordinator() -> None:
    faults = (Fault(70, "stop"), Fault(71, "coordinator_dies", ticks=20, detail="now"))
    cluster = simulate(quiet(*faults))
    assert cluster.exit_code == 75
    assert cluster.checkers.published[-1][1].step == cluster.furthest


def test_rank_death_while_stopping_saves_what_all_hold() -> None:
    cluster = simulate(quiet(Fault(70, "stop"), Fault(71, "rank_dies")))
    assert cluster.exit_code == 75
    assert cluster.checkers.granted == 1
    assert cluster.checkers.published[-1][1].step >= cluster.furthest - 2


def test_one_death_is_one_incident() -> None:
    cluster = simulate(quiet(Fault(60, "rank_dies", node=1)))
    (incident,) = cluster.incidents
    assert incident.cause == "rank 2 (node 1) died: SIGKILL"
    assert [f.rank for f in incident.failures] == [2]
    assert (incident.epoch, incident.new_epoch) == (1, 2)
    assert incident.steps_recomputed == cluster.checkers.steps_lost <= 2


@pytest.mark.parametrize("spares", [0, 1, 2])
def test_a_spare_does_not_wait_for_the_lost_node(spares: int) -> None:
    lost = Fault(60, "node_dies", node=1, ticks=90)
    cluster = simulate(quiet(lost, spares=spares, delay_ticks_max=0))
    (incident,) = cluster.incidents
    assert cluster.seats == ((0, 2) if spares else (0, 1))
    stepped = [phases.stepped_ns for _, phases in incident.phases]  # ticks
    assert (max(stepped) < 100) == bool(spares)
    assert [node for node, _ in incident.phases] == list(cluster.seats)


def test_who_lost_a_seat_while_silent_ends_its_ranks_before_it_takes_another() -> None:
    caught = 0
    for at in range(90, 112, 2):
        for seed in range(3):
            faults = (Fault(60, "cut", node=1, ticks=40), Fault(at, "node_dies", 2, ticks=60))
            options = Options(spares=1, lease_ticks=15, work_ticks_max=8)
            schedule = Schedule(seed, options, faults)
            assert simulate(schedule).delivered["node dies"]
            said = failure(schedule, Machines(membership=DoesNotWaitForSpares))
            caught += "are alive at once" in said
    assert caught


@pytest.mark.parametrize("seed", range(6))
def test_nodes_and_spares_change_places_again_and_again(seed: int) -> None:
    faults = [Fault(30 + 20 * i, "node_dies", node=i + seed, ticks=15) for i in range(6)]
    faults.append(Fault(158, "stop"))
    cluster = simulate(Schedule(seed, Options(spares=1 + seed % 2), tuple(faults)))
    assert cluster.exit_code == 75
    assert len(cluster.incidents) >= 2


def test_a_failure_that_comes_back_ends_the_job() -> None:
    faults = tuple(Fault(20 + i, "rank_raises") for i in range(100))
    schedule = quiet(*faults, max_restarts=2)
    cluster = simulate(schedule)
    assert cluster.exit_code == 1
    assert cluster.membership is not None
    assert "3 failures in a row" in cluster.membership.hard.end_reason


@pytest.mark.parametrize("point", ["", "now", "before_persist", "after_persist", "mid_send"])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_what_a_job_that_is_given_up_had_in_memory_is_durable(nodes: int, point: str) -> None:
    faults = [Fault(70, "rank_raises")]
    if point:
        faults.append(Fault(70, "coordinator_dies", ticks=20, detail=point))
    cluster = simulate(quiet(*faults, max_restarts=0, save_at_end=True, nodes=nodes))
    assert cluster.exit_code == 1
    assert cluster.membership is not None
    assert "; step" in cluster.membership.hard.end_reason
    newest = cluster.checkers.newest_saved
    assert newest is not None
    assert newest.step >= cluster.furthest - 2


def test_an_end_that_no_disk_takes_is_no_success() -> None:
    faults = (Fault(1, "disk_full", node=1, ticks=400),)
    cluster = simulate(quiet(*faults, steps_total=20, save_at_end=True))
    assert cluster.exit_code == 1
    assert cluster.checkers.published == []
    assert cluster.membership is not None
    assert "the end of the run, step 20, is not durable" in cluster.membership.hard.end_reason


def test_shrinking_keeps_what_matters() -> None:
    faults = [Fault(20 + i, "rank_raises") for i in range(60)]
    faults += [Fault(5 * i, "clock_jump", ticks=1) for i in range(20)]
    schedule = quiet(*sorted(faults, key=lambda f: f.at), max_restarts=0, save_at_end=True)
    mutant = Machines(membership=GivesUpUnsaved)
    shrunk = shrink(schedule, mutant)
    assert [f.kind for f in shrunk.faults] == ["rank_raises"]
    assert "failures in a row" in failure(shrunk, mutant)
