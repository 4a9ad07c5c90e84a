"""What processes say to each other: frozen values, standard library only.

Control is level-triggered: an agent always sends its whole :class:`NodeReport`, the coordinator
always answers with the whole :class:`Directive` for that node.  So a lost, duplicated or late
message costs nothing but time; ``sequence`` orders the reports of one incarnation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class NodeState(StrEnum):
    """What a node's ranks are doing, as its agent reports it."""

    IDLE = "idle"  # no rank was started in `epoch`, or all of an older epoch are gone
    STARTING = "starting"  # ranks of `epoch` are being forked; their first step is not done
    RUNNING = "running"  # every local rank completed a step of `epoch`
    STOPPED = "stopped"  # no rank of `epoch` is alive, inventory `held` is final
    DONE = "done"  # every local rank of `epoch` ended by itself with code 0


class Order(StrEnum):
    """What the coordinator wants of a node."""

    WAIT = "wait"  # stay as you are
    RUN = "run"  # run `formation`
    STOP = "stop"  # finish captures, then end every rank of `epoch`
    PAUSE = "pause"  # hold the ranks at their next boundary and report which one that is
    STOP_AT = "stop_at"  # let the ranks run to boundary `stop_step`, save, and end
    FLUSH = "flush"  # write version `flush` to the durable level, then say prepared
    FINISH = "finish"  # the job is over: exit with `exit_code`


@dataclass(frozen=True, slots=True, order=True)
class VersionId:
    """A version's identity. A later epoch supersedes every version of an earlier one."""

    epoch: int  # the membership epoch it was captured in
    step: int  # boundary: number of completed steps


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of state that several ranks hold in common.

    ``key`` names the set of ranks with identical bytes ("0-3", "2", "0,2"); on ``node`` those bytes
    are split into ``parts``, of which this is number ``part``.
    """

    key: str
    node: int
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class Held:
    """One rank's share of one version, as a snapshot manager holds it."""

    version: VersionId
    rank: int
    digest: str  # xxh3-128 hex of the sealed image header; of the small section when not `whole`
    shares: tuple[Share, ...]
    whole: bool  # False: only the small section (RNG, counters, user objects) is here
    collectives: int  # collectives the rank had enqueued at that boundary; -1 unknown


@dataclass(frozen=True, slots=True, order=True)
class RoundId:
    """A round in which all nodes of a group protected one version with parity."""

    epoch: int  # of the group
    number: int


@dataclass(frozen=True, slots=True)
class ProtectedNode:
    """What a round of parity protects of one node."""

    node: int
    ranks: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class HeldParity:
    """One node's part of the parity of a round, whole, as its snapshot manager holds it."""

    round: RoundId
    version: VersionId
    parity: int  # so many of `nodes` may be lost
    nodes: tuple[ProtectedNode, ...]  # that protect each other, in order


@dataclass(frozen=True, slots=True)
class RankFailure:
    """A rank that ended, hung or broke."""

    rank: int  # global rank
    # signal | exit | exception | usage | unsaved | restore | loss | oom | stopped | gil | desync
    # | stall | fork
    kind: str
    cause: str  # plain words: "SIGKILL", "exit code 3", "ValueError: bad shape"
    noticed_ns: int  # CLOCK_MONOTONIC on that node
    traceback: str = ""  # of the user's script, for kind=exception
    step: int = -1  # boundary, for kind=loss


@dataclass(frozen=True, slots=True)
class Phases:
    """When the parts of one start of a group happened on a node, CLOCK_MONOTONIC ns; 0 unknown."""

    noticed_ns: int = 0  # the failure that ended the epoch before was noticed
    stopped_ns: int = 0  # the last rank of the epoch before was gone
    forked_ns: int = 0  # the last rank of this epoch was forked
    script_ns: int = 0  # the last script began to run
    formed_ns: int = 0  # the last Session saw its process group formed
    restored_ns: int = 0  # the last rank had its state back
    stepped_ns: int = 0  # the last rank completed its first step


@dataclass(frozen=True, slots=True)
class NodeReport:
    """The whole of what an agent knows about its node."""

    node: int
    incarnation: int  # of the agent; unique for all time within a run
    sequence: int
    epoch: int  # epoch of the ranks that `state` speaks of; 0 before the first
    state: NodeState
    local_world: int
    host: str  # address under which other nodes reach this one
    smp_address: str  # "host:port" of the snapshot manager's data port; "" while it is down
    held: tuple[Held, ...] = ()  # final only in IDLE and STOPPED
    failures: tuple[RankFailure, ...] = ()  # in `epoch`
    phases: Phases = Phases()
    step: int = 0  # lowest boundary reached by a local rank in `epoch`
    step_max: int = 0  # highest boundary reached by a local rank in `epoch`
    kept_max: int = 0  # highest boundary of which a local rank set out to keep the version
    committed: VersionId | None = None  # newest version committed in memory, as the SMP knows it
    pausing: bool = False  # every local rank was told to hold before `boundaries` was read
    boundaries: tuple[int, ...] = ()  # per local rank: the boundary it holds at, or will reach next
    stopped_at: int = -1  # boundary at which all local ranks ended after STOP_AT
    prepared: tuple[VersionId, ...] = ()  # versions whose durable files are written and synced
    refused: str = ""  # why the node can't do what it was told (flush passed over, disk full, …)
    loss: float = 0.0
    step_s: float = 0.0  # median step time
    signals: tuple[str, ...] = ()  # SIGTERM, SIGUSR1, … that this agent received
    flush: VersionId | None = None  # the flush order that `prepared` or `refused` answers
    flush_attempt: int = 0  # and which attempt at it
    fence: int = 0  # fence under which `prepared` was written
    write_failed: bool = False  # with `refused`: writing failed, there was something to write
    withdrawn: tuple[VersionId, ...] = ()  # newest versions that a rank here had captured wrongly
    parity: tuple[HeldParity, ...] = ()  # final only in IDLE and STOPPED
    protected: VersionId | None = None  # newest version of which every node has its parity
    protected_in: int = 0  # epoch of the group that protected it
    rack: str = ""  # what fails together with this node; "": nothing that is known of


@dataclass(frozen=True, slots=True)
class NodePlace:
    """A node's place in a formation."""

    node: int
    incarnation: int
    first_rank: int
    local_world: int
    host: str
    smp_address: str
    rack: str = ""


@dataclass(frozen=True, slots=True)
class Rebuild:
    """The images of a lost node, to be rebuilt from what the others hold of a round."""

    round: RoundId
    lost: int  # the node, as the round knows it
    node: int  # in whose memory


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Where the ranks of a formation get their state from, and why."""

    level: str  # "fresh" | "memory" | "parity" | "durable"
    version: VersionId | None = None  # None for fresh
    fence: int = 0  # of the durable version
    epoch: int = 0  # in which that was captured
    path: str = ""  # durable: the manifest's path
    sources: tuple[int, ...] = ()  # memory: nodes that hold parts of it
    reason: str = ""  # the arithmetic, in words
    rebuilds: tuple[Rebuild, ...] = ()  # parity: what has to be rebuilt before it is in memory
    round: RoundId | None = None  # whose parity all nodes keep until there is newer
    lost: str = ""  # why a newer version is not restored from, where parity does not suffice
    trusted: bool = False  # no loss speaks against it: the script has its own reasons

    @property
    def parent(self) -> VersionId | None:
        """The version that training goes on from, by the epoch it was captured in."""
        if self.level == "durable" and self.version is not None:
            return VersionId(self.epoch, self.version.step)
        return self.version if self.in_memory else None

    @property
    def in_memory(self) -> bool:
        """Whether the version is, or is going to be, in the nodes' memory."""
        return self.level in ("memory", "parity")


@dataclass(frozen=True, slots=True)
class Formation:
    """One group's membership in one epoch."""

    epoch: int
    places: tuple[NodePlace, ...]
    store_host: str
    store_port: int
    restore: RestorePlan
    restarts: int  # formations of this job before this one

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""
        return sum(place.local_world for place in self.places)


@dataclass(frozen=True, slots=True)
class Directive:
    """The whole of what the coordinator wants of one node."""

    epoch: int
    order: Order
    formation: Formation | None = None
    stop_step: int = -1
    flush: VersionId | None = None  # FLUSH: this version, or the first committed one after it
    flush_attempt: int = 0  # tells a second attempt at the same version from an order said again
    fence: int = 0
    exit_code: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OpenStore:
    """To the first node of a formation: have a fresh store opened for it. Said until answered."""

    epoch: int


@dataclass(frozen=True, slots=True)
class StoreOpened:
    """Answer to :class:`OpenStore`."""

    epoch: int
    port: int
    problem: str = ""  # why there is none


@dataclass(frozen=True, slots=True)
class NodeGone:
    """The front saw a node's agent end, or a node's lease ran out."""

    node: int
    incarnation: int
    cause: str


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """The first message of another host's front: what has to be the same on every host."""

    node: int
    facts: tuple[tuple[str, str], ...]  # name, value: versions, the script's digest, settings


@dataclass(frozen=True, slots=True)
class JoinAnswer:
    """The coordinator's answer to :class:`JoinRequest`."""

    refused: str = ""  # what differs, as a sentence; empty: welcome
    mark: str = ""  # name of a file that must be seen in the checkpoint directory; "": none
    incarnation: int = 0  # newest of the node's agents that the coordinator knows


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Somebody asks for a graceful stop with a durable version."""

    cause: str  # "SIGTERM", "Ctrl-C", "ftrain stop"


@dataclass(frozen=True, slots=True)
class Sealed:
    """Gossip between snapshot managers of one group: my ranks sealed this version.

    Carries the small sections of the node's ranks, so that they outlive the node.
    """

    version: VersionId
    node: int
    incarnation: int  # of the snapshot manager's memory (the agent's), not of its process
    held: tuple[Held, ...]
    smalls: tuple[bytes, ...]  # same order as `held`


@dataclass(frozen=True, slots=True)
class SealedSeen:
    """Which announcements of the receiver's the sender has, in one epoch: the whole list.

    Answers each :class:`Sealed`; also sent unasked by who waits or has just started, so that a
    snapshot manager that lost what it was told is told again.
    """

    epoch: int
    node: int | str  # the sender
    versions: tuple[VersionId, ...]
    newest: VersionId | None = None  # committed at the sender: it needs nothing older


@dataclass(frozen=True, slots=True)
class Notice:
    """One line of news for whoever watches the job (the front prints it)."""

    # incident | repair | memory | info | warning | error | progress | traceback | summary | …
    kind: str
    text: str
    data: dict[str, object]
