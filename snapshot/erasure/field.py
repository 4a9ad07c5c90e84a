"""Arithmetic in GF(2^8): the numbers that codes and matrices are made of, a byte each.

Addition is exclusive or.  For long runs of bytes see engines.py; this is for matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

POLYNOMIAL = 0x11D  # x^8 + x^4 + x^3 + x^2 + 1, of which 2 generates every number but 0
_ORDER = 255

Matrix = tuple[tuple[int, ...], ...]


def _powers() -> tuple[list[int], list[int]]:
    exponents, logarithms = [0] * (2 * _ORDER), [0] * 256
    value = 1
    for exponent in range(_ORDER):
        exponents[exponent] = exponents[exponent + _ORDER] = value
        logarithms[value] = exponent
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return exponents, logarithms


_EXPONENTS, _LOGARITHMS = _powers()


def multiply(a: int, b: int) -> int:
    """The product."""
    return _EXPONENTS[_LOGARITHMS[a] + _LOGARITHMS[b]] if a and b else 0


def inverse(a: int) -> int:
    """What gives 1 with ``a``; ZeroDivisionError for 0."""
    if not a:
        raise ZeroDivisionError("0 has no inverse in GF(2^8)")
    return _EXPONENTS[_ORDER - _LOGARITHMS[a]]


def power_of_two(exponent: int) -> int:
    """2 to the power of ``exponent``, from 0 on."""
    return _EXPONENTS[exponent % _ORDER]


def dot(row: Sequence[int], column: Sequence[int]) -> int:
    """The sum of products."""
    total = 0
    for a, b in zip(row, column, strict=True):
        total ^= multiply(a, b)
    return total


def product(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> Matrix:
    """The product of two matrices."""
    columns = list(zip(*right, strict=True))
    return tuple(tuple(dot(row, column) for column in columns) for row in left)


def inverted(matrix: Sequence[Sequence[int]]) -> Matrix:
    """The inverse of a square matrix, by Gauss and Jordan; ZeroDivisionError if it has none."""
    size = len(matrix)
    rows = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next((i for i in range(column, size) if rows[i][column]), None)
        if pivot is None:
            raise ZeroDivisionError("the matrix is singular")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        factor = inverse(rows[column][column])
        rows[column] = [multiply(factor, value) for value in rows[column]]
        for i in range(size):
            if i != column and (factor := rows[i][column]):
                rows[i] = [
                    a ^ multiply(factor, b) for a, b in zip(rows[i], rows[column], strict=True)
                ]
    return tuple(tuple(row[size:]) for row in rows)
