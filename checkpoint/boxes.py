"""Which bytes of one shard of a tensor are which bytes of another: arithmetic of boxes.

A *box* is a hyper-rectangle of a global tensor; a shard holds one box in row-major order.  A
durable file holds a run of elements of a box.  Any change of the number of ranks, or of the way
that tensors are laid over them, is an intersection of boxes.  Nothing here touches memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod


@dataclass(frozen=True, slots=True)
class Box:
    """The elements ``[origin, origin + shape)`` of a tensor, in every dimension."""

    origin: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    def intersection(self, other: Box) -> Box | None:
        """What both have in common; None when that is nothing, or the dimensions differ."""
        if len(self.shape) != len(other.shape):
            return None
        first = tuple(map(max, self.origin, other.origin))
        last = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.origin, self.shape, other.origin, other.shape, strict=True)
        ]
        shape = tuple(stop - start for start, stop in zip(first, last, strict=True))
        return Box(first, shape) if all(size > 0 for size in shape) else None

    def strides(self) -> tuple[int, ...]:
        """Elements from one index to the next, by dimension, in row-major order."""
        strides = [1] * len(self.shape)
        for dim in range(len(self.shape) - 2, -1, -1):
            strides[dim] = strides[dim + 1] * self.shape[dim + 1]
        return tuple(strides)

    def position(self, point: tuple[int, ...]) -> int:
        """Number of the element at ``point`` (of the global tensor) in row-major order."""
        return sum(
            (at - start) * stride
            for at, start, stride in zip(point, self.origin, self.strides(), strict=True)
        )

    def runs(self, start: int, stop: int) -> Iterator[Box]:
        """The elements numbered ``[start, stop)`` as boxes, in order: at most 2 x dimensions - 1.

        Each of them is contiguous in this box.
        """
        if start >= stop:
            return
        if not self.shape:
            yield self
            return
        yield from self._runs(start, stop, 0, self.origin)

    def _runs(self, start: int, stop: int, dim: int, corner: tuple[int, ...]) -> Iterator[Box]:
        """Runs within one index of all dimensions before ``dim``."""
        rows = prod(self.shape[dim + 1 :])  # elements of one index of this dimension
        first, last = -(-start // rows), stop // rows
        origin = self.origin[dim]
        if first > last:  # inside one index
            at = start // rows
            inner = (*corner[:dim], origin + at, *corner[dim + 1 :])
            yield from self._runs(start - at * rows, stop - at * rows, dim + 1, inner)
            return
        if start < first * rows:
            inner = (*corner[:dim], origin + first - 1, *corner[dim + 1 :])
            yield from self._runs(start - (first - 1) * rows, rows, dim + 1, inner)
        if first < last:
            ones = (1,) * dim
            begin = (*corner[:dim], origin + first, *corner[dim + 1 :])
            yield Box(begin, (*ones, last - first, *self.shape[dim + 1 :]))
        if last * rows < stop:
            inner = (*corner[:dim], origin + last, *corner[dim + 1 :])
            yield from self._runs(0, stop - last * rows, dim + 1, inner)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a rank's tensor lies in the job's.

    ``shape`` is the global one, ``origin`` where the rank's begins.  ``owner`` is empty for what
    is the same tensor on all ranks; otherwise it names the ranks (as ``Share.key`` does) whose
    own it is: another rank's tensor of the same name is another one.
    """

    shape: tuple[int, ...]
    origin: tuple[int, ...]
    owner: str = ""

    @staticmethod
    def whole(shape: tuple[int, ...], owner: str = "") -> Placement:
        """Of a tensor that the rank has all of."""
        return Placement(shape, (0,) * len(shape), owner)


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy between two shards, in elements of their row-major orders.

    ``shape`` elements are taken at ``source`` with ``source_strides``, and put at ``target`` with
    ``target_strides``.
    """

    shape: tuple[int, ...]
    source: int
    source_strides: tuple[int, ...]
    target: int
    target_strides: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def copies(source: Box, start: int, stop: int, target: Box) -> list[Copy]:
    """What the elements ``[start, stop)`` of ``source`` give to ``target``; contiguous where it
    can be, so that equal boxes need one copy in one dimension."""
    if source == target:
        return [Copy((stop - start,), start, (1,), start, (1,))] if start < stop else []
    found = []
    for run in source.runs(start, stop):
        common = run.intersection(target)
        if common is not None:
            found.append(
                _merged(
                    common.shape,
                    source.position(common.origin),
                    source.strides(),
                    target.position(common.origin),
                    target.strides(),
                )
            )
    return found


def hull(source: Box, target: Box) -> tuple[int, int]:
    """First element of ``source`` that ``target`` needs, and the one behind the last; (0, 0) if
    it needs none."""
    if source == target:
        return 0, source.volume
    common = source.intersection(target)
    if common is None:
        return 0, 0
    last = tuple(at + size - 1 for at, size in zip(common.origin, common.shape, strict=True))
    return source.position(common.origin), source.position(last) + 1


def disjoint(boxes: list[Box]) -> bool:
    """Whether no two of the boxes share an element."""
    ordered = sorted((box for box in boxes if box.volume), key=lambda box: box.origin)
    cut = [
        dim
        for dim in range(max((len(box.shape) for box in ordered), default=0))
        if len({(box.origin[dim], box.shape[dim]) for box in ordered}) > 1
    ]
    if len(cut) == 1:  # the common case, and a long one: shards along one dimension
        return all(
            a.origin[cut[0]] + a.shape[cut[0]] <= b.origin[cut[0]] for a, b in pairwise(ordered)
        )
    return not any(
        box.intersection(other) for number, box in enumerate(ordered) for other in ordered[:number]
    )


def _merged(
    shape: tuple[int, ...],
    source: int,
    source_strides: tuple[int, ...],
    target: int,
    target_strides: tuple[int, ...],
) -> Copy:
    """The same copy in as few dimensions as possible."""
    dims: list[tuple[int, int, int]] = []  # size, source stride, target stride; innermost first
    for size, a, b in zip(
        reversed(shape), reversed(source_strides), reversed(target_strides), strict=True
    ):
        if size == 1:
            continue
        if dims:
            inner, inner_a, inner_b = dims[-1]
            if (a, b) == (inner * inner_a, inner * inner_b):
                dims[-1] = (inner * size, inner_a, inner_b)
                continue
        dims.append((size, a, b))
    dims = dims[::-1] or [(1, 1, 1)]
    sizes, first, second = zip(*dims, strict=True)
    return Copy(sizes, source, first, target, second)
