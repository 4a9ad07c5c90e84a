"""Every error ftrain raises on purpose.

::

    FtrainError                    exit code 1; one plain sentence: what, where, what to do
     ├─ UsageError (ValueError)    2   the command line or the call is wrong
     │   ├─ ConfigError            2   a configuration key or value is wrong
     │   └─ SessionError           2   the training script uses Session wrongly
     ├─ RunDirectoryError (OSError) 2  the run directory is unusable, locked or another run's
     ├─ MemoryShortError (MemoryError) 2  the snapshot slots do not fit
     ├─ ProtocolError              1   a message breaks the protocol
     │   ├─ LocalProtocolError         our own fault: a bug in ftrain
     │   └─ RemoteProtocolError        the peer's fault: garbage, too large, stale
     ├─ AuthenticationError (PermissionError)  2  the job secret does not match
     ├─ PeerLostError (ConnectionError)  1   a peer went away or never answered
     │   ├─ PeerGarbledError          what a peer sent breaks the protocol
     │   ├─ FleetChangedError         an operation was undone because members came or went
     │   └─ FleetLeftError            this process belongs to the fleet no more
     ├─ StateError (ValueError)    2   training state can't be captured or does not fit
     │   └─ RestoreError           1   one version can't be put back, another one may be
     ├─ SuspectError (ArithmeticError) 1 the loss went bad soon after a restore
     ├─ CorruptionError (ValueError) 1 bytes do not match their digest
     ├─ LeadershipLostError        1   another coordinator leads, or may by now
     └─ ObjectStoreError (OSError) 1   the object store, or the coordinator's, did not do its part
         ├─ StoreUnreachableError  1   nobody answers there, or only that it can't now
         ├─ StoreRefusedError      2   wrong credentials, or not allowed
         ├─ StoreMissingError      2   there is no such bucket
         └─ StoreFullError         1   no space, or the quota is used up

A message says what is wrong, where, and what to do, in one sentence that a user can act on.
"""

from __future__ import annotations


class FtrainError(Exception):
    """Root of all deliberate errors; ``exit_code`` is what the command line returns."""

    exit_code: int = 1


class UsageError(FtrainError, ValueError):
    """The command line, or a call of the public API, is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value is wrong."""


class SessionError(UsageError):
    """The training script uses :class:`ftrain.Session` wrongly."""


class RunDirectoryError(FtrainError, OSError):
    """The run directory can't be used: read-only, locked, or of another run."""

    exit_code = 2


class MemoryShortError(FtrainError, MemoryError):
    """The snapshot slots do not fit into the memory there is."""

    exit_code = 2


class ProtocolError(FtrainError):
    """A message breaks the protocol."""


class LocalProtocolError(ProtocolError):
    """This process tried to do what the protocol forbids: a bug in ftrain."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol forbids."""


class AuthenticationError(FtrainError, PermissionError):
    """The peer does not hold the job secret, or belongs to another run."""

    exit_code = 2


class PeerLostError(FtrainError, ConnectionError):
    """A peer closed the connection, or never answered.

    ``node``: its number, if it has one. ``reached``: there was a connection.
    """

    def __init__(self, *args: object, node: int = -1, reached: bool = True) -> None:
        super().__init__(*args)
        self.node = node
        self.reached = reached


class PeerGarbledError(PeerLostError, RemoteProtocolError):
    """A neighbour, ``node``, sent what breaks the protocol, so the link to it is of no use."""


class FleetChangedError(PeerLostError):
    """An operation among replica groups was undone on all of them, because members went, and it
    can't be tried again as it is: its sizes depend on how many there are, or the caller wants to
    know."""


class FleetLeftError(PeerLostError):
    """This process is not in the fleet any more: it left, or the others went on without it."""


class StateError(FtrainError, ValueError):
    """Training state that can't be captured, or does not fit what is restored."""

    exit_code = 2


class RestoreError(StateError):
    """A version can't be put back because bytes of it are damaged or gone; an older one may be."""

    exit_code = 1


class SuspectError(FtrainError, ArithmeticError):
    """The loss is not finite soon after a version was restored, which may be why.

    ``step``: the boundary at which that was seen.
    """

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text)
        self.step = step


class CorruptionError(FtrainError, ValueError):
    """Bytes do not match their digest."""


class LeadershipLostError(FtrainError):
    """This coordinator leads no more: what it says or stores counts for nothing."""


class ObjectStoreError(FtrainError, OSError):
    """An object store, whatever else checkpoints are uploaded to, or the store that coordinators
    keep their state in, did not do what it was asked.

    ``transient``: whether trying again may help.
    """

    transient: bool = True


class StoreUnreachableError(ObjectStoreError):
    """Nobody answers at the store's address, not in time, or only that it can't serve now."""


class StoreRefusedError(ObjectStoreError):
    """The store does not know the credentials, or they do not allow what was asked."""

    exit_code = 2
    transient = False


class StoreMissingError(ObjectStoreError):
    """There is no such bucket."""

    exit_code = 2
    transient = False


class StoreFullError(ObjectStoreError):
    """The store has no space left, or the quota is used up."""

    transient = False
