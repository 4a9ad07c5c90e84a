"""The stores through which the ranks of a formation find each other.

torch's own way of sharing one store between restarts lets new ranks read what dead ones left there.
Here every formation has a store of its own, on a port of its own, in a process of its own that is
no rank: forked by the worker server, where torch is imported already.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from ftrain.comms.addresses import format_address, listen_tcp
from ftrain.comms.errors import FtrainError
from ftrain.comms.local import LocalSocket
from ftrain.launch.worker_messages import StoreServed

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_TIMEOUT = timedelta(seconds=60)


def serve_store(socket: LocalSocket, bind: str) -> NoReturn:
    """Be a store's process from now on; says on ``socket`` where the store is, or why it is not."""
    try:
        store = make_store(bind)
    except (FtrainError, RuntimeError) as error:
        socket.send(StoreServed(0, 0, str(error)))
        os._exit(1)
    socket.send(StoreServed(os.getpid(), int(store.port)))
    socket.close()
    while True:
        signal.pause()


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
