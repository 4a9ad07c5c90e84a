"""What the fleet's coordinator knows of each peer: its newest word, and whether it is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ftrain.comms.fleet.protocol.messages import Member, PeerGone, PeerStatus


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the coordinator is patient, in its ticks."""

    reconnect_ticks: int = 2  # with a connection that ended, once something is wrong
    silence_ticks: int = 10  # with a peer that does not answer while operations stand still
    patient_ticks: int = 40  # ... while they only wait for somebody to begin
    halt_ticks: int = 100  # with a peer that answers, but whose ring does not stop
    link_ticks: int = 20  # with operations that stand still though all answer
    change_ticks: int = 100  # with a change for which nothing is left but to be done
    recover_ticks: int = 40  # of a new coordinator, with peers that it has not heard of


@dataclass(slots=True)
class _Record:
    incarnation: int
    status: PeerStatus | None = None
    linked: bool = False
    down_ticks: int = 0  # since there is no connection
    silent_ticks: int = 0  # that it owes an answer
    ended: str = ""  # why it is gone for good


class Peers:
    """All peers that were heard of; of each only the newest incarnation."""

    def __init__(self, width: int, limits: Limits) -> None:
        self._width = width
        self._limits = limits
        self._records: dict[int, _Record] = {}
        self._age_ticks = 0
        self._asking = False
        self._asked_ticks = 0  # since the newest ping
        self._silence_ticks = limits.silence_ticks
        self._accused: set[int] = set()
        self.ping = 0

    def tick(self) -> None:
        """One unit of logical time has passed."""
        self._age_ticks += 1
        self._asked_ticks += 1
        # Where nobody answers, it may be this coordinator that is not heard: who answers later than
        # others is silent.
        answered = max((status.pong for status in self.statuses()), default=0)
        for record in self._records.values():
            record.down_ticks = 0 if record.linked else record.down_ticks + 1
            owes = self._asking and (record.status is None or record.status.pong < answered)
            record.silent_ticks = record.silent_ticks + 1 if owes else 0

    def ask(self, *, patiently: bool = False) -> None:
        """Something is wrong: have everybody answer, again and again until :meth:`rest`."""
        limits = self._limits
        self._silence_ticks = limits.patient_ticks if patiently else limits.silence_ticks
        if not self._asking or self._asked_ticks >= max(1, limits.silence_ticks // 2):
            self._asking = True
            self._asked_ticks = 0
            self.ping += 1

    def accuse(self, peers: set[int]) -> None:
        """Others have lost these: one whose connection here has ended as well is gone."""
        self._accused = peers

    def rest(self) -> None:
        """Nothing is wrong any more."""
        self._asking = False
        for record in self._records.values():
            record.silent_ticks = 0

    def accept(self, status: PeerStatus) -> bool:
        """Whether a peer's word is news."""
        record = self._record(status.peer, status.incarnation)
        if record is None or (record.status and record.status.sequence >= status.sequence):
            return False
        if record.status and record.status.place != status.place:
            self.give_up(status.peer, status.incarnation, "it says to be somewhere else")
        record.status = status
        record.silent_ticks = 0
        return True

    def connected(self, peer: int, incarnation: int) -> None:
        """There is a connection to it."""
        record = self._record(peer, incarnation)
        if record is not None:
            record.linked, record.down_ticks = True, 0

    def disconnected(self, peer: int, incarnation: int) -> None:
        """There is none any more."""
        record = self._records.get(peer)
        if record is not None and record.incarnation == incarnation:
            record.linked = False

    def gone(self, news: PeerGone) -> None:
        """Its process has ended."""
        self.give_up(news.peer, news.incarnation, news.cause)

    def give_up(self, peer: int, incarnation: int, why: str) -> None:
        """Count it as gone whatever it may say."""
        record = self._record(peer, incarnation)
        if record is not None and not record.ended:
            record.ended = why

    def why_gone(self, member: Member) -> str:
        """Why a member can't go on, in words; empty: it can."""
        for peer in range(member.member * self._width, (member.member + 1) * self._width):
            if why := self._why(peer, member.incarnation):
                return f"replica group {member.member} is gone: {why}"
        return ""

    def _why(self, peer: int, incarnation: int) -> str:
        limits, record = self._limits, self._records.get(peer)
        if record is None or record.incarnation < incarnation:
            return "it was not heard of" if self._age_ticks > limits.recover_ticks else ""
        if record.incarnation > incarnation:
            return "it has begun anew"
        if record.ended or not self._asking:
            return record.ended
        young = self._age_ticks <= limits.recover_ticks and record.status is None
        patience = 0 if peer in self._accused else limits.reconnect_ticks + 1
        if not record.linked and record.down_ticks >= patience and not young:
            return "its connection ended"
        if record.silent_ticks > self._silence_ticks:
            return "it does not answer"
        return ""

    def why_ended(self, peer: int, incarnation: int) -> str:
        """Why an incarnation is gone for good; empty: it is not."""
        record = self._records.get(peer)
        return record.ended if record is not None and record.incarnation == incarnation else ""

    def linked(self, peer: int) -> PeerStatus | None:
        """The newest word of a peer to whom there is a connection."""
        record = self._records.get(peer)
        return record.status if record is not None and record.linked else None

    def forget(self, keep: Callable[[Member], bool]) -> None:
        """Drop who was not connected for long, but not those to ``keep``."""
        for peer, record in list(self._records.items()):
            gone = not record.linked and record.down_ticks > self._limits.halt_ticks
            if gone and not keep(Member(peer // self._width, record.incarnation)):
                del self._records[peer]

    def newest(self, peer: int) -> PeerStatus | None:
        """Its newest word."""
        record = self._records.get(peer)
        return record.status if record is not None else None

    def statuses(self) -> Iterable[PeerStatus]:
        """The newest word of all."""
        return [r.status for _, r in sorted(self._records.items()) if r.status is not None]

    def of(self, members: Sequence[Member]) -> list[PeerStatus]:
        """The newest word of the members' peers, as far as they were heard of in this life."""
        found = []
        for member in members:
            for peer in range(member.member * self._width, (member.member + 1) * self._width):
                status = self.newest(peer)
                if status is not None and status.incarnation == member.incarnation:
                    found.append(status)
        return found

    def complete(self) -> tuple[Member, ...]:
        """Members all of whose peers are there, in the same life."""
        found = []
        for number in sorted({peer // self._width for peer in self._records}):
            peers = range(number * self._width, (number + 1) * self._width)
            records = [self._records.get(peer) for peer in peers]
            lives = {r.incarnation if r and r.linked and not r.ended else None for r in records}
            if (
                len(lives) == 1
                and (life := lives.pop()) is not None
                and all(record is not None and record.status is not None for record in records)
            ):
                found.append(Member(number, life))
        return tuple(found)

    def _record(self, peer: int, incarnation: int) -> _Record | None:
        """None for an incarnation that was followed by another one."""
        record = self._records.get(peer)
        if record is None or record.incarnation < incarnation:
            record = self._records[peer] = _Record(incarnation)
        return record if record.incarnation == incarnation else None
