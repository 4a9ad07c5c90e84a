"""What changes of a fleet's membership cost its coordinator, as the fleet grows.

::

    python benchmarks/fleet_scale.py [--groups 8 64 256 1000]

No processes: the machines of coordinator and peers over a network in memory that delivers every
message after one tick and loses none.  Effects (building a ring, halting one) take no time, so what
is counted is what the protocol itself needs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

from common import Record, print_table, write_results

from ftrain.comms import wire
from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator, Phase
from ftrain.comms.fleet.protocol.messages import OpState, PeerGone, Stall
from ftrain.comms.fleet.protocol.peer import (
    Build,
    FleetPeer,
    Halt,
    Hold,
    Install,
    Leave,
    Switch,
)
from ftrain.comms.fleet.protocol.peers import Limits
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId

HOST = "1f0c8a7e-6a0b-4a70-9a57-6f2f6f8f2f0b-4026531840"  # as long as in reality
COUNTS = ((0, 12345),)
UNDER_WAY = (OpState(OpId(0, 12344), 1, False, bytes(range(1, 17))),)
SETTLED_TICKS = 12  # nothing is said in so many
TICKS_MAX = 400


@dataclass(frozen=True)
class Cost:
    """Of one change, as the coordinator sees it."""

    up: int  # messages to the coordinator
    down: int  # messages of the coordinator
    rounds: int  # one-way delays from what happened to the last message
    up_bytes_max: int
    down_bytes_max: int
    nbytes: int  # of all messages
    coordinator_s: float  # CPU time

    @property
    def messages(self) -> int:
        """Both ways."""
        return self.up + self.down


class IdealFleet:
    """A coordinator and one peer for each of ``groups`` members, all in the first view."""

    def __init__(self, groups: int) -> None:
        # Silence is told of, as Stall, in the tick after: the limits are what is left to wait.
        self.limits = Limits(silence_ticks=10)
        self.coordinator = FleetCoordinator(members_expected=groups, limits=self.limits)
        self.peers: dict[int, FleetPeer] = {}
        self.deaf: set[int] = set()
        self.up: list[object] = []
        self.down: list[tuple[int, object]] = []
        self.counted: list[tuple[bool, object]] = []
        self.now = self.last = 0
        self.coordinator_s = 0.0
        for number in range(groups):
            self.begin(number)
        self.settle()

    def begin(self, number: int, incarnation: int = 1) -> None:
        """A member connects."""
        place = Place(number, incarnation, f"10.0.{number // 256}.{number % 256}:40000", HOST, HOST)
        self.peers[number] = FleetPeer(place)
        self._by_coordinator(lambda: self.coordinator.connected(number, incarnation))
        self.peers[number].connected()

    def kill(self, number: int) -> None:
        """A process ends, of which its launcher and both neighbours in the ring tell."""
        peer = self.peers.pop(number)
        incarnation = peer.status.incarnation
        self._by_coordinator(lambda: self.coordinator.disconnected(number, incarnation))
        self.up.append(PeerGone(number, incarnation, "signal 9"))
        members = self.coordinator.hard.view.numbers
        at = members.index(number)
        for other in {members[at - 1], members[(at + 1) % len(members)]} - {number}:
            lost = self.peers[other]
            lost.lost(lost.status.view, number, "it closed the connection")

    def stop(self, number: int) -> None:
        """A process stands still, and so do the others' operations."""
        self.deaf.add(number)
        for other, peer in self.peers.items():
            if other != number:
                peer.stall(Stall.STUCK)

    def measure(self) -> Cost:
        """Let it come to rest; the cost of what happened since it last did."""
        began = self.now
        self.counted, self.coordinator_s = [], 0.0
        self.settle()
        sizes = {
            way: [len(wire.encode(m)) for up, m in self.counted if up is way]
            for way in (True, False)
        }
        return Cost(
            len(sizes[True]),
            len(sizes[False]),
            self.last - began,
            max(sizes[True], default=0),
            max(sizes[False], default=0),
            sum(sizes[True]) + sum(sizes[False]),
            self.coordinator_s,
        )

    def steady(self, ticks: int) -> int:
        """Messages in so many ticks in which nothing happens."""
        self.counted = []
        for _ in range(ticks):
            self._tick()
        return len(self.counted)

    def settle(self) -> None:
        """Until nothing is said any more."""
        self.last = began = self.now
        while self.now - self.last < SETTLED_TICKS or self.coordinator.phase is not Phase.STEADY:
            self._tick()
            assert self.now - began < TICKS_MAX, f"no rest: {self.coordinator.phase}"

    def _tick(self) -> None:
        self.now += 1
        up, down, self.up, self.down = self.up, self.down, [], []
        for address, message in down:
            if address in self.peers and address not in self.deaf:
                self.peers[address].receive(message)
        for number, peer in list(self.peers.items()):
            if number not in self.deaf:
                peer.tick()
                self._pump(number, peer)
        for message in up:
            self._by_coordinator(partial(self.coordinator.receive, message))
        self._pump_coordinator()
        self._by_coordinator(self.coordinator.tick)
        self._pump_coordinator()

    def _by_coordinator(self, what: Callable[[], None]) -> None:
        began_s = time.process_time()
        what()
        self.coordinator_s += time.process_time() - began_s

    def _pump_coordinator(self) -> None:
        began_s = time.process_time()
        ready = self.coordinator.ready()
        self.coordinator_s += time.process_time() - began_s
        self._count(False, [message for _, message in ready.messages])
        self.down += ready.messages  # type: ignore[arg-type]

    def _pump(self, number: int, peer: FleetPeer) -> None:
        while ready := peer.ready():
            said = [message for _, message in ready.messages]
            self._count(True, said)
            self.up += said
            for effect in ready.effects:
                self._perform(number, peer, effect)

    def _count(self, up: bool, messages: Iterable[object]) -> None:
        for message in messages:
            self.counted.append((up, message))
            self.last = self.now

    def _perform(self, number: int, peer: FleetPeer, effect: object) -> None:
        if isinstance(effect, Build):
            peer.built(effect.view)
        elif isinstance(effect, Hold):
            peer.held(effect.number, COUNTS)
        elif isinstance(effect, Halt):
            peer.halted(effect.number, COUNTS, UNDER_WAY)
        elif isinstance(effect, Install | Switch):
            peer.stall(Stall.NO)
            peer.moved(effect.view)
        elif isinstance(effect, Leave):
            del self.peers[number]
            self.coordinator.disconnected(number, peer.status.incarnation)


CHANGES = ("failure", "join", "leave", "eviction")


def change(groups: int, what: str) -> Cost:
    """What one change costs a fleet of so many groups."""
    fleet = IdealFleet(groups)
    if what == "failure":
        fleet.kill(groups // 2)
    elif what == "join":
        fleet.begin(groups)
    elif what == "leave":
        fleet.peers[groups // 2].leave()
    else:
        fleet.stop(groups // 2)
    return fleet.measure()


HEAD = ("groups", "change", "up", "down", "rounds", "largest, bytes", "all, bytes", "CPU, ms")


def main() -> None:
    """Print the table, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 64, 256, 1000])
    arguments = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    records: list[Record] = []
    for groups in arguments.groups:
        rows.append((groups, "none in 100 ticks", IdealFleet(groups).steady(100), 0, 0, 0, 0, 0))
        for what in CHANGES:
            cost = change(groups, what)
            largest = max(cost.up_bytes_max, cost.down_bytes_max)
            took = f"{cost.coordinator_s * 1e3:.1f}"
            rows.append((groups, what, cost.up, cost.down, cost.rounds, largest, cost.nbytes, took))
            records.append({"groups": groups, "change": what, **asdict(cost)})
    print_table("the coordinator's messages for a change of the membership", HEAD, rows)
    write_results("fleet_scale", {"changes": records})


if __name__ == "__main__":
    main()
