"""The manager's side of its conversation with ranks."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from ftrain.comms.errors import (
    AuthenticationError,
    CorruptionError,
    FtrainError,
    LocalProtocolError,
    MemoryShortError,
    StateError,
)
from ftrain.comms.links import LocalLink
from ftrain.comms.local import LocalSocket, accept_local, listen_local
from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.protocol.custody import SlotState
from ftrain.snapshot.protocol.messages import (
    Begin,
    ClientHello,
    ClientWelcome,
    Denied,
    Finished,
    FinishTask,
    Granted,
    ImageSealed,
    Open,
    Opened,
    Part,
    Release,
    Repaired,
    RequestRefused,
    Reserve,
    Reserved,
    Withdraw,
)
from ftrain.snapshot.protocol.takeover import Task
from ftrain.snapshot.store import Place, SlotStore, places_of

_BYTES_MAX = 1 << 44
_PEERS_S_MAX = 0.1  # what a boundary waits for other nodes' managers rather than lose its version
_ACCEPT_PAUSE_S = 0.1


class RankServer:
    """Serves the ranks of one node.

    Args:
        store: what they write to and read from.
        on_sealed: a rank's image of this version was sealed.
        on_withdrawn: a rank's sealed image of this version is wrong.
        on_skipped: a rank will not hold some version.
        on_change: a rank began, ended or answered: captures may be finishable now, or not any more.
        on_hold: keep this slot's descriptor: rank, slot, descriptor, bytes.
        on_grown: slots take more memory than before.
        on_repaired: a rank was restored although images were damaged.
        on_trouble: one sentence for the user.
        settled: returns once a version is not being rebuilt here.
    """

    def __init__(
        self,
        store: SlotStore,
        *,
        on_sealed: Callable[[VersionId], None],
        on_withdrawn: Callable[[VersionId], None],
        on_skipped: Callable[[], None],
        on_change: Callable[[], None],
        on_hold: Callable[[int, int, int, int], None],
        on_grown: Callable[[], None],
        on_repaired: Callable[[Repaired], None],
        on_trouble: Callable[[str], None],
        settled: Callable[[VersionId], Awaitable[None]],
    ) -> None:
        self.store = store
        self.on_sealed = on_sealed
        self.on_withdrawn = on_withdrawn
        self.on_skipped = on_skipped
        self.on_change = on_change
        self.on_hold = on_hold
        self.on_grown = on_grown
        self.on_repaired = on_repaired
        self.on_trouble = on_trouble
        self.settled = settled
        self._sessions: dict[int, _RankSession] = {}  # by rank
        self._strangers: set[_RankSession] = set()  # not welcomed yet
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._pausing = False  # nobody can be accepted, and that was told
        self.patient = True  # a rank may wait for other nodes; once, until they are heard again
        self._told_short = False
        self._growth: dict[int, asyncio.Lock] = {}  # by rank

    def listen(self, path: str) -> None:
        """Accept ranks at ``path``; RunDirectoryError."""
        self._listener = listen_local(path)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Stop serving."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for session in [*self._sessions.values(), *self._strangers]:
            session.end()

    def group_changed(self) -> None:
        """Another epoch began: its ranks may come in, those of older ones are put out."""
        for session in [*self._sessions.values(), *self._strangers]:
            session.review()

    def committed(self) -> None:
        """A version was committed, so other nodes keep up: slots may be free now."""
        self.patient = True
        for session in list(self._sessions.values()):
            session.retry()

    def connected(self) -> list[int]:
        """Ranks that can be asked something."""
        return list(self._sessions)

    def hears(self, session: _RankSession) -> bool:
        """Whether ``session`` still speaks for its rank."""
        return self._sessions.get(session.rank) is session

    def ask(self, task: Task) -> None:
        """Ask a connected survivor to finish a dead rank's image."""
        region = self.store.region(task.rank, task.slot)
        self._sessions[task.survivor].link.post(
            FinishTask(task.version, task.rank, region.nbytes), [region.fd]
        )

    async def grow(self, rank: int, nbytes: int) -> None:
        """Make every slot of ``rank`` that large; MemoryShortError."""
        async with self._growth.setdefault(rank, asyncio.Lock()):
            short = self.store.plan_growth(rank, nbytes)
            while short:
                slot, _ = short[0]
                try:
                    fd = await asyncio.to_thread(self.store.allocate, rank, slot, nbytes)
                    region = self.store.grow(rank, slot, fd)
                except (MemoryShortError, OSError) as error:
                    self.store.growth_failed(sum(nbytes - size for _, size in short))
                    if isinstance(error, MemoryShortError):
                        raise
                    raise MemoryShortError(f"rank {rank} got no snapshot slot: {error}") from None
                self.on_hold(rank, slot, region.fd, region.nbytes)
                short.pop(0)
                self.on_grown()

    def short(self, rank: int, error: MemoryShortError) -> None:
        """Slots can't grow: told once. (One that never had any ends its rank, which tells it.)"""
        if self.store.has_slots(rank) and not self._told_short:
            self._told_short = True
            self.on_trouble(f"training goes on without new snapshots: {error}")

    def admit(self, session: _RankSession, rank: int) -> None:
        """``session`` speaks for ``rank`` from now on."""
        earlier = self._sessions.get(rank)
        if earlier is not None and earlier is not session:
            earlier.end()
        self._strangers.discard(session)
        self._sessions[rank] = session

    def gone(self, session: _RankSession) -> None:
        """A connection ended."""
        self._strangers.discard(session)
        if session.hello is not None and self._sessions.get(session.hello.rank) is session:
            del self._sessions[session.hello.rank]
            self.store.takeover.unreachable(session.hello.rank)
            self.on_change()

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                sock = accept_local(self._listener)
            except BlockingIOError:
                return
            except AuthenticationError as error:
                self.on_trouble(f"a connection to the snapshot manager was refused: {error}")
                continue
            except OSError as error:  # out of descriptors, say; who waits in the queue stays there
                if not self._pausing:
                    self.on_trouble(f"the snapshot manager can't take a rank in now: {error}")
                self._pause()
                return
            self._pausing = False
            self._strangers.add(_RankSession(self, sock))

    def _pause(self) -> None:
        """Accept nobody for a while: the queue would be reported as readable again at once."""
        assert self._listener is not None
        self._pausing = True
        self._loop.remove_reader(self._listener.fileno())
        self._loop.call_later(_ACCEPT_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)
            self._accept()


class _RankSession:
    """One rank's connection. Whatever it says that makes no sense ends it, and nothing else."""

    def __init__(self, server: RankServer, sock: LocalSocket) -> None:
        self._server = server
        self._store = server.store
        self.hello: ClientHello | None = None
        self._welcomed = False
        self._opened: dict[VersionId, list[Place]] = {}
        self._growing: asyncio.Task[None] | None = None  # goes on when the rank is gone
        self._opening: asyncio.Task[None] | None = None
        self._wanted: Begin | None = None  # waits for a slot
        self._giving_up: asyncio.TimerHandle | None = None
        self._handlers: dict[type, Callable[[Any], None]] = {
            Reserve: self._reserve,
            Begin: self._begin,
            ImageSealed: self._sealed,
            Withdraw: self._withdraw,
            Open: self._open,
            Release: self._release,
            Finished: self._finished,
            Repaired: lambda message: self._server.on_repaired(message),
        }
        self.link = LocalLink(sock, self._message, lambda _: self.end())

    @property
    def rank(self) -> int:
        """The rank it speaks for."""
        assert self.hello is not None
        return self.hello.rank

    def end(self) -> None:
        """Close the connection and take back what it read; what it wrote stays as it is."""
        self.link.close()
        self._stop_waiting()
        if self._opening is not None:
            self._opening.cancel()
        for version in list(self._opened):
            self._release(Release(version))
        self._server.gone(self)

    def review(self) -> None:
        """Welcome or refuse the rank by its epoch; one that is ahead of us has to wait."""
        hello, custody = self.hello, self._store.custody
        if hello is None or hello.epoch > custody.epoch:
            return
        if hello.epoch < custody.epoch or hello.rank not in custody.local_ranks:
            self._refuse(
                hello.request,
                f"rank {hello.rank} of epoch {hello.epoch} is not of this node's group in epoch "
                f"{custody.epoch}: it should end",
            )
            self.end()
        elif not self._welcomed:
            self._welcome(hello)

    def _welcome(self, hello: ClientHello) -> None:
        self._welcomed = True
        self._server.admit(self, hello.rank)
        slot = hello.slot if 0 <= hello.slot < self._store.custody.slots_per_rank else -1
        if slot < 0 or not self._store.claim(hello.rank, slot, hello.version):
            slot = -1
        for number, state in enumerate(self._store.custody.slots(hello.rank)):
            if state.state is SlotState.WRITING and number != slot:
                self._store.give_up(hello.rank, number)
        self.link.post(ClientWelcome(hello.request, slot))
        self._announce_all()
        self._server.on_change()

    def _announce_all(self) -> None:
        """Images that were sealed while nobody listened."""
        for version in reversed(self._store.custody.sealed_versions()):
            if version.epoch == self._store.custody.epoch:
                self._server.on_sealed(version)

    def _message(self, message: object, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)  # a rank has no descriptor to give
        try:
            if isinstance(message, ClientHello):
                if self.hello is None:
                    self.hello = message
                    self.review()
                return
            handler = self._handlers.get(type(message))
            if handler is None or not self._welcomed:
                raise LocalProtocolError(f"{type(message).__name__} makes no sense here")
            handler(message)
        except (FtrainError, KeyError, IndexError) as error:
            who = f"rank {self.hello.rank}" if self.hello else "a local process"
            self._server.on_trouble(f"the snapshot manager closed its connection to {who}: {error}")
            self.end()

    # ------------------------------------------------------------ requests

    def _reserve(self, message: Reserve) -> None:
        if not 0 < message.nbytes < _BYTES_MAX or self._growing is not None:
            raise LocalProtocolError(f"an impossible reservation of {message.nbytes} bytes")
        self._growing = asyncio.get_running_loop().create_task(self._grow(message))

    async def _grow(self, message: Reserve) -> None:
        try:
            await self._server.grow(self.rank, message.nbytes)
        except MemoryShortError as error:
            self._server.short(self.rank, error)
            self._refuse(message.request, str(error), short=True)
            return
        finally:
            self._growing = None
        if not self._server.hears(self):
            return  # put out meanwhile; its slots may be gone
        slots = range(self._store.custody.slots_per_rank)
        regions = [self._store.region(self.rank, slot) for slot in slots]
        sizes = tuple(region.nbytes for region in regions)
        self.link.post(Reserved(message.request, sizes), [region.fd for region in regions])

    def _begin(self, message: Begin) -> None:
        self._require_current(message.version)
        if message.slot >= 0:
            if message.slot != self._store.custody.writing(self.rank):
                raise LocalProtocolError(f"slot {message.slot} was not granted")
            self._store.custody.writes(self.rank, message.slot, message.version)
        else:
            self._wanted = message
            self.retry()
        self._server.on_change()

    def retry(self, *, last: bool = False) -> None:
        """Give the rank the slot that it waits for; on the ``last`` try, or tell it why not."""
        wanted = self._wanted
        if wanted is None:
            return
        if last:
            self._server.patient = False
        if self._grant(wanted.request, wanted.version, patient=self._server.patient):
            self._stop_waiting()
        elif self._giving_up is None:
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(_PEERS_S_MAX, lambda: self.retry(last=True))

    def _stop_waiting(self) -> None:
        self._wanted = None
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def _sealed(self, message: ImageSealed) -> None:
        self._require_current(message.version)
        if message.slot not in range(self._store.custody.slots_per_rank):
            raise LocalProtocolError(f"there is no slot {message.slot}")
        try:
            self._store.seal(self.rank, message.slot, message.version)
        except (CorruptionError, StateError) as error:
            self._store.give_up(self.rank, message.slot)
            self._server.on_trouble(f"a version was not kept: {error}")
        self._server.on_sealed(message.version)
        self._grant(message.request, None)
        self._server.on_change()

    def _withdraw(self, message: Withdraw) -> None:
        self._require_current(message.version)
        if self._store.withdraw(self.rank, message.version):
            self._server.on_withdrawn(message.version)

    def _grant(self, request: int, version: VersionId | None, *, patient: bool = False) -> bool:
        """Answer a rank that wants a slot; False: it has to wait."""
        grant = self._store.grant(self.rank, version, patient=patient)
        if grant.later:
            return False
        if grant.slot < 0:
            self.link.post(Denied(request, grant.reason))
            if version is not None:
                self._server.on_skipped()
        else:
            self.link.post(Granted(request, grant.slot))
        return True

    def _open(self, message: Open) -> None:
        self._opening = asyncio.get_running_loop().create_task(self._open_settled(message))

    async def _open_settled(self, message: Open) -> None:
        """Once nothing of the version is being rebuilt any more."""
        await self._server.settled(message.version)
        if self._server.hears(self):
            self._give(message)

    def _give(self, message: Open) -> None:
        images = self._store.images(message.version)
        if not images:
            self._refuse(message.request, f"this node holds nothing of {message.version}")
            return
        small = b"".join(image.view for image in images if image.place is None)
        fds = [self._store.region(*place).fd for place in places_of(images)]
        parts: list[Part] = []
        offset = files = 0
        for image in images:
            if image.place is None:
                parts.append(Part(image.rank, False, len(fds), offset, image.view.nbytes))
                offset += image.view.nbytes
            else:
                parts.append(Part(image.rank, True, files, 0, image.view.nbytes))
                files += 1
        if message.version not in self._opened:
            self._opened[message.version] = places_of(images)
            self._store.custody.pin(places_of(images))
        shelf = os.memfd_create("ftrain-small", os.MFD_CLOEXEC)
        try:
            os.write(shelf, small)
            self.link.post(Opened(message.request, tuple(parts)), [*fds, shelf])
        finally:
            os.close(shelf)

    def _release(self, message: Release) -> None:
        self._store.custody.unpin(self._opened.pop(message.version, []))

    def _finished(self, message: Finished) -> None:
        if not self._store.takeover.answered(message.version, message.rank, self.rank):
            return
        self._store.reload_rank(message.rank)  # the header knows better than the message
        self._server.on_sealed(message.version)
        self._server.on_change()

    def _require_current(self, version: VersionId) -> None:
        if version.epoch != self._store.custody.epoch:
            raise LocalProtocolError(f"{version} is not of epoch {self._store.custody.epoch}")

    def _refuse(self, request: int, reason: str, *, short: bool = False) -> None:
        self.link.post(RequestRefused(request, reason, short))
