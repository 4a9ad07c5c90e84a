"""What the watchdog must say, and what it must not; each scenario asserts."""

from __future__ import annotations

import random

from watchdog_world import World, named

from ftrain.comms.protocol.phases import Phase, Where
from ftrain.configs.schema import DetectionConfig

WAIT = {"where": Where.COLLECTIVE, "collectives": 21}  # joined one of step 10's two collectives
MISSING = {"where": Where.COLLECTIVE, "collectives": 20}
INSIDE = {"where": Where.BACKWARD, "collectives": 21}


def stopped_is_noticed_within_the_limit() -> None:
    world = World()
    world.set(0, **WAIT)
    world.run(1)
    world.set(1, state="T")
    assert named(world.run(3)) == [(1, "stopped", "restart")]
    assert world.verdicts[0][0] <= 1 + 2.75


def stopped_in_a_declared_phase_too() -> None:
    world = World()
    world.set(1, state="T", phase=Phase.DECLARED)
    assert named(world.run(3)) == [(1, "stopped", "restart")]


def continued_in_time_is_let_off() -> None:
    world = World()
    for _ in range(5):
        world.set(1, state="T")
        assert world.run(1.5) == []
        world.set(1, state="S")
        assert world.run(0.5) == []


def continued_with_the_gil_held_counts_from_then() -> None:
    world = World()
    world.beating[1] = False
    world.set(1, state="T")
    assert world.run(2) == []
    world.set(1, state="S")
    assert world.run(2) == []
    assert named(world.run(1)) == [(1, "gil", "restart")]


def the_limit_grows_with_the_step() -> None:
    world = World(median_s=2.0)  # limit 20 s
    world.set(1, state="T")
    assert world.run(14.5) == []
    assert named(world.run(5)) == [(1, "stopped", "restart")]


def gil_held_asleep_is_noticed() -> None:
    world = World()
    world.set(0, **WAIT)
    world.run(1)
    world.beating[1] = False
    world.busy_elsewhere[1] = 0.01  # threads that ask for the GIL
    assert named(world.run(3)) == [(1, "gil", "restart")]


def gil_held_in_an_unsampled_place_blames_nobody_else() -> None:
    world = World()
    world.set(0, step=11, boundaries=((10, 20), (11, 22)), collectives=23, where=Where.COLLECTIVE)
    world.set(1, **WAIT)
    world.beating[1] = False
    assert named(world.run(3)) == [(1, "gil", "restart")]


def gil_held_with_io_is_a_save() -> None:
    world = World()
    world.set(0, **WAIT)
    world.beating[1] = False
    world.writing[1] = 1_000_000
    assert world.run(10) == []
    world.beating[1] = True
    world.writing[1] = 0
    assert world.run(2) == []


def gil_held_with_cpu_is_a_long_call() -> None:
    for share in ("busy", "busy_elsewhere"):
        world = World(config=DetectionConfig(user_warn_s=1000))
        world.beating[1] = False
        getattr(world, share)[1] = 0.5
        assert world.run(55) == []
        assert named(world.run(7)) == [(1, "gil", "restart")]


def gil_held_with_cpu_after_a_long_quiet_time_too() -> None:
    world = World()
    world.set(1, phase=Phase.DECLARED)
    world.run(200)
    world.set(1, phase=Phase.STEP)
    world.beating[1], world.busy[1] = False, 1.0
    assert world.run(20) == []


def gil_held_in_disk_wait_is_a_long_call() -> None:
    world = World()
    world.set(1, state="D")
    world.beating[1] = False
    assert world.run(10) == []


def no_beat_before_the_session() -> None:
    world = World()
    for rank in range(2):
        world.set(rank, phase=Phase.STARTING, step=0, steps_done=0, gil_beat=0, boundaries=())
        world.beating[rank] = False
    assert world.run(29) == []


def an_unwatched_gap_is_nobodys_fault() -> None:
    world = World()
    world.run(1)
    for rank in range(2):
        world.set(rank, **WAIT)
        world.beating[rank] = False
    world.jump(120)  # the machine was suspended: nobody ran, and nobody looked
    assert world.look() == []
    for rank in range(2):
        world.beating[rank] = True
    assert world.run(0.5) == []


def a_skipped_collective_is_noticed_at_once() -> None:
    world = World(ranks=4)
    world.run(1)
    for rank in range(4):
        world.step(rank, collectives=1 if rank == 2 else 2)
    assert named(world.run(0.25)) == [(2, "desync", "restart")]
    for rank in range(4):
        world.step(rank)
    assert world.run(0.5) == []  # said once


def of_two_the_one_that_left_out_is_blamed() -> None:
    world = World()
    world.step(0)
    world.step(1, collectives=1)
    assert named(world.run(0.25)) == [(1, "desync", "restart")]


def an_added_collective_is_noticed() -> None:
    world = World(ranks=3)
    for rank in range(3):
        world.step(rank, collectives=3 if rank == 0 else 2)
    assert named(world.run(0.25)) == [(0, "desync", "restart")]


def counts_wait_for_every_rank() -> None:
    world = World(ranks=3)
    world.step(0, collectives=3)
    world.step(1)
    assert world.run(0.25) == []  # one each: rank 2 decides
    world.step(2)
    assert named(world.run(0.25)) == [(0, "desync", "restart")]


def unknown_counts_say_nothing() -> None:
    world = World()
    for rank in range(2):
        world.set(rank, collectives=-1, boundaries=((10, -1 if rank else 20),))
    assert world.run(5) == []


def counts_of_another_node_count() -> None:
    world = World(ranks=1, group=(0, 1))
    world.watchdog.record_boundary(1, 10, 20)
    world.watchdog.record_boundary(1, 11, 22)
    world.step(0, collectives=1)
    assert named(world.run(0.25)) == [(0, "desync", "restart")]


def missing_from_a_collective_is_noticed() -> None:
    world = World(ranks=3)
    world.set(0, **INSIDE)
    world.set(2, **WAIT)
    world.run(1)
    world.set(1, step=11, collectives=-1, boundaries=(), where=Where.USER)
    world.busy[1] = 1.0
    assert named(world.run(3)) == [(1, "desync", "restart")]


def leaving_the_loop_early_is_noticed() -> None:
    for changes in ({"phase": Phase.FINISHED}, {"alive": False}):
        world = World()
        world.set(0, **WAIT)
        world.set(1, **changes)
        assert named(world.run(3)) == [(1, "desync", "restart")]


def a_slow_third_rank_excuses_both() -> None:
    world = World(ranks=3)
    world.set(0, **WAIT)
    world.set(1, step=11, boundaries=(), where=Where.COLLECTIVE)
    world.busy[2] = 1.0
    assert world.run(20) == []


def waiting_in_different_collectives_is_noticed() -> None:
    world = World(ranks=3)
    for rank in range(3):
        world.set(rank, **WAIT)
    world.set(1, collectives=20)
    assert named(world.run(3)) == [(1, "desync", "restart")]


def all_waiting_in_the_same_collective_is_a_stall() -> None:
    world = World()
    for rank in range(2):
        world.set(rank, **WAIT)
    found = named(world.run(3))
    assert found == [(0, "stall", "restart"), (1, "stall", "restart")]


def all_asleep_before_the_first_collective_gets_longer() -> None:
    world = World()
    for rank in range(2):
        world.set(rank, where=Where.BACKWARD)  # compiling, perhaps
    assert world.run(29) == []
    assert {kind for _, kind, _ in named(world.run(3))} == {"stall"}


def a_transfer_is_no_stall() -> None:
    world = World()
    for rank in range(2):
        world.set(rank, **WAIT)
    world.busy_elsewhere[0] = 0.3  # the transport's thread
    assert world.run(25) == []


def half_the_group_waits_and_the_rest_is_unseen() -> None:
    world = World(ranks=2, group=range(4))
    for rank in range(2):
        world.set(rank, **WAIT)
    assert world.run(600) == []


def the_first_step_may_take_long() -> None:
    world = World(median_s=0.0)
    for rank in range(2):
        world.set(rank, step=0, steps_done=0, boundaries=((0, 0),), where=Where.BACKWARD)
        world.set(rank, collectives=1)
    assert world.run(590) == []


def an_evaluation_of_twenty_seconds_is_fine() -> None:
    for busy in (0.0, 1.0):
        world = World()
        world.set(0, **WAIT)
        world.busy[1] = busy
        assert world.run(25) == []


def long_user_code_is_warned_about_once_then_restarted() -> None:
    world = World()
    world.set(0, **WAIT)
    assert world.run(29.75) == []
    assert named(world.run(2)) == [(1, "stall", "warn")]
    assert world.run(560) == []
    assert named(world.run(15)) == [(1, "stall", "restart")]


def who_waited_long_is_not_slow_afterwards() -> None:
    world = World()
    world.set(0, **WAIT)
    world.run(500)
    world.verdicts.clear()
    world.set(0, where=Where.USER, collectives=20)
    world.step(0)
    world.step(1)
    assert world.run(25) == []


def declared_and_ended_phases_are_silent() -> None:
    for phase in (Phase.DECLARED, Phase.HOLDING, Phase.STOPPED, Phase.FINISHED):
        world = World()
        for rank in range(2):
            world.set(rank, phase=phase)
            world.beating[rank] = False
        assert world.run(1000) == []


def waiting_for_a_declared_phase_is_silent() -> None:
    world = World()
    world.set(0, **WAIT)
    world.set(1, phase=Phase.DECLARED)
    assert world.run(1000) == []


def switched_off_it_says_nothing() -> None:
    world = World(config=DetectionConfig(enabled=False))
    world.set(1, state="T")
    assert world.run(10) == []


def healthy_training_is_left_alone() -> None:
    healthy(seed=0, hours=0.2)


def healthy(seed: int, hours: float) -> None:
    """Steps in lockstep; each rank computes, waits, saves, evaluates, compiles for a while."""
    chance = random.Random(seed)
    world = World(ranks=chance.choice((2, 4)), median_s=0.4)
    while world.now_ns - world.began_ns < hours * 3600e9:
        slow = chance.randrange(world.ranks)
        for rank in range(world.ranks):
            world.busy[rank] = 0.0 if rank != slow else chance.choice((0.0, 0.3, 1.0))
            if rank != slow:
                base = world.samples[rank].boundaries[-1][1]
                world.set(rank, where=Where.COLLECTIVE, collectives=base + chance.randrange(2))
        _be_slow(world, slow, chance)
        for rank in range(world.ranks):
            base = world.samples[rank].boundaries[-1][1]
            world.set(rank, where=Where.USER, collectives=base, phase=Phase.STEP)
            world.step(rank)
        if chance.random() < 0.01:
            world.jump(chance.uniform(1, 60))
        assert world.run(chance.choice((0.25, 0.5))) == [], world.verdicts


def _be_slow(world: World, slow: int, chance: random.Random) -> None:
    """One rank takes its time, in one of the ways in which ranks do."""
    way = chance.random()
    seconds = 0.5
    if way < 0.05:  # its own save: holds the GIL, writes
        world.beating[slow], world.writing[slow], seconds = False, 5_000_000, 10
    elif way < 0.08:  # a long C call
        world.beating[slow], world.busy[slow], seconds = False, 1.0, 20
    elif way < 0.12:  # an evaluation that nobody declared
        world.busy[slow], seconds = chance.choice((0.0, 1.0)), chance.uniform(5, 25)
    elif way < 0.14:  # a declared one
        world.set(slow, phase=Phase.DECLARED)
        seconds = 100
    elif way < 0.18:  # stopped, for a moment
        world.set(slow, state="T")
        seconds = 1.5
    elif way < 0.22:  # a disk that does not answer
        world.set(slow, state="D")
        world.beating[slow], seconds = False, 8
    assert world.run(seconds) == [], world.verdicts
    world.beating[slow], world.writing[slow], world.busy[slow] = True, 0, 0.0
    world.set(slow, state="S", phase=Phase.STEP)


SCENARIOS = [
    value
    for name, value in list(globals().items())
    if getattr(value, "__module__", "") == __name__ and name != "healthy" and name[0] != "_"
]
