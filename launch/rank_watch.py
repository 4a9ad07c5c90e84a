"""A node's watch over its ranks: what the observer sees, as failures of the group that runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from ftrain.comms.protocol.messages import RankFailure
from ftrain.configs.schema import DetectionConfig
from ftrain.launch.ranks import RankGroup
from ftrain.recovery.observer import Observer
from ftrain.recovery.protocol.watchdog import RESTART


class RankWatch:
    """Watches one group of ranks at a time, from outside of them; ``warn`` takes one sentence."""

    def __init__(self, config: DetectionConfig, node: int, warn: Callable[[str], None]) -> None:
        self._config = config
        self._node = node
        self._warn = warn
        self._observer: Observer | None = None

    def begin(self, group: RankGroup) -> None:
        """Watch this group instead of the one before."""
        self.end()
        if self._config.enabled:
            self._observer = Observer(self._config, range(group.formation.world_size))
            for rank in group.ranks:
                with suppress(ProcessLookupError):  # its end is reported anyway
                    self._observer.add(rank.rank, rank.pid, rank.page)

    def end(self) -> None:
        """Watch nobody."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    def boundaries(self, step: int, collectives: Mapping[int, int]) -> None:
        """How many collectives ranks of all nodes had enqueued at boundary ``step``."""
        if self._observer is not None:
            self._observer.record_boundaries(step, dict(collectives))

    def failures(self, group: RankGroup) -> list[RankFailure]:
        """Ranks that were found hung since the last call, each once; warns about slow ones."""
        if self._observer is None:
            return []
        now_ns = time.monotonic_ns()
        found = []
        for verdict in self._observer.poll(now_ns):
            rank = group.of(verdict.rank)
            if verdict.action != RESTART:
                where = f"rank {rank.rank} (node {self._node})"
                self._warn(f"{where}: {verdict.evidence}; its stack is in its log")
            elif rank.alive and not rank.blamed:
                rank.blamed = True
                found.append(RankFailure(rank.rank, verdict.kind, verdict.evidence, now_ns))
            elif rank.status == 0 and not rank.blamed:
                found.append(group.desertion(rank, now_ns))
        return found
