"""The catalogue of deliberate faults, and those that a rank commits on itself.

A fault from outside (a signal) needs nothing of its victim.  Faults that are code running inside a
rank are asked for through the rank's telemetry page: the injector arms it (:func:`arm`), the
Session asks at each of its hooks (:func:`poll_fault`), which costs one word read while nothing is
armed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

import msgspec

from ftrain.comms.errors import ConfigError
from ftrain.comms.protocol.phases import Phase
from ftrain.comms.telemetry import TelemetryPage, Word
from ftrain.configs.schema import FaultConfig, FaultsConfig
from ftrain.recovery.node_file import NodeFile as NodeFile
from ftrain.recovery.node_file import NodeRank as NodeRank
from ftrain.recovery.node_file import read_node_file as read_node_file
from ftrain.recovery.node_file import read_node_files as read_node_files
from ftrain.recovery.node_file import write_node_file as write_node_file

OOM_ALLOWANCE_BYTES = 64 * 1024 * 1024  # what an OOM victim may still allocate before it dies
_EXIT_CODE = 3
_GIL_HANG_S = 24 * 3600
_TOUCH_BYTES = 1024 * 1024


class InjectedFault(RuntimeError):
    """What a rank's script sees raised by the fault ``exception``."""


class FaultKind(IntEnum):
    """Every deliberate fault; the number goes into a telemetry word."""

    SIGKILL = 1
    SIGSTOP = 2
    SEGFAULT = 3
    EXIT = 4
    EXCEPTION = 5
    GIL_HANG = 6
    OOM = 7
    SKIP_COLLECTIVE = 8
    NODE = 9
    SMP = 10
    WORKER_SERVER = 11
    AGENT = 12
    COORDINATOR = 13


class Target(Enum):
    """What a fault hits."""

    RANK = "rank"
    NODE = "node"
    JOB = "job"


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """One row of the catalogue."""

    kind: FaultKind
    target: Target
    inside: bool  # committed by code inside the rank
    what: str

    @property
    def name(self) -> str:
        """As written in the configuration."""
        return self.kind.name.lower()


_ROWS = (
    FaultSpec(FaultKind.SIGKILL, Target.RANK, False, "SIGKILL of one rank"),
    FaultSpec(FaultKind.SIGSTOP, Target.RANK, False, "SIGSTOP of one rank, SIGCONT after resume_s"),
    FaultSpec(FaultKind.SEGFAULT, Target.RANK, True, "a rank reads address 0"),
    FaultSpec(FaultKind.EXIT, Target.RANK, True, "a rank exits at once with code 3"),
    FaultSpec(FaultKind.EXCEPTION, Target.RANK, True, "a rank's script sees an exception raised"),
    FaultSpec(FaultKind.GIL_HANG, Target.RANK, True, "a rank sleeps in C, holding the GIL"),
    FaultSpec(FaultKind.OOM, Target.RANK, True, "the kernel kills a rank for its memory (cgroup)"),
    FaultSpec(FaultKind.SKIP_COLLECTIVE, Target.RANK, True, "a rank leaves out one all-reduce"),
    FaultSpec(FaultKind.NODE, Target.NODE, False, "SIGKILL of every process of one node"),
    FaultSpec(FaultKind.SMP, Target.NODE, False, "SIGKILL of a node's snapshot manager"),
    FaultSpec(FaultKind.WORKER_SERVER, Target.NODE, False, "SIGKILL of a node's worker server"),
    FaultSpec(FaultKind.AGENT, Target.NODE, False, "SIGKILL of a node's agent"),
    FaultSpec(FaultKind.COORDINATOR, Target.JOB, False, "SIGKILL of the coordinator"),
)
CATALOGUE: dict[str, FaultSpec] = {row.name: row for row in _ROWS}

PHASES: dict[str, tuple[Phase, ...]] = {
    "any": tuple(Phase),
    "forward_backward": (Phase.STEP,),
    "optimizer": (Phase.OPTIMIZER,),
    "boundary": (Phase.BOUNDARY,),
    "recovery": (Phase.STARTING, Phase.RESTORING),
}


def check_fault(fault: FaultConfig, *, nodes: int, world_size: int, now: bool = False) -> FaultSpec:
    """The fault's row of the catalogue; ``now`` says that it strikes at once if no time is set.

    Raises :class:`ConfigError` for a fault that means nothing in a job of that size.
    """
    spec = CATALOGUE.get(fault.kind)
    if spec is None:
        raise ConfigError(f"faults: kind={fault.kind!r} is none of {', '.join(CATALOGUE)}")
    where = f"fault {fault.kind}"
    times = (fault.at_step >= 0, fault.at_s >= 0, fault.mtbf_s > 0)
    if sum(times) > 1 or not (now or any(times)):
        wanted = "at most" if now else "exactly"
        raise ConfigError(
            f"{where}: set {wanted} one of at_step, at_s and mtbf_s, not {sum(times)}"
        )
    if fault.phase not in PHASES:
        raise ConfigError(f"{where}: phase={fault.phase!r} is none of {', '.join(PHASES)}")
    if not -1 <= fault.rank < world_size:
        raise ConfigError(
            f"{where}: rank={fault.rank}, but the job has ranks 0 to {world_size - 1}"
        )
    if not -1 <= fault.node < nodes:
        raise ConfigError(f"{where}: node={fault.node}, but the job has nodes 0 to {nodes - 1}")
    if spec.target is Target.RANK and fault.node >= 0 and fault.rank >= 0:
        raise ConfigError(f"{where}: set rank or node, not both, for a fault of one rank")
    if spec.target is Target.JOB and max(fault.rank, fault.node) >= 0:
        raise ConfigError(f"{where}: there is one coordinator, leave out rank and node")
    if spec.kind is FaultKind.SKIP_COLLECTIVE and fault.phase not in ("any", "forward_backward"):
        raise ConfigError(f"{where}: it happens in forward_backward, leave out phase={fault.phase}")
    if fault.count_max < 1 or fault.delay_s < 0 or fault.down_s < 0:
        raise ConfigError(f"{where}: count_max must be 1 or more, delay_s and down_s not negative")
    if fault.resume_s >= 0 and spec.kind is not FaultKind.SIGSTOP:
        raise ConfigError(f"{where}: resume_s belongs to sigstop, leave it out")
    if fault.down_s > 0 and spec.kind is not FaultKind.COORDINATOR:
        raise ConfigError(f"{where}: down_s belongs to coordinator, leave it out")
    return spec


def check_schedule(faults: FaultsConfig, *, nodes: int, world_size: int) -> None:
    """Check every fault of the configuration; raises :class:`ConfigError` for the first bad one."""
    for fault in faults.schedule:
        check_fault(fault, nodes=nodes, world_size=world_size)


def parse_fault(pairs: Sequence[str]) -> FaultConfig:
    """A fault from ``key=value`` words, such as ``kind=sigkill rank=1``; a bare word is the kind.

    Raises :class:`ConfigError` naming the word that can't be read.
    """
    keys: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        keys[key if equals else "kind"] = value if equals else pair
    if "kind" not in keys:
        raise ConfigError(f"a fault needs kind=…, one of {', '.join(CATALOGUE)}")
    allowed = FaultConfig.__dataclass_fields__
    for key in keys:
        if key not in allowed:
            raise ConfigError(f"{key!r} is no key of a fault; there are {', '.join(allowed)}")
    try:
        return msgspec.convert(keys, FaultConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{' '.join(pairs)}: {error}") from None


def arm(page: TelemetryPage, kind: FaultKind, step: int = 0, phase: Phase | None = None) -> None:
    """Ask the rank that writes ``page`` to commit ``kind`` on itself, not before ``step``."""
    if kind is FaultKind.SKIP_COLLECTIVE:
        phase = Phase.STEP  # the only hook that can leave an all-reduce out
    page[Word.FAULT_STEP] = step
    page[Word.FAULT_PHASE] = 0 if phase is None else phase + 1
    page[Word.FAULT_ARG] = OOM_ALLOWANCE_BYTES if kind is FaultKind.OOM else 0
    page[Word.FAULT_KIND] = kind  # last: the rank looks at this word first


def poll_fault(page: TelemetryPage, step: int, phase: Phase) -> FaultKind | None:
    """Commit the armed fault if it is due in ``step`` (completed steps) and ``phase``.

    To be called from the rank's main thread where the user's code would fail: in the forward hook
    (``Phase.STEP``), the optimizer hook, the boundary and while restoring.  Returns
    ``FaultKind.SKIP_COLLECTIVE`` when the caller is to leave one all-reduce out, else None.
    Raises :class:`InjectedFault` for the fault ``exception``.
    """
    number = page[Word.FAULT_KIND]
    if not number:
        return None
    wanted = page[Word.FAULT_PHASE]
    if step < page[Word.FAULT_STEP] or wanted not in (0, phase + 1):
        return None
    kind = FaultKind(number)
    argument = page[Word.FAULT_ARG]
    page[Word.FAULT_FIRED_STEP] = step
    page[Word.FAULT_FIRED_PHASE] = phase
    page[Word.FAULT_FIRED_NS] = time.monotonic_ns()
    page[Word.FAULT_KIND] = 0  # once only, whatever becomes of this process
    fire_in_rank(kind, argument)
    return kind if kind is FaultKind.SKIP_COLLECTIVE else None


def fire_in_rank(kind: FaultKind, argument: int = 0) -> None:
    """Commit ``kind`` on this very process, now; ``argument`` as in ``Word.FAULT_ARG``."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core of many GB
    if kind in (FaultKind.SIGKILL, FaultKind.SIGSTOP):
        os.kill(os.getpid(), signal.Signals[kind.name])
    elif kind is FaultKind.SEGFAULT:
        ctypes.string_at(0)
    elif kind is FaultKind.EXIT:
        os._exit(argument or _EXIT_CODE)
    elif kind is FaultKind.EXCEPTION:
        raise InjectedFault("this exception was asked for by faults.kind=exception")
    elif kind is FaultKind.GIL_HANG:
        ctypes.PyDLL(None).sleep(argument or _GIL_HANG_S)
    elif kind is FaultKind.OOM:
        _exhaust_memory(argument or OOM_ALLOWANCE_BYTES)
    elif kind is not FaultKind.SKIP_COLLECTIVE:
        raise ConfigError(f"{kind.name.lower()} is not a fault that a rank commits on itself")


def _exhaust_memory(allowance_bytes: int) -> None:
    """Touch memory until the kernel kills this process, which its cgroup lets it soon do.

    Far beyond the allowance it stops: then the cgroup was taken away, and the machine is others'.
    """
    hoard = mmap.mmap(-1, 4 * allowance_bytes // _TOUCH_BYTES * _TOUCH_BYTES)
    for offset in range(0, len(hoard), _TOUCH_BYTES):
        hoard[offset : offset + _TOUCH_BYTES] = b"\xa5" * _TOUCH_BYTES
    hoard.close()
