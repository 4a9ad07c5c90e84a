"""Chunks of few bits: float32, float16 and bfloat16 values as one or half a byte each.

A packed chunk is two little-endian float32, ``base`` and ``step``, and the codes::

    min-max      value = base + code * step      base: the least value
    zero-point   value = (code - base) * step    base: the code of 0.0, a whole number
    either       value = base                    where step is 0; the codes are 0

* ``step`` is the range over the number of steps, and :data:`STEP_MIN` at least.  So no value is
  subnormal (all are multiples of 2^-126): one loaded library may make a processor take those for
  zero, and two ranks would have different bits.
* Rounding is half to even, every operation float32 as IEEE 754 has it, multiplied and added apart:
  the same bits from the same input everywhere.
* A chunk of equal values is exact.
* A chunk with a value that is infinite, not a number or beyond :data:`MAGNITUDE_MAX` comes out as
  NaN in every element: it can't be mistaken for a result, by whoever has any part of it.  (float32
  has no step for a range of twice its largest number.)
* Two codes to a byte: of every :data:`PIECE` elements, the first half (and the middle one) are the
  low four bits, the second half the high ones, so that whole vectors are shifted.

After NumPy's fast kernels, one thread, without the interpreter lock.  What Prime Intellect's PCCL
(arXiv 2505.14065) calls min-max and zero-point-scale; it has one range for a whole segment.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from ftrain.comms.errors import UsageError

PIECE = 32768  # elements: torch's grain size, and what stays in a core's cache
MAGNITUDE_MAX = 2.0**126
STEP_MIN = 2.0**-103
QUANTISED = (torch.float32, torch.float16, torch.bfloat16)

_HEADER = struct.Struct("<ff")
_Floats = NDArray[np.float32]


class Scheme(IntEnum):
    """What the codes of a chunk are spread over."""

    MIN_MAX = 1  # from its least to its largest value
    ZERO_POINT = 2  # the same and 0.0, which is exact


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How chunks travel; equal on all ranks.

    Args:
        bits: of a code, 8 or 4.

    Raises:
        UsageError: another number of bits.
    """

    scheme: Scheme = Scheme.MIN_MAX
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"values are quantised to 8 or 4 bits, not {self.bits}")

    @property
    def steps(self) -> int:
        """Between the least and the largest code."""
        return int(2**self.bits) - 1

    def packed_bytes(self, elements: int) -> int:
        """Of a chunk; an empty one has none."""
        return _HEADER.size + -(-elements * self.bits // 8) if elements else 0


class Scratch:
    """One thread's memory to work in, which grows to its largest chunk."""

    def __init__(self) -> None:
        self.piece = np.empty(PIECE, np.float32)
        self.codes = np.empty(PIECE, np.uint8)
        self._floats = np.empty(0, np.float32)

    def floats(self, count: int) -> _Floats:
        """So many, until the next call."""
        if self._floats.size < count:
            self._floats = np.empty(count, np.float32)
        return self._floats[:count]


class Quantiser:
    """Packs and unpacks chunks of one dtype, whose values are handed over as their bytes.

    Raises:
        UsageError: a dtype other than float32, float16 and bfloat16.
    """

    def __init__(self, how: Quantisation, dtype: torch.dtype, scratch: Scratch) -> None:
        if dtype not in QUANTISED:
            known = ", ".join(str(each).removeprefix("torch.") for each in QUANTISED)
            raise UsageError(f"tensors of {dtype} can't be quantised; these can: {known}")
        self._how, self._dtype, self._scratch = how, dtype, scratch

    def pack(self, values: memoryview, out: memoryview) -> None:
        """Pack a chunk's values into as many bytes as it takes."""
        if self._dtype is torch.float32:
            self.pack_sums(np.frombuffer(values, np.float32), out)
            return
        floats = self._scratch.floats(values.nbytes // self._dtype.itemsize)
        for part, narrow in self._narrow(values):
            torch.from_numpy(floats[part]).copy_(narrow)
        self.pack_sums(floats, out)

    def pack_sums(self, sums: _Floats, out: memoryview) -> None:
        """Pack what :meth:`unpack_add` gave."""
        if not sums.size:
            return
        base, step = _spread(self._how, sums)
        _HEADER.pack_into(out, 0, base, step)
        packed = np.frombuffer(out, np.uint8)[_HEADER.size :]
        if not step:
            packed.fill(0)
            return
        for part in _parts(sums.size):
            values = sums[part]
            codes, coded = self._scratch.codes[: values.size], self._scratch.piece[: values.size]
            if self._how.scheme is Scheme.MIN_MAX:
                np.subtract(values, np.float32(base), out=coded)
                np.divide(coded, np.float32(step), out=coded)
                np.rint(coded, out=coded)
            else:
                np.divide(values, np.float32(step), out=coded)
                np.rint(coded, out=coded)
                np.add(coded, np.float32(base), out=coded)
                # The least and the largest value may both lie half a step outside.
                np.minimum(coded, np.float32(self._how.steps), out=coded)
            np.copyto(codes, coded, casting="unsafe")
            self._pack_codes(codes, packed[self._bytes_of(part)])

    def unpack(self, packed: memoryview, out: memoryview) -> None:
        """Fill a chunk with the values."""
        if self._dtype is torch.float32:
            self._unpack(packed, np.frombuffer(out, np.float32))
            return
        floats = self._scratch.floats(out.nbytes // self._dtype.itemsize)
        self._unpack(packed, floats)
        lost = bool(floats.size) and math.isnan(floats[0])
        for part, narrow in self._narrow(out):
            if lost:
                narrow.fill_(math.nan)  # conversion has several, which depend on the processor
            else:
                narrow.copy_(torch.from_numpy(floats[part]))

    def unpack_add(self, packed: memoryview, own: memoryview) -> _Floats:
        """A chunk's values and as many of one's own, added up in float32.

        They lie in the scratch memory: good until it is used again.
        """
        sums = self._scratch.floats(own.nbytes // self._dtype.itemsize)
        self._unpack(packed, sums)
        with np.errstate(all="ignore"):  # inf and nan are values like others
            if self._dtype is torch.float32:
                np.add(sums, np.frombuffer(own, np.float32), out=sums)
                return sums
            for part, narrow in self._narrow(own):
                wide = self._scratch.piece[: narrow.numel()]
                torch.from_numpy(wide).copy_(narrow)
                np.add(sums[part], wide, out=sums[part])
        return sums

    def _unpack(self, packed: memoryview, out: _Floats) -> None:
        if not out.size:
            return
        base, step = _HEADER.unpack_from(packed)
        if not step:
            out.fill(math.nan if math.isnan(base) else base)
            return
        coded = np.frombuffer(packed, np.uint8)[_HEADER.size :]
        for part in _parts(out.size):
            values = out[part]
            np.copyto(values, self._codes(coded[self._bytes_of(part)], values.size))
            if self._how.scheme is Scheme.MIN_MAX:
                np.multiply(values, np.float32(step), out=values)
                np.add(values, np.float32(base), out=values)
            else:
                np.subtract(values, np.float32(base), out=values)
                np.multiply(values, np.float32(step), out=values)

    def _bytes_of(self, part: slice) -> slice:
        """Where a piece's codes are."""
        return slice(part.start * self._how.bits // 8, -(-part.stop * self._how.bits // 8))

    def _pack_codes(self, codes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        if self._how.bits == 8:
            np.copyto(out, codes)
            return
        low, high = codes[: out.size], codes[out.size :]
        np.left_shift(high, 4, out=high)
        np.copyto(out, low)
        np.bitwise_or(out[: high.size], high, out=out[: high.size])

    def _codes(self, packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
        if self._how.bits == 8:
            return packed
        codes = self._scratch.codes[:count]
        np.bitwise_and(packed, 15, out=codes[: packed.size])
        np.right_shift(packed[: count - packed.size], 4, out=codes[packed.size :])
        return codes

    def _narrow(self, values: memoryview) -> Iterator[tuple[slice, torch.Tensor]]:
        """Values of half precision, in pieces that torch does not spread over threads."""
        if values.nbytes:
            tensor = torch.frombuffer(values, dtype=self._dtype)
            for part in _parts(tensor.numel()):
                yield part, tensor[part]


def error_bound(
    how: Quantisation,
    ranges: list[tuple[float, float]],
    *,
    average: bool,
    dtype: torch.dtype = torch.float32,
) -> float:
    r"""Most that an element of a quantised all-reduce can differ from the exact result.

    A chunk visits N ranks.  Each of the first N - 1 rounds the partial sum to the nearest code, off
    by at most half a step :math:`h_k = (r_k / L) / 2`, with L steps over the range :math:`r_k` of
    the sum of k ranks (up to :data:`STEP_MIN` longer); nothing else changes the sum, so the errors
    add up.  The last rank divides
    by N for an average, and rounds once more.  Everybody has what comes out of that, and so

    .. math:: |error| \le (h_1 + ... + h_{N-1}) / D + h_N, \quad D = N \text{ or } 1

    where :math:`h_N` is of the range of the result.  As a partial sum is itself off by then, its
    range is up to twice that wider; around each code there are fewer than 16 roundings to float32
    of numbers up to the largest of the range; the result is rounded to the dtype.

    Args:
        ranges: least and largest value, in this chunk, of the exact sum of 1, 2, ..., N ranks, in
            the ring's order (for segment ``s``: ranks ``s + 1``, ``s + 2``, ..., ``s``).  Known are
            each rank's own: their running sums are at least as wide.
        average: whether the sum is divided by N.
        dtype: of the elements.

    Returns:
        The bound, for finite values, in the elements' own unit; infinite for a chunk that may come
        out as NaN, or beyond the dtype.  One rank alone quantises nothing: 0.0.
    """
    if len(ranges) == 1:
        return 0.0
    off = largest = 0.0  # of the sum so far
    for ranks, (lo, hi) in enumerate(ranges, 1):
        lo, hi = lo - off, hi + off
        if not max(-lo, hi) < 2.0**127:  # the sum may not fit into float32
            return math.inf
        if ranks == len(ranges) and average:
            off, lo, hi = off / ranks, lo / ranks, hi / ranks
        if how.scheme is Scheme.ZERO_POINT:
            lo, hi = min(lo, 0.0), max(hi, 0.0)
        largest = max(-lo, hi)
        if not largest <= MAGNITUDE_MAX:
            return math.inf
        off += ((hi - lo) / how.steps + STEP_MIN) / 2 + largest * 2.0**-20
    if dtype is not torch.float32:
        info = torch.finfo(dtype)
        if largest + off > info.max:
            return math.inf
        off += (largest + off) * info.eps / 2 + info.tiny * info.eps / 2
    return off


def _spread(how: Quantisation, values: _Floats) -> tuple[float, float]:
    """Base and step of a chunk."""
    with np.errstate(all="ignore"):  # a nan among them is looked for below
        lo, hi = float(values.min()), float(values.max())
    if not (lo >= -MAGNITUDE_MAX and hi <= MAGNITUDE_MAX):
        return math.nan, 0.0
    if lo == hi:
        return lo + 0.0, 0.0  # of zeros of both signs, whichever was found
    if how.scheme is Scheme.MIN_MAX:
        if abs(lo) < STEP_MIN:
            lo = -STEP_MIN if lo < 0 else 0.0
        return lo, _step(how, lo, hi)
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    step = _step(how, lo, hi)
    # As the least value itself is divided and rounded, so that its code is 0.
    return float(np.rint(np.float32(-lo) / np.float32(step))), step


def _step(how: Quantisation, lo: float, hi: float) -> float:
    return float(np.float32(max(STEP_MIN, (hi - lo) / how.steps)))


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, PIECE):
        yield slice(start, min(count, start + PIECE))
