"""One node of the simulated group: its memory, and the machines that decide what stays in it.

The memory outlives the manager: images in slots, and parity that is whole.  All else is the
manager's and is made anew when it starts.  What the engines do (protector, rebuilder, store) is
done here in the same order, with values in the place of bytes: an image's content follows from its
version and rank, and parity remembers of which contents it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ftrain.checkpoint.protocol.commit import Committed, VersionCommit
from ftrain.comms.protocol.messages import (
    Held,
    HeldParity,
    ProtectedNode,
    Rebuild,
    RestorePlan,
    RoundId,
    Sealed,
    SealedSeen,
    Share,
    VersionId,
)
from ftrain.comms.protocol.ready import Address
from ftrain.recovery.protocol.planner import Memory, plan_restore
from ftrain.snapshot.protocol.custody import Custody, SlotState
from ftrain.snapshot.protocol.keeping import Keeping
from ftrain.snapshot.protocol.placement import ParityGroup
from ftrain.snapshot.protocol.protection import MESSAGES, Begin, Protected, Protection

PARITY_SLOTS = 4  # of a node, as in parity_slots.py
TRIES = 8  # until a node is unable to make its parity
ROUNDS_PER_PROCESS = 1000

Place = tuple[int, int]
Content = dict[int, str]  # by rank


class Violation(AssertionError):
    """The rules were broken."""


@dataclass(frozen=True)
class Rules:
    """What is simulated; each mutant changes one of these."""

    custody: type[Custody] = Custody
    protection: type[Protection] = Protection
    keeping: type[Keeping] = Keeping
    plan: Callable[[Memory], RestorePlan] = lambda memory: plan_restore(memory, None)
    pins: bool = True  # the images of kept rounds
    finds: bool = True  # a manager that starts finds the rounds in memory
    freezes: bool = True  # who says what it holds changes nothing any more
    stays_frozen: bool = True  # nor does a manager that starts after that
    rebuilds_once: bool = True  # a manager that starts does not rebuild what was given up since
    numbers_on: bool = True  # a process numbers its rounds behind those of earlier ones


@dataclass(frozen=True)
class Standing:
    """Custody's news for the other nodes."""

    node: int
    floor: VersionId
    possible: tuple[VersionId, ...]


@dataclass
class Cell:
    """What the header of a slot says."""

    version: VersionId
    sealed: bool


@dataclass(frozen=True)
class Parity:
    """A node's parity of a round, and of what it was made."""

    held: HeldParity
    data: dict[int, Content]  # by node


@dataclass(frozen=True)
class Group:
    """What SetGroup says."""

    epoch: int
    members: dict[int, int]  # node -> incarnation
    base: VersionId | None
    kept: RoundId | None
    parity: int
    rebuild: Rebuild | None = None


@dataclass
class Job:
    """A round that is worked on."""

    round: RoundId
    version: VersionId
    data: dict[int, Content] = field(default_factory=dict)
    tries: int = 0


def content(version: VersionId, rank: int) -> str:
    """An image's, as it was captured."""
    return f"epoch {version.epoch} step {version.step} rank {rank}"


class Node:
    """Its memory and its manager, of one agent's incarnation."""

    def __init__(
        self,
        number: int,
        incarnation: int,
        ranks: tuple[int, ...],
        slots: int,
        rules: Rules,
        post: Callable[[Node, int, object], None],
        on_protected: Callable[[Node, RoundId, VersionId], None],
        on_committed: Callable[[VersionId], None],
        count: Callable[[str], None],
    ) -> None:
        self.number, self.incarnation, self.ranks = number, incarnation, ranks
        self.slots, self.rules = slots, rules
        self.post, self.on_protected, self.on_committed = post, on_protected, on_committed
        self.count = count
        self.cells: dict[Place, Cell] = {}
        self.parity: dict[RoundId, Parity] = {}
        self.granted: dict[int, int] = {}  # the slot that each rank has
        self.group: Group | None = None
        self.said_last = False  # the agent knows that it said what it holds
        self.generation = 0
        self.protected: VersionId | None = None
        self.up = False
        self.start()

    # ------------------------------------------------------------ the manager's process

    def start(self) -> None:
        """A manager begins over what there is in memory."""
        rules = self.rules
        self.generation += 1
        self.up, self.protected = True, None
        self.ticks = 0
        self.custody = rules.custody(self.slots)
        self.commit = VersionCommit(me=self.number)
        first = self.generation * ROUNDS_PER_PROCESS if rules.numbers_on else 1
        self.machine = rules.protection(self.number, first)
        self.keeping = rules.keeping()
        self.pins: dict[RoundId, list[Place]] = {}
        self.writing: set[RoundId] = set(self.parity)  # slots of parity that are in use
        self.job: Job | None = None
        self.waiting: Begin | None = None
        self.rebuilding: VersionId | None = None
        for (rank, slot), cell in sorted(self.cells.items()):
            if cell.sealed:
                self.custody.seal(rank, slot, cell.version)
            else:
                self.custody.writes(rank, slot, cell.version)
        if rules.finds:
            for round_, parity in self.parity.items():
                self.keeping.found(round_, parity.held.version)
                self._pin(round_, parity.held.version)
        else:
            self.parity.clear()
        for rank, slot in list(self.granted.items()):
            self._claim(rank, slot)
        if self.group is not None:
            self._enter(self.group)
        if self.said_last and rules.stays_frozen:
            self.freeze()

    def _claim(self, rank: int, slot: int) -> None:
        """A rank says which slot was its own."""
        cell = self.cells.get((rank, slot))
        if cell is None or not cell.sealed or self.custody.spare(rank, slot):
            self.custody.writes(rank, slot, cell.version if cell and not cell.sealed else None)
        else:
            del self.granted[rank]

    def set_group(self, group: Group) -> None:
        """Another membership begins."""
        self.said_last = False
        self.group = group
        for rank in self.ranks:  # its ranks of before are gone: slots hold what headers say
            number = self.custody.writing(rank)
            if number >= 0:
                cell = self.cells.get((rank, number))
                self.custody.abandon(rank, number)
                if cell is not None and cell.sealed:
                    self.custody.seal(rank, number, cell.version)
                else:
                    self.cells.pop((rank, number), None)
        self.granted.clear()
        self._enter(group)

    def _enter(self, group: Group) -> None:
        """What a manager does with SetGroup, whether it is new or told again."""
        self.custody.set_group(group.epoch, self.ranks, group.base)
        nodes = tuple(sorted(group.members))
        self.commit.new_group(group.epoch, nodes, nodes)
        self._drop(self.keeping.new_group(group.epoch, group.kept))
        self._give_up_job()
        self.guards = ParityGroup(nodes, min(group.parity, len(nodes) - 1))
        self.rebuilding = group.base if group.rebuild is not None else None
        base = group.base if group.kept is not None else None
        self.machine.new_group(
            group.epoch, nodes if self.guards.parity else (), self.incarnation, base
        )
        base = self.rebuilding
        if base is not None and (self.custody.complete(base) or self._had(base)):
            self.rebuilt()
        for version in reversed(self.custody.sealed_versions()):
            self.announce(version)
        self.pump()

    def _had(self, base: VersionId) -> bool:
        """Whether it was rebuilt, and is given up for something newer."""
        sealed = self.custody.sealed_versions()
        return self.rules.rebuilds_once and any(version > base for version in sealed)

    def freeze(self) -> None:
        """What this node holds is being said for the last time."""
        if self.rules.freezes:
            self.keeping.freeze()
            self._give_up_job()

    # ------------------------------------------------------------ ranks

    def begin(self, rank: int, version: VersionId) -> str:
        """A rank comes to a boundary and begins to write; or why not."""
        slot = self.granted.get(rank, -1)
        if slot >= 0 and not self._why_not_ahead(rank, version):
            self.custody.writes(rank, slot, version)
        else:
            grant = self.custody.grant(rank, version)
            if grant.slot < 0:
                return grant.reason
            slot = grant.slot
        self.granted[rank] = slot
        self.cells[rank, slot] = Cell(version, False)
        return ""

    def _why_not_ahead(self, rank: int, version: VersionId) -> bool:
        number = self.custody.writing(rank)
        return number != self.granted.get(rank) or version.epoch != self.custody.epoch

    def seal(self, rank: int, *, ahead: bool) -> None:
        """A rank completes what it writes; ``ahead``: it gets the next slot at once."""
        slot = self.granted.get(rank, -1)
        cell = self.cells.get((rank, slot))
        if cell is None or cell.sealed or cell.version.epoch != self.custody.epoch:
            return
        cell.sealed = True
        self.custody.seal(rank, slot, cell.version)
        del self.granted[rank]
        self.announce(cell.version)
        if ahead:
            grant = self.custody.grant(rank, None)
            if grant.slot >= 0:
                self.granted[rank] = grant.slot
        self.pump()

    def announce(self, version: VersionId) -> None:
        """Tell everybody that a version is complete here."""
        if version.epoch == self.custody.epoch and self.custody.complete(version):
            message = Sealed(version, self.number, self.incarnation, (), ())
            self.commit.sealed_here(version, message)

    # ------------------------------------------------------------ messages

    def tick(self) -> None:
        """One unit of time."""
        self.commit.tick()
        self.ticks += 1
        standing = self.custody.standing() if self.ticks % 4 == 0 else None
        if standing is not None and self.group is not None:
            for node in self.group.members:
                if node != self.number:
                    self.post(self, node, Standing(self.number, *standing))
        if not self.keeping.frozen:
            self.machine.tick()
        self.pump()

    def receive(self, message: object) -> None:
        """Of a member of the group."""
        if isinstance(message, Sealed | SealedSeen):
            self.commit.receive(message)
        elif isinstance(message, Standing):
            self.custody.hear(message.node, message.floor, message.possible)
        elif isinstance(message, MESSAGES) and not self.keeping.frozen:
            self.machine.receive(message)
        self.pump()

    def pump(self) -> None:
        """Do what the machines want."""
        again = True
        while again:
            again = False
            for machine in (self.commit, self.machine):
                ready = machine.ready()
                again = again or bool(ready)
                for to, message in ready.messages:
                    self._send(to, message)
                for effect in ready.effects:
                    self._perform(effect)

    def _send(self, to: Address, message: object) -> None:
        assert isinstance(to, int)
        self.post(self, to, message)

    def _perform(self, effect: object) -> None:
        if isinstance(effect, Committed):
            if self.custody.complete(effect.version):
                self.custody.commit(effect.version)
                self.on_committed(effect.version)
                if self.machine.leads and not self.keeping.frozen:
                    self.machine.held_by_all(effect.version)
        elif isinstance(effect, Begin):
            self._give_up_job()
            dropped = self.keeping.begin(effect.round, effect.version, effect.first, effect.over)
            self._drop(dropped)
            if self.rebuilding == effect.version:
                self.waiting = effect
            else:
                self._start_round(effect)
        elif isinstance(effect, Protected):
            self.on_protected(self, RoundId(self.custody.epoch, effect.round), effect.version)
            self._drop(self.keeping.over(effect.round))
            self.protected = effect.version

    # ------------------------------------------------------------ making parity

    def _start_round(self, begin: Begin) -> None:
        round_ = RoundId(self.custody.epoch, begin.round)
        if self.keeping.is_whole(round_):
            self.machine.done(begin.round)
        elif not self._pin(round_, begin.version):
            self._refuse(begin.round)
        else:
            self.job = Job(round_, begin.version)

    def work(self, ask: Callable[[int], Node | None]) -> None:
        """Fetch what one more node contributes; with all of it, the parity is there."""
        job = self.job
        if job is None:
            return
        missing = [node for node in self.guards.nodes if node not in job.data]
        peer = self if missing[0] == self.number else ask(missing[0])
        images = peer.images(job.version) if peer is not None else None
        if images is None:
            job.tries, job.data = job.tries + 1, {}
            self.count("a contributor was not there, or not that far")
            if job.tries >= TRIES:
                self.count("unable: a contributor was not there for too long")
                self._refuse(job.round.number)
            return
        if job.round not in self.writing and len(self.writing) >= PARITY_SLOTS:
            self.count("unable: no slot for parity")
            self._refuse(job.round.number)
            return
        self.writing.add(job.round)
        self.parity.pop(job.round, None)
        job.data[missing[0]] = images
        if len(missing) > 1:
            return
        nodes = tuple(
            ProtectedNode(node, tuple(sorted(job.data[node])), 1) for node in self.guards.nodes
        )
        held = HeldParity(job.round, job.version, self.guards.parity, nodes)
        self.parity[job.round] = Parity(held, job.data)
        self.job = None
        self.keeping.whole(job.round.number)
        self.machine.done(job.round.number)
        self.pump()

    def run_short(self) -> None:
        """There is no memory for the parity now."""
        if self.job is not None:
            self.count("unable: no memory")
            self._refuse(self.job.round.number)

    def images(self, version: VersionId) -> Content | None:
        """What is in this node's slots of a version, if it is whole; asked by other nodes."""
        places = self.custody.sealed(version)
        if not places or not {rank for rank, _ in places}.issuperset(self.ranks):
            return None
        found = {}
        for rank, slot in places:
            cell = self.cells[rank, slot]
            if not cell.sealed:
                raise Violation(f"slot {slot} of rank {rank} is written, and counts as sealed")
            found[rank] = content(cell.version, rank)
        return found

    def _refuse(self, number: int) -> None:
        self.count("a node was unable")
        self._give_up_job()
        self.machine.unable(number)
        self.pump()

    def _give_up_job(self) -> None:
        self.job = self.waiting = None

    def _pin(self, round_: RoundId, version: VersionId) -> bool:
        if round_ in self.pins:
            return True
        places = self.custody.sealed(version)
        if not places or not {rank for rank, _ in places}.issuperset(self.custody.local_ranks):
            return False
        if self.rules.pins:
            self.custody.pin(places)
            self.pins[round_] = places
        return True

    def _drop(self, rounds: Iterable[RoundId]) -> None:
        for round_ in rounds:
            self.parity.pop(round_, None)
            self.writing.discard(round_)
            self.custody.unpin(self.pins.pop(round_, []))

    # ------------------------------------------------------------ rebuilding

    def rebuilt(self) -> None:
        """What had to be rebuilt is there, or never will be."""
        self.rebuilding = None
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self._start_round(waiting)
        self.pump()

    def put_back(self, images: Content, version: VersionId) -> None:
        """What was rebuilt is in the first slots."""
        for rank in images:
            if (rank, 0) in self.cells:
                raise Violation(f"{version} is rebuilt over {self.cells[rank, 0]}")
            self.cells[rank, 0] = Cell(version, True)
            self.custody.seal(rank, 0, version)
        self.rebuilt()

    # ------------------------------------------------------------ what there is

    def held(self) -> tuple[Held, ...]:
        """Images, as the headers of the slots say."""
        return tuple(
            Held(
                cell.version,
                rank,
                content(cell.version, rank),
                (Share(str(rank), self.number, 0, 1),),
                True,
                -1,
            )
            for (rank, _), cell in sorted(self.cells.items())
            if cell.sealed
        )

    def parities(self) -> tuple[HeldParity, ...]:
        """Rounds whose parity is whole here."""
        return tuple(self.parity[round_].held for round_ in sorted(self.parity))

    def in_memory(self, version: VersionId) -> Content:
        """Every image of a version."""
        return {
            rank: content(cell.version, rank)
            for (rank, _), cell in self.cells.items()
            if cell.sealed and cell.version == version
        }

    def writable(self, rank: int) -> bool:
        """Whether the rank has a slot for writing."""
        return self.custody.writing(rank) >= 0

    def writes(self, rank: int) -> bool:
        """Whether the rank has begun an image that is not sealed."""
        cell = self.cells.get((rank, self.granted.get(rank, -1)))
        state = self.custody.slots(rank)[max(0, self.granted.get(rank, -1))].state
        return cell is not None and not cell.sealed and state is SlotState.WRITING


def regained(
    rebuild: Rebuild, nodes: Iterable[Node]
) -> tuple[Content | None, VersionId | None, str]:
    """A lost node's images out of what these nodes have of a round, as the rebuilder does it: who
    has none of its parity is not asked; or None and why."""
    found: dict[int, tuple[Parity, Content]] = {}
    for node in nodes:
        parity = node.parity.get(rebuild.round)
        if parity is not None and rebuild.lost in parity.data:
            found[node.number] = parity, node.in_memory(parity.held.version)
    if not found:
        return None, None, f"nobody has parity of {rebuild.round} any more"
    first = next(iter(found.values()))[0]
    if any(parity.data != first.data or parity.held != first.held for parity, _ in found.values()):
        return None, None, "the records contradict each other"
    group = ParityGroup(tuple(member.node for member in first.held.nodes), first.held.parity)
    for stripe in group.stripes_of(rebuild.lost):
        parts = sum(node in found for node in group.holders(stripe))
        parts += sum(
            node in found and found[node][1].items() >= first.data[node].items()
            for node in group.contributors(stripe)
        )
        if parts < group.data:
            return None, None, f"stripe {stripe} has {parts} parts of {group.data}"
    return first.data[rebuild.lost], first.held.version, ""
