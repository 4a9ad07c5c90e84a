"""Which version the ranks of a new formation get their state from, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ftrain.checkpoint.protocol.agreement import collectives_agree, whole_keys
from ftrain.comms.protocol.messages import Held, RestorePlan, VersionId

_REASONS_MAX = 4  # incomplete versions that a reason names


@dataclass(frozen=True, slots=True)
class DurableVersion:
    """A published durable version."""

    fence: int
    step: int
    path: str
    world_size: int
    epoch: int = 0  # in which it was captured


def choose_restore(
    held: Mapping[int, Sequence[Held]],
    world_size: int,
    durable: DurableVersion | None,
    refused: frozenset[VersionId] = frozenset(),
    remarks: Sequence[str] = (),
) -> RestorePlan:
    """The newest version that can be restored exactly, from the cheapest place that has it.

    ``held``: what each node's snapshot manager holds; ``durable``: the newest durable version that
    may be used; ``refused``: versions in memory found bad, never used; ``remarks``: what else
    belongs into the plan's reason.
    A version in memory can be restored when the small section of every rank is somewhere, and for
    every share key one single node holds all parts of it.  ``durable`` wins only when it is newer.
    """
    memory, notes = _newest_in_memory(held, world_size, refused)
    notes += remarks
    if durable is not None:
        durable_id = VersionId(durable.fence, durable.step)
        if memory is None or durable_id > memory:
            choice = f"step {durable.step} from the durable version"
            if durable.world_size != world_size:
                choice += f" of {durable.world_size} ranks, laid over {world_size}"
            return RestorePlan(
                level="durable",
                version=durable_id,
                fence=durable.fence,
                path=durable.path,
                reason=_reason(choice, notes),
                epoch=durable.epoch,
            )
        else:
            notes.append(f"durable step {durable.step} of epoch {durable.fence} is no newer")
    if memory is None:
        return RestorePlan(level="fresh", reason=_reason("a fresh start", notes))
    sources = tuple(
        sorted(n for n, records in held.items() if any(h.version == memory for h in records))
    )
    return RestorePlan(
        level="memory",
        version=memory,
        sources=sources,
        reason=_reason(f"step {memory.step} of epoch {memory.epoch} from memory", notes),
    )


def _reason(choice: str, notes: Sequence[str]) -> str:
    return "; ".join([choice, *notes[:_REASONS_MAX]])


def _newest_in_memory(
    held: Mapping[int, Sequence[Held]], world_size: int, refused: frozenset[VersionId]
) -> tuple[VersionId | None, list[str]]:
    """The newest restorable version, and what was wrong with those passed over on the way."""
    by_version: dict[VersionId, list[tuple[int, Held]]] = defaultdict(list)
    for node, records in held.items():
        for record in records:
            by_version[record.version].append((node, record))
    notes: list[str] = []
    for version in sorted(by_version, reverse=True):
        lack = "was found bad" if version in refused else _lack(by_version[version], world_size)
        if not lack:
            return version, notes
        notes.append(f"step {version.step} of epoch {version.epoch} {lack}")
    return None, notes


def _lack(records: Sequence[tuple[int, Held]], world_size: int) -> str:
    """What a version lacks to be restorable, in words; empty when it lacks nothing."""
    ranks = {record.rank for _, record in records}
    if ranks - set(range(world_size)):
        return f"is of {max(ranks) + 1} ranks, not {world_size}"
    absent = sorted(set(range(world_size)) - ranks)
    if absent:
        return f"lacks {_ranks(absent)}"
    if not collectives_agree(record for _, record in records):
        return "holds ranks that had not joined the same collectives"
    keys = {share.key for _, record in records for share in record.shares}
    broken = sorted(keys - _whole_keys(records))
    return f"lacks parts of the state of ranks {broken[0]}" if broken else ""


def _whole_keys(records: Iterable[tuple[int, Held]]) -> set[str]:
    """Share keys that some node holds as a whole."""
    by_node: dict[int, list[Held]] = defaultdict(list)
    for node, record in records:
        by_node[node].append(record)
    return set().union(*map(whole_keys, by_node.values()))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
