"""The erasure code: which sums of the data are its parity, and which sums give back what is lost.

Systematic Reed-Solomon over GF(2^8) with polynomial 0x11d, generator 2 and first root 1 (Reed and
Solomon 1960; Plank 1997 on its use for storage).  Its parity of one is the plain exclusive or.  It
is the code of the package ``reedsolo`` with its usual parameters, byte for byte, so that there is
an independent implementation to compare with, and to decode with where nothing else is left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

from ftrain.comms.errors import StateError
from ftrain.snapshot.erasure.field import Matrix, inverted, multiply, power_of_two, product

CHUNKS_MAX = 255  # of a stripe: there are no more numbers to tell them by


@dataclass(frozen=True, slots=True)
class ErasureCode:
    """Of every ``data + parity`` chunks, whichever ``parity`` of them may be lost.

    Chunks are numbered: the data from 0 on, then the parity.  Raises StateError for numbers that
    no stripe can have.
    """

    data: int
    parity: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.data < 1 or self.parity < 0 or self.chunks > CHUNKS_MAX:
            raise StateError(
                f"a stripe of {self.data} data and {self.parity} parity chunks is impossible: at "
                f"least one of data, at most {CHUNKS_MAX} together"
            )

    @property
    def chunks(self) -> int:
        """Chunks in a stripe."""
        return self.data + self.parity

    @property
    def parity_rows(self) -> Matrix:
        """For each parity chunk, the factor of each data chunk in it."""
        return _parity_rows(self.data, self.parity)

    def recovery_rows(self, lost: Sequence[int], present: Collection[int]) -> Matrix:
        """For each lost chunk the factor of each of the first ``data`` chunks in ``present``, in
        rising order.

        Raises:
            StateError: fewer than ``data`` chunks are present, or numbers are out of place.
        """
        used = sorted(present)[: self.data]
        numbers = {*lost, *present}
        if len(used) < self.data or not numbers <= set(range(self.chunks)):
            raise StateError(
                f"{len(set(present))} chunks are there of a stripe that needs {self.data}"
            )
        return _recovery_rows(self.data, self.parity, tuple(lost), tuple(used))


@cache
def _parity_rows(data: int, parity: int) -> Matrix:
    """The remainder of each data symbol's power of x by the generator polynomial."""
    generator = [1]  # coefficients from the highest power down
    for root in map(power_of_two, range(parity)):
        shifted = [*generator, 0]
        for index, value in enumerate(generator):
            shifted[index + 1] ^= multiply(value, root)
        generator = shifted
    columns: list[list[int]] = []
    # The last data symbol stands at x^parity, each other one a power above the next.
    remainder = [1] + [0] * (parity - 1)
    for _ in range(data if parity else 0):
        carry, *rest = [*remainder, 0]
        remainder = [a ^ multiply(carry, b) for a, b in zip(rest, generator[1:], strict=True)]
        columns.append(remainder)
    return tuple(zip(*reversed(columns), strict=True)) if parity else ()


@cache
def _recovery_rows(data: int, parity: int, lost: tuple[int, ...], used: tuple[int, ...]) -> Matrix:
    unit = tuple(tuple(int(i == j) for j in range(data)) for i in range(data))
    rows = (*unit, *_parity_rows(data, parity))
    return product([rows[number] for number in lost], inverted([rows[number] for number in used]))
