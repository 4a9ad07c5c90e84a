"""The stores through which the ranks of a formation find each other.

torch's own way of sharing one store between restarts lets new ranks read what dead ones left there.
Here every formation has a store of its own, on a port of its own, hosted by a process that is no
rank.  The next one is made ahead of time, because forming must not wait for it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

from ftrain.comms.addresses import format_address, listen_tcp

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_TIMEOUT = timedelta(seconds=60)


class GroupStores:
    """Makes stores in a thread of its own, which also imports torch; close it at the end."""

    def __init__(self, bind: str) -> None:
        self._bind = bind
        self._thread = ThreadPoolExecutor(1, "stores")
        self._next: asyncio.Future[TCPStore] = self._prepare()
        self._present: TCPStore | None = None
        self._outgoing: list[TCPStore] = []

    async def take(self) -> int:
        """Port of a fresh store. Raises UsageError or RuntimeError when none can be made."""
        try:
            store = await self._next
        finally:
            self._next = self._prepare()
        if self._present is not None:
            self._outgoing.append(self._present)
        self._present = store
        return int(store.port)

    def retire(self) -> None:
        """Close every store but the newest: their ranks are gone."""
        outgoing, self._outgoing = self._outgoing, []
        if outgoing:
            self._thread.submit(outgoing.clear)

    def close(self) -> None:
        """Give up all stores, without waiting."""
        self._next.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prepare(self) -> asyncio.Future[TCPStore]:
        future = asyncio.get_running_loop().run_in_executor(self._thread, make_store, self._bind)
        future.add_done_callback(_look_at)
        return future


def make_store(bind: str, port: int = 0) -> TCPStore:
    """A store listening on ``bind`` alone; torch by itself would listen on every interface.

    Raises UsageError when the address can't be listened on.
    """
    listener = listen_tcp(format_address(bind, port))
    try:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host, port = listener.getsockname()[:2]
        fd = listener.fileno()
        store = TCPStore(
            _reachable(host),
            port,
            is_master=True,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=fd,
            use_libuv=True,
        )
    except BaseException:  # whatever torch raises: the descriptor is still ours
        listener.close()
        raise
    listener.detach()  # the store's from now on
    return store


def _reachable(host: str) -> str:
    """An address of this host for one that it listens on."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _look_at(future: asyncio.Future[TCPStore]) -> None:
    if not future.cancelled():
        future.exception()  # raised again to who takes it; nobody may
