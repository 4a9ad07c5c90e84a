"""Time as a value that can be handed in, so that tests bring their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since boot; equal in all processes of one host."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970."""
        ...


class SystemClock:
    """The machine's clocks (CLOCK_MONOTONIC and CLOCK_REALTIME)."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since boot; equal in all processes of one host."""
        return time.monotonic_ns()

    def wall_s(self) -> float:
        """Seconds since 1970."""
        return time.time()
