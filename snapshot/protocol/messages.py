"""What agents, ranks and other nodes say to a snapshot manager, and what it answers.

Three conversations:

- agent <-> manager over the inherited local socket: :class:`Setup` first, then any of the others.
- rank -> manager over a local socket at ``Setup.socket_path``: :class:`ClientHello` first; each
  request carries a number that its answer repeats.  Only :class:`FinishTask` comes unasked.
- another node -> manager over an authenticated channel: gossip (role ``smp``) or fetching.

Descriptors that travel along are named in the docstrings.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftrain.comms.protocol.messages import Held, HeldParity, Rebuild, RoundId, VersionId

# ---------------------------------------------------------------- agent -> manager


@dataclass(frozen=True, slots=True)
class Taken:
    """A slot that an earlier manager of this node made; of parity, if ``rank`` is ``PARITY``."""

    rank: int
    slot: int


PARITY = -1
"""In the place of a rank: the node's own slots, for parity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The first message of an agent. Comes with one descriptor for each of ``taken``, in order."""

    run_id: str
    secret: str  # hex
    node: int
    incarnation: int  # of the agent, whose memory this is
    socket_path: str  # where ranks connect
    bind: str  # host the data port listens on
    host: str  # host under which other nodes reach it
    slots: int
    memory_share_max: float
    bytes_per_s_max: float  # of writing durable versions; 0: no limit
    checkpoint_dir: str  # "" when there is no durable level
    taken: tuple[Taken, ...] = ()
    generation: int = 1  # of the agent's managers, counted from 1
    parity_bytes_per_s_max: float = 0.0  # of fetching what parity is made of; 0: no limit
    scrub_every_s: float = 0.0  # between looks whether what is protected is as it was; 0: none


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node of the group."""

    node: int
    incarnation: int
    address: str  # "host:port" of its manager; "" while that is unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class SetGroup:
    """The group that this node's ranks form from now on.

    Sent before the ranks are forked, again whenever something in it changes (a peer's new address),
    and once after every :class:`Setup`.  ``base`` is the version in memory that the ranks restore
    from (None: fresh or durable); it is kept until a version of ``epoch`` is committed.  An older
    epoch is ignored.
    """

    epoch: int
    first_rank: int
    local_world: int
    world_size: int
    peers: tuple[Peer, ...] = ()  # without this node
    base: VersionId | None = None
    dead: tuple[int, ...] = ()  # local ranks of `epoch` that already ended
    guards: tuple[int, ...] = ()  # nodes that protect each other, this one included; (): none
    parity: int = 0  # how many of them may be lost
    kept: RoundId | None = None  # whose parity is kept until there is newer
    rebuild: Rebuild | None = None  # what has to be rebuilt here before a rank can have `base`


@dataclass(frozen=True, slots=True)
class RankDied:
    """A local rank ended."""

    epoch: int
    rank: int


@dataclass(frozen=True, slots=True)
class FinishCaptures:
    """Answer :class:`CapturesFinished` when no capture of ``epoch`` can be finished any more."""

    epoch: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class AskInventory:
    """Answer :class:`Inventory` at once."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer :class:`Pong` at once: a manager that does not is replaced."""


@dataclass(frozen=True, slots=True)
class Flush:
    """Write a version to the durable level.

    That is ``version`` itself when it is committed and still here, else the first version of the
    same epoch that is committed from now on and not older.
    """

    version: VersionId
    fence: int


# ---------------------------------------------------------------- manager -> agent


@dataclass(frozen=True, slots=True)
class SetupRefused:
    """The manager can't serve with this :class:`Setup`, and ends."""

    why: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class ManagerStarted:
    """The manager serves: answer to :class:`Setup`."""

    address: str  # "host:port" of the data port
    held: tuple[Held, ...]
    parity: tuple[HeldParity, ...] = ()


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep this descriptor (one comes along) for the next manager. Replaces an earlier one."""

    rank: int
    slot: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the descriptor of this slot: its memory is given back."""

    rank: int
    slot: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The newest version that the whole group holds, as far as this node knows."""

    version: VersionId


@dataclass(frozen=True, slots=True)
class ParityComplete:
    """Every node of the group of ``epoch`` has its parity of ``version``."""

    version: VersionId
    epoch: int


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A rank found that what it captured of ``version`` is wrong: nobody may restore from it."""

    version: VersionId


@dataclass(frozen=True, slots=True)
class BoundaryCounts:
    """How many collectives other nodes' ``ranks`` had enqueued at the boundary of ``version``."""

    version: VersionId
    ranks: tuple[int, ...]
    collectives: tuple[int, ...]  # same order as `ranks`


@dataclass(frozen=True, slots=True)
class CapturesFinished:
    """Nothing is left to wait for; ``held`` is the inventory."""

    epoch: int
    held: tuple[Held, ...]
    parity: tuple[HeldParity, ...] = ()


@dataclass(frozen=True, slots=True)
class Inventory:
    """Every image this node holds: whole ones of its ranks, small ones of other nodes' ranks, and
    every round's parity.  Until the next group begins no round changes that any more."""

    held: tuple[Held, ...]
    parity: tuple[HeldParity, ...] = ()


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to :class:`Ping`."""


@dataclass(frozen=True, slots=True)
class FlushedFile:
    """One durable file, synced, not yet published."""

    rank: int
    path: str  # relative to the checkpoint directory
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Flushed:
    """``asked`` was answered with ``version``: every local rank's file is written and synced."""

    asked: VersionId
    version: VersionId
    fence: int
    files: tuple[FlushedFile, ...]


@dataclass(frozen=True, slots=True)
class FlushRefused:
    """``asked`` can't be written, and why in one sentence."""

    asked: VersionId
    fence: int
    reason: str
    write_failed: bool = False  # there was something to write


# ---------------------------------------------------------------- rank -> manager


@dataclass(frozen=True, slots=True)
class ClientHello:
    """The first message of a rank, and of each reconnection.

    ``slot`` is the slot it may be writing now (-1: none), ``version`` what it writes there (None:
    nothing yet).  Answered by :class:`ClientWelcome` or :class:`RequestRefused`.
    """

    request: int
    rank: int
    world_size: int
    node: int
    epoch: int
    slot: int = -1
    version: VersionId | None = None


@dataclass(frozen=True, slots=True)
class Reserve:
    """I need slots of this many bytes. Answered by :class:`Reserved` or :class:`RequestRefused`."""

    request: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Begin:
    """I want to capture ``version``. Answered by :class:`Granted` or :class:`Denied`.

    With ``slot`` >= 0 the rank already holds that slot and only says what it writes there; there is
    no answer.
    """

    request: int
    version: VersionId
    slot: int = -1


@dataclass(frozen=True, slots=True)
class ImageSealed:
    """``version`` is sealed in ``slot``. Answered by :class:`Granted` (the next slot) or Denied."""

    request: int
    version: VersionId
    slot: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """My image of ``version`` was sealed and is wrong: count it no more. No answer."""

    version: VersionId


@dataclass(frozen=True, slots=True)
class Open:
    """Give me every image of ``version`` here. Answered by :class:`Opened` or RequestRefused."""

    request: int
    version: VersionId


@dataclass(frozen=True, slots=True)
class Release:
    """I read what I opened of ``version``. No answer."""

    version: VersionId


@dataclass(frozen=True, slots=True)
class Finished:
    """Answer to :class:`FinishTask`; ``held`` is None when it could not be done."""

    version: VersionId
    rank: int  # the dead one
    held: Held | None


@dataclass(frozen=True, slots=True)
class Repaired:
    """I have ``version`` back although ``damage`` was found, in the words of each error.

    ``sources`` are the images that stood in for what was damaged.  No answer.
    """

    version: VersionId
    damage: tuple[str, ...]
    sources: tuple[str, ...]


# ---------------------------------------------------------------- manager -> rank


@dataclass(frozen=True, slots=True)
class ClientWelcome:
    """The rank may go on; ``slot`` repeats its claim, or is -1 when that slot is not its own."""

    request: int
    slot: int = -1


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """No; ``short`` says that it is memory that is lacking."""

    request: int
    reason: str
    short: bool = False


@dataclass(frozen=True, slots=True)
class Reserved:
    """All slots of this rank. Comes with one descriptor for each, in order."""

    request: int
    nbytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Granted:
    """``slot`` is the rank's to write."""

    request: int
    slot: int


@dataclass(frozen=True, slots=True)
class Denied:
    """No slot now, and why."""

    request: int
    reason: str


@dataclass(frozen=True, slots=True)
class Part:
    """Where one image lies: bytes ``[offset, offset + nbytes)`` of descriptor ``file``."""

    rank: int
    whole: bool
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Opened:
    """Every image of a version on this node. Comes with the descriptors that ``parts`` names."""

    request: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class FinishTask:
    """Finish dead ``rank``'s image of ``version``. Comes with its slot's descriptor."""

    version: VersionId
    rank: int
    nbytes: int


# ---------------------------------------------------------------- manager <-> other nodes


@dataclass(frozen=True, slots=True)
class Standing:
    """What a node can still contribute: of all versions up to ``floor`` only ``possible``.

    Lets the others reuse slots of versions that some node skipped, which never become complete.
    """

    node: int
    incarnation: int
    floor: VersionId
    possible: tuple[VersionId, ...]


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where the sender's manager listens: a new one, after a crash, has another port."""

    node: int
    incarnation: int
    address: str


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """Send me images of ``version``: of these ranks, or of all when empty."""

    version: VersionId
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FetchedImage:
    """The next image, followed by ``nbytes`` of data frames."""

    rank: int
    whole: bool
    nbytes: int


@dataclass(frozen=True, slots=True)
class FetchDone:
    """No more images; ``reason`` says why when something is missing."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """Which images of ``version`` do you hold? Answered by :class:`BundleAnswer`."""

    version: VersionId


@dataclass(frozen=True, slots=True)
class BundleAnswer:
    """All images of one version on the node, in rising order of ranks; none, and why."""

    ranks: tuple[int, ...]
    nbytes: tuple[int, ...]  # same order
    digests: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Send me the first ``nbytes`` of a chunk of your images of ``version``.

    Answered by :class:`ChunkAnswer`, which data frames follow unless it has a reason.
    """

    version: VersionId
    chunk: int
    chunk_bytes: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RowRequest:
    """Send me the first ``nbytes`` of a chunk of parity. Answered like :class:`ChunkRequest`."""

    round: RoundId
    stripe: int
    row: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ChunkAnswer:
    """The bytes follow, unless ``reason`` says why not."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class SoundRequest:
    """What do you have of a round that is as it was, if it protects node ``lost``?

    Answered by :class:`SoundAnswer`.
    """

    round: RoundId
    lost: int


@dataclass(frozen=True, slots=True)
class SoundAnswer:
    """What of a round was compared with its digests, and is as it was."""

    record: bytes  # of the parity here; b"": there is none
    chunks: tuple[int, ...]  # of data
    rows: tuple[tuple[int, int], ...]  # stripe and row
    damage: tuple[str, ...]  # what is not
    reason: str = ""


MESSAGES: tuple[type, ...] = (
    Taken,
    Setup,
    Peer,
    SetGroup,
    RankDied,
    FinishCaptures,
    AskInventory,
    Ping,
    Flush,
    SetupRefused,
    ManagerStarted,
    Hold,
    Drop,
    Committed,
    Withdrawn,
    BoundaryCounts,
    ParityComplete,
    CapturesFinished,
    Inventory,
    Pong,
    FlushedFile,
    Flushed,
    FlushRefused,
    ClientHello,
    Reserve,
    Begin,
    ImageSealed,
    Withdraw,
    Open,
    Release,
    Finished,
    Repaired,
    ClientWelcome,
    RequestRefused,
    Reserved,
    Granted,
    Denied,
    Part,
    Opened,
    FinishTask,
    Standing,
    Whereabouts,
    FetchRequest,
    FetchedImage,
    FetchDone,
    BundleRequest,
    BundleAnswer,
    ChunkRequest,
    RowRequest,
    ChunkAnswer,
    SoundRequest,
    SoundAnswer,
)
