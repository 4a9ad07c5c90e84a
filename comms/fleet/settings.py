"""How a peer takes part in a fleet."""

from __future__ import annotations

from dataclasses import dataclass, field

from ftrain.comms.collectives.meeting import RingSettings


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """Of one peer; ``ring`` is equal on all."""

    ring: RingSettings = field(default_factory=RingSettings)
    tick_s: float = 0.05
    stall_s: float = 0.2  # without progress, before the coordinator is told
    build_s: float = 2.0  # to connect to the neighbours
    connect_s: float = 10.0  # to reach the coordinator for the first time
    resend_s: float = 0.25
    hold_s: float = 0.5  # after which operations go on although the coordinator said nothing

    def ticks(self, seconds: float) -> int:
        """At least one."""
        return max(1, round(seconds / self.tick_s))
