"""What the ranks tell each other about a save, from threads: through the group's store.

No collective is used: the training threads are in theirs.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import Annotated, Any

import msgspec
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from ftrain.comms.errors import PeerLostError, UsageError
from ftrain.runtime.alone import Agreement
from ftrain.runtime.deepspeed.tags import TagFile

_LOOK_EVERY_S = 0.02, 0.5  # at first, and at most: a tenth of the time waited in between
_EXCHANGE_S = 1800.0  # each may read and verify its part of a checkpoint first


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's part of a save: what it wrote, and what went wrong."""

    rank: int
    folder: Annotated[str, msgspec.Meta(max_length=8192)]
    files: dict[str, TagFile]
    problem: str = ""


class Peers:
    """The ranks that save together.

    Args:
        rank, world_size: who this is.
        name: of this run, the same on all ranks; a store may hold keys of a launch before.
        store: that all of them reach.
    """

    def __init__(self, rank: int, world_size: int, name: str, store: Any) -> None:
        self.rank, self.world_size, self.name = rank, world_size, name
        self._exchanges = 0
        self._store = PrefixStore(f"ftrain/deepspeed/{name}", store)

    def tell(self, save: int, report: Report) -> None:
        """Say what this rank did; raises PeerLostError."""
        self._set(f"{save}/{report.rank}", msgspec.msgpack.encode(report))
        self._add(f"{save}/count", 1)

    def gather(self, save: int, patience_s: float) -> list[Report]:
        """What all ranks said; raises PeerLostError after ``patience_s``."""
        self._await(f"{save}/count", self.world_size, patience_s)
        reports = []
        for rank in range(self.world_size):
            content = self._get(f"{save}/{rank}")
            with suppress(RuntimeError):
                self._store.delete_key(f"{save}/{rank}")
            reports.append(msgspec.msgpack.decode(content, type=Report))
        return reports

    def announce(self, save: int, problem: str) -> None:
        """Say what became of the save, as rank 0; raises PeerLostError."""
        self._set(f"{save}/problem", problem.encode(errors="replace"))
        self._add(f"{save}/done", 1)

    def announced(self, save: int, patience_s: float) -> str:
        """What rank 0 says of the save: "" if all is well; raises PeerLostError."""
        self._await(f"{save}/done", 1, patience_s)
        return self._get(f"{save}/problem").decode()

    def exchange(self, words: str) -> list[str]:
        """Every rank's words, on every rank; they all call this.  Raises PeerLostError."""
        self._exchanges += 1
        key = f"exchange/{self._exchanges}"
        self._set(f"{key}/{self.rank}", words.encode(errors="replace"))
        self._add(f"{key}/count", 1)
        self._await(f"{key}/count", self.world_size, _EXCHANGE_S)
        return [self._get(f"{key}/{rank}").decode() for rank in range(self.world_size)]

    def _await(self, key: str, count: int, patience_s: float) -> None:
        began, (least_s, most_s) = time.monotonic(), _LOOK_EVERY_S
        while (found := self._add(key, 0)) < count:
            waited_s = time.monotonic() - began
            if waited_s > patience_s:
                raise PeerLostError(
                    f"only {found} of {count} ranks answered within {patience_s:g} s"
                )
            pause_s = min(most_s, max(least_s, waited_s / 10))
            time.sleep(pause_s)  # a store tells nobody; waiting in it would keep others out

    def _set(self, key: str, value: bytes) -> None:
        try:
            self._store.set(key, value)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise _lost(error) from None

    def _get(self, key: str) -> bytes:
        try:
            return bytes(self._store.get(key))
        except RuntimeError as error:
            raise _lost(error) from None

    def _add(self, key: str, number: int) -> int:
        try:
            return self._store.add(key, number)
        except RuntimeError as error:
            raise _lost(error) from None


def group_peers() -> Peers:
    """The ranks of the default group, which all make this at the same place.

    Raises:
        UsageError: there is no group, or none with a store.
    """
    if not dist.is_initialized():
        raise UsageError("torch.distributed is not initialized: call deepspeed.initialize")
    name = f"{Agreement().share([secrets.randbits(62)])[0]:016x}"
    store: Any = dist.distributed_c10d._get_default_store()
    if store is None:
        raise UsageError("the process group has no store: start it with gloo or nccl")
    return Peers(dist.get_rank(), dist.get_world_size(), name, store)


def _lost(error: RuntimeError) -> PeerLostError:
    first = (str(error).splitlines() or [""])[0]
    return PeerLostError(f"the ranks' common store can't be reached: {first}")
