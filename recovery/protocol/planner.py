"""The recovery ladder: of everything that a formation could restore from exactly, the cheapest.

Each rung is priced: steps to be done again times the length of a step, bytes to be moved over the
rate at which they move, and what using the rung costs besides.  The sums are in the plan's reason,
which goes into the incident's record.  Versions on one rung are not weighed against each other: a
newer one never costs more.  Nothing goes back behind the newest durable version that counts.

Nodes give up every round of parity but the one that the plan keeps, so that is the only one that
anything is rebuilt from.  It is the one that stands the most further losses: a newer version that
would be gone with the next node is not worth one that would not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ftrain.comms.protocol.messages import (
    Held,
    HeldParity,
    NodePlace,
    RestorePlan,
    RoundId,
    VersionId,
)
from ftrain.recovery.protocol.plan import DurableVersion, choose_restore
from ftrain.recovery.protocol.rebuilds import (
    Round,
    rebuilds_for,
    round_to_keep,
    rounds_of,
)

_STEP_S = 1.0  # while none was measured


@dataclass(frozen=True, slots=True)
class Rates:
    """What rungs cost besides the steps that are done again."""

    memory_s: float = 0.0  # penalty
    parity_s: float = 0.1
    parity_bytes_per_s: float = 5e8  # rebuilt, on each node
    durable_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Memory:
    """What the nodes of a new formation hold, and how far its training had come."""

    places: tuple[NodePlace, ...]
    held: Mapping[int, Sequence[Held]]
    parity: Mapping[int, Sequence[HeldParity]] = field(default_factory=dict)
    reached: int = 0  # highest boundary of any rank
    step_s: float = 0.0  # 0: unknown

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(place.local_world for place in self.places)

    @property
    def versions(self) -> set[VersionId]:
        """Every one of which there is something."""
        held = {record.version for records in self.held.values() for record in records}
        return held.union(h.version for rounds in self.parity.values() for h in rounds)


@dataclass(frozen=True, slots=True)
class _Rung:
    plan: RestorePlan
    seconds: float
    words: str


def plan_restore(
    memory: Memory,
    durable: DurableVersion | None,
    refused: frozenset[VersionId] = frozenset(),
    remarks: Sequence[str] = (),
    rates: Rates | None = None,
) -> RestorePlan:
    """Where the ranks of a new formation get their state from, and which parity is kept meanwhile.

    Args:
        memory: what there is in it.
        durable: the newest durable version that may be used.
        refused: versions that are not restored from, whether in memory or rebuilt.
        remarks: what else belongs into the reason.
    """
    rates = rates or Rates()
    rounds = rounds_of(memory.parity)
    plain = choose_restore(memory.held, memory.world_size, durable, refused, remarks)
    kept = round_to_keep(rounds, memory.places, memory.held, refused)
    rebuilt, notes = _rebuilt(memory, rounds, kept, refused, plain.version)
    best = plain
    if rebuilt is not None:
        first, second = _priced(plain, memory, rates), _priced(rebuilt, memory, rates)
        cheaper, dearer = sorted((first, second), key=lambda rung: rung.seconds)
        best = cheaper.plan
        choice = best.reason.partition("; ")[0]
        sums = [f"{choice}: {cheaper.words}", f"{_name(dearer.plan)}: {dearer.words}"]
        best = replace(best, reason="; ".join([*sums, *notes, *_rest(plain.reason)]))
    elif notes:
        best = replace(best, reason="; ".join([best.reason, *notes]))
    # What was not finished when a node was lost is no loss while something nearly as new serves.
    lost = notes[0] if notes and not best.in_memory else ""
    return replace(best, round=kept, lost=lost)


def _rebuilt(
    memory: Memory,
    rounds: Sequence[Round],
    kept: RoundId | None,
    refused: Collection[VersionId],
    than: VersionId | None,
) -> tuple[RestorePlan | None, list[str]]:
    """What the parity that is kept gives back, if it is beyond ``than``, and why newer rounds than
    that are of no use."""
    notes: list[str] = []
    for round_ in sorted(rounds, key=lambda r: (r.version, r.id), reverse=True):
        version = round_.version
        if version in refused or (than is not None and version <= than):
            continue
        rebuilds, lack = rebuilds_for(round_, memory.places, memory.held)
        name = f"step {version.step} of epoch {version.epoch}"
        if lack:
            notes.append(f"{name} {lack}")
        elif rebuilds and round_.id != kept:
            notes.append(f"{name} would be lost with fewer nodes more than an older one")
        if lack or not rebuilds or round_.id != kept:
            continue
        have = {n for n, held in memory.held.items() if any(h.version == version for h in held)}
        plan = RestorePlan(
            level="parity",
            version=version,
            sources=tuple(sorted(have.union(rebuild.node for rebuild in rebuilds))),
            rebuilds=rebuilds,
            reason=f"{name} rebuilt from parity",
        )
        return plan, notes
    return None, notes


def _priced(plan: RestorePlan, memory: Memory, rates: Rates) -> _Rung:
    step = plan.version.step if plan.version is not None else 0
    again, step_s = max(0, memory.reached - step), memory.step_s or _STEP_S
    seconds = again * step_s
    words = f"{again} steps of {step_s:.3g} s again"
    if plan.level == "parity":
        nbytes = _rebuilt_bytes(plan, memory)
        moving_s = nbytes / rates.parity_bytes_per_s
        seconds += moving_s + rates.parity_s
        words += f" + {nbytes / 1e6:.1f} MB in {moving_s:.2g} s + {rates.parity_s:g} s"
    elif plan.level == "durable":
        seconds += rates.durable_s
        words += f" + {rates.durable_s:g} s"
    else:
        seconds += rates.memory_s
    return _Rung(plan, seconds, f"{words} = {seconds:.3g} s")


def _rebuilt_bytes(plan: RestorePlan, memory: Memory) -> int:
    """Of the node that gets most; they work beside each other."""
    sizes = {
        (held.round, node.node): node.nbytes
        for rounds in memory.parity.values()
        for held in rounds
        for node in held.nodes
    }
    return max((sizes[r.round, r.lost] for r in plan.rebuilds), default=0)


def _name(plan: RestorePlan) -> str:
    step = plan.version.step if plan.version is not None else 0
    where = {"memory": "in memory", "durable": "durable", "parity": "from parity"}
    return f"step {step} {where[plan.level]}" if plan.level in where else "a fresh start"


def _rest(reason: str) -> list[str]:
    return [text for text in reason.split("; ")[1:] if text]
