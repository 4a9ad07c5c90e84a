"""What the ranks tell each other about a save, from threads: through the group's store.

No collective is used: the training threads are in theirs.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any

import msgspec
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from ftrain.comms.errors import PeerLostError, UsageError
from ftrain.runtime.alone import Agreement
from ftrain.runtime.deepspeed.tags import TagFile

_LOOK_EVERY_S = 0.02


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's part of a save: what it wrote, and what went wrong."""

    rank: int
    folder: Annotated[str, msgspec.Meta(max_length=8192)]
    files: dict[str, TagFile]
    problem: str = ""


class Peers:
    """The ranks of the default group; made by all of them at the same place.

    Raises:
        UsageError: there is no group, or none with a store.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            raise UsageError("torch.distributed is not initialized: call deepspeed.initialize")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # A store may hold keys of a launch before: nobody else has this name.
        self.name = f"{Agreement().share([secrets.randbits(62)])[0]:016x}"
        store: Any = dist.distributed_c10d._get_default_store()
        if store is None:
            raise UsageError("the process group has no store: start it with gloo or nccl")
        self._store = PrefixStore(f"ftrain/deepspeed/{self.name}", store)

    def tell(self, save: int, report: Report) -> None:
        """Say what this rank did; raises PeerLostError."""
        self._set(f"{save}/{report.rank}", msgspec.msgpack.encode(report))
        self._add(f"{save}/count", 1)

    def gather(self, save: int, patience_s: float) -> list[Report]:
        """What all ranks said; raises PeerLostError after ``patience_s``."""
        self._await(f"{save}/count", self.world_size, patience_s)
        reports = []
        for rank in range(self.world_size):
            try:
                content = bytes(self._store.get(f"{save}/{rank}"))
                self._store.delete_key(f"{save}/{rank}")
            except RuntimeError as error:
                raise _lost(error) from None
            reports.append(msgspec.msgpack.decode(content, type=Report))
        return reports

    def announce(self, save: int) -> None:
        """Rank 0 has done with the save."""
        self._add(f"{save}/done", 1)

    def await_announced(self, save: int, patience_s: float) -> None:
        """Return when it has; raises PeerLostError."""
        self._await(f"{save}/done", 1, patience_s)

    def _await(self, key: str, count: int, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while (found := self._add(key, 0)) < count:
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"only {found} of {count} ranks answered within {patience_s:g} s"
                )
            time.sleep(_LOOK_EVERY_S)  # a store tells nobody; waiting in it would keep others out

    def _set(self, key: str, value: bytes) -> None:
        try:
            self._store.set(key, value)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise _lost(error) from None

    def _add(self, key: str, number: int) -> int:
        try:
            return self._store.add(key, number)
        except RuntimeError as error:
            raise _lost(error) from None


def _lost(error: RuntimeError) -> PeerLostError:
    first = (str(error).splitlines() or [""])[0]
    return PeerLostError(f"the ranks' common store can't be reached: {first}")
