"""The only loop that turns a machine's :class:`Ready` into storage, messages and work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

from ftrain.comms.protocol.ready import Address, HardT, Machine


class Driver(Generic[HardT]):
    """Runs one machine: after every input persist, send, perform, in that order, until all is done.

    Synchronous, and used from one thread only.  The machine's own inputs (answers to effects) are
    called on the machine, followed by :meth:`pump`; that is allowed inside ``perform`` as well.
    ``persist`` returns when the state is on stable storage; when it raises, nothing is sent and the
    process should end, because what the machine believes was never stored.
    """

    def __init__(
        self,
        machine: Machine[HardT],
        persist: Callable[[HardT], None],
        send: Callable[[Address, object], None],
        perform: Callable[[object], None],
    ) -> None:
        self._machine = machine
        self._persist = persist
        self._send = send
        self._perform = perform
        self._pumping = False

    def tick(self) -> None:
        """One unit of logical time has passed."""
        self._machine.tick()
        self.pump()

    def receive(self, message: object) -> None:
        """A message has arrived."""
        self._machine.receive(message)
        self.pump()

    def pump(self) -> None:
        """Do everything that is ready; called from within (an answer at once) it just returns."""
        if self._pumping:
            return  # the loop below goes round once more
        self._pumping = True
        try:
            while ready := self._machine.ready():
                if ready.hard_state is not None:
                    self._persist(ready.hard_state)
                for address, message in ready.messages:
                    self._send(address, message)
                for effect in ready.effects:
                    self._perform(effect)
        finally:
            self._pumping = False
