"""Which samples of an epoch this rank draws, also when the number of ranks changed in its middle.

torch's samplers have in common that an epoch has one order, a permutation that one seed decides,
and that rank r of n takes every n-th entry from the r-th on.  So what all ranks together consumed
is always a beginning of that order, whatever the number of ranks and the batch size were, and one
number says how long it is.  The rest is dealt out to the ranks that there are now, as
DistributedSampler would deal it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
import xxhash
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ftrain.runtime.random_state import mix


class BatchIndices(list[Any]):
    """The sample indices of one batch, with the seed its worker shall draw from."""

    seed: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """The order of an epoch's samples, over all ranks."""

    length: int
    shuffle: int | None  # seed of the permutation; None: as the dataset has them

    def deal(self, start: int, world: int, rank: int, drop_last: bool) -> list[int]:
        """The samples that ``rank`` gets of those from ``start`` on.

        They are made to divide as DistributedSampler does it: the epoch's first ones are added,
        or with ``drop_last`` the last ones left out.
        """
        count = share(self.length - start, world, drop_last)
        return self._samples((torch.arange(count) * world + (start + rank)) % self.length)

    def lease(self, stretch: Stretch, rank: int, drop_last: bool) -> list[int]:
        """The samples that ``rank`` gets batch by batch of what is left: in every step each rank
        takes the next batch, so whose one comes to nothing changes nobody else's."""
        again, batch, world = stretch.again, stretch.batch, stretch.world
        left = len(again) + self.length - stretch.start
        steps = share(left, world * batch, drop_last)
        turns = torch.arange(steps * batch)
        turns = turns // batch * (world * batch) + rank * batch + turns % batch
        places = (turns + (stretch.start - len(again))) % self.length
        if again:
            first = turns < len(again)
            places[first] = torch.tensor(again)[turns[first]]
        return self._samples(places)

    def _samples(self, places: torch.Tensor) -> list[int]:
        if self.shuffle is not None and places.numel():
            generator = torch.Generator()
            generator.manual_seed(self.shuffle)
            places = torch.randperm(self.length, generator=generator)[places]
        dealt: list[int] = places.tolist()
        return dealt


@dataclass(frozen=True, slots=True)
class Stretch:
    """The part of an epoch since the number of ranks or the batch size changed last."""

    world: int  # ranks that the samples are dealt out to
    batch: int  # samples per batch and rank
    since: int = 0  # batches of the epoch that each rank had consumed before
    start: int = 0  # samples of the epoch that all ranks together had consumed before
    again: tuple[int, ...] = ()  # places of the order before that of which nothing came
    order: Order | None = None  # None: not known here, it is a sampler's own affair

    def record(self) -> dict[str, Any]:
        """As a value that can be captured."""
        order = self.order
        return {
            "world": self.world,
            "batch": self.batch,
            "since": self.since,
            "start": self.start,
            "again": list(self.again),
            "order": order and {"length": order.length, "shuffle": order.shuffle},
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> Stretch:
        """What :meth:`record` returned; it may have more entries."""
        order = record["order"]
        return cls(
            world=record["world"],
            batch=record["batch"],
            since=record["since"],
            start=record["start"],
            again=tuple(record.get("again", ())),
            order=None if order is None else Order(order["length"], order["shuffle"]),
        )

    def same_layout(self, other: Stretch) -> bool:
        """Whether as many ranks draw batches as large."""
        return (self.world, self.batch) == (other.world, other.batch)

    def after(self, fresh: Stretch, index: int, consumed: int, unit: int) -> Stretch:
        """Go on under ``fresh``'s layout, without knowing who drew what: at the same place, less
        what does not fill a whole ``unit``, because to repeat samples is better than to skip."""
        return replace(fresh, since=index, start=consumed // unit * unit)

    def drawn(self, index: int) -> int:
        """Samples that all ranks together have drawn of it at ``index``."""
        return (index - self.since) * self.batch * self.world

    def left(self, index: int) -> tuple[tuple[int, ...], int]:
        """What is left at ``index``: places to be dealt out again, and where the rest begins."""
        drawn = self.drawn(index)
        start = self.start + max(0, drawn - len(self.again))
        if self.order is not None:  # the last batches were made to divide
            start = min(start, self.order.length)
        return self.again[drawn:], start

    def leased(self, rank: int, index: int) -> tuple[int, ...]:
        """Places of the order that one rank was leased as the batch before ``index``."""
        first = self.drawn(index - 1) + rank * self.batch
        count, length = len(self.again), self.order.length if self.order else 0
        places = [
            self.again[turn] if turn < count else turn - count + self.start
            for turn in range(first, first + self.batch)
        ]
        return tuple(place for place in places if place < length)

    def told_from(self, now: Stretch) -> str:
        """The two layouts in words."""
        return f"it was drawn from by {self._drawers()} before and by {now._drawers()} now"

    def _drawers(self) -> str:
        ranks = f"{self.world} rank{'s' if self.world > 1 else ''}"
        return ranks if self.batch == 1 else f"{ranks} in batches of {self.batch}"


def share(samples: int, world: int, drop_last: bool) -> int:
    """How many of ``samples`` each rank gets."""
    return max(0, samples // world if drop_last else -(-samples // world))


@dataclass(frozen=True, slots=True)
class _Seat:
    """This rank among those that a known sampler deals out to."""

    world: int = 1
    rank: int = 0
    drop_last: bool = False


class ResumableSampler:
    """Stands in for a loader's (batch) sampler: can start in the middle of an epoch, under another
    layout as well, and knows what it yielded.

    Args:
        inner: the loader's own batch sampler, or its sampler.
        seed: what the seeds of batches follow from.
        batched: ``inner`` yields batches, whose workers have to be seeded.
        world_size: ranks that the samples are dealt out to, where ``inner`` does not tell.
    """

    def __init__(self, inner: Any, seed: int, batched: bool, world_size: int = 1) -> None:
        self.inner = inner
        self.seed = seed
        self.digests: dict[int, str] = {}
        self.chain = _chain(inner)  # the user's samplers, outermost first
        self._batched = batched
        self._batcher: BatchSampler | None = inner if _iterates_as(inner, BatchSampler) else None
        self._source: Any = inner if self._batcher is None else self._batcher.sampler
        # Whether what is left can be batched anew, instead of only skipping whole batches.
        self._splittable = self._batcher is not None or not batched
        self._seat = _seat(self._source) if self._splittable else None
        self._layout = Stretch(_world(self.chain, world_size), _batch_size(inner))
        self._reseated = False  # dealt out to others than the user's samplers know of
        self._epoch = 0
        self._begins: tuple[Stretch, int] | None = None  # where an iteration does; None: anew

    def __len__(self) -> int:
        return len(self.inner)

    def reseat(self, world: int, rank: int) -> None:
        """Lease batches to ``world`` ranks from now on, of which this is ``rank``, whatever the
        user's sampler says; what has no known order is not dealt out at all."""
        if self._seat is not None:
            self._seat = replace(self._seat, world=world, rank=rank)
            self._layout = replace(self._layout, world=world)
            self._reseated = True

    def fresh(self) -> Stretch:
        """A whole epoch as the user's loader has it; its samplers were told the epoch before."""
        return replace(self._layout, order=_order(self._source) if self._seat else None)

    def resume(self, before: Stretch, index: int, consumed: int) -> tuple[Stretch, str]:
        """Where an epoch stands that came to ``index`` batches under the layout of ``before``, and
        why not every sample of it is drawn exactly once ("": they are)."""
        own = self.fresh()
        same = before.same_layout(own)
        if before.order and own.order and before.order.length <= own.order.length:
            again, start = before.left(index) if before.again else ((), consumed)
            resumed = replace(own, since=index, start=start, again=again, order=before.order)
            return before if same else resumed, ""
        if same:
            resumed = replace(before, order=own.order)
        else:
            unit = own.world if self._splittable else own.world * own.batch
            resumed = before.after(own, index, consumed, unit)
        return resumed, self._inexact(before, own)

    def _inexact(self, before: Stretch, own: Stretch) -> str:
        names = " around ".join(type(sampler).__name__ for sampler in self.chain)
        if before.order and own.order:
            had, has = before.order.length, own.order.length
            return f"the dataset had {had} samples before and has {has} now"
        if before.order or own.order:
            return f"they were drawn by another sampler before than by {names} now"
        if before.same_layout(own) or (before.world == own.world and self._splittable):
            return ""
        known = "can't be dealt out anew (DistributedSampler's can)"
        return f"the order of {names} {known}, and {before.told_from(own)}"

    def consumed(self, stretch: Stretch, index: int) -> int:
        """How many samples of the epoch all ranks together have consumed at ``index``."""
        drawn = (index - stretch.since) * stretch.batch
        if stretch.order is not None and self._seat is not None:
            left = len(stretch.again) + stretch.order.length - stretch.start
            drawn = min(drawn, share(left, stretch.world, self._seat.drop_last))
        return stretch.start - len(stretch.again) + drawn * stretch.world

    def give_back(self, stretch: Stretch, index: int, ranks: Sequence[int]) -> Stretch:
        """The stretch when nothing came of what ``ranks`` drew as the batch before ``index``."""
        if stretch.order is None or self._seat is None:
            return stretch
        again, start = stretch.left(index)
        lost = [place for rank in ranks for place in stretch.leased(rank, index)]
        return replace(stretch, since=index, start=start, again=(*lost, *again))

    @contextmanager
    def standing_at(self, epoch: int, stretch: Stretch, index: int) -> Iterator[None]:
        """What is iterated in here (a loader may do it twice) begins with the batch ``index``.

        Others iterate the loader as well, such as update_bn, and get whole epochs.
        """
        self._epoch, self._begins = epoch, (stretch, index)
        try:
            yield
        finally:
            self._begins = None

    def __iter__(self) -> Iterator[Any]:
        # Started here and not at the first next(): a sampler that draws its permutation from the
        # global generators must do so while DataPosition holds them at the epoch's beginning.
        if self._begins is None:
            return self._entries(iter(self.inner), self._epoch, 0, {})
        stretch, index = self._begins
        self.digests.clear()
        entries = self._remaining(stretch, index)
        first = list(islice(entries, 1))
        return self._entries(chain(first, entries), self._epoch, index, self.digests)

    def _remaining(self, stretch: Stretch, index: int) -> Iterator[Any]:
        skip = index - stretch.since
        samples: Iterable[Any]
        seat = self._seat
        if seat and stretch.order and self._reseated:
            drops = seat.drop_last or bool(self._batcher is not None and self._batcher.drop_last)
            samples = stretch.order.lease(stretch, seat.rank, drops)
        elif seat and stretch.order and (stretch.start or stretch.order != self.fresh().order):
            samples = stretch.order.deal(stretch.start, seat.world, seat.rank, seat.drop_last)
        elif stretch.start and self._splittable:
            samples = islice(iter(self._source), stretch.start // stretch.world, None)
        else:
            skip += stretch.start // (stretch.world * stretch.batch)
            return islice(iter(self.inner), skip, None)
        if self._batcher is not None:
            samples = BatchSampler(samples, self._batcher.batch_size, self._batcher.drop_last)
        return islice(iter(samples), skip, None)

    def _entries(
        self, entries: Iterator[Any], epoch: int, start: int, digests: dict[int, str]
    ) -> Iterator[Any]:
        for index, entry in enumerate(entries, start=start):
            digests[index] = xxhash.xxh3_64_hexdigest(repr(entry).encode())
            if not self._batched:
                yield entry
                continue
            batch = BatchIndices(entry)
            batch.seed = mix(self.seed, epoch, index)
            yield batch


def _iterates_as(sampler: Any, *kinds: type) -> bool:
    """Whether it is one of these or a subclass that yields the same."""
    iterate = getattr(type(sampler), "__iter__", None)
    return any(iterate is kind.__iter__ for kind in kinds)  # type: ignore[attr-defined]


def _chain(sampler: Any) -> list[Any]:
    found: list[Any] = []
    while sampler is not None and all(sampler is not known for known in found):
        found.append(sampler)
        sampler = getattr(sampler, "sampler", None)
    return found


def _seat(sampler: Any) -> _Seat | None:
    """This rank's seat, if the sampler's order is known: then the rest of it can be dealt anew."""
    if _iterates_as(sampler, DistributedSampler):
        return _Seat(sampler.num_replicas, sampler.rank, sampler.drop_last)
    if _iterates_as(sampler, SequentialSampler):
        return _Seat()
    if _iterates_as(sampler, RandomSampler) and not sampler.replacement:
        return _Seat() if sampler.num_samples == len(sampler.data_source) else None
    return None


def _order(sampler: Any) -> Order:
    """The order of the epoch that the sampler was told."""
    if _iterates_as(sampler, DistributedSampler):
        seed = sampler.seed + sampler.epoch if sampler.shuffle else None
        return Order(len(sampler.dataset), seed)
    if _iterates_as(sampler, SequentialSampler):
        return Order(len(sampler.data_source), None)
    return Order(len(sampler.data_source), sampler.generator.initial_seed())


def _world(samplers: list[Any], world_size: int) -> int:
    """Number of ranks that the samplers deal out to."""
    for sampler in samplers:
        if isinstance(ranks := getattr(sampler, "num_replicas", None), int):
            return ranks
    of_one_rank = (BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    alone = all(_iterates_as(sampler, *of_one_rank, SequentialSampler) for sampler in samplers)
    return 1 if alone else world_size


def _batch_size(sampler: Any) -> int:
    """Samples per batch; 1 where only batches can be counted."""
    size = getattr(sampler, "batch_size", 1)
    return size if isinstance(size, int) and size > 0 else 1
