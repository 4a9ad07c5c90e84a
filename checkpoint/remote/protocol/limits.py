"""How patient, how fast and with how many threads an object store is used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The defaults suit a store across a data centre's network."""

    connect_timeout_s: float = 10.0
    request_timeout_s: float = 30.0  # without a byte
    attempts: int = 6  # of each operation
    pause_s: float = 0.5  # before the second attempt, doubled for each further one
    pause_s_max: float = 15.0
    bytes_per_s: float = 0.0  # cap of uploads; 0: none
    threads: int = 4  # requests at a time
