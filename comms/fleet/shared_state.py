"""Making the peers of a lane equal: only what differs travels, from several donors at once.

::

    exchange: what I have, where it is to be got       all get the same words, so make the same plan
    fetch what I lack, from whoever has it             directly, beside the ring
    exchange: I have everything                        nobody goes on before all have said so

An exchange is an all-gather of words of equal length among the members of the moment; it is tried
again among the rest when one is lost, so every member gets the same words.  Lists of digests are
longer than a word: they are fetched where they differ, so that equal members need one word each.
Whatever goes wrong, or whoever comes in between, everything begins again with what there is then.

PCCL's shared state (Keiblinger et al., arXiv:2505.14065) is the model; what differs is said in
``docs/shared_state.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import torch

from ftrain.comms import wire
from ftrain.comms.collectives.work import Work
from ftrain.comms.errors import FtrainError, PeerLostError, RemoteProtocolError, StateError
from ftrain.comms.fleet.access import Access
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.protocol.shared_state import Content, Offer, Plan, Role, agree
from ftrain.comms.fleet.protocol.state_messages import StateStep, StateWord
from ftrain.comms.fleet.state_fetch import Donor, Fetcher, Found
from ftrain.comms.fleet.state_server import StateServer
from ftrain.comms.fleet.state_snapshot import Landing, Snapshot
from ftrain.comms.protocol.ring import Kind

__all__ = ["Role", "Serving", "Synchronised", "fetch", "serve", "synchronise"]

TAG = 65535  # of all operations here
ATTEMPTS_MAX = 3  # that fail with the same members
PATIENCE_S = 10.0
_WORD_BYTES = 1024
_WHY_BYTES_MAX = 300


@dataclass(frozen=True, slots=True)
class Synchronised:
    """What came of it; ``members`` and ``revision`` are the same for all of them.

    Args:
        bytes_received: of tensors; 0 when this peer had everything.
        donors: how many of them came from each member.
        rounds: 1 unless it had to begin again.
        faults: what went wrong on the way and was mended, a sentence each.
    """

    revision: int
    bytes_received: int
    bytes_sent: int
    donors: dict[int, int]
    members: tuple[int, ...]
    rounds: int = 1
    faults: tuple[str, ...] = ()


def synchronise(
    fleet: Fleet,
    tensors: Mapping[str, torch.Tensor],
    revision: int,
    *,
    role: Role = Role.ENFORCE_POPULAR,
    expect_unchanged: bool = False,
    patience_s: float = PATIENCE_S,
) -> Synchronised:
    """Make ``tensors`` the same on all members: a collective, which every peer of the lane calls.

    Returns once all have everything; until then nobody may change the tensors.  A peer whose
    content counts keeps it until all have received everything, for which it needs as much memory as
    it lacks; one that is RECEIVE_ONLY receives in place, and has anything in its tensors when this
    raises.

    Args:
        tensors: contiguous, on the CPU, of any dtype; the same keys, dtypes and shapes everywhere.
        revision: of what this peer has; the newest is elected, see
            :mod:`ftrain.comms.fleet.protocol.shared_state`.
        expect_unchanged: raise StateError on all members if one that says this lacks something.
        patience_s: with a donor that sends nothing.

    Raises UsageError for tensors that can't be shared, StateError (the same on all members) for
    offers that do not go together, PeerLostError when nobody has any more what was elected or it
    can't be had, FleetLeftError.
    """
    with StateServer(fleet.access, patience_s) as server:
        landing: Landing | None = None
        fetcher = Fetcher(fleet.access, patience_s)
        attempt = rounds = 0
        while True:
            rounds += 1
            snapshot = Snapshot(tensors, revision)  # anew: what was wrong may be in the memory here
            landing = landing or Landing(snapshot.views, in_place=role is Role.RECEIVE_ONLY)
            server.offer(snapshot.digest.hex(), snapshot)
            word = StateWord(
                StateStep.OFFER,
                fleet.peer,
                attempt,
                revision,
                role,
                expect_unchanged,
                server.address,
                snapshot.digest,
            )
            offers = _exchange(fleet, word)
            if any(other.step is not StateStep.OFFER for other in offers.values()):
                continue  # this peer came in the middle: the others begin again too
            member = next(m for m, other in offers.items() if other.peer == fleet.peer)
            outcome = _fetch(fetcher, offers, member, snapshot, landing)
            ends = _exchange(fleet, outcome.word(word))
            if all(end.step is StateStep.DONE for end in ends.values()):
                assert outcome.plan is not None
                landing.commit(outcome.plan, member)
                received = dict(sorted(fetcher.received.items()))
                return Synchronised(
                    outcome.plan.revision,
                    sum(received.values()),
                    server.sent_bytes,
                    received,
                    tuple(sorted(ends)),
                    rounds,
                    tuple(fetcher.faults),
                )
            attempt = _attempts(offers, ends)
            if outcome.error is not None and all(
                e.step is StateStep.REFUSED for e in ends.values()
            ):
                raise outcome.error


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Of one round, on one peer."""

    plan: Plan | None = None
    error: StateError | None = None  # the same for all
    why: str = ""  # it could not get everything

    def word(self, offer: StateWord) -> StateWord:
        step = StateStep.FAILED if self.why else StateStep.DONE
        step = StateStep.REFUSED if self.error is not None else step
        why = self.why.encode()[:_WHY_BYTES_MAX].decode(errors="ignore")
        return replace(offer, step=step, why=why)


def _fetch(
    fetcher: Fetcher,
    words: Mapping[int, StateWord],
    member: int,
    snapshot: Snapshot,
    landing: Landing,
) -> _Outcome:
    try:
        contents = _contents(fetcher, words, snapshot)
        offers = [
            Offer(number, word.revision, word.role, contents[word.digest], word.expects)
            for number, word in words.items()
        ]
        try:
            plan = agree(offers)
        except StateError as error:
            return _Outcome(error=error)
        donors = {
            number: Donor(number, word.peer, word.address, word.digest.hex())
            for number, word in words.items()
        }
        fetcher.blocks(plan, member, donors, landing)
        return _Outcome(plan)
    except (FtrainError, OSError, MemoryError, RuntimeError) as error:  # no thread to be had
        return _Outcome(why=str(error) or type(error).__name__)


def _contents(
    fetcher: Fetcher, words: Mapping[int, StateWord], snapshot: Snapshot
) -> dict[bytes, Content]:
    """Of each digest the list of tensors, from anybody who has it."""
    found = {snapshot.digest: snapshot.content}
    error: Exception | None = None
    for number, word in words.items():
        if word.digest in found:
            continue
        try:
            there = fetcher.content(word.address, word.digest.hex())
            if there.digest != word.digest:
                raise RemoteProtocolError(f"member {number} sent another list than it announced")
            found[word.digest] = there.content
        except (FtrainError, OSError) as caught:
            fetcher.tell(f"member {number} did not say what it has: {caught}")
            error = caught
    missing = [number for number, word in words.items() if word.digest not in found]
    if missing:
        raise PeerLostError(f"member {missing[0]} did not say what it has: {error}")
    return found


def _attempts(offers: Mapping[int, StateWord], ends: Mapping[int, StateWord]) -> int:
    """How many have failed now; raises PeerLostError, on all members, after too many."""
    if set(ends) != set(offers):
        return 0  # somebody went, or came: that is reason enough
    attempt = max(offer.attempt for offer in offers.values()) + 1
    failed = {number: end.why for number, end in ends.items() if end.step is StateStep.FAILED}
    if attempt >= ATTEMPTS_MAX and failed:
        number, why = min(failed.items())
        raise PeerLostError(
            f"member {number} could not get the state in {attempt} attempts: {why}: check that the"
            " members reach each other, and that nothing changes tensors meanwhile"
        )
    return attempt


def _exchange(fleet: Fleet, word: StateWord) -> dict[int, StateWord]:
    """All members' words, by member."""
    encoded = wire.encode(word)
    record = len(encoded).to_bytes(2, "little") + encoded
    source = memoryview(record.ljust(_WORD_BYTES, b"\0"))
    target = memoryview(b"")

    def make(rank: int, ranks: int) -> Work:  # anew for every ring in which it is tried
        nonlocal target
        target = memoryview(bytearray(ranks * _WORD_BYTES))
        return Work(Kind.ALL_GATHER, target.nbytes, 1, source, target)

    handle = fleet.begin(make, tag=TAG)
    handle.wait()
    words: dict[int, StateWord] = {}
    for rank, member in enumerate(handle.members):
        data = target[rank * _WORD_BYTES : (rank + 1) * _WORD_BYTES]
        end = 2 + int.from_bytes(data[:2], "little")
        message = wire.decode(data[2:end])
        if not isinstance(message, StateWord):
            raise RemoteProtocolError(f"member {member} said what it may not say")
        words[member] = message
    return dict(sorted(words.items()))


# ------------------------------------------------------------------ without the fleet


class Serving:
    """A snapshot that is offered to whoever joins; closes itself as a context manager."""

    def __init__(self, server: StateServer, copies: tuple[torch.Tensor, ...]) -> None:
        self._server = server
        self._copies = copies  # whose memory is served
        self.address = server.address

    @property
    def bytes_sent(self) -> int:
        """Of tensors, so far."""
        return self._server.sent_bytes

    def close(self) -> None:
        """Offer it no more."""
        self._server.close()
        self._copies = ()

    def __enter__(self) -> Serving:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(
    access: Access,
    tensors: Mapping[str, torch.Tensor],
    revision: int,
    *,
    name: str = "",
    copy: bool = True,
    patience_s: float = PATIENCE_S,
) -> Serving:
    """Offer tensors as they are now, under a name, for :func:`fetch`, until it is closed.

    Args:
        copy: serve a copy, so that training may go on; else nobody may change the tensors.

    Raises UsageError for tensors that can't be shared.
    """
    frozen = {key: one.clone() for key, one in tensors.items()} if copy else dict(tensors)
    snapshot = Snapshot(frozen, revision)
    server = StateServer(access, patience_s)
    server.offer(name, snapshot)
    return Serving(server, tuple(frozen.values()))


def fetch(
    access: Access,
    addresses: Iterable[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    name: str = "",
    patience_s: float = PATIENCE_S,
) -> Synchronised:
    """Make ``tensors`` what the servers at ``addresses`` offer under a name: the newest revision,
    the most popular content of it, from all of them at once that have it.

    In place: when this raises there is anything in the tensors.  In the result members are peers.

    Raises UsageError for tensors that can't be shared, StateError for offers that do not go
    together, PeerLostError when nobody offers it or not all is to be had.
    """
    fetcher = Fetcher(access, patience_s)
    snapshot = Snapshot(tensors, -1)
    me = access.identity.node
    found: dict[int, tuple[str, Found]] = {}
    for address in addresses:
        try:
            there = fetcher.content(address, name)
            if there.peer != me:
                found.setdefault(there.peer, (address, there))
        except (FtrainError, OSError) as error:
            fetcher.tell(f"{address} does not offer it: {error}")
    if not found:
        raise PeerLostError(f"nobody offers the state: {_all(fetcher.faults)}")
    offers = [Offer(me, -1, Role.RECEIVE_ONLY, snapshot.content)]
    donors = {}
    for peer, (address, there) in found.items():
        offers.append(Offer(peer, there.revision, Role.ENFORCE_POPULAR, there.content))
        donors[peer] = Donor(peer, peer, address, name)
    plan = agree(offers)
    fetcher.blocks(plan, me, donors, Landing(snapshot.views, in_place=True))
    received = dict(sorted(fetcher.received.items()))
    return Synchronised(
        plan.revision,
        sum(received.values()),
        0,
        received,
        tuple(sorted(found)),
        faults=tuple(fetcher.faults),
    )


def _all(faults: Sequence[str]) -> str:
    return "; ".join(faults) or "no address was given"
