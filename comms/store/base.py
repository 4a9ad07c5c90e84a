"""What a coordinator needs of the store that outlives it: a vote, a few kilobytes, an address.

At most one coordinator leads.  Its *term* has a number that only rises, which is the fence: what a
coordinator of an earlier term still stores is refused by the store itself, and members drop what
one still says by the number.  :mod:`ftrain.comms.store.files` does this in a directory of one host,
:mod:`ftrain.comms.store.etcd` in etcd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Protocol

from ftrain.comms.errors import FtrainError, UsageError

STATE_BYTES_MAX = 1024 * 1024  # etcd takes requests of up to 1.5 MiB unless told otherwise
ADDRESS_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads: where it listens, and the number of its term."""

    address: str
    term: int


class Term(Protocol):
    """One coordinator's leadership.  Its methods may be called from any thread.

    ``number``: higher than that of every term before it, in this store, for ever.
    ``lost``: set once the store says that this term is over, and by :meth:`resign`; never unset.
    """

    number: int
    lost: Event

    def assured_s(self) -> float:
        """For how many seconds from now nobody else can lead; not positive: somebody may.

        Whoever stood still, or can't reach the store, sees this run out before ``lost`` is set:
        nothing may be said then that is only true of a leader.
        """
        ...

    def save(self, state: bytes) -> None:
        """Store ``state`` durably, in place of what was stored in this or earlier terms.

        Raises:
            LeadershipLostError: the term is over, and the state was not stored.
            StoreUnreachableError: it is not known whether it was stored; save again. It never
                replaces what a later call stored.
            StoreFullError: there is no room for it; it was not stored.
            StoreRefusedError: the credentials do not allow it.
            UsageError: it is longer than ``STATE_BYTES_MAX``.
        """

    def load(self) -> bytes | None:
        """What was stored last, in whichever term; None: nothing ever was.

        Raises LeadershipLostError and StoreUnreachableError: they say that nothing was read.
        """

    def resign(self) -> None:
        """End the term, so that others need not wait for it to run out. Raises nothing."""


class LeaderWatch(Protocol):
    """Tells of leaders until it is closed, through failures of the store.

    ``newest``: the last one told of; None: nobody led.
    ``trouble``: why ``newest`` may be out of date; None: it is not.
    """

    newest: Leader | None
    trouble: FtrainError | None

    def close(self) -> None:
        """Tell no more; once this returns no call is under way, unless it is called from one."""


class CoordinatorStore(Protocol):
    """The store of one job's coordinators.  Its methods may be called from any thread."""

    def campaign(self, address: str, timeout_s: float) -> Term | None:
        """Become the leader, once nobody is, and let others know ``address``.

        Returns None when somebody led for all of ``timeout_s``.

        Raises:
            StoreUnreachableError: the store did not answer for so long that it is not known.
            StoreRefusedError: the credentials, or the certificates, are wrong.
            UsageError: the address is empty or longer than ``ADDRESS_BYTES_MAX``.
        """

    def leader(self, timeout_s: float) -> Leader | None:
        """Who leads now; None: nobody.

        Raises StoreUnreachableError after ``timeout_s``, and StoreRefusedError.
        """

    def watch_leader(self, heard: Callable[[Leader | None], None]) -> LeaderWatch:
        """Call ``heard``, from a thread of its own, with who leads now and whenever that changes.

        Of leaders that come in quick succession some may be left out, the newest never is, and
        numbers of terms only rise.  ``heard`` must not raise, and not wait.
        """
        ...

    def close(self) -> None:
        """End all terms and watches of this store, and its threads and connections."""


def check_address(address: str) -> None:
    """Raise UsageError for what can't be the address of a leader."""
    if not 0 < len(address.encode()) <= ADDRESS_BYTES_MAX:
        raise UsageError(
            f"a coordinator's address has 1 to {ADDRESS_BYTES_MAX} bytes, not"
            f" {len(address.encode())}: give where it listens, as host:port"
        )


def check_state(state: bytes) -> None:
    """Raise UsageError for a state that the store does not take."""
    if len(state) > STATE_BYTES_MAX:
        raise UsageError(
            f"a coordinator's state of {len(state)} bytes is more than the {STATE_BYTES_MAX} that"
            " fit: keep what is large elsewhere"
        )
