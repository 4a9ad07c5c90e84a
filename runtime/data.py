"""Where a run stands in its data, as a value that can be captured and put back.

The position counts batches that the training loop consumed, never those a worker prefetched.  An
epoch's order and its workers' random numbers follow from (seed, epoch, batch index) alone, so a
resumed epoch skips at the level of the sampler: no skipped sample is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, IterableDataset

from ftrain.comms.process import die_with_parent
from ftrain.runtime.random_state import mix, random_state, seed_everything, set_random_state
from ftrain.runtime.sampling import BatchIndices, ResumableSampler, Stretch


@runtime_checkable
class Stateful(Protocol):
    """Anything that can hand out and take back its state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


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


class DataPosition:
    """Base: iterate any iterable, epoch after epoch, and count what was consumed.

    On resume the batches before the position are drawn again and thrown away.

    Args:
        data: the iterable; None: steps without batches.
        seed: what an epoch's order and its workers' random numbers follow from.
        rank, world_size: this rank's place.
    """

    def __init__(
        self, data: Iterable[Any] | None, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0
        self.index = 0  # batches consumed in this epoch
        self._rank = rank
        self._world_size = world_size
        self._stretch = Stretch(world_size, 1)
        self._iterator: Iterator[Any] | None = None
        self._epoch_random: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """The position at this boundary."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self.seed,
            "random": self._epoch_random if self._iterator is not None else None,
            "dealt": {**self._stretch.record(), "consumed": self._consumed()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go to a position; the next batch is the one that followed it.

        When it is of another number of ranks or another batch size, what is left of its epoch is
        dealt out anew.
        """
        self.epoch, self.index, self.seed = state["epoch"], state["index"], state["seed"]
        self._epoch_random = state["random"]
        self._iterator = None
        dealt = state.get("dealt")
        # A state without it does not tell its layout, which is taken to be today's.
        if dealt is None or self.index == 0 or self.data is None:
            self._stretch = self._fresh()
        else:
            self._stretch = self._resume(Stretch.of(dealt), dealt["consumed"])

    def deal(self, world: int, rank: int) -> None:
        """Have what is left of the epoch dealt out to ``world`` ranks, of which this is ``rank``:
        the samples of an epoch are those of all replica groups together."""
        if (world, rank) == (self._world_size, self._rank) or self.data is None:
            return
        state = self.state()
        self._world_size, self._rank = world, rank
        self._reseat()
        self.load(state)

    def give_back(self, ranks: Sequence[int]) -> bool:
        """Nothing came of what ``ranks`` drew as the newest batch: deal it out again.  False where
        it is not known what that was."""
        return False

    def _reseat(self) -> None:
        """Nothing more is known of what an iterable yields."""

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
        if not resumed:
            self._stretch = self._fresh()
        iterator = self._start()
        if resumed:
            set_random_state(now)
        return iterator

    def _start(self) -> Iterator[Any]:
        assert self.data is not None
        iterator = iter(self.data)
        stretch = self._stretch
        skipped = stretch.start // (stretch.world * stretch.batch) + self.index - stretch.since
        next(islice(iterator, skipped, skipped), None)
        return iterator

    def _fresh(self) -> Stretch:
        """A whole epoch under today's layout."""
        return Stretch(self._world_size, _batch_size(self.data))

    def _resume(self, before: Stretch, consumed: int) -> Stretch:
        """Where the epoch stands today that all ranks drew ``consumed`` samples of."""
        now = self._fresh()
        if before.same_layout(now):
            return before
        self._warn(f"what an iterable yields can't be dealt out anew, and {before.told_from(now)}")
        return before.after(now, self.index, consumed, now.world * now.batch)

    def _consumed(self) -> int:
        stretch = self._stretch
        return stretch.start + (self.index - stretch.since) * stretch.batch * stretch.world

    def _warn(self, why: str) -> None:
        """Once, and not by every rank."""
        if self._rank == 0:
            warnings.warn(
                f"samples of this epoch may be drawn again or be left out: {why}",
                stacklevel=6,  # where Session is made
            )


class LoaderPosition(DataPosition):
    """Position in a map-style :class:`torch.utils.data.DataLoader`, as users have it."""

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        rank_pid: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(loader, seed, rank, world_size)
        self.loader = loader
        batched = loader.batch_sampler is not None
        self._sampler = ResumableSampler(
            loader.batch_sampler if batched else loader.sampler, seed, batched, world_size
        )
        # DataLoader refuses to have these exchanged after construction; it reads them only when
        # an iterator is made, and none was made yet.
        object.__setattr__(loader, "batch_sampler" if batched else "sampler", self._sampler)
        if loader.num_workers > 0:
            object.__setattr__(loader, "dataset", _SeededDataset(loader.dataset))
            loader.worker_init_fn = _WorkerInit(loader.worker_init_fn, rank_pid)
        self._user_seed = _seed_of(loader.generator) or 0
        self._sampler_seeds = [
            _seed_of(getattr(sampler, "generator", None)) for sampler in self._sampler.chain
        ]

    def ledger(self) -> dict[str, Any]:
        """Epoch, batch index and a digest of the sample indices of the newest batch."""
        found = super().ledger()
        found["digest"] = self._sampler.digests.pop(self.index - 1, "")
        return found

    def give_back(self, ranks: Sequence[int]) -> bool:
        """See :meth:`DataPosition.give_back`."""
        stretch = self._sampler.give_back(self._stretch, self.index, ranks)
        known = stretch is not self._stretch
        if known:
            self._stretch, self._iterator = stretch, None
        return known

    def _reseat(self) -> None:
        self._sampler.reseat(self._world_size, self._rank)

    def _start(self) -> Iterator[Any]:
        self._enter()
        self.loader.generator = self._generator(2)
        with self._sampler.standing_at(self.epoch, self._stretch, self.index):
            return iter(self.loader)

    def _enter(self) -> None:
        """Tell the samplers the epoch."""
        self._sampler.seed = self.seed
        for sampler, seed in zip(self._sampler.chain, self._sampler_seeds, strict=True):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
            generator = getattr(sampler, "generator", self)
            if seed is not None:  # the user's own, equal on ranks on which he made it so
                sampler.generator = torch.Generator().manual_seed(mix(seed, self.epoch, 1))
            elif generator is None or isinstance(generator, torch.Generator):  # RandomSampler's kin
                sampler.generator = self._generator(1)

    def _fresh(self) -> Stretch:
        self._enter()
        return self._sampler.fresh()

    def _resume(self, before: Stretch, consumed: int) -> Stretch:
        self._enter()
        stretch, why = self._sampler.resume(before, self.index, consumed)
        if why:
            self._warn(why)
        return stretch

    def _consumed(self) -> int:
        return self._sampler.consumed(self._stretch, self.index)

    def _generator(self, use: int) -> torch.Generator:
        generator = torch.Generator()
        generator.manual_seed(mix(self.seed, self._user_seed, self.epoch, use))
        return generator


def _seed_of(generator: Any) -> int | None:
    """What a generator of torch's was seeded with; None: it is none."""
    return generator.initial_seed() if isinstance(generator, torch.Generator) else None


class StatefulPosition(DataPosition):
    """Data that keeps its own position (torchdata's StatefulDataLoader and the like)."""

    def __init__(self, data: Any, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(data, seed, rank, world_size)
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

    def _fresh(self) -> Stretch:
        return Stretch(self._world_size, 1)  # batches are its own affair

    def _resume(self, before: Stretch, consumed: int) -> Stretch:
        now = self._fresh()
        if not before.same_layout(now):
            name = type(self.data).__name__
            self._warn(f"{name} keeps one rank's state, and {before.told_from(now)}")
        return now


def open_data(
    data: Any, seed: int, rank_pid: int, *, rank: int = 0, world_size: int = 1
) -> DataPosition:
    """The position keeper that fits ``data``: a loader, anything with its own state, or an
    iterable (or None: steps without batches)."""
    if isinstance(data, Stateful):
        return StatefulPosition(data, seed, rank, world_size)
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            warnings.warn(
                "the DataLoader's dataset is an IterableDataset: resuming draws and drops every "
                "batch before the position; give it state_dict()/load_state_dict() to skip at once",
                stacklevel=3,
            )
            return DataPosition(data, seed, rank, world_size)
        return LoaderPosition(data, seed, rank_pid, rank, world_size)
    return DataPosition(data, seed, rank, world_size)


def _batch_size(data: Any) -> int:
    """Samples per batch where ``data`` is a loader; otherwise a batch is what is counted."""
    return (data.batch_size or 1) if isinstance(data, DataLoader) else 1
