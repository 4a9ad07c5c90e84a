"""Which nodes protect each other with parity, and what that is worth, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import NodePlace
from ftrain.configs.schema import SnapshotConfig
from ftrain.snapshot.protocol.placement import ParityGroup, groups_of
from ftrain.snapshot.survival import loss_per_day, racks_that_may_fail

_WINDOW_S = 60.0  # from the loss of a node until what it held is protected again
_HOUR_S = 3600.0


def guard_groups(places: Iterable[NodePlace], config: SnapshotConfig) -> tuple[ParityGroup, ...]:
    """The groups that the nodes of a formation protect each other in."""
    racks = {place.node: place.rack for place in places}
    return groups_of(racks, max(config.group, config.parity + 1), config.parity)


def slots_for_parity(job: JobSpec) -> int:
    """Slots of each rank beside ``snapshot.slots``: what parity was made of stays, too."""
    return int(job.config.snapshot.parity > 0 and job.nodes > 1)


def rack_of(job: JobSpec, node: int) -> str:
    """What fails together with a node; "" when nothing is known."""
    labels = job.config.snapshot.rack.split(",")
    if job.config.launch.local_nodes and len(labels) > 1:
        return labels[node % len(labels)].strip()
    return job.config.snapshot.rack


def protection_text(places: Sequence[NodePlace], config: SnapshotConfig) -> str:
    """What parity costs, what may be lost at once, and how likely more than that is."""
    groups = guard_groups(places, config)
    racks = {place.node: place.rack for place in places}
    risk = loss_per_day(
        groups,
        racks,
        node_mtbf_s=config.node_mtbf_s,
        rack_mtbf_s=config.rack_mtbf_s or None,
        window_s=_WINDOW_S,
    )
    each = sorted({(len(group.nodes), group.parity) for group in groups})
    stands = " and ".join(f"any {m} of {n} nodes" for n, m in each)
    if len(groups) > 1:
        stands = f"in each of {len(groups)} groups {stands}"
    dear = max(len(group.nodes) / group.data for group in groups)
    text = f"parity: {stands} may be lost at once, for {dear:.2f} times the memory of snapshots"
    if whole := racks_that_may_fail(groups, racks):
        text += f", as may any one of the racks {', '.join(whole)}"
    losses = f"a node is lost every {config.node_mtbf_s / _HOUR_S:,.0f} h"
    if config.rack_mtbf_s:
        losses += f", a rack every {config.rack_mtbf_s / _HOUR_S:,.0f} h"
    least = "" if risk.exact else "at most "
    return (
        f"{text}; more than that within {_WINDOW_S:g} s: {least}{float(risk.probability):.1g} a "
        f"day, if {losses}"
    )
