"""Where a rank of a ring is found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is found.

    ``host`` is equal for ranks that can share memory; ``local`` is an abstract unix socket there.
    """

    node: int
    incarnation: int
    address: str  # host:port
    host: str
    local: str
    state: str = ""  # host:port where it gives its state to newcomers; "": nowhere
