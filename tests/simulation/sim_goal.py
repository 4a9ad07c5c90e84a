"""What a healed world has to come to, and what is said when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ftrain.comms.protocol.transitions import Phase

if TYPE_CHECKING:
    from sim_cluster import Cluster


def goal_of(cluster: Cluster) -> Callable[[], bool]:
    """Ten steps further, every member commits in the present epoch, and a version gets durable.

    Or the job is over and every agent gone, those of spares too.
    """
    target = min(cluster.reached + 10, cluster.options.steps_total)
    began = cluster.now

    def met() -> bool:
        membership = cluster.membership
        if membership is None:
            return False
        if membership.phase is Phase.FINISHED:
            return not any(n.life.alive for n in cluster.nodes) and not cluster.nodes_down
        if membership.phase is not Phase.RUNNING or membership.hard.stop_cause:
            return False
        if (cluster.now - began) % 40 == 0:
            membership.request_flush()
        epoch = membership.hard.epoch
        newest = max((v for _, v in cluster.checkers.published), default=None)
        members = [n for n in cluster.nodes if n.number in cluster.seats]
        return (
            all(r.boundary >= target and r.epoch == epoch for r in cluster.alive_ranks())
            and all(n.commit.newest and n.commit.newest.epoch == epoch for n in members)
            and newest is not None
            and newest.epoch == epoch
        )

    return met


def why_not(cluster: Cluster) -> str:
    """Where everything stands."""
    m = cluster.membership
    lines = ["coordinator down" if m is None else f"{m.phase}: {m.reason}; {m.hard}"]
    for n in cluster.nodes:
        ranks = [(r.rank, r.epoch, r.boundary, r.alive, r.in_step) for r in n.ranks.values()]
        lines.append(
            f"node {n.number}.{n.incarnation} alive={n.life.alive} {n.member.phase} epoch "
            f"{n.member.epoch} newest {n.commit.newest} ranks {ranks} flush {n.flush}"
        )
    return "\n    ".join(lines)
