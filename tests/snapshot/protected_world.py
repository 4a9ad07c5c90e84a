"""A group of nodes that capture, commit and protect versions, lose nodes and go on from a plan.

The machines are the real ones (custody, version commit, protection, keeping, the planner); network,
ranks, agents and coordinator are drawn at random.  Messages are lost, come late and come twice.
What is checked is checked from outside, against what lies in the nodes' memory.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import combinations

from protected_node import PARITY_SLOTS, Group, Node, Rules, Violation, regained

from ftrain.comms.protocol.messages import (
    Held,
    HeldParity,
    NodePlace,
    RestorePlan,
    RoundId,
    VersionId,
)
from ftrain.recovery.protocol.planner import Memory

Inventory = tuple[tuple[Held, ...], tuple[HeldParity, ...]]

_LATE_TICKS = 60
_SPARE = 1000  # number of a node that is imagined in the place of a lost one


class World:
    """``nodes`` seats with some ranks each, of which ``parity`` may be lost at once."""

    def __init__(self, rules: Rules, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.rules = rules
        self.count = draw.randint(2, 6)
        self.parity = draw.randint(1, 2)
        self.stands = min(self.parity, self.count - 1)
        self.slots = draw.randint(2, 4)
        per_node = draw.choice((1, 1, 2))
        self.local = per_node
        self.loss = draw.choice((0.0, 0.1, 0.3))
        self.haste = draw.choice((0.2, 0.5, 0.9))  # of ranks
        self.diligence = draw.choice((0.3, 0.6, 0.9))  # of who makes parity
        self.promptness = draw.choice((0.04, 0.1, 0.4))  # of agents
        self.fault_rate = draw.choice((0.01, 0.03, 0.06))
        self.counts: Counter[str] = Counter()
        self.now = self.numbers = self.incarnations = self.sequence = 0
        self.flying: list[tuple[int, int, tuple[int, int], tuple[int, int], object]] = []
        self.epoch, self.stopping, self.formed = 1, False, False
        self.steps, self.faulty = True, True
        self.base: VersionId | None = None
        self.committed: VersionId | None = None  # newest of this lineage, by anybody's word
        self.goal: VersionId | None = None  # newest that was protected everywhere
        self.weak: set[int] = set()  # seats that had no part in that
        self.over: set[RoundId] = set()
        self.down: dict[int, int] = {}  # node -> when its manager starts again
        self.reports: dict[int, Inventory] = {}
        self.found: dict[int, Inventory] = {}  # in memory, when it was looked at last
        self.orders: dict[int, Group] = {}  # by seat
        self.rebuilds: dict[int, int] = {}  # node -> when what it rebuilds is fetched
        self.seats: list[Node | None] = [self._node(seat) for seat in range(self.count)]
        self.cursor = dict.fromkeys(range(self.count * per_node), 0)
        self.checked: object = None
        self._order_all(RestorePlan("fresh"))

    # ------------------------------------------------------------ nodes and messages

    @property
    def nodes(self) -> list[Node]:
        """Those whose memory is there."""
        return [node for node in self.seats if node is not None]

    def _node(self, seat: int, number: int | None = None) -> Node:
        if number is None:
            number = self.numbers
            self.numbers += 1
        self.incarnations += 1
        return Node(
            number,
            self.incarnations,
            tuple(range(seat * self.local, (seat + 1) * self.local)),
            self.slots,
            self.rules,
            self._post,
            self._protected,
            self._committed,
            self._count,
        )

    def _of(self, number: int) -> Node | None:
        return next((node for node in self.nodes if node.number == number), None)

    def _reach(self, number: int) -> Node | None:
        node = self._of(number)
        return node if node is not None and node.up else None

    def _count(self, what: str) -> None:
        self.counts[what] += 1

    def _post(self, sender: Node, to: int, message: object) -> None:
        if sender.group is None or to not in sender.group.members:
            return
        if self.draw.random() < self.loss:
            self._count("message lost")
            return
        copies = 1
        if self.faulty and self.draw.random() < 0.1:
            copies = 2
            self._count("message twice")
        for _ in range(copies):
            delay = self.draw.randint(0, 3)
            if self.faulty and self.draw.random() < 0.06:
                delay = self.draw.randint(10, _LATE_TICKS)
                self._count("message late")
            self.sequence += 1
            source = sender.number, sender.incarnation
            target = to, sender.group.members[to]
            heappush(self.flying, (self.now + delay, self.sequence, source, target, message))

    def _deliver(self) -> None:
        while self.flying and self.flying[0][0] <= self.now:
            _, _, source, target, message = heappop(self.flying)
            node = self._reach(target[0])
            if node is None or node.incarnation != target[1] or node.group is None:
                continue
            if node.group.members.get(source[0]) == source[1]:
                node.receive(message)

    # ------------------------------------------------------------ what nodes say

    def _committed(self, version: VersionId) -> None:
        if version.epoch != self.epoch or None in self.seats:
            return  # a node that was lost since may have been needed for it
        if self.committed is None or version > self.committed:
            self.committed = version
            self._count("committed")

    def _protected(self, node: Node, round_: RoundId, version: VersionId) -> None:
        if round_ in self.over:
            return
        self.over.add(round_)
        self._count("round over")
        for other in self.nodes:
            parity = other.parity.get(round_)
            if parity is None or parity.held.version != version:
                raise Violation(
                    f"node {node.number} says {round_} is over, {other.number} has none"
                )
        absent = {seat for seat, there in enumerate(self.seats) if there is None}
        if len(absent) > self.stands:  # it was over a moment before they were lost
            return
        if round_.epoch == self.epoch and (self.goal is None or version >= self.goal):
            self.goal = version
            self.weak = absent

    # ------------------------------------------------------------ one unit of time

    def tick(self) -> None:
        """Everybody does something."""
        self.now += 1
        self._deliver()
        for node in self.nodes:
            if node.up and self.draw.random() < 0.9:
                node.tick()
        if self.formed and self.steps:
            for _ in range(len(self.cursor)):
                self._rank()
        for node in self.nodes:
            if node.up and self.draw.random() < self.diligence:
                node.work(self._reach)
            if node.up and self.faulty and self.draw.random() < 0.01:
                node.run_short()
        self._rebuild()
        self._coordinate()
        for number, due in list(self.down.items()):
            restarted = self._of(number)
            if due <= self.now:
                del self.down[number]
                if restarted is not None and not restarted.up:
                    self._count("manager started again")
                    restarted.start()
                    if restarted.rebuilding is not None:
                        self.rebuilds.setdefault(number, self.now + self.draw.randint(0, 20))
        troubled = self.stopping or bool(self.weak) or bool(self.rebuilds)
        if self.faulty and self.draw.random() < self.fault_rate * (2 if troubled else 1):
            self._fault()

    def _rank(self) -> None:
        node = self.draw.choice(self.nodes)
        rank = self.draw.choice(node.ranks)
        group = node.group
        if not node.up or node.said_last or group is None or group.epoch != self.epoch:
            return
        if self.draw.random() > self.haste:
            return
        if node.writes(rank):
            node.seal(rank, ahead=self.draw.random() < 0.7)
            return
        if self.stopping:
            return
        step = self.cursor[rank] + 1
        if step > min(self.cursor.values()) + 1:
            return
        self.cursor[rank] = step
        if self.faulty and self.draw.random() < 0.03:
            self._count("rank skipped a version by itself")
            return
        why = node.begin(rank, VersionId(self.epoch, step))
        self._count(f"denied {why.partition(':')[0]}" if why else "begun")

    def _rebuild(self) -> None:
        """It goes on while nodes stop, and until the node hears of another group."""
        for number, due in list(self.rebuilds.items()):
            node = self._of(number)
            group = node.group if node is not None else None
            if node is None or group is None or group.rebuild is None or node.rebuilding is None:
                del self.rebuilds[number]
                continue
            if due > self.now or not node.up:
                continue
            there = [n for n in self.nodes if n.up and n is not node]
            peers = [n for n in there if group.members.get(n.number) == n.incarnation]
            images, version, why = regained(group.rebuild, peers)
            if images is None and len(peers) < len(group.members) - 1:
                self._count("rebuilding waits for a manager")
                continue
            if images is None or version is None or version != group.base:
                if group.epoch == self.epoch and not self.stopping:
                    raise Violation(f"node {number} can't rebuild {group.base}: {why}, {version}")
                continue
            del self.rebuilds[number]
            self._count("rebuilt" + (" while stopping" if self.stopping else ""))
            node.put_back(images, version)

    # ------------------------------------------------------------ faults

    def _fault(self) -> None:
        kind = self.draw.random()
        if kind < (0.7 if self.stopping else 0.45):
            node = self.draw.choice(self.nodes)
            if node.up:
                node.up = False
                self._count("manager killed" + (" while stopping" if self.stopping else ""))
                self.down[node.number] = self.now + self.draw.choice((1, 3, 25))
        elif kind < 0.6:
            self._count("rank killed")
            self._stop()
        elif kind < 0.98:
            self._lose()
        elif self.draw.random() < 0.5:
            self._lose(too_many=True)

    def _lose(self, *, too_many: bool = False) -> None:
        there = [seat for seat, node in enumerate(self.seats) if node is not None]
        seats = self.draw.sample(there, min(len(there) - 1, self.draw.choice((1, self.stands))))
        if len(self.weak.union(seats)) > self.stands:  # the same again
            seats = [seat for seat in self.weak if seat in there][: len(there) - 1]
        if too_many:
            seats = self.draw.sample(there, min(len(there) - 1, self.stands + 1))
        if not seats:
            return
        lost = self.weak.union(seats)
        if len(lost) > self.stands:
            if not too_many:
                return
            self._count("more lost than parity stands")
            self.goal = self.committed = None
        if not self.goal:
            self.committed = None
        self._count(f"{len(seats)} nodes lost at once")
        if self.rebuilds:
            self._count("node lost during rebuilding")
        elif self.weak:
            self._count("node lost before all was protected again")
        for seat in seats:
            node = self.seats[seat]
            assert node is not None
            self.reports.pop(node.number, None)
            self.down.pop(node.number, None)
            self.seats[seat] = None
        self.weak = lost
        self._stop()

    # ------------------------------------------------------------ agents and coordinator

    def _stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.reports, self.orders = {}, {}

    def _coordinate(self) -> None:
        if self.stopping:
            for node in self.nodes:
                if node.up and node.number not in self.reports and self._promptly():
                    node.said_last = True
                    node.freeze()
                    self.reports[node.number] = node.held(), node.parities()
            if len(self.reports) == len(self.nodes) and self.draw.random() < 0.3:
                self._form()
            return
        for seat, group in list(self.orders.items()):
            there = self.seats[seat]
            if there is not None and there.up and self._promptly():
                del self.orders[seat]
                there.set_group(group)
                if there.rebuilding is not None:
                    self.rebuilds[there.number] = self.now + self.draw.randint(0, 20)
        if not self.orders and not self.rebuilds:
            self.formed = True

    def _promptly(self) -> bool:
        return self.draw.random() < self.promptness

    def _form(self) -> None:
        """Every node said what it holds: replace those that are lost, and make the plan."""
        for seat, node in enumerate(self.seats):
            if node is None:
                again = self.draw.random() < 0.4
                numbers = [n for n in range(self.numbers) if self._of(n) is None]
                number = self.draw.choice(numbers) if again and numbers else None
                new = self.seats[seat] = self._node(seat, number)
                self.reports[new.number] = (), ()
        held = {number: report[0] for number, report in self.reports.items()}
        parity = {number: report[1] for number, report in self.reports.items()}
        plan = self.rules.plan(self._memory(self.nodes, held, parity))
        self._require(plan, "the plan")
        self._count(f"plan from {plan.level}")
        self._order_all(plan)

    def _order_all(self, plan: RestorePlan) -> None:
        kept = {
            seat
            for seat, node in enumerate(self.seats)
            if node is not None and plan.round is not None and self._takes_part(node, plan.round)
        }
        weak = set(range(self.count)) - kept
        if plan.version is None or not plan.in_memory:
            self.goal = None
        if self.goal is not None and len(weak) > len(self.weak):
            raise Violation(f"{plan.round} is worth less than what there was: {weak}, {self.weak}")
        self.weak = weak
        self.base = self.committed = plan.version
        if self.now:
            self.epoch += 1
        self.stopping = self.formed = False
        members = {node.number: node.incarnation for node in self.nodes}
        group = Group(self.epoch, members, plan.version, plan.round, self.parity)
        rebuilds = {rebuild.node: rebuild for rebuild in plan.rebuilds}
        for seat, node in enumerate(self.seats):
            assert node is not None
            self.orders[seat] = replace(group, rebuild=rebuilds.get(node.number))
        self.cursor = dict.fromkeys(self.cursor, plan.version.step if plan.version else 0)

    def _takes_part(self, node: Node, round_: RoundId) -> bool:
        """Whether all that a round needs of a node is there."""
        parity = node.parity.get(round_)
        return parity is not None and bool(node.in_memory(parity.held.version))

    def _memory(
        self,
        nodes: Sequence[Node],
        held: dict[int, tuple[Held, ...]],
        parity: dict[int, tuple[HeldParity, ...]],
    ) -> Memory:
        """As the coordinator sees it; seats of which no node is given get an empty one."""
        by_seat = {node.ranks[0] // self.local: node.number for node in nodes}
        places = tuple(
            NodePlace(by_seat.get(seat, _SPARE + seat), 0, seat * self.local, self.local, "", "")
            for seat in range(self.count)
        )
        reached = max(self.cursor.values())
        return Memory(places, held, parity, reached, 1.0)

    # ------------------------------------------------------------ the invariants

    def _require(self, plan: RestorePlan, what: str) -> None:
        """What was protected comes back, and what a plan names is kept."""
        if self.goal is not None and (plan.version is None or plan.version < self.goal):
            raise Violation(f"{what} goes back to {plan.version}, {self.goal} was protected")
        if any(rebuild.round != plan.round for rebuild in plan.rebuilds):
            raise Violation(f"{what} rebuilds from {plan.rebuilds} and keeps {plan.round}")

    def check(self) -> None:
        """From outside, in what lies in memory now."""
        for node in self.nodes:
            if node.up:
                self._check_kept(node)
        self.found = {node.number: (node.held(), node.parities()) for node in self.nodes}
        known = self.found, self.goal, self.weak
        if known == self.checked:
            return
        self.checked = known
        whole = len(self.nodes) == self.count and not self.orders and not self.rebuilds
        if whole and self.committed is not None:
            plan = self._imagine(set())
            if plan.version is None or plan.version < self.committed:
                raise Violation(f"{self.committed} was committed, the newest is {plan.version}")
        if self.goal is not None:
            for lost in self._losses():
                self._imagine(lost)

    def _check_kept(self, node: Node) -> None:
        rounds = node.keeping.rounds
        if len(rounds) > PARITY_SLOTS + 1:
            raise Violation(f"node {node.number} keeps {len(rounds)} rounds")
        for round_, version in rounds.items():
            if round_ in node.parity and not node.in_memory(version).keys() >= set(node.ranks):
                raise Violation(f"node {node.number}: an image that {round_} needs was overwritten")

    def _losses(self) -> Iterator[set[int]]:
        """All that may be lost now, by seats."""
        strong = [seat for seat in range(self.count) if seat not in self.weak]
        for number in range(self.stands - len(self.weak) + 1):
            for lost in combinations(strong, number):
                yield set(lost)
                if self.weak:
                    yield self.weak.union(lost)

    def _imagine(self, lost: set[int]) -> RestorePlan:
        """The plan if these seats' nodes were lost now, carried out."""
        rest = [node for seat, node in enumerate(self.seats) if node and seat not in lost]
        held = {node.number: self.found[node.number][0] for node in rest}
        parity = {node.number: self.found[node.number][1] for node in rest}
        plan = self.rules.plan(self._memory(rest, held, parity))
        self._count("loss imagined")
        self._require(plan, f"without seats {lost}, the plan ({plan.reason})")
        if self.goal is not None and plan.version is not None:
            found: set[int] = set()
            for rebuild in plan.rebuilds:
                images, version, why = regained(rebuild, rest)
                if images is None or version != plan.version:
                    raise Violation(f"without seats {lost}, {rebuild} fails: {why}, got {version}")
                found |= set(images)
            for node in rest:
                found |= set(node.in_memory(plan.version))
            if found < set(self.cursor):
                raise Violation(f"without seats {lost}, {plan} gives only ranks {found}")
        return plan

    # ------------------------------------------------------------ from begin to end

    def run(self, ticks: int = 150) -> None:
        """Faults, then peace; checking all the time."""
        for number in range(ticks):
            self.tick()
            if number % 5 == 0:
                self.check()
        self.settle()

    def settle(self) -> None:
        """Without faults the newest version gets protected, and nothing else is kept."""
        self.faulty, self.loss = False, 0.0
        for number in self.down:
            self.down[number] = self.now
        self.diligence = self.haste = self.promptness = 0.9
        for number in range(130):
            self.steps = number < 70
            self.tick()
            if number % 20 == 0:
                self.check()
        if self.committed is None or self.committed.epoch != self.epoch:
            raise Violation(f"nothing is committed: {[n.protected for n in self.nodes]}")
        newest = self.committed
        if any(node.protected != newest for node in self.nodes):
            raise Violation(f"{newest} is not protected: {[n.protected for n in self.nodes]}")
        if any(len(node.keeping.rounds) != 1 for node in self.nodes):
            raise Violation(f"kept: {[sorted(node.keeping.rounds) for node in self.nodes]}")
