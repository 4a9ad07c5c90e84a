"""Page-locked memory: what a GPU can copy to by itself, at full speed, beside everything else.

Memory that it does not know it copies to through a buffer of the driver's, while the calling thread
waits: measured on an H200, 1 to 13 GB/s instead of 55.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU


class PageLock:
    """Lets the GPUs of this process copy to ``view``, a whole writable map, as long as this exists
    and :meth:`release` was not called; the map stays until then.

    Nothing happens in a process that uses no GPU.  Where the driver refuses, copies are slower and
    correct all the same.
    """

    def __init__(self, view: memoryview) -> None:
        self._undo: Callable[[], object] = _nothing
        if not view.nbytes or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        gpu = torch.cuda.current_device()
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if _apart(gpu, lambda: int(runtime.cudaHostRegister(address, view.nbytes, _PORTABLE))):
            return
        # It holds the view, so that no map is gone before it is unlocked: the next one at that
        # address would be copied past.
        undo = weakref.finalize(self, _unlock, runtime, gpu, address, view)
        undo.atexit = False
        self._undo = undo

    def release(self) -> None:
        """Unlock it; no copy may be under way."""
        self._undo()


def _unlock(runtime: Any, gpu: int, address: int, view: memoryview) -> None:
    _apart(gpu, lambda: int(runtime.cudaHostUnregister(address)))


def _apart(gpu: int, call: Callable[[], int]) -> int:
    """Call in a thread of its own: a refusal is remembered for the calling thread, and would be
    raised at its next kernel."""
    results: list[int] = []

    def run() -> None:
        torch.cuda.set_device(gpu)  # every thread begins with the first one
        results.append(call())

    thread = threading.Thread(target=run, name="ftrain-lock-pages", daemon=True)
    thread.start()
    thread.join()
    return results[0] if results else -1


def _nothing() -> None:
    """Nothing was locked."""
