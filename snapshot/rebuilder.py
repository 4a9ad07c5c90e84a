"""Rebuilds the images of a lost node in this node's memory, from what the others hold of a round.

What is used was compared with its digests by whoever holds it; what comes out is compared with the
digests that the round's record names.  So the images are those of the lost node, or there are none.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ftrain.comms.channel import Identity
from ftrain.comms.errors import CorruptionError, FtrainError, PeerLostError, StateError
from ftrain.comms.protocol.messages import Rebuild, VersionId
from ftrain.snapshot.chunks import Source
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.protocol.messages import SoundAnswer
from ftrain.snapshot.remains import HopelessError, Remains
from ftrain.snapshot.store import SlotStore
from ftrain.snapshot.stripes import Summer

_RETRY_S = 0.1
_PATIENCE_S = 10.0  # for managers that are being replaced, since one was last heard
_TRIES_MAX = 30


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What rebuilding took."""

    version: VersionId
    node: int  # that was lost
    nbytes: int
    seconds: float
    damage: tuple[str, ...]  # that was found, and done without


class Rebuilder:
    """One rebuilding at a time, the newest that is wanted.

    Args:
        grow: make all slots of a rank that large; raises MemoryShortError.
        on_rebuilt: a lost node's images are here, sealed.
        on_settled: the same, or they never will be.
    """

    def __init__(
        self,
        store: SlotStore,
        identity: Identity,
        secret: bytes,
        *,
        grow: Callable[[int, int], Coroutine[object, object, None]],
        address_of: Callable[[int], str],
        on_rebuilt: Callable[[Rebuilt], None],
        on_settled: Callable[[], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._store = store
        self._identity = identity
        self._secret = secret
        self._grow = grow
        self._address_of = address_of
        self._on_rebuilt = on_rebuilt
        self._on_settled = on_settled
        self._on_trouble = on_trouble
        self._order: Rebuild | None = None
        self._version: VersionId | None = None
        self._task: asyncio.Task[None] | None = None
        self._over = threading.Event()
        self._sources: _Sources | None = None
        self._settled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "ftrain-rebuild")

    def begin(self, order: Rebuild | None, version: VersionId | None, peers: list[int]) -> None:
        """A new group began; ``order`` and ``version``: what it restores from has to be rebuilt."""
        if order == self._order and (order is None or self._task is not None):
            return  # else the new group has to hear that it is there, or it is tried again
        self.close()
        self._order, self._version = order, version
        if order is None or version is None:
            return
        self._over = over = threading.Event()
        self._settled = asyncio.Event()
        work = self._work(order, version, peers, over)
        self._task = asyncio.get_running_loop().create_task(work)

    async def settled(self, version: VersionId) -> None:
        """Return once ``version`` is not being rebuilt here, with or without success."""
        if self._task is not None and version == self._version:
            await self._settled.wait()

    def close(self) -> None:
        """Give up what is under way."""
        self._over.set()
        self._settled.set()
        if self._sources is not None:
            self._sources.interrupt()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _work(
        self, order: Rebuild, version: VersionId, peers: list[int], over: threading.Event
    ) -> None:
        began_s = time.monotonic()
        try:
            if self._has_been(version):  # an earlier manager rebuilt it
                return
            sources = self._sources = _Sources(self, peers, over)
            found = await self._rebuild(sources, order, version)
            sources.close()
            nbytes = sum(image.nbytes for image in found.images)
            took_s = time.monotonic() - began_s
            self._on_rebuilt(Rebuilt(version, order.lost, nbytes, took_s, found.damage))
        except (FtrainError, OSError) as error:
            self._on_trouble(
                f"step {version.step} of node {order.lost} can't be rebuilt here: {error}"
            )
        finally:
            if not over.is_set():
                self._settled.set()
                self._task = None
                self._on_settled()

    async def _rebuild(self, sources: _Sources, order: Rebuild, version: VersionId) -> Remains:
        """Try until it is done, or nobody was heard for too long."""
        loop = asyncio.get_running_loop()
        heard_s, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                found = await loop.run_in_executor(self._thread, sources.look, order, version)
                heard_s = time.monotonic()
                await self._fill(sources, found)
                return found
            except (PeerLostError, StateError, CorruptionError) as error:
                late = time.monotonic() > heard_s + _PATIENCE_S or tries == _TRIES_MAX
                if late or isinstance(error, HopelessError):
                    raise
            await asyncio.sleep(_RETRY_S)
            sources.close()

    def _has_been(self, version: VersionId) -> bool:
        """Whether it is here, or was: it is given up only for one that was captured since."""
        custody = self._store.custody
        ranks = {rank for rank, _ in custody.sealed(version)}
        newer = any(sealed.epoch == custody.epoch for sealed in custody.sealed_versions())
        return newer or ranks.issuperset(custody.local_ranks)

    async def _fill(self, sources: _Sources, found: Remains) -> None:
        """Rebuild into slots that nobody is given until the thread is done with them."""
        for image in found.images:
            await self._grow(image.rank, image.nbytes)
        places = [(image.rank, self._store.vacate(image.rank)) for image in found.images]
        room = {
            image.rank: self._store.region(*place).view[: image.nbytes]
            for image, place in zip(found.images, places, strict=True)
        }
        custody, loop = self._store.custody, asyncio.get_running_loop()
        custody.pin(places)
        work = self._thread.submit(sources.rebuild, found, room)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(custody.unpin, places))
        await asyncio.wrap_future(work)
        for place in places:
            self._store.reload(*place)

    def source(self, node: int) -> Source:
        """A connection to another node's manager."""
        return Source(node, self._address_of(node), self._identity, self._secret)


class _Sources:
    """The other nodes, as the thread asks them."""

    def __init__(self, rebuilder: Rebuilder, peers: list[int], over: threading.Event) -> None:
        self._rebuilder = rebuilder
        self._peers = peers
        self.over = over
        self._open: dict[int, Source] = {}

    def close(self) -> None:
        """End every connection."""
        for source in self._open.values():
            source.close()
        self._open.clear()

    def of(self, node: int) -> Source:
        """The one of a node."""
        if node not in self._open:
            self._open[node] = self._rebuilder.source(node)
        return self._open[node]

    def interrupt(self) -> None:
        """From another thread: what waits for an answer raises soon."""
        for source in list(self._open.values()):
            source.interrupt()

    def look(self, order: Rebuild, version: VersionId) -> Remains:
        """What is left of the round; raises as :class:`Remains` does."""
        answers: dict[int, SoundAnswer] = {}
        unheard: list[str] = []
        with ThreadPoolExecutor(max(1, len(self._peers)), "ftrain-look") as pool:
            asked = {
                node: pool.submit(self.of(node).sound, order.round, order.lost)
                for node in self._peers
            }
            for node, answer in asked.items():  # each compares all that it holds with its digests
                try:
                    if answer.result().record:
                        answers[node] = answer.result()
                except (PeerLostError, StateError) as error:
                    unheard.append(str(error))
        return Remains(order, version, answers, unheard)

    def rebuild(self, remains: Remains, room: Mapping[int, memoryview]) -> None:
        """Fill the memory of each rank."""

        def require_current() -> None:
            if self.over.is_set():
                raise PeerLostError("the group has changed meanwhile")

        summer = Summer(engine().engine, lambda _: require_current())
        remains.rebuild(room, self.of, summer, require_current)
