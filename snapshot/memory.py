"""Memory that outlives its writer: anonymous files, mapped by ranks and the snapshot manager.

A memfd has no name, so nothing is left behind when the last process that holds it is gone.  Pages
are taken from the system when a slot is made (:func:`os.posix_fallocate`), not at the first write:
memory that does not fit is then an error with a number in it rather than a killed process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

from ftrain.comms.errors import MemoryShortError
from ftrain.comms.process import available_memory_bytes

_MADV_POPULATE_WRITE = 23  # Linux 5.14; mmap.mmap(..., MAP_POPULATE) would hold the GIL
_GIB = 1 << 30
_MIB = 1 << 20
_PAGE_BYTES = mmap.PAGESIZE
_BLOCK_BYTES = 512  # unit of st_blocks


class Region:
    """One memfd and this process's map of it; the descriptor is owned."""

    __slots__ = ("fd", "nbytes", "view")

    def __init__(self, fd: int) -> None:
        """Take over ``fd`` and map the whole of it."""
        self.fd = fd
        self.nbytes = os.fstat(fd).st_size
        self.view = map_fd(fd, self.nbytes)

    @classmethod
    def create(cls, name: str, nbytes: int) -> Region:
        """New memory, all of it allocated; MemoryShortError."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            allocate(fd, nbytes)
        except MemoryShortError:
            os.close(fd)
            raise
        return cls(fd)

    def close(self) -> None:
        """Close the descriptor; the map goes when nobody uses the view any more."""
        os.close(self.fd)
        self.view = memoryview(b"")


def allocate(fd: int, nbytes: int) -> None:
    """Make a memfd at least this long, with all its pages; MemoryShortError."""
    # Asked first, because the kernel would rather kill some process than say that it has no more.
    free = available_memory_bytes()
    missing = nbytes - os.fstat(fd).st_blocks * _BLOCK_BYTES
    why = f"{in_words(free)} are free"
    if missing < free:
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            why = os.strerror(error.errno or 0)
        else:
            return
    raise MemoryShortError(
        f"no {in_words(nbytes)} of memory for a snapshot slot ({why}): lower snapshot.slots, "
        "free memory on this host, or switch snapshots off with snapshot=off"
    )


def in_words(nbytes: int) -> str:
    """A size for people: MiB below one GiB."""
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB else f"{nbytes / _MIB:.4g} MiB"


def map_fd(fd: int, nbytes: int, *, writable: bool = True) -> memoryview:
    """Map ``nbytes`` of a memfd; unmapped when the view and what was cut from it are gone."""
    if nbytes == 0:
        return memoryview(b"")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return memoryview(mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=protection))


def populate(view: memoryview) -> None:
    """Enter the pages of a writable map into this process's page table, without the GIL.

    Saves a page fault per 4 KiB later; where the kernel does not know how, nothing happens.
    """
    if view.nbytes:
        anchor = ctypes.c_char.from_buffer(view)
        size = -(-view.nbytes // _PAGE_BYTES) * _PAGE_BYTES
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(
            ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), _MADV_POPULATE_WRITE
        )


class Budget:
    """How much memory the slots of one node may take, of what was available at the start."""

    def __init__(self, *, share_max: float, slots: int, taken_bytes: int) -> None:
        self._share_max = share_max
        self._slots = slots
        self._taken_bytes = taken_bytes
        self._available_bytes = available_memory_bytes() + taken_bytes
        self._lock = threading.Lock()  # slots of parity are made in another thread

    def take(self, rank: int, nbytes: int, *, all_bytes: int = 0) -> None:
        """Count ``nbytes`` more for ``rank``'s slots; MemoryShortError when that is too much.

        ``all_bytes`` is what the slots of every rank of the node will take if they are alike.
        """
        if nbytes <= 0:
            return  # what is taken already is never too much, whatever memory is left now
        with self._lock:
            self._take(rank, nbytes, all_bytes)

    def _take(self, rank: int, nbytes: int, all_bytes: int) -> None:
        limit = int(self._available_bytes * self._share_max)
        total = self._taken_bytes + nbytes
        free = available_memory_bytes()
        if total > limit or nbytes > free:
            raise MemoryShortError(
                f"rank {rank}'s {self._slots} snapshot slots need {in_words(nbytes)} more, those "
                f"of all ranks of this node {in_words(max(total, all_bytes))}, but only "
                f"{in_words(limit)} may be used (snapshot.memory_share_max={self._share_max:g} of "
                f"{in_words(self._available_bytes)}) and {in_words(free)} are free: lower "
                "snapshot.slots, raise snapshot.memory_share_max, use fewer ranks, or switch "
                "snapshots off with snapshot=off"
            )
        self._taken_bytes = total

    def count(self, nbytes: int) -> None:
        """Count ``nbytes`` more, of whatever; MemoryShortError, in half a sentence."""
        limit = int(self._available_bytes * self._share_max)
        free = available_memory_bytes()
        with self._lock:
            if self._taken_bytes + nbytes > limit or nbytes > free:
                raise MemoryShortError(
                    f"only {in_words(max(0, limit - self._taken_bytes))} more may be used for "
                    f"snapshots on this node, and {in_words(free)} are free"
                )
            self._taken_bytes += nbytes

    def give_back(self, nbytes: int) -> None:
        """``nbytes`` were not taken after all, or are free again."""
        with self._lock:
            self._taken_bytes -= nbytes
