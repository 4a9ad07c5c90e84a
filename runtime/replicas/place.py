"""Whether this rank is one of a fleet, and which."""

from __future__ import annotations

from ftrain.comms.environment import RankEnvironment
from ftrain.comms.errors import SessionError
from ftrain.runtime.replicas.member import FleetPlace


def fleet_place(
    environment: RankEnvironment, replicas: str | None, accumulate: int
) -> FleetPlace | None:
    """The rank's place in a fleet; None: there is none, and gradients stay this group's own.

    Raises SessionError when script and launch do not mean the same.
    """
    if replicas not in (None, "sync"):
        raise SessionError(f"Session(replicas={replicas!r}): it is 'sync', or None")
    if accumulate < 1:
        raise SessionError(f"Session(accumulate={accumulate}): a step has a backward pass or more")
    context = environment.context
    fleet = context.config.fleet if context is not None else None
    if context is None or fleet is None or not fleet.coordinator:
        return None
    if replicas is None:
        raise SessionError(
            "this run is one of several replica groups (--replica-groups or --join), and the script"
            ' does not average with them: say Session(replicas="sync")'
        )
    if environment.world_size != 1:
        raise SessionError(
            "a replica group has one rank in this version: leave --nproc-per-node and --nnodes out"
        )
    return FleetPlace(
        coordinator=fleet.coordinator,
        run_id=fleet.run_id,
        secret=bytes.fromhex(context.secret),
        group=fleet.group,
        bind=fleet.bind,
        host=fleet.host,
        join_timeout_s=fleet.join_timeout_s,
    )
