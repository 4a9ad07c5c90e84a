"""The simulated world: one coordinator, some nodes, a network, a disk, and everything that breaks.

The machines and the driver are the real ones.  Every random decision comes from the seed.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any

from sim_checkers import EXCUSES, TROUBLES, Checkers, Violation, demand
from sim_goal import goal_of, why_not
from sim_memory import restorable
from sim_network import Network
from sim_node import Life, SimNode, SimRank
from sim_schedule import FAULTY_TICKS, Fault, Options, Schedule

from ftrain.checkpoint.protocol.commit import VersionCommit
from ftrain.checkpoint.protocol.lineage import Fence, filed, next_fence, settling
from ftrain.comms.driver import Driver
from ftrain.comms.protocol.effects import EndJob, Form, Incident, Obstacle, Publish
from ftrain.comms.protocol.membership import Membership
from ftrain.comms.protocol.messages import (
    Directive,
    Formation,
    NodeGone,
    NodeState,
    Order,
    RestorePlan,
    StopRequest,
    VersionId,
)
from ftrain.comms.protocol.node import NodeMember
from ftrain.comms.protocol.records import MembershipHard
from ftrain.comms.protocol.transitions import Phase
from ftrain.recovery.protocol.plan import DurableVersion, choose_restore

SETTLE_TICKS_MAX = 900


@dataclass(frozen=True, slots=True)
class Machines:
    """What is simulated; mutants replace one of them."""

    membership: Callable[..., Membership] = Membership
    node: Callable[..., NodeMember] = NodeMember
    commit: Callable[..., VersionCommit] = VersionCommit
    driver: Callable[..., Driver[Any]] = Driver
    choose_restore: Callable[..., Any] = choose_restore
    same_incarnation: bool = False  # an agent that starts again calls itself what it was called


class Crashed(Exception):
    """The coordinator's process ends here."""


class Cluster:
    """One run of one schedule."""

    def __init__(self, schedule: Schedule, machines: Machines) -> None:
        self.options = schedule.options
        self.machines = machines
        self.rng = random.Random(schedule.seed)
        self.now = 0
        self.delivered: Counter[str] = Counter()  # faults that had an effect, by kind
        self.crash_points: Counter[str] = Counter()
        self.network = Network(self.rng, self.options.delay_ticks_max, self.delivered)
        self.checkers = Checkers()
        self.sealed: dict[VersionId, set[int]] = {}  # god's: ranks that sealed it, ever
        self.files: dict[tuple[int, VersionId], set[int]] = {}  # durable: ranks in it
        self.fences: list[Fence] = []  # the records beside them
        self.disk: MembershipHard | None = None
        self.slow_disk_until = -1
        self.seats: tuple[int, ...] = ()  # nodes of the last formation that was made and stored
        self.reached = 0  # highest boundary of any rank since the last formation
        self.furthest = 0  # ever
        self.incidents: list[Incident] = []
        self.reasons: list[str] = []
        self._faults = list(schedule.faults)
        self._armed: list[tuple[str, int]] = []  # faults that wait for their moment
        self._jobs: list[tuple[int, int, Life, Callable[[], None], Callable[[], None]]] = []
        self._job_count = 0
        self._crash_at = ""
        self._crash_ticks = 0
        self._coordinator_back = 0
        self._coordinator_stalled_until = -1
        self._coordinator_life = Life()
        self._node_back: dict[int, int] = {}
        self._stop_asked = False
        self.exit_code: int | None = None
        self.membership: Membership | None = None
        self.nodes = [SimNode(self, n, 1) for n in range(self.options.all_nodes)]
        self._start_coordinator()

    # ------------------------------------------------------------------ time

    def run(self) -> None:
        """Faulty weather, then fair weather in which progress is demanded."""
        while self.now < FAULTY_TICKS + 20:
            self.tick()
        self._heal()
        goal = goal_of(self)
        began = self.now
        while not goal():
            if self.now - began > SETTLE_TICKS_MAX:
                raise Violation(f"no progress in fair weather: {why_not(self)}")
            self.tick()

    def tick(self) -> None:
        """One tick of the world."""
        self.now += 1
        while self._faults and self._faults[0].at <= self.now:
            self._inject(self._faults.pop(0))
        self._restart_the_dead()
        self.network.deliver(self.now, self._deliver)
        while self._jobs and self._jobs[0][0] <= self.now:
            _, _, life, answer, pump = heapq.heappop(self._jobs)
            if life.alive:
                answer()
                self._guarded(pump)
        self._step_ranks()
        for node in self.nodes:
            if node.life.alive:
                node.tick()
        self._crash_half_started()
        if self.membership is not None and self.now >= self._coordinator_stalled_until:
            self._guarded(self.coordinator.tick)
        every = self.options.flush_every_ticks
        if every and self.now % every == 0 and self.membership is not None:
            self.membership.request_flush()
        alive = {n.number: r.epoch for n in self.nodes if n.life.alive for r in n.alive_ranks()}
        self.checkers.alive_epochs(alive)

    def later(
        self, life: Life, answer: Callable[[], None], pump: Callable[[], None], ticks: int = -1
    ) -> None:
        """Do something after some work; not when ``life`` is over by then."""
        work = self.rng.randint(0, self.options.work_ticks_max) if ticks < 0 else ticks
        self._job_count += 1
        heapq.heappush(self._jobs, (self.now + work, self._job_count, life, answer, pump))

    def _guarded(self, call: Callable[[], None]) -> None:
        """Run a piece of the coordinator, which may be killed in the middle of it."""
        try:
            call()
        except Crashed:
            self._kill_coordinator(self._crash_ticks)

    def _deliver(self, target: Hashable, message: object) -> None:
        if target == "coordinator":
            if self.membership is not None:
                self._guarded(lambda: self.coordinator.receive(message))
        elif isinstance(target, int):
            if self.nodes[target].life.alive:
                self.nodes[target].driver.receive(message)
        elif isinstance(target, tuple) and self.nodes[target[1]].life.alive:
            self.nodes[target[1]].hear_gossip(message)

    # ------------------------------------------------------------------ coordinator

    def _start_coordinator(self) -> None:
        self._coordinator_life = Life()
        self._crash_at = ""
        self.membership = self.machines.membership(
            nodes=self.options.nodes,
            spares=self.options.spares,
            hard=self.disk,
            max_restarts=self.options.max_restarts,
            lease_ticks=self.options.lease_ticks,
            flush_ticks=100,
            grace_ticks=400,
            save_at_end=self.options.save_at_end,
        )
        self.coordinator = self.machines.driver(
            self.membership, self._persist, self._direct, self._perform
        )
        self._guarded(self.coordinator.pump)

    def _kill_coordinator(self, down_ticks: int) -> None:
        self.membership = None
        self._crash_at = ""
        self._coordinator_life.alive = False
        self._coordinator_back = self.now + down_ticks

    def _crash_half_started(self) -> None:
        """The coordinator dies when one node runs and another has not noticed that it does."""
        if self._crash_at != "starting" or self.membership is None:
            return
        started = {n.number for n in self.nodes if n.member.report.state is NodeState.RUNNING}
        waited_for = self.checkers.members - started
        if self.membership.phase is Phase.STARTING and started and waited_for:
            for node in self.nodes:
                if node.number in waited_for:
                    node.blind_until = self.now + self._crash_ticks + 20
            self.delivered["coordinator dies"] += 1
            self.crash_points["starting"] += 1
            self._kill_coordinator(self._crash_ticks)

    def _crash_point(self, name: str) -> None:
        if self._crash_at == name:
            self.delivered["coordinator dies"] += 1
            self.crash_points[name] += 1
            raise Crashed

    def _persist(self, hard: MembershipHard) -> None:
        self._crash_point("before_persist")
        self.disk, self.seats = hard, hard.seats or self.seats
        assert self.membership is not None
        self.checkers.epoch_stored(hard.epoch, set(self.membership.members))
        self._crash_point("after_persist")

    def _direct(self, address: Hashable, directive: object) -> None:
        assert isinstance(directive, Directive)
        if directive.order is Order.RUN and directive.formation is not None:
            self.checkers.formation_announced(directive.formation)
            if directive.epoch > 1 and self.take("late_order", address):
                # One node hears of the formation late, and on another it fails at once.
                self.network.late(address, self.now + 40)
                self._armed.append(("fork_fails", (int(str(address)) + 1) % self.options.nodes))
        self.network.send(self.now, "coordinator", address, directive)
        self._crash_point("mid_send")

    def _perform(self, effect: object) -> None:
        self._crash_point("before_effect")
        assert self.membership is not None
        membership, pump = self.membership, self.coordinator.pump
        match effect:
            case Form():
                seats = tuple(p.node for p in effect.places)
                self.checkers.epoch_granted(effect.epoch, set(seats))
                self.checkers.seats_given(
                    self.seats, seats, {report.node for report in effect.reports}
                )
                slow = self.rng.randint(5, 40) if self.now < self.slow_disk_until else -1
                self.delivered["slow disk"] += slow > 0
                self.later(
                    self._coordinator_life, lambda: self._form(membership, effect), pump, slow
                )
            case Publish():
                slow = self.rng.randint(5, 60) if self.now < self.slow_disk_until else -1
                self.delivered["slow disk"] += slow > 0
                self.later(
                    self._coordinator_life, lambda: self._publish(membership, effect), pump, slow
                )
            case Incident():
                self.incidents.append(effect)
                lost = self.checkers.steps_lost
                counted = sum(i.steps_recomputed for i in self.incidents)
                demand(counted <= lost, f"{counted} steps recomputed are told, {lost} were lost")
            case EndJob():
                self._check_end(effect)

    def _form(self, membership: Membership, form: Form) -> None:
        if self.take("form_fails"):
            membership.formed(form.epoch, Obstacle("no port is free"))
            return
        world = sum(p.local_world for p in form.places)
        there = set().union(*(filed(f, v) for f, v in self.checkers.published))
        record = settling(self.fences, there) or Fence(0)
        mine = {v for _, v in self.checkers.published} - self.checkers.withdrawn
        good = {v for v in mine if record.shows(v)}
        durable = None
        if good:
            published = [(f, v) for f, v in self.checkers.published if v in good]
            fence, version = max(published, key=lambda p: (p[0], p[1].step))
            durable = DurableVersion(fence, version.step, "p", world, version.epoch)
        refused = frozenset(self.checkers.withdrawn)
        plan = self.machines.choose_restore(form.held, world, durable, refused)
        demand(plan.version not in refused, f"{plan.version} was withdrawn and is restored from")
        if membership.phase is Phase.FORMING and membership.hard.epoch == form.epoch:
            self._check_plan(form, plan, durable, world)
            step = 0 if plan.version is None else plan.version.step
            self.checkers.steps_lost += max(0, self.reached - step)
            self.reached = step
        if all(fence.fence < form.epoch for fence in self.fences):
            self.fences.append(next_fence(form.epoch, plan.parent, self.fences, there))
        formation = Formation(form.epoch, form.places, "h", form.epoch, plan, form.restarts)
        membership.formed(form.epoch, formation)

    def _check_plan(
        self, form: Form, plan: RestorePlan, durable: DurableVersion | None, world: int
    ) -> None:
        current = {n.number: n.incarnation for n in self.nodes if n.life.alive}
        if any(current.get(p.node) != p.incarnation for p in form.places):
            return  # memory was lost meanwhile, and the coordinator is about to hear of it
        seats = {p.node for p in form.places}
        held = list(form.held.items())
        found = restorable(held, world, sharded=self.options.sharded)
        best = max((v for v in found if v not in self.checkers.withdrawn), default=None)
        demand(
            plan.level != "memory" or self.restorable(plan.version, seats),
            f"{plan.version} is planned, but is not in memory",
        )
        if durable is not None:
            durable_id = VersionId(durable.fence, durable.step)
            best = max(best or durable_id, durable_id)
        self.checkers.plan_chosen(plan.version, best)

    def _publish(self, membership: Membership, publish: Publish) -> None:
        if self.take("torn_write"):
            membership.publish_failed("input/output error")
            return
        if (publish.fence, publish.version) not in self.checkers.published:
            written = self.files.get((publish.fence, publish.version), set())
            self.checkers.manifest_published(
                publish.fence, publish.version, written, self.options.world_size
            )
        membership.published(publish.fence, publish.version)

    def _check_end(self, end: EndJob) -> None:
        self.exit_code = end.exit_code
        if end.exit_code == 0:
            done = self.furthest >= self.options.steps_total
            demand(done, f"exit 0 before the last step: {end.reason}")
            last = self.checkers.newest_saved
            demand(
                not self.options.save_at_end
                or (last is not None and last.step >= self.options.steps_total),
                f"exit 0, and the last step is not durable, at most {last}: {end.reason}",
            )
            return
        given_up = self.membership is not None and bool(self.membership.hard.giving_up)
        unsaved = "every rank is done, but" in end.reason
        failed = "failures in a row" in end.reason or "can't be formed" in end.reason
        few = failed and self.options.max_restarts < Options().max_restarts
        asked = self._stop_asked or given_up or unsaved or few
        demand(asked, f"exit {end.exit_code} unasked: {end.reason}")
        trouble = any(self.delivered[kind] for kind in TROUBLES)
        if unsaved:
            world, total = self.options.world_size, self.options.steps_total
            sealed = [v for v, ranks in self.sealed.items() if len(ranks) == world]
            captured = any(v.step >= total for v in sealed)  # there was a slot for it
            demand(trouble or not captured, f"no need: {end.reason}")
        elif end.exit_code == 75 or (given_up and end.exit_code != 130):  # 130: by force
            # A disk that refuses, a lost node and the like excuse nobody who says all is saved.
            excused = given_up and trouble and any(why in end.reason for why in EXCUSES)
            self.checkers.ended_saved(end.reason)
            held, saved = self._held_everywhere(), self.checkers.newest_saved
            worth = held is not None and (held.step > 0 or not given_up)
            demand(
                excused or not worth or (saved is not None and held is not None and saved >= held),
                f"exit {end.exit_code} with {saved} saved, but all nodes hold {held}: {end.reason}",
            )

    def _held_everywhere(self) -> VersionId | None:
        held = [n.memory for n in self.nodes if n.life.alive and n.number in self.seats]
        versions = {i.version for m in held for i in m.images.values() if i.sealed}
        everywhere = [v for v in versions if all(m.sealed(v) == set(m.ranks) for m in held)]
        return max(everywhere, default=None) if len(held) == self.options.nodes else None

    # ------------------------------------------------------------------ ranks

    @property
    def nodes_down(self) -> bool:
        """Whether an agent that died is not there again yet."""
        return bool(self._node_back)

    def alive_ranks(self) -> list[SimRank]:
        """All ranks that have a process now."""
        return [r for n in self.nodes if n.life.alive for r in n.alive_ranks()]

    def restorable(self, version: VersionId | None, seats: Collection[int]) -> bool:
        """Whether ``version`` can still be read from the memory of those nodes that are alive."""
        there = [n for n in self.nodes if n.life.alive and n.number in seats]
        held = [(n.number, n.memory.held()) for n in there]
        return version in restorable(held, self.options.world_size, sharded=self.options.sharded)

    def _step_ranks(self) -> None:
        everyone: dict[int, list[SimRank]] = {}
        for node in self.nodes:
            for rank in node.ranks.values():
                everyone.setdefault(rank.epoch, []).append(rank)
        for node in self.nodes:
            if node.life.alive:
                for rank in node.alive_ranks():
                    self._step(node, rank, everyone[rank.epoch])

    def _step(self, node: SimNode, rank: SimRank, group: list[SimRank]) -> None:
        rng, options = self.rng, self.options
        if rank.boundary < 0 or rng.random() > options.step_probability:
            return
        if rank.capturing >= 0 and rng.random() < 0.6:
            node.seal(rank)
        if rank.in_step:
            if rank.joined <= rank.boundary:
                rank.joined = rank.boundary + 1
            complete = len(group) == rank.world_size and all(
                r.joined > rank.boundary for r in group
            )
            if complete and rank.capturing < 0:  # the optimizer waits for the capture
                rank.boundary += 1
                rank.in_step = False
                if rank.epoch == self.checkers.formed:  # else its node lost its seat
                    self.reached = max(self.reached, rank.boundary)
                self.furthest = max(self.furthest, rank.boundary)
                node.begin_capture(rank)
        elif rank.boundary >= options.steps_total:
            if rank.finished_at < 0:
                rank.finished_at = self.now
            if rank.capturing < 0 and self.now >= rank.finished_at + options.evaluate_ticks:
                rank.alive, rank.ended = False, True
        elif 0 <= rank.stop_at <= rank.boundary:
            if rank.capturing < 0:
                rank.alive, rank.ended, rank.stopped = False, True, True
        elif not rank.hold or rank.stop_at > rank.boundary:
            rank.in_step = True

    # ------------------------------------------------------------------ faults

    def _inject(self, fault: Fault) -> None:
        node = self.nodes[fault.node % len(self.nodes)]
        getattr(self, f"_fault_{fault.kind}")(fault, node)

    def take(self, kind: str, node: Hashable = None) -> bool:
        """Whether a fault was waiting for this moment (at ``node``; None: anywhere)."""
        for armed in self._armed:
            if armed[0] == kind and node in (None, armed[1]):
                self._armed.remove(armed)
                self.delivered[kind.replace("_", " ")] += 1
                return True
        return False

    def _fault_rank_dies(self, fault: Fault, node: SimNode) -> None:
        victims = node.alive_ranks() if node.life.alive else []
        if victims:
            self.delivered["rank dies"] += 1
            victim = victims[fault.other % len(victims)]
            node.kill(victim.rank, "signal", "SIGKILL")

    def _fault_rank_raises(self, fault: Fault, node: SimNode) -> None:
        victims = node.alive_ranks() if node.life.alive else []
        if victims:
            self.delivered["rank raises"] += 1
            node.kill(victims[0].rank, "exception", "ValueError: bad shape")

    def _fault_node_dies(self, fault: Fault, node: SimNode) -> None:
        if node.life.alive:
            self.delivered["node dies"] += 1
            self._kill_node(node, fault.ticks)

    def _kill_node(self, node: SimNode, down_ticks: int) -> None:
        node.life.alive = False
        for rank in node.ranks.values():
            rank.alive = False
        self._node_back[node.number] = self.now + down_ticks
        self._tell_gone(node)

    def _tell_gone(self, node: SimNode) -> None:
        gone = NodeGone(node.number, node.incarnation, "SIGKILL")
        self.network.send(self.now, "front", "coordinator", gone)

    def _fault_smp_dies(self, fault: Fault, node: SimNode) -> None:
        if node.life.alive:
            self.delivered["smp dies"] += 1
            if node.flush is not None:
                node.flush = None
                node.member.flush_refused("the snapshot manager died")
            node.start_smp()

    def _fault_coordinator_dies(self, fault: Fault, node: SimNode) -> None:
        if self.membership is None:
            return
        self._crash_ticks = fault.ticks
        if fault.detail == "now":
            self.delivered["coordinator dies"] += 1
            self.crash_points["now"] += 1
            self._kill_coordinator(fault.ticks)
        else:
            self._crash_at = fault.detail

    def _fault_cut(self, fault: Fault, node: SimNode) -> None:
        self.delivered["cut"] += 1
        self.network.cut(node.number, "coordinator", self.now + fault.ticks)

    def _fault_cut_smp(self, fault: Fault, node: SimNode) -> None:
        other = self.nodes[fault.other % len(self.nodes)]
        if other is not node:
            self.delivered["cut between managers"] += 1
            self.network.cut(("smp", node.number), ("smp", other.number), self.now + fault.ticks)

    def _fault_replay(self, fault: Fault, node: SimNode) -> None:
        self.network.replay(self.now + fault.ticks)

    def _fault_delay(self, fault: Fault, node: SimNode) -> None:
        self.network.delay(self.now + fault.ticks)

    def _fault_stall(self, fault: Fault, node: SimNode) -> None:
        self.delivered["stall"] += 1
        if fault.other % 2:
            node.stalled_until = self.now + fault.ticks
        else:
            self._coordinator_stalled_until = self.now + fault.ticks

    def _fault_clock_jump(self, fault: Fault, node: SimNode) -> None:
        self.delivered["clock jump"] += 1
        for _ in range(fault.ticks):
            if fault.other % 2 and node.life.alive:
                node.driver.tick()
                node.smp.tick()
            elif self.membership is not None:
                self._guarded(self.coordinator.tick)

    def _fault_slow_disk(self, fault: Fault, node: SimNode) -> None:
        self.slow_disk_until = self.now + 2 * fault.ticks

    def _fault_disk_full(self, fault: Fault, node: SimNode) -> None:
        node.disk_full_until = self.now + 2 * fault.ticks

    def _arm(self, fault: Fault, node: SimNode) -> None:
        # Where ranks start, most of the time; a torn write is not of one node.
        self._armed.append((fault.kind, node.number % self.options.nodes))

    _fault_torn_write = _fault_form_fails = _fault_fork_fails = _fault_late_order = _arm

    def _fault_write_found(self, fault: Fault, node: SimNode) -> None:
        victims = node.alive_ranks() if node.life.alive else []
        if victims and node.withdraw(victims[fault.other % len(victims)]):
            self.delivered["write found"] += 1

    def _fault_flush(self, fault: Fault, node: SimNode) -> None:
        if self.membership is not None:
            self.delivered["flush asked"] += 1
            self.membership.request_flush(kept=True)
            self._guarded(self.coordinator.pump)

    def _fault_stop(self, fault: Fault, node: SimNode) -> None:
        if self.membership is not None:
            self.delivered["stop asked"] += 1
            self._stop_asked = True
            self._guarded(lambda: self.coordinator.receive(StopRequest("Ctrl-C")))

    def _fault_force(self, fault: Fault, node: SimNode) -> None:
        if self.membership is not None:
            self.delivered["force asked"] += 1
            self._stop_asked = True
            self._guarded(lambda: self.coordinator.receive(StopRequest("force: second Ctrl-C")))

    def _fault_signal(self, fault: Fault, node: SimNode) -> None:
        if node.life.alive:
            self.delivered["signal"] += 1
            self._stop_asked = True
            node.member.signal("SIGTERM")
            node.driver.pump()

    # ------------------------------------------------------------------ coming back

    def _restart_the_dead(self) -> None:
        if self.membership is None and self.now >= self._coordinator_back:
            self._start_coordinator()
        for number, back in list(self._node_back.items()):
            old = self.nodes[number]
            if self.now % 4 == 0:
                self._tell_gone(old)  # the front says so until there is a successor
            if self.now >= back:
                del self._node_back[number]
                fresh = old.incarnation + (not self.machines.same_incarnation)
                self.nodes[number] = SimNode(self, number, fresh)

    def _heal(self) -> None:
        self.network.heal()
        self._armed.clear()
        self._crash_at = ""
        self._coordinator_back = self.now
        self._coordinator_stalled_until = self.slow_disk_until = -1
        self._node_back = dict.fromkeys(self._node_back, self.now)
        for node in self.nodes:
            node.stalled_until = node.disk_full_until = -1


def simulate(schedule: Schedule, machines: Machines | None = None) -> Cluster:
    """Run a schedule; raises :class:`Violation`, or whatever error a machine raises."""
    cluster = Cluster(schedule, machines or Machines())
    cluster.run()
    return cluster
