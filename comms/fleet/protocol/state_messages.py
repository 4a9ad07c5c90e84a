"""What peers say to each other when they make their states equal."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ftrain.comms.fleet.protocol.shared_state import BlockId, Content, Role


class StateStep(Enum):
    """What a peer says in the exchange that all take part in."""

    OFFER = "offer"  # what I have, and where it is to be got
    DONE = "done"  # I have everything
    REFUSED = "refused"  # the offers do not go together
    FAILED = "failed"  # I could not get everything


@dataclass(frozen=True, slots=True)
class StateWord:
    """One peer's part of an exchange."""

    step: StateStep
    peer: int
    attempt: int  # how many have failed, with the same members
    revision: int = 0
    role: Role = Role.ENFORCE_POPULAR
    expects: bool = False
    address: str = ""
    digest: bytes = b""  # of the content, as it is sent
    why: str = ""  # FAILED


@dataclass(frozen=True, slots=True)
class StateContent:
    """What there is under a name."""

    content: Content


@dataclass(frozen=True, slots=True)
class StateAsk:
    """Wants what is offered under a name: its content, or blocks of it."""

    name: str
    blocks: tuple[BlockId, ...] = ()  # none: the content


@dataclass(frozen=True, slots=True)
class StateAnswer:
    """Comes before the content (so many bytes of data) or before the blocks."""

    found: bool
    revision: int = 0
    nbytes: int = 0
