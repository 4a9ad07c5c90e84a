"""What a ring needs of the link to each neighbour.

A ring's chunks come in through one lane and leave through another.  A lane raises PeerLostError
when its other end is gone or it was closed here, and RemoteProtocolError for garbage; it is of no
use after that.
"""

from __future__ import annotations

from typing import Protocol

from ftrain.comms.protocol.chunk_frames import Head


class OutLane(Protocol):
    """To the right neighbour."""

    def fileno(self) -> int:
        """Hung up when the neighbour is gone."""
        ...

    def say(self, head: Head) -> None:
        """Send a word, ahead of chunks that have not left yet."""

    def room(self, nbytes: int) -> memoryview:
        """A buffer to put the next chunk into; waits until there is one."""
        ...

    def send_room(self, head: Head, room: memoryview) -> None:
        """Send what :meth:`room` gave, which is the lane's again."""

    def send(self, head: Head, chunk: memoryview) -> None:
        """Send bytes of somebody else's, who keeps them as they are until the operation is over.

        ``head.value`` is their checksum, or 0: then the lane makes it, if it needs one.
        """

    def close(self) -> None:
        """End the link; whoever waits for it raises."""


class InLane(Protocol):
    """From the left neighbour; for one thread."""

    def fileno(self) -> int:
        """Readable when there is a next frame, or the end."""
        ...

    def next(self) -> Head:
        """The next frame; if it announces a chunk, take that before asking again."""
        ...

    def take(self, target: memoryview) -> None:
        """Put the announced chunk there, which is as long."""

    def borrow(self) -> memoryview:
        """The announced chunk, until :meth:`give_back`."""
        ...

    def give_back(self) -> None:
        """What was borrowed is needed no more."""

    def close(self) -> None:
        """End the link; whoever waits for it raises."""
