"""What the coordinator says: into the event log, and to the fronts that watch."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from ftrain.comms.channel import Channel
from ftrain.comms.errors import PeerLostError
from ftrain.comms.events import EventLog
from ftrain.comms.protocol.messages import Notice

_BACKLOG_MAX = 200  # notices kept while nobody watches
# For the event log only.
_QUIET_KINDS = ("phase", "total_steps", "save", "withdrawn", "written", "parity")


class News:
    """Takes each notice to the event log and to the fronts; without one, keeps it for the next."""

    def __init__(self, events: EventLog, launch: str) -> None:
        self._events = events
        self._launch = launch
        self._watchers: list[Channel] = []
        self._backlog: deque[Notice] = deque(maxlen=_BACKLOG_MAX)

    def announce(self, notice: Notice) -> None:
        """Into the event log, and to everybody who watches."""
        self._events.write(notice.kind, text=notice.text, data=notice.data, launch=self._launch)
        if notice.kind not in _QUIET_KINDS:
            self.show(notice)

    def show(self, notice: Notice) -> None:
        """Only to those who watch: the event log has it in another form, or not at all."""
        fronts = [c for c in self._watchers if c.peer.role == "front" and not c.closed]
        if not fronts:
            self._backlog.append(notice)
        for channel in fronts:
            with suppress(PeerLostError):
                channel.post(notice)

    def watch(self, channel: Channel) -> None:
        """A front or a command line is there; the first front gets what nobody has seen."""
        self._watchers.append(channel)
        if channel.peer.role == "front":
            while self._backlog:
                channel.post(self._backlog.popleft())

    def unwatch(self, channel: Channel) -> None:
        """It is gone."""
        self._watchers.remove(channel)
