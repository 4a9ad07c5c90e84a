"""Page-locked memory: what a GPU can copy to by itself, at full speed, beside everything else.

Memory that it does not know it copies to through a buffer of the driver's, while the calling thread
waits: measured on an H200, 1 to 13 GB/s instead of 55.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU


def lock_pages(view: memoryview) -> Callable[[], None]:
    """Let the GPUs of this process copy to ``view``, a whole writable map; returns the undoing,
    to be called before the map goes.

    Nothing happens in a process that uses no GPU.  Where the driver refuses, copies are slower and
    correct all the same.
    """
    if not view.nbytes or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return _nothing
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(address, view.nbytes, _PORTABLE)):
        return _nothing

    def unlock() -> None:
        runtime.cudaHostUnregister(address)

    return unlock


def _nothing() -> None:
    """Nothing was locked."""
