"""Sums over the chunks of a stripe, block by block, wherever the chunks come from.

Encoding and rebuilding are the same work: a chunk of parity is a sum of chunks of data, a lost
chunk is a sum of what is left of its stripe.  What is added up passes through a block that fits a
core's cache, so that each byte is read from memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from ftrain.checkpoint.files import page_buffer
from ftrain.comms.errors import StateError
from ftrain.snapshot.bundle import Bundle
from ftrain.snapshot.erasure.engines import Engine
from ftrain.snapshot.parity import BLOCK_BYTES, ParityRecord

_AT_ONCE = 8  # sources of a sum that are in memory at the same time


class Chunk(Protocol):
    """One chunk of a stripe, read once and in order; zeros follow its bytes."""

    nbytes: int

    def read_into(self, buffer: memoryview) -> None:
        """The next bytes, as many as the buffer has. PeerLostError, CorruptionError, StateError."""


@dataclass(frozen=True, slots=True)
class Term:
    """What a chunk contributes to a sum."""

    factor: int
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk by the place where it is: data of ``node``, or (``row`` >= 0) parity held by it."""

    factor: int
    node: int
    stripe: int
    row: int = -1


def parity_parts(record: ParityRecord, stripe: int, row: int) -> list[Part]:
    """What a chunk of parity is the sum of."""
    factors = record.erasure_code.parity_rows[row]
    nodes = record.group.contributors(stripe)
    return [Part(f, node, stripe) for f, node in zip(factors, nodes, strict=True)]


def lost_parts(record: ParityRecord, node: int, chunk: int, there: Collection[int]) -> list[Part]:
    """What chunk number ``chunk`` of a lost node is the sum of, when the nodes ``there`` have
    what they hold of its stripe, be it data or parity.

    Raises:
        StateError: too much of its stripe is lost.
    """
    group, code = record.group, record.erasure_code
    stripe = group.stripes_of(node)[chunk]
    contributors, holders = group.contributors(stripe), group.holders(stripe)
    members = (*contributors, *holders)
    present = [number for number, member in enumerate(members) if member in there]
    factors = code.recovery_rows([contributors.index(node)], present)[0]
    return [
        Part(factor, members[number], stripe, number - code.data if number >= code.data else -1)
        for factor, number in zip(factors, sorted(present)[: code.data], strict=True)
    ]


class Summer:
    """Adds up chunks in one thread; has the memory for that."""

    def __init__(self, engine: Engine, before: Callable[[int], None] = lambda nbytes: None) -> None:
        self._engine = engine
        self._before = before
        self._scratch: list[memoryview] = []  # one block each

    def fill(
        self,
        target: memoryview,
        terms: Sequence[Term],
        done: Callable[[int], None] = lambda block: None,
    ) -> None:
        """``target`` becomes the sum of ``terms``; ``done`` is called after each block of it.

        ``before`` of the constructor is called with the number of bytes that are read next, and
        may wait or raise.  Raises as the chunks do.
        """
        for block, start in enumerate(range(0, len(target), BLOCK_BYTES)):
            self.fill_next(target[start : start + BLOCK_BYTES], start, terms)
            done(block)

    def fill_next(self, block: memoryview, start: int, terms: Sequence[Term]) -> None:
        """The same for one block, which begins at byte ``start`` of the chunks."""
        there = [term for term in terms if term.chunk.nbytes > start]
        if not there:
            block[:] = bytes(len(block))
            return
        if len(there) == 1 and there[0].factor == 1:  # that is the sum
            self._read(there[0], start, block)
            return
        for first in range(0, len(there), _AT_ONCE):
            terms_now = there[first : first + _AT_ONCE]
            sources = [self._room(n)[: len(block)] for n in range(len(terms_now))]
            for term, source in zip(terms_now, sources, strict=True):
                self._read(term, start, source)
            factors = tuple(term.factor for term in terms_now)
            if not first:
                self._engine.combine((factors,), sources, [block])
                continue
            for factor, source in zip(factors, sources, strict=True):
                self._engine.add(factor, source, block)

    def _read(self, term: Term, start: int, room: memoryview) -> None:
        """The next bytes of a chunk, and zeros behind its end."""
        count = min(term.chunk.nbytes - start, len(room))
        self._before(count)
        term.chunk.read_into(room[:count])
        if count < len(room):
            room[count:] = bytes(len(room) - count)

    def _room(self, number: int) -> memoryview:
        while len(self._scratch) <= number:
            self._scratch.append(page_buffer(BLOCK_BYTES))
        return self._scratch[number]


class BundleChunk:
    """A chunk of images that are in this process's memory."""

    def __init__(self, bundle: Bundle, chunk: int) -> None:
        self.nbytes = bundle.present(chunk)
        self._bundle = bundle
        self._chunk = chunk
        self._at = 0

    def read_into(self, buffer: memoryview) -> None:
        """See :class:`Chunk`."""
        done = 0
        for piece in self._bundle.pieces(self._chunk, self._at, self._at + len(buffer)):
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        self._at += len(buffer)


class RowChunk:
    """A chunk of parity that is in this process's memory."""

    def __init__(self, row: memoryview) -> None:
        self.nbytes = len(row)
        self._row = row
        self._at = 0

    def read_into(self, buffer: memoryview) -> None:
        """See :class:`Chunk`."""
        stop = self._at + len(buffer)
        if stop > len(self._row):
            raise StateError(f"a chunk of parity has {len(self._row)} bytes, not {stop}")
        buffer[:] = self._row[self._at : stop]
        self._at = stop


def rebuild(
    record: ParityRecord,
    node: int,
    bundle: Bundle,
    there: Callable[[int], Collection[int]],
    open_part: Callable[[Part, int], Chunk],
    summer: Summer,
) -> None:
    """Fill ``bundle``, which has room for all images of a lost node of the group.

    ``there`` says which nodes have what they hold of a stripe, be it data or parity; ``open_part``
    is asked for the first so many bytes of a part.  Raises as :func:`lost_parts` and the chunks do.
    """
    block = page_buffer(BLOCK_BYTES)
    for chunk in range(record.group.data):
        present = bundle.present(chunk)
        if not present:
            break
        parts = lost_parts(record, node, chunk, there(record.group.stripes_of(node)[chunk]))
        terms = [Term(part.factor, open_part(part, present)) for part in parts if part.factor]
        for start in range(0, present, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, present)
            pieces = list(bundle.pieces(chunk, start, stop))
            if len(pieces) == 1:
                summer.fill_next(pieces[0], start, terms)
                continue
            summer.fill_next(block[: stop - start], start, terms)
            done = 0
            for piece in pieces:
                piece[:] = block[done : done + len(piece)]
                done += len(piece)
