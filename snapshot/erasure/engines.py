"""Who multiplies and adds long runs of bytes: the fastest engine here that computes rightly.

All of them do two things in GF(2^8), which encoding and rebuilding are made of: they add up sources
times factors, and add such a product to what is there.  In this order, each tried against known
vectors before it is trusted:

1. ISA-L's kernels, from the library that the wheel of pyeclib carries (its own Python interface
   copies so much that it takes thirty times as long);
2. the same from the system's library;
3. NumPy, with one table per factor;
4. the package reedsolo: about 1 MB/s, for whoever has nothing else.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

from ftrain.checkpoint.scatter import address_of
from ftrain.comms.errors import StateError
from ftrain.snapshot.erasure.field import POLYNOMIAL, Matrix, multiply

_BLOCK_BYTES = 64 * 1024  # of NumPy's: what is worked on stays in the cache
_ISAL_TABLE_BYTES = 32
_TABLES_MAX = 512  # of sums that are kept; the first ones are those of single factors
_TEST_ROWS = ((1, 1), (29, 164))
_TEST_LENGTHS = (0, 1, 31, 64, 100, 4096 + 7)


class Engine(Protocol):
    """``add`` may be called from several threads at once, for targets that do not overlap."""

    name: str

    def add(self, factor: int, source: memoryview, target: memoryview) -> None:
        """``target[:len(source)] += factor * source``; ``factor`` from 0 to 255, the target
        writable and at least as long.  Raises StateError if it is not."""

    def combine(
        self, rows: Matrix, sources: Sequence[memoryview], targets: Sequence[memoryview]
    ) -> None:
        """Each target becomes the sum of the sources times its row's factors, in one pass over
        them; all are equally long.  Raises StateError if they are not."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that is used, and why those before it are not."""

    engine: Engine
    refused: tuple[str, ...]

    @property
    def slow(self) -> bool:
        """Whether nothing better is left than what takes seconds for a megabyte."""
        return isinstance(self.engine, Reedsolo)


class Isal:
    """Intel's library, by ctypes, which gives up the interpreter lock."""

    def __init__(self, path: str) -> None:
        self.name = f"ISA-L ({path})"
        library = ctypes.CDLL(path)
        self._update = library.ec_encode_data_update
        self._update.argtypes = (*[ctypes.c_int] * 4, *[ctypes.c_void_p] * 3)
        self._update.restype = None
        library.ec_init_tables.argtypes = (ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 2)
        library.ec_init_tables.restype = None
        self._encode = library.ec_encode_data
        self._encode.argtypes = (*[ctypes.c_int] * 3, *[ctypes.c_void_p] * 3)
        self._encode.restype = None

        @lru_cache(_TABLES_MAX)
        def tables_of(rows: Matrix) -> ctypes.Array[ctypes.c_char]:
            found = ctypes.create_string_buffer(_ISAL_TABLE_BYTES * len(rows) * len(rows[0]))
            library.ec_init_tables(len(rows[0]), len(rows), b"".join(map(bytes, rows)), found)
            return found

        self._tables_of = tables_of
        self._tables = [tables_of(((factor,),)) for factor in range(256)]

    def combine(
        self, rows: Matrix, sources: Sequence[memoryview], targets: Sequence[memoryview]
    ) -> None:
        """See :class:`Engine`."""
        _check_all(rows, sources, targets)
        count, made = len(sources), len(targets)
        read = (ctypes.c_void_p * count)(*map(address_of, sources))
        written = (ctypes.c_void_p * made)(*map(address_of, targets))
        self._encode(targets[0].nbytes, count, made, self._tables_of(rows), read, written)

    def add(self, factor: int, source: memoryview, target: memoryview) -> None:
        """See :class:`Engine`."""
        _check(source, target)
        if source.nbytes:
            coding = ctypes.c_void_p(address_of(target))
            self._update(
                source.nbytes,
                1,
                1,
                0,
                self._tables[factor],
                address_of(source),
                ctypes.byref(coding),
            )


class Numpy:
    """A table look-up and an exclusive or, block by block."""

    name = "NumPy"

    def __init__(self) -> None:
        import numpy  # a snapshot manager that has ISA-L starts without it

        self._np = numpy

    def combine(
        self, rows: Matrix, sources: Sequence[memoryview], targets: Sequence[memoryview]
    ) -> None:
        """See :class:`Engine`."""
        _by_adding(self, rows, sources, targets)

    def add(self, factor: int, source: memoryview, target: memoryview) -> None:
        """See :class:`Engine`."""
        _check(source, target)
        if not factor:
            return
        np = self._np
        into = np.frombuffer(target, np.uint8)
        for at in range(0, source.nbytes, _BLOCK_BYTES):
            block: bytes | memoryview = source[at : at + _BLOCK_BYTES]
            if factor != 1:
                block = bytes(block).translate(_table(factor))
            place = into[at : at + len(block)]
            np.bitwise_xor(place, np.frombuffer(block, np.uint8), out=place)


class Reedsolo:
    """An independent implementation, byte by byte in Python."""

    name = "reedsolo, about 1 MB/s"

    def __init__(self) -> None:
        import reedsolo

        self._multiply: Callable[[int, int], int] = reedsolo.gf_mul
        reedsolo.init_tables(POLYNOMIAL)

    def combine(
        self, rows: Matrix, sources: Sequence[memoryview], targets: Sequence[memoryview]
    ) -> None:
        """See :class:`Engine`."""
        _by_adding(self, rows, sources, targets)

    def add(self, factor: int, source: memoryview, target: memoryview) -> None:
        """See :class:`Engine`."""
        _check(source, target)
        for index, value in enumerate(source):
            target[index] ^= self._multiply(factor, value)


@cache
def engine() -> Choice:
    """The first engine that is there and computes rightly; StateError if there is none."""
    refused: list[str] = []
    for what, make in _candidates():
        try:
            found = make()
            _try(found)
        except (AttributeError, ImportError, OSError, StateError) as error:
            refused.append(f"{what}: {error}")
        else:
            return Choice(found, tuple(refused))
    raise StateError(f"no engine for erasure coding computes rightly: {'; '.join(refused)}")


def _candidates() -> Iterator[tuple[str, Callable[[], Engine]]]:
    for path in (*_bundled(), "libisal.so.2"):
        yield path, lambda path=path: Isal(path)  # type: ignore[misc]
    yield Numpy.name, Numpy
    yield Reedsolo.name, Reedsolo


def _bundled() -> list[str]:
    """ISA-L's library in the wheel of pyeclib, whose module is not imported."""
    spec = importlib.util.find_spec("pyeclib")
    places = spec.submodule_search_locations if spec is not None else None
    folders = [Path(place).parent / "pyeclib.libs" for place in places or ()]
    return sorted(str(path) for folder in folders for path in folder.glob("libisal*.so*"))


def _try(found: Engine) -> None:
    """StateError unless it computes what field.py says, for every factor and awkward lengths."""
    values = bytes(i * 167 % 256 for i in range(max(_TEST_LENGTHS)))
    before = bytes(i * 59 % 256 for i in range(len(values)))
    for factor in range(256):
        for length in _TEST_LENGTHS if factor % 16 == 2 else _TEST_LENGTHS[-2:-1]:
            target = bytearray(before)
            found.add(factor, memoryview(values)[:length], memoryview(target))
            product = values[:length].translate(_table(factor))
            expected = bytes(a ^ b for a, b in zip(before[:length], product, strict=True))
            if target != expected + before[length:]:
                raise StateError(f"it multiplies {length} bytes by {factor} wrongly")
    for length in _TEST_LENGTHS[1:]:
        views = [memoryview(values)[:length], memoryview(before)[:length]]
        results = [memoryview(bytearray(length)) for _ in _TEST_ROWS]
        found.combine(_TEST_ROWS, views, results)
        for row, result in zip(_TEST_ROWS, results, strict=True):
            products = [bytes(v).translate(_table(f)) for f, v in zip(row, views, strict=True)]
            if result != bytes(a ^ b for a, b in zip(*products, strict=True)):
                raise StateError(f"it adds {length} bytes up wrongly")


@cache
def _table(factor: int) -> bytes:
    return bytes(multiply(factor, value) for value in range(256))


def _by_adding(
    engine: Engine, rows: Matrix, sources: Sequence[memoryview], targets: Sequence[memoryview]
) -> None:
    """Adds one product after the other."""
    _check_all(rows, sources, targets)
    for row, target in zip(rows, targets, strict=True):
        target[:] = bytes(target.nbytes)
        for factor, source in zip(row, sources, strict=True):
            engine.add(factor, source, target)


def _check_all(rows: Matrix, sources: Sequence[memoryview], targets: Sequence[memoryview]) -> None:
    sizes = {view.nbytes for view in (*sources, *targets)}
    shape = {len(row) for row in rows}
    fits = len(rows) == len(targets) and shape == {len(sources)} and len(sizes) == 1
    if not fits or any(target.readonly for target in targets):
        raise StateError(
            f"{len(sources)} sources can't be added up to {len(targets)} targets of {len(rows)} "
            f"rows: sizes {sorted(sizes)}"
        )


def _check(source: memoryview, target: memoryview) -> None:
    if target.readonly or target.nbytes < source.nbytes:
        raise StateError(
            f"{source.nbytes} bytes can't be added to {target.nbytes} "
            f"{'read-only' if target.readonly else 'writable'} ones"
        )
