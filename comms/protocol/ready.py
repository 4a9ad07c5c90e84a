"""The shape of every pure protocol machine: inputs are calls, the only output is a value.

A machine never waits, reads a clock, sends or stores anything.  Time comes in as
:meth:`Machine.tick`, news as :meth:`Machine.receive` and as the machine's own inputs (answers to
its effects); what has to happen comes out of :meth:`Machine.ready`, and the driver does it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Address = Hashable
"""Where a message goes: a node number, or a role such as ``"coordinator"``."""

HardT = TypeVar("HardT")


@dataclass(frozen=True, slots=True)
class Ready(Generic[HardT]):
    """Everything the driver has to do now, in this order. False when there is nothing."""

    hard_state: HardT | None = (
        None  # to stable storage BEFORE anything below: it may be promised there
    )
    messages: tuple[tuple[Address, object], ...] = ()  # then send these; any of them may get lost
    effects: tuple[object, ...] = ()  # then begin these; their answers come back as inputs

    def __bool__(self) -> bool:
        return self.hard_state is not None or bool(self.messages) or bool(self.effects)


class Machine(Protocol[HardT]):
    """A pure protocol machine."""

    def tick(self) -> None:
        """One unit of logical time has passed."""

    def receive(self, message: object) -> None:
        """A peer's message has arrived; messages that make no sense here are ignored."""

    def ready(self) -> Ready[HardT]:
        """Take what has to be done; what is taken once is not given again."""
        ...
