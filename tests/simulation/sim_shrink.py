"""Make a failing schedule as short as it can be while it still fails."""

from __future__ import annotations

from dataclasses import replace

from sim_cluster import Machines, simulate
from sim_schedule import Schedule


def failure(schedule: Schedule, machines: Machines | None = None) -> str:
    """What goes wrong in a schedule, or ""; any error of a machine counts."""
    try:
        simulate(schedule, machines)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def shrink(schedule: Schedule, machines: Machines | None = None) -> Schedule:
    """Drop faults, many at once first, as long as the schedule still fails."""
    size = max(1, len(schedule.faults) // 2)
    while size:
        start = 0
        while start < len(schedule.faults):
            faults = schedule.faults
            fewer = replace(schedule, faults=faults[:start] + faults[start + size :])
            if failure(fewer, machines):
                schedule = fewer
            else:
                start += size
        size //= 2
    return schedule
