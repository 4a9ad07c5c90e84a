"""Where a run stands in its data, as a value that can be captured and put back.

The position counts batches that the training loop consumed, never those a worker prefetched.  An
epoch's order and its workers' random numbers follow from (seed, epoch, batch index) alone, so a
resumed epoch skips at the level of the sampler: no skipped sample is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset

from ftrain.comms.process import die_with_parent
from ftrain.runtime.random_state import mix, random_state, seed_everything, set_random_state


@runtime_checkable
class Stateful(Protocol):
    """Anything that can hand out and take back its state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class BatchIndices(list[Any]):
    """The sample indices of one batch, with the seed its worker shall draw from."""

    seed: int = 0


class _SeededDataset(torch.utils.data.Dataset[Any]):
    """Seeds a worker for each batch it loads: its draws don't depend on what came before."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> Any:
        if isinstance(indices, BatchIndices) and torch.utils.data.get_worker_info() is not None:
            seed_everything(indices.seed)
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]


class _WorkerInit:
    """Ends a loader's worker with its rank, then runs the user's own ``worker_init_fn``."""

    def __init__(self, user: Any, rank_pid: int) -> None:
        self.user = user
        self.rank_pid = rank_pid

    def __call__(self, worker: int) -> None:
        die_with_parent(self.rank_pid)
        if self.user is not None:
            self.user(worker)


class _Resumable:
    """A (batch) sampler that can start in the middle of an epoch and knows what it yielded."""

    def __init__(self, inner: Any, seed: int, batched: bool) -> None:
        self.inner = inner
        self.seed = seed
        self.batched = batched
        self.epoch = 0
        self.skip = 0
        self.digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        # Started here and not at the first next(): a sampler that draws its permutation from the
        # global generators must do so while DataPosition holds them at the epoch's beginning.
        self.digests.clear()
        entries = islice(iter(self.inner), self.skip, None)
        first = list(islice(entries, 1))
        return self._entries(chain(first, entries), self.epoch, self.skip)

    def _entries(self, entries: Iterator[Any], epoch: int, skip: int) -> Iterator[Any]:
        for index, entry in enumerate(entries, start=skip):
            self.digests[index] = xxhash.xxh3_64_hexdigest(repr(entry).encode())
            if not self.batched:
                yield entry
                continue
            batch = BatchIndices(entry)
            batch.seed = mix(self.seed, epoch, index)
            yield batch


class DataPosition:
    """Base: iterate any iterable, epoch after epoch, and count what was consumed.

    On resume the batches before the position are drawn again and thrown away.
    """

    def __init__(self, data: Iterable[Any] | None, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0
        self.index = 0  # batches consumed in this epoch
        self._iterator: Iterator[Any] | None = None
        self._epoch_random: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """The position at this boundary."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self.seed,
            "random": self._epoch_random if self._iterator is not None else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go to a position; the next batch is the one that followed it."""
        self.epoch, self.index, self.seed = state["epoch"], state["index"], state["seed"]
        self._epoch_random = state["random"]
        self._iterator = None

    def next(self) -> Any:
        """The next batch, across epochs.

        Raises :class:`StopIteration` when the data has no batch at all.
        """
        if self.data is None:
            self.index += 1
            return None
        for _ in range(2):
            if self._iterator is None:
                self._iterator = self._open()
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self.index == 0:
                    raise
                self.epoch, self.index = self.epoch + 1, 0
                self._iterator, self._epoch_random = None, None
                continue
            self.index += 1
            return batch
        raise StopIteration

    def ledger(self) -> dict[str, Any]:
        """What the newest batch was, for the step record."""
        return {"epoch": self.epoch, "index": self.index - 1}

    def _open(self) -> Iterator[Any]:
        """An iterator that stands at the position; samplers that draw from the global generators
        draw what they drew when the epoch began."""
        now = random_state()
        if self._epoch_random is not None:
            set_random_state(self._epoch_random)
        else:
            self._epoch_random = now
        resumed = self.index > 0
        iterator = self._start()
        if resumed:
            set_random_state(now)
        return iterator

    def _start(self) -> Iterator[Any]:
        assert self.data is not None
        iterator = iter(self.data)
        for _ in range(self.index):
            next(iterator)
        return iterator


class LoaderPosition(DataPosition):
    """Position in a map-style :class:`torch.utils.data.DataLoader`, as users have it."""

    def __init__(self, loader: DataLoader[Any], seed: int, rank_pid: int) -> None:
        super().__init__(loader, seed)
        self.loader = loader
        batched = loader.batch_sampler is not None
        self._sampler = _Resumable(
            loader.batch_sampler if batched else loader.sampler, seed, batched
        )
        # DataLoader refuses to have these exchanged after construction; it reads them only when
        # an iterator is made, and none was made yet.
        object.__setattr__(loader, "batch_sampler" if batched else "sampler", self._sampler)
        if loader.num_workers > 0:
            object.__setattr__(loader, "dataset", _SeededDataset(loader.dataset))
            loader.worker_init_fn = _WorkerInit(loader.worker_init_fn, rank_pid)
        self._user_seed = (
            loader.generator.initial_seed() if isinstance(loader.generator, torch.Generator) else 0
        )
        self._user_samplers = self._samplers()

    def load(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        super().load(state)
        self._sampler.seed = self.seed

    def ledger(self) -> dict[str, Any]:
        """Epoch, batch index and a digest of the sample indices of the newest batch."""
        found = super().ledger()
        found["digest"] = self._sampler.digests.pop(self.index - 1, "")
        return found

    def _samplers(self) -> list[Any]:
        """The user's sampler objects, outermost first."""
        found: list[Any] = []
        sampler: Any = self._sampler.inner
        while sampler is not None and all(sampler is not known for known in found):
            found.append(sampler)
            sampler = getattr(sampler, "sampler", None)
        return found

    def _start(self) -> Iterator[Any]:
        self._sampler.epoch, self._sampler.skip = self.epoch, self.index
        for sampler in self._user_samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
            if hasattr(sampler, "generator"):  # RandomSampler and its kin
                sampler.generator = self._generator(1)
        self.loader.generator = self._generator(2)
        return iter(self.loader)

    def _generator(self, use: int) -> torch.Generator:
        generator = torch.Generator()
        generator.manual_seed(mix(self.seed, self._user_seed, self.epoch, use))
        return generator


class StatefulPosition(DataPosition):
    """Data that keeps its own position (torchdata's StatefulDataLoader and the like)."""

    def __init__(self, data: Any, seed: int) -> None:
        super().__init__(data, seed)
        self._stateful: Stateful = data

    def state(self) -> dict[str, Any]:
        """The position, and the data's own state."""
        return {**super().state(), "own": self._stateful.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        super().load(state)
        self._stateful.load_state_dict(state["own"])

    def _start(self) -> Iterator[Any]:
        assert self.data is not None
        return iter(self.data)


def open_data(data: Any, seed: int, rank_pid: int) -> DataPosition:
    """The position keeper that fits ``data``: a loader, anything with its own state, or an
    iterable (or None: steps without batches)."""
    if isinstance(data, Stateful):
        return StatefulPosition(data, seed)
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            warnings.warn(
                "the DataLoader's dataset is an IterableDataset: resuming draws and drops every "
                "batch before the position; give it state_dict()/load_state_dict() to skip at once",
                stacklevel=3,
            )
            return DataPosition(data, seed)
        return LoaderPosition(data, seed, rank_pid)
    return DataPosition(data, seed)
