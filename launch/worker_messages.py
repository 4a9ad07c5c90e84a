"""What an agent and its worker server say to each other over their local socket."""

from __future__ import annotations

from dataclasses import dataclass, field

from ftrain.comms import wire

TELEMETRY_FD = 98  # where every rank finds its telemetry page; far above what a script opens itself
FDS_PER_RANK = 3  # stdout, stderr, telemetry page


@dataclass(frozen=True, slots=True)
class Preload:
    """The first message to a worker server: what its ranks will run. Answer: ServerReady."""

    argv: tuple[str, ...]  # the script (or module) and its arguments
    module: bool  # argv[0] is a module name
    modules: tuple[str, ...]  # imported once, on top of torch


@dataclass(frozen=True, slots=True)
class ServerReady:
    """Everything is imported; forks are fast from here on."""

    import_s: float
    problems: tuple[str, ...]  # each in one sentence; the ranks start nevertheless


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank to fork."""

    rank: int  # global
    environment: dict[str, str]
    error_file: str  # where an uncaught exception is described


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """Fork these ranks. Comes with FDS_PER_RANK descriptors for each rank, in order.

    Answer: Forked for each rank, or ForkFailed.
    """

    epoch: int
    ranks: tuple[RankSpec, ...]
    environment: dict[str, str] = field(default_factory=dict)  # of every rank


@dataclass(frozen=True, slots=True)
class Forked:
    """A rank exists; it is, or in a moment will be, a child of the agent."""

    epoch: int
    rank: int
    pid: int
    forked_ns: int


@dataclass(frozen=True, slots=True)
class ForkFailed:
    """No (further) rank of this request was forked."""

    epoch: int  # 0: of whatever request is not answered yet
    cause: str


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """Fork a process with a store for ranks to find each other. Answer: StoreServed."""

    bind: str  # host it listens on


@dataclass(frozen=True, slots=True)
class StoreServed:
    """The store is there until its process, a child of the agent, is killed."""

    pid: int
    port: int
    problem: str = ""  # why there is none


@dataclass(frozen=True, slots=True)
class ScriptEdited:
    """The script is another one than at the last fork."""

    path: str


wire.register(
    Preload,
    ServerReady,
    RankSpec,
    ForkRequest,
    Forked,
    ForkFailed,
    StoreRequest,
    StoreServed,
    ScriptEdited,
)
