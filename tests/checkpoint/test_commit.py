"""Version commit with one central decider, and with processes that forget.

What all deciding members together do is simulated in tests/simulation.
"""

from __future__ import annotations

from ftrain.checkpoint.protocol.commit import Committed, VersionCommit
from ftrain.comms.protocol.messages import Sealed, SealedSeen, VersionId


def sealed(node: int, step: int, epoch: int = 1) -> Sealed:
    return Sealed(VersionId(epoch, step), node, 1, (), ())


def deliver(machines: dict[object, VersionCommit]) -> dict[object, list[VersionId]]:
    """Carry messages until there are none; returns what each machine committed."""
    committed: dict[object, list[VersionId]] = {name: [] for name in machines}
    busy = True
    while busy:
        busy = False
        for name, machine in machines.items():
            ready = machine.ready()
            busy = busy or bool(ready)
            committed[name] += [e.version for e in ready.effects if isinstance(e, Committed)]
            for address, message in ready.messages:
                if address in machines:
                    machines[address].receive(message)
    return committed


def central() -> dict[object, VersionCommit]:
    machines: dict[object, VersionCommit] = {
        name: VersionCommit(me=name) for name in (0, 1, "coordinator")
    }
    for machine in machines.values():
        machine.new_group(1, [0, 1], ["coordinator"])
    return machines


def test_a_central_decider_alone_decides() -> None:
    machines = central()
    machines[0].sealed_here(VersionId(1, 4), sealed(0, 4))
    assert deliver(machines) == {0: [], 1: [], "coordinator": []}
    machines[1].sealed_here(VersionId(1, 4), sealed(1, 4))
    assert deliver(machines) == {0: [], 1: [], "coordinator": [VersionId(1, 4)]}
    assert machines["coordinator"].newest == VersionId(1, 4)
    assert machines[0].newest is None


def test_a_decider_that_starts_again_is_told_again() -> None:
    machines = central()
    for node in (0, 1):
        machines[node].sealed_here(VersionId(1, 4), sealed(node, 4))
    deliver(machines)
    machines["coordinator"] = VersionCommit(me="coordinator")
    machines["coordinator"].new_group(1, [0, 1], ["coordinator"])
    assert deliver(machines)["coordinator"] == [VersionId(1, 4)]


def test_lost_messages_are_repeated_until_seen() -> None:
    member = VersionCommit(me=0, resend_ticks=2)
    member.new_group(1, [0, 1], [0, 1])
    member.sealed_here(VersionId(1, 4), sealed(0, 4))
    member.ready()  # lost
    for _ in range(2):
        member.tick()
    assert (1, sealed(0, 4)) in member.ready().messages
    member.receive(SealedSeen(1, 1, (VersionId(1, 4),)))
    for _ in range(2):
        member.tick()
    assert (1, sealed(0, 4)) not in member.ready().messages


def test_a_peer_that_is_ahead_needs_nothing_older() -> None:
    member = VersionCommit(me=0, resend_ticks=1)
    member.new_group(1, [0, 1], [0, 1])
    member.sealed_here(VersionId(1, 4), sealed(0, 4))
    member.receive(SealedSeen(1, 1, (), newest=VersionId(1, 5)))
    member.ready()
    member.tick()
    assert not [m for _, m in member.ready().messages if isinstance(m, Sealed)]


def test_duplicates_strangers_and_the_past_do_not_count() -> None:
    member = VersionCommit(me=0)
    member.new_group(2, [0, 1, 2], [0, 1, 2])
    member.sealed_here(VersionId(2, 9), sealed(0, 9, epoch=2))
    for message in (
        sealed(1, 9, epoch=2),
        sealed(1, 9, epoch=2),
        sealed(7, 9, epoch=2),
        sealed(2, 9, epoch=1),
        sealed(2, 9, epoch=3),
    ):
        member.receive(message)
    assert member.newest is None
    member.receive(sealed(2, 9, epoch=2))
    assert member.newest == VersionId(2, 9)
    assert member.droppable(VersionId(2, 8))
    assert member.droppable(VersionId(1, 99))
    assert not member.droppable(VersionId(2, 9))


def test_newest_never_goes_back() -> None:
    member = VersionCommit(me=0)
    member.new_group(1, [0, 1], [0, 1])
    for step in (4, 5):
        member.sealed_here(VersionId(1, step), sealed(0, step))
    member.receive(sealed(1, 5))
    member.receive(sealed(1, 4))
    assert member.newest == VersionId(1, 5)
    member.new_group(2, [0, 1], [0, 1])
    member.new_group(1, [0], [0])  # late: ignored
    assert (member.epoch, member.newest) == (2, VersionId(1, 5))
    assert list(member.ready().effects) == [Committed(VersionId(1, 5))]


def test_what_was_dropped_does_not_count() -> None:
    member = VersionCommit(me=0)
    member.new_group(1, [0, 1], [0, 1])
    member.sealed_here(VersionId(1, 4), sealed(0, 4))
    member.dropped_here(VersionId(1, 4))
    member.receive(sealed(1, 4))
    assert member.newest is None


def test_one_member_commits_at_once_and_memory_is_bounded() -> None:
    member = VersionCommit(me=0, window=4)
    member.new_group(1, [0], [0])
    for step in range(100):
        member.sealed_here(VersionId(1, step), sealed(0, step))
    assert [e.version.step for e in member.ready().effects] == list(range(100))  # type: ignore[attr-defined]
    waiting = VersionCommit(me=0, window=4, resend_ticks=1)
    waiting.new_group(1, [0, 1], [0, 1])
    for step in range(100):
        waiting.sealed_here(VersionId(1, step), sealed(0, step))
        waiting.receive(sealed(1, 1000 + step))
    waiting.ready()
    waiting.tick()
    resent = [m.version.step for _, m in waiting.ready().messages if isinstance(m, Sealed)]
    assert resent == [96, 97, 98, 99]
