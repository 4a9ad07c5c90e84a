"""Runs of a chunk's bytes, and the memory that they belong in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class Home:
    """Where a run of a chunk's bytes belongs; homes of one chunk do not overlap in it."""

    at: int  # first byte within the chunk
    memory: memoryview  # writable bytes, as long as the run

    @property
    def end(self) -> int:
        """The byte behind the run."""
        return self.at + len(self.memory)


def interleaved(homes: Iterable[Home], rest: memoryview) -> list[memoryview]:
    """A chunk's bytes in order: what has a home lies there, the rest in ``rest`` at its place."""
    parts: list[memoryview] = []
    done = 0
    for home in sorted(homes, key=attrgetter("at")):
        if done < home.at:
            parts.append(rest[done : home.at])
        parts.append(home.memory)
        done = home.end
    if done < len(rest):
        parts.append(rest[done:])
    return parts


def bring_home(chunk: memoryview, homes: Sequence[Home]) -> None:
    """Copy what has a home from a whole chunk, without the GIL."""
    if not homes:
        return
    first = address_of(chunk)
    for home in homes:
        ctypes.memmove(address_of(home.memory), first + home.at, len(home.memory))


def memory_at(address: int, nbytes: int) -> memoryview:
    """Writable bytes of somebody's, who has to keep them."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def address_of(memory: memoryview) -> int:
    """Where the bytes lie, whether or not they may be written to."""
    import numpy as np

    return int(np.frombuffer(memory, np.uint8).ctypes.data)
