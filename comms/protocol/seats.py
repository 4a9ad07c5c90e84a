"""Which node takes which seat of a replica group, where more nodes wait than it has seats.

Rank numbers belong to seats, not to nodes: the ranks of seat 2 are the same wherever they run.  A
seat keeps its node for as long as that is present; so memory is where ranks look for it, and a node
that was replaced waits as a spare when it comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

NOBODY = -1


def take_seats(
    last: Sequence[int], seats: int, present: Collection[int], expected: Collection[int] = ()
) -> tuple[int, ...]:
    """The node of each seat, in the order of ranks; ``NOBODY`` where there is none.

    ``last``: who had them in the last formation; empty before the first one, when the nodes with
    the lowest numbers have a right to them.  ``present``: nodes that can take one.  The seat of a
    node that is ``expected`` to be present soon is kept free for it.
    """
    owners = tuple(last) or tuple(range(seats))
    spares = iter(sorted(set(present) - set(owners)))
    taken = []
    for owner in owners:
        if owner not in present:
            owner = NOBODY if owner in expected else next(spares, NOBODY)
        taken.append(owner)
    return tuple(taken)


def empty_seats(
    last: Sequence[int], seats: int, present: Collection[int], expected: Collection[int] = ()
) -> tuple[int, ...]:
    """The nodes that had the seats which nobody can take: those are waited for, or a spare is."""
    owners = tuple(last) or tuple(range(seats))
    taken = take_seats(last, seats, present, expected)
    return tuple(owner for owner, node in zip(owners, taken, strict=True) if node == NOBODY)


def changes_in_words(last: Sequence[int], now: Sequence[int]) -> str:
    """Who takes whose place; empty where everybody keeps his."""
    pairs = zip(last or range(len(now)), now, strict=True)
    moved = [f"node {new} takes the place of node {old}" for old, new in pairs if old != new]
    return ", ".join(moved)
