"""Nodes with one rank each whose managers protect each other with parity."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manager_process import Manager, Rank

from ftrain.comms.protocol.messages import HeldParity, Rebuild, RoundId, VersionId


class ParityNodes:
    """Managers of several nodes, and their ranks. Closes itself as a context manager."""

    def __init__(
        self,
        directory: Path,
        nodes: int,
        *,
        parity: int = 1,
        sizes: Sequence[int] = (),
        slots: int = 4,
        **more: Any,
    ) -> None:
        self.directory, self.parity, self.slots, self.more = directory, parity, slots, more
        self.epoch = 1
        self.last: dict[str, Any] = {}  # what the group was told last, beside its members
        self.sizes = sizes or [20_000 + 7_000 * node for node in range(nodes)]
        self.managers = {node: self.manager(node) for node in range(nodes)}
        self.seats = list(range(nodes))  # node that has each rank
        self.ranks: dict[int, Rank] = {}
        self.group()

    def manager(self, node: int, incarnation: int = 100) -> Manager:
        """A new node's."""
        return Manager(
            self.directory, node=node, incarnation=incarnation, slots=self.slots, **self.more
        )

    def group(self, only: Sequence[int] | None = None, **more: Any) -> None:
        """Tell the managers (or ``only`` some nodes') their group."""
        self.last = dict(more)
        members = [self.managers[node] for node in self.seats]
        rebuilds: dict[int, Rebuild] = more.pop("rebuilds", {})
        for rank, node in enumerate(self.seats):
            if only is not None and node not in only:
                continue
            self.managers[node].group(
                self.epoch,
                first_rank=rank,
                peers=[member for member in members if member.node != node],
                guards=tuple(sorted(self.seats)),
                parity=self.parity,
                rebuild=rebuilds.get(node),
                **more,
            )

    def join(self) -> None:
        """Ranks connect to their managers."""
        for rank in self.ranks.values():
            rank.close()
        self.ranks = {
            rank: Rank(
                self.managers[node],
                rank,
                epoch=self.epoch,
                world_size=len(self.seats),
                nbytes=self.sizes[rank],
                key=str(rank),
            )
            for rank, node in enumerate(self.seats)
        }

    def capture(self, step: int) -> None:
        """Every rank captures a version."""
        for rank in self.ranks.values():
            assert rank.capture(step) is not None

    def version(self, step: int) -> VersionId:
        """The version of the present epoch."""
        return VersionId(self.epoch, step)

    def protect(self, step: int) -> None:
        """Capture a version and wait until it is protected."""
        self.capture(step)
        self.protected(step)

    def protected(self, step: int) -> None:
        """Wait until it is."""
        for node in self.seats:
            self.managers[node].protected(self.version(step))

    def lose(self, node: int) -> None:
        """Kill a node, with its memory."""
        rank = self.seats.index(node)
        if rank in self.ranks:
            self.ranks.pop(rank).close()
        manager = self.managers.pop(node)
        manager.kill()
        manager.close()

    def inventories(self) -> dict[int, tuple[HeldParity, ...]]:
        """What every node says for the last time; ranks are gone by then."""
        for rank in self.ranks.values():
            rank.close()
        self.ranks = {}
        return {node: self.managers[node].parity() for node in self.seats if node in self.managers}

    def replace(
        self,
        lost: Sequence[int],
        spares: Sequence[int],
        kept: RoundId,
        version: VersionId,
        *,
        lost_as: int = -1,
    ) -> None:
        """Another group, in which ``spares`` have the ranks of the ``lost``, which the round knows
        as ``lost_as`` if not by their numbers."""
        self.epoch += 1
        rebuilds = {}
        for node, spare in zip(lost, spares, strict=True):
            self.managers[spare] = self.manager(spare, incarnation=100 + self.epoch)
            self.seats[self.seats.index(node)] = spare
            rebuilds[spare] = Rebuild(kept, node if lost_as < 0 else lost_as, spare)
        self.group(base=version, kept=kept, rebuilds=rebuilds)

    def __enter__(self) -> ParityNodes:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks.values():
            rank.close()
        for manager in self.managers.values():
            with contextlib.suppress(Exception):
                manager.close()
