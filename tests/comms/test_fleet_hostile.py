"""Garbage on every port of a running fleet, from strangers and from broken members.

A broken member may cost a change of the membership, and itself; it must not take others along.
What no checksum covers is not noticed: the contents of a slot of shared memory.
"""

from __future__ import annotations

import fcntl
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fleet_samples import SECRET, Coordinator, Peer, fleet_of, until
from hostile_frames import (
    dial_tcp,
    dial_unix,
    resources,
    strangers,
    wrong_frames,
    wrong_joins,
)
from test_fleet import agree, last_members

from ftrain.comms.collectives import shared_lane
from ftrain.comms.collectives.meeting import RingSettings
from ftrain.comms.errors import FtrainError
from ftrain.comms.fleet.collectives import all_reduce
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.protocol.messages import (
    LOST_MAX,
    OPS_MAX,
    FleetDirective,
    Lost,
    OpState,
    Order,
    PeerGone,
    PeerStatus,
    Stage,
)
from ftrain.comms.fleet.protocol.plausible import fault_of_directive, fault_of_status
from ftrain.comms.fleet.settings import FleetSettings
from ftrain.comms.protocol.chunk_frames import Head, HeadSender, Word
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId

HONEST = (0, 1, 2)
STRANGER = Identity("run", "rank", 9, 1)
RESIDENT_KIB_MORE = 64 * 1024  # what malloc keeps of the rings of 20 views, not more for 40
Nasty = Callable[[PeerStatus], object]


@contextmanager
def honest_fleet(
    capfd: pytest.CaptureFixture[str], links: str = "memory"
) -> Iterator[tuple[Coordinator, list[Peer]]]:
    """One that has to be as it was afterwards: members, sums, descriptors, threads, memory."""
    with fleet_of(HONEST, 100_000, links) as (coordinator, peers):
        pids = [os.getpid(), *(peer.process.pid for peer in peers)]
        before = [resources(pid) for pid in pids]
        yield coordinator, peers
        until(lambda: last_members(peers[0]) == [*HONEST], "a sum of all that are honest")
        go_on(peers)
        with suppress(AssertionError):
            until(lambda: not grown(pids, before), "the end of what was opened", 8)
        assert not grown(pids, before)
        agree(peers)
        assert not any(peer.error() for peer in peers)
        assert all(peer.process.poll() is None for peer in peers)
    told = capfd.readouterr().err
    assert "Traceback" not in told, told


def grown(
    pids: Sequence[int], before: Sequence[tuple[int, int, int]]
) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Of what a process has more: before and now; a few descriptors wait for the next change."""
    return [
        (old, now)
        for now, old in zip(map(resources, pids), before, strict=True)
        if now[0] > old[0] + 34 or now[1] > old[1] + 1 or now[2] > old[2] + RESIDENT_KIB_MORE
    ]


def go_on(peers: Sequence[Peer], sums: int = 3) -> None:
    """All get further."""
    goals = [peer.sums()[-1]["op"] + sums for peer in peers]
    until(
        lambda: all(p.sums()[-1]["op"] >= goal for p, goal in zip(peers, goals, strict=True)),
        "further sums",
        30,
    )


def places_of(coordinator: Coordinator) -> list[Place]:
    return [status.place for status in coordinator.machine._peers.statuses()]


# ---------------------------------------------------------------- strangers


def descriptors(rng: random.Random) -> list[int]:
    """Anything but one sealed piece of memory."""
    how = rng.randrange(5)
    if how == 0:
        return list(os.pipe())
    if how == 1:
        return [os.open("/dev/null", os.O_RDWR)]
    count = rng.choice((1, 2, 3, 9))
    found = [os.memfd_create("hostile", os.MFD_ALLOW_SEALING) for _ in range(count)]
    for fd in found:
        os.ftruncate(fd, rng.choice((0, 1, 4096, 4 * 1024 * 1024)))
        if how > 2:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, rng.choice((0, 0xF, fcntl.F_SEAL_SHRINK)))
    return found


def attack_all_ports(coordinator: Coordinator, seed: int, frames: int) -> int:
    """At every port at once; how many frames were sent."""
    rng, sent = random.Random(seed), 0
    jobs: list[Callable[[], None]] = []
    share = frames // 10
    at_coordinator = partial(dial_tcp, coordinator.address)
    jobs.append(partial(strangers, random.Random(rng.random()), at_coordinator, 3 * share))
    jobs.append(partial(wrong_frames, random.Random(rng.random()), at_coordinator, STRANGER, share))
    sent += 4 * share
    for place in places_of(coordinator):
        for dial in (partial(dial_tcp, place.address), partial(dial_unix, place.local)):
            own = random.Random(rng.random())
            jobs.append(partial(strangers, own, dial, share * 2 // 3 + 1))
            passed = partial(descriptors, own)
            jobs.append(partial(wrong_joins, own, dial, STRANGER, share // 3 + 1, passed))
            sent += share
    failed: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return sent


def test_ten_thousand_wrong_frames(capfd: pytest.CaptureFixture[str]) -> None:
    with honest_fleet(capfd) as (coordinator, peers):
        began, view = peers[0].sums()[-1]["op"], coordinator.machine.hard.view.number
        began_s = time.monotonic()
        assert attack_all_ports(coordinator, 1, 10_000) >= 10_000
        print(f"{time.monotonic() - began_s:.1f} s, {peers[0].sums()[-1]['op'] - began} sums")
        assert peers[0].sums()[-1]["op"] > began + 10
        assert coordinator.machine.hard.view.number == view, "nobody had to stop for that"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_wrong_frames_with_fresh_seeds(capfd: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("FTRAIN_TEST_SEED", secrets.randbelow(10**9)))
    with honest_fleet(capfd) as (coordinator, _):
        for number in range(20):
            print(f"seed {seed + number}")
            attack_all_ports(coordinator, seed + number, 10_000)


# ---------------------------------------------------------------- broken members


class Broken:
    """A member in this process, which adds up with the others."""

    def __init__(self, coordinator: Coordinator, incarnation: int, links: str = "memory") -> None:
        settings = FleetSettings(ring=RingSettings(share_memory=links == "memory"))
        self.fleet = Fleet(coordinator.address, "run", SECRET, 3, incarnation, settings=settings)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(FtrainError):
            self.fleet.wait_for_view(20)
            while True:
                all_reduce(self.fleet, torch.full((100_000,), 8.0)).wait(20)

    @property
    def out(self) -> str:
        """Why it is out."""
        return str(self.fleet._error or "")

    def say(self, nasty: Nasty) -> None:
        link = self.fleet._link
        link.call(lambda: link._send(None, nasty(link.machine.status)))

    def end(self) -> None:
        self.fleet.close()
        self._thread.join()


@contextmanager
def broken_member(
    coordinator: Coordinator, peers: Sequence[Peer], incarnation: int, links: str = "memory"
) -> Iterator[Broken]:
    """In the view, and removed at the end, without the others."""
    broken = Broken(coordinator, incarnation, links)
    try:
        until(lambda: 3 in last_members(peers[0]), "a sum with it", 20)
        yield broken
        until(lambda: last_members(peers[0]) == [*HONEST], "a sum without it", 20)
        go_on(peers)
    finally:
        broken.end()


def _state(number: int, tag: int = 0, held: bytes = b"") -> OpState:
    return OpState(OpId(tag, number), 1, False, held)


NASTY: dict[str, Nasty] = {
    "view 2**62": lambda s: replace(s, sequence=s.sequence + 9, view=2**62),
    "number 2**31 - 1": lambda s: replace(s, sequence=s.sequence + 9, number=2**31 - 1),
    "negative": lambda s: replace(s, sequence=s.sequence + 9, number=-1),
    "a view that never was": lambda s: replace(s, sequence=s.sequence + 9, view=s.view + 1),
    "lost in the future": lambda s: replace(s, sequence=s.sequence + 9, lost=(Lost(0, "", 2**30),)),
    "many lost": lambda s: replace(
        s, sequence=s.sequence + 9, lost=(Lost(0, "", s.view),) * (LOST_MAX + 1)
    ),
    "many operations": lambda s: replace(
        s, sequence=s.sequence + 9, ops=tuple(map(_state, range(OPS_MAX + 1)))
    ),
    "huge tag": lambda s: replace(s, sequence=s.sequence + 9, counts=((2**40, 1),)),
    "huge count": lambda s: replace(s, sequence=s.sequence + 9, counts=((0, 2**62),)),
    "another place": lambda s: replace(
        s, sequence=s.sequence + 9, place=replace(s.place, address="127.0.0.1:9")
    ),
    "place of another": lambda s: replace(
        s, sequence=s.sequence + 9, place=replace(s.place, node=0)
    ),
    "sequence 2**63": lambda s: replace(s, sequence=2**63 - 1),
}
CLOSES: dict[str, Nasty] = {  # the connection only: it comes back
    "status of another": lambda s: replace(s, peer=0, sequence=2**40),
    "another life": lambda s: replace(s, incarnation=2**40),
    "a directive": lambda s: FleetDirective(0, 1, Order.LEAVE, 2**30),
    "an end": lambda s: PeerGone(0, 1, "so it says"),
}


def test_a_member_that_says_what_cannot_be_is_removed_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with honest_fleet(capfd) as (coordinator, peers):
        for incarnation, (name, nasty) in enumerate(NASTY.items(), 1):
            number = coordinator.machine.hard.number
            with broken_member(coordinator, peers, incarnation) as broken:
                broken.say(nasty)
                until(lambda: bool(broken.out), f"the end of who said: {name}")
            assert coordinator.machine.hard.number <= number + 6, name


def test_a_member_that_speaks_for_others_is_cut_off_and_harms_nobody(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with (
        honest_fleet(capfd) as (coordinator, peers),
        broken_member(coordinator, peers, 1) as broken,
    ):
        for nasty in CLOSES.values():
            channel = broken.fleet._link._channel
            broken.say(nasty)
            until(lambda: broken.fleet._link._channel not in (None, channel), "a new one")  # noqa: B023
            go_on(peers)
            assert set(last_members(peers[0])) == {*HONEST, 3}
        broken.fleet.close()


def test_counts_that_nobody_can_come_to_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """A member that claims, when a change comes, to be 100,000 operations ahead."""
    with (
        honest_fleet(capfd) as (coordinator, peers),
        broken_member(coordinator, peers, 1) as broken,
    ):
        machine = broken.fleet._machine
        held = machine.held
        machine.held = lambda number, counts: held(number, ((0, 2**31),))  # type: ignore[method-assign]
        came = Peer(coordinator.address, 5, 1, 100_000, "memory")
        until(lambda: bool(broken.out), "its end")
        until(lambda: 5 in last_members(peers[0]), "who came meanwhile", 20)
        came.end()


# ---------------------------------------------------------------- lanes


def other_op(rng: random.Random, head: Head) -> Head:
    return replace(head, op=OpId(head.op.tag, head.op.number + rng.choice((1, 9, 10**6))))


def other_chunk(rng: random.Random, head: Head) -> Head:
    field = rng.choice(("phase", "segment", "number", "part"))
    return replace(head, **{field: getattr(head, field) + rng.choice((1, 2, 100))})


def other_length(rng: random.Random, head: Head) -> Head:
    return replace(head, nbytes=max(0, head.nbytes + rng.choice((-4, -1, 1, 4, 10**6))))


def other_value(rng: random.Random, head: Head) -> Head:
    return replace(head, value=head.value ^ 1 << rng.randrange(64))


def other_meaning(rng: random.Random, head: Head) -> Head:
    return replace(head, word=Word.BEGUN, value=rng.randrange(1, 2**64), number=1, nbytes=0)


def gives_up(rng: random.Random, head: Head) -> Head:
    return Head(Word.HALT)


Change = Callable[[random.Random, Head], Head]
CHANGES: dict[str, Change | None] = {
    "bits": None,
    "operation": other_op,
    "chunk": other_chunk,
    "length": other_length,
    "meaning": other_meaning,
    "halt": gives_up,
}


class Garbler:
    """In place of :meth:`HeadSender.seal` of this process, where only the broken member has one."""

    def __init__(self, rng: random.Random, change: Change | None) -> None:
        self.rng, self.change = rng, change
        self.armed = False
        self._seal = HeadSender.seal

    def __call__(self, sender: HeadSender, head: Head) -> bytes:
        if not self.armed or head.word is not Word.CHUNK or self.rng.random() < 0.5:
            return self._seal(sender, head)
        if self.change is not None:
            return self._seal(sender, self.change(self.rng, head))
        sealed = bytearray(self._seal(sender, head))
        sealed[self.rng.randrange(len(sealed))] ^= 1 << self.rng.randrange(8)
        return bytes(sealed)


@pytest.mark.parametrize("links", ["memory", "tcp"])
def test_a_member_that_sends_garbage_on_its_lane_is_removed_alone(
    links: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(4)
    changes = dict(CHANGES) | ({"checksum": other_value} if links == "tcp" else {})
    with honest_fleet(capfd, links) as (coordinator, peers):
        for incarnation, (name, change) in enumerate(changes.items(), 1):
            garbler = Garbler(rng, change)
            monkeypatch.setattr(HeadSender, "seal", lambda *a, g=garbler: g(*a))
            with broken_member(coordinator, peers, incarnation, links) as broken:
                garbler.armed = True
                until(lambda: bool(broken.out), f"the end of who changed: {name}", 20)
                print(f"{links} {name}: {broken.out}")
            monkeypatch.undo()


@pytest.mark.parametrize("how", ["too large", "write-sealed"])
def test_memory_that_is_not_as_agreed_keeps_its_owner_out(
    how: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    send = shared_lane.socket.send_fds

    def spoil(sock: Any, data: Any, fds: Sequence[int], *rest: Any) -> int:
        fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
        size = os.fstat(fds[0]).st_size
        os.ftruncate(fd, size + (4096 if how == "too large" else 0))
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | (how == "write-sealed" and fcntl.F_SEAL_WRITE))
        try:
            return send(sock, data, [fd], *rest)
        finally:
            os.close(fd)

    with honest_fleet(capfd) as (coordinator, _):
        monkeypatch.setattr(shared_lane.socket, "send_fds", spoil)
        broken = Broken(coordinator, 1)
        until(lambda: bool(broken.out), "a refusal", 20)
        assert "join again" in broken.out
        broken.end()
        monkeypatch.undo()


# ---------------------------------------------------------------- what can't be said


def test_what_is_possible_is_not_refused() -> None:
    place = Place(3, 1, "127.0.0.1:1", "", "")
    status = PeerStatus(
        3, 1, 5, place, 4, 5, Stage.HALTED, ((0, 9), (7, 1)), (_state(8),), (Lost(2, "x", 4),)
    )
    assert not fault_of_status(status)
    directive = FleetDirective(3, 1, Order.RUN, 5, 5, (3,), (place,), (3,), ((0, 9),), True)
    assert not fault_of_directive(directive)
    for wrong in (
        replace(directive, number=2**62, view=2**62),
        replace(directive, view=6),
        replace(directive, ring=(3, 3), members=(3, 3)),
        replace(directive, members=(3, 4)),
        replace(directive, places=()),
        replace(directive, ring=(3, 4), members=(3, 4)),
        replace(directive, places=(replace(place, address="nowhere"),)),
        replace(directive, first=((0, 2**32),)),
        replace(directive, first=((0, 1), (0, 2))),
        replace(directive, ping=-1),
    ):
        assert fault_of_directive(wrong), wrong
