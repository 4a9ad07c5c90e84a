"""An epoch whose number of ranks or batch size changes in its middle: each sample once."""

from __future__ import annotations

import itertools
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from ftrain.checkpoint.codec import decode_tree, encode_tree
from ftrain.runtime.data import DataPosition, open_data
from ftrain.runtime.random_state import mix, random_state, seed_everything, set_random_state

SEED = 7


@dataclass(frozen=True)
class Job:
    """A script's loader; ``plain``: one rank alone uses no DistributedSampler."""

    samples: int
    shuffle: bool = True
    drop_uneven: bool = False  # the sampler's drop_last
    drop_partial: bool = False  # the loader's
    plain: bool = False

    def sampler(self, world: int, rank: int) -> Sampler[int]:
        dataset = range(self.samples)
        if self.plain and world == 1:
            return RandomSampler(dataset) if self.shuffle else SequentialSampler(dataset)
        return DistributedSampler(
            dataset, world, rank, shuffle=self.shuffle, seed=3, drop_last=self.drop_uneven
        )

    def loader(self, world: int, rank: int, batch: int) -> DataLoader[Any]:
        return DataLoader(
            range(self.samples),
            batch,
            sampler=self.sampler(world, rank),
            drop_last=self.drop_partial,
            collate_fn=list,
        )

    def order(self, world: int) -> list[int]:
        """Of the first epoch when ``world`` ranks begin it, from a rank that has all of it."""
        if self.plain and self.shuffle and world == 1:
            alone = open_data(self.loader(1, 0, 1), SEED, os.getpid())
            return [alone.next()[0] for _ in range(self.samples)]
        return list(Job(self.samples, self.shuffle).sampler(1, 0))


class Ranks:
    """All ranks of a job, in step."""

    def __init__(self, loaders: list[Any], state: dict[str, Any] | None = None) -> None:
        self.positions: list[DataPosition] = []
        for rank, loader in enumerate(loaders):
            position = open_data(loader, SEED, os.getpid(), rank=rank, world_size=len(loaders))
            if state is not None:
                position.load(decode_tree(encode_tree(state)))
            self.positions.append(position)

    @property
    def epoch(self) -> int:
        (epoch,) = {position.epoch for position in self.positions}  # all in the same
        return epoch

    def step(self) -> list[Any]:
        """The samples of the next batches of all ranks, which are as many on each."""
        batches = [position.next() for position in self.positions]
        assert len({len(batch) for batch in batches}) == 1
        return [sample for batch in batches for sample in batch]

    def rest(self) -> tuple[list[Any], list[Any]]:
        """What is left of this epoch, and the first batches of the next one."""
        epoch, found = self.epoch, []
        while True:
            samples = self.step()
            if self.epoch > epoch:
                return found, samples
            found += samples

    def state(self) -> dict[str, Any]:
        """Any rank's will do: ranks that join have none of their own."""
        return self.positions[-1].state()


def make(job: Job, world: int, batch: int, state: dict[str, Any] | None = None) -> Ranks:
    return Ranks([job.loader(world, rank, batch) for rank in range(world)], state)


def used(job: Job, left: int, world: int, batch: int) -> int:
    """How many of ``left`` samples one rank draws, as the classes' documentation has it."""
    each = left // world if job.drop_uneven else -(-left // world)
    return each // batch * batch if job.drop_partial else each


def is_beginning(samples: list[int], order: list[int]) -> bool:
    """Whether these are the first of the order, which begins anew where padding needs it."""
    return Counter(samples) == Counter(itertools.islice(itertools.cycle(order), len(samples)))


def check(job: Job, layouts: list[tuple[int, int]], choose: random.Random) -> bool:
    """An epoch under one layout after the other; whether all of them had a part in it."""
    order = job.order(layouts[0][0])
    seen: list[int] = []
    state = None
    for world, batch in layouts[:-1]:
        left = max(0, job.samples - len(seen))
        steps = -(-used(job, left, world, batch) // batch)
        if steps == 0:
            return False
        ranks = make(job, world, batch, state)
        for _ in range(choose.randint(1, choose.choice([steps, max(1, steps // 2)]))):
            seen += ranks.step()
        assert ranks.epoch == 0
        assert is_beginning(seen, order)
        state = ranks.state()
    world, batch = layouts[-1]
    if used(job, job.samples, world, batch) == 0:
        return False  # its next epoch is empty
    left = max(0, job.samples - len(seen))
    total = len(seen) + used(job, left, world, batch) * world
    ranks = make(job, world, batch, state)
    rest, following = ranks.rest()
    seen += rest
    assert len(seen) == total
    assert is_beginning(seen, order)
    counts = Counter(seen)
    if not job.drop_uneven and not job.drop_partial:
        assert set(counts) == set(range(job.samples))  # none skipped
    if total <= job.samples:
        assert set(counts.values()) == {1}  # none twice
    assert following == as_the_user_has_it(job, world, batch)
    return len(rest) > 0


def as_the_user_has_it(job: Job, world: int, batch: int) -> list[int]:
    """The first batches of the second epoch, undisturbed."""
    undisturbed = make(job, world, batch)
    if not (job.plain and world == 1 and job.shuffle):
        found = []
        for rank in range(world):
            sampler = job.sampler(world, rank)
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(1)
            found += list(itertools.islice(sampler, batch))
        return found
    return undisturbed.rest()[1]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("drop_uneven", [False, True])
@pytest.mark.parametrize("drop_partial", [False, True])
@pytest.mark.parametrize(
    "every",
    [29, pytest.param(7, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.soak)],
)
def test_each_sample_is_drawn_once_whatever_the_ranks_were(
    plain: bool, drop_uneven: bool, drop_partial: bool, every: int
) -> None:
    """Sizes 1 to 40, 1 to 4 ranks that change twice, batches of 1 to 4; soak has all cases."""
    cases = itertools.product(range(1, 41), *[range(1, 5)] * 3, [False, True])
    whole = 0
    for number, (samples, *worlds, shuffle) in enumerate(cases):
        if number % every:
            continue
        choose = random.Random(number)
        job = Job(samples, shuffle, drop_uneven, drop_partial, plain)
        whole += check(job, [(world, choose.randint(1, 4)) for world in worlds], choose)
    assert whole > 1000 / every  # cases in which every layout drew samples


def test_an_epoch_may_change_often_and_be_interrupted_without_a_change() -> None:
    job = Job(151)
    seen: list[int] = []
    state = None
    for world, batch in [(3, 2), (3, 2), (2, 5), (2, 5), (4, 1), (4, 3), (4, 3), (1, 4)]:
        ranks = make(job, world, batch, state)
        seen += ranks.step() + ranks.step()
        state = ranks.state()
    seen += make(job, 2, 2, state).rest()[0]
    assert is_beginning(seen, job.order(3))
    assert len(seen) == 151 + 1  # an even number


def test_what_is_dealt_anew_does_not_depend_on_interruptions() -> None:
    job = Job(50)
    before = make(job, 4, 2)
    before.step()
    undisturbed = make(job, 3, 2, before.state())
    expected = [undisturbed.step() for _ in range(12)]  # into the next epoch
    assert undisturbed.epoch == 1
    state = before.state()
    for samples in expected:
        again = make(job, 3, 2, state)
        assert again.step() == samples
        state = again.state()


def test_a_state_that_does_not_tell_its_layout_is_todays() -> None:
    job = Job(40)
    ranks = make(job, 2, 4)
    ranks.step()
    state = ranks.state()
    del state["dealt"]
    assert make(job, 2, 4, state).step() == ranks.step()


def test_the_order_of_before_holds_until_the_epoch_ends() -> None:
    """Also when the script shuffles otherwise by now: an epoch has one order."""
    ranks = make(Job(20), 2, 2)
    seen = ranks.step()
    rest, following = make(Job(20, shuffle=False), 2, 2, ranks.state()).rest()
    assert sorted(seen + rest) == list(range(20))
    assert following == [0, 2, 1, 3]


class Drawn(Dataset[Any]):
    """Sample i is (i, a random number)."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, int(torch.randint(0, 10**6, ()).item())


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_from_the_seed_of_their_batch(persistent: bool) -> None:
    def ranks(world: int, batch: int, state: dict[str, Any] | None = None) -> Ranks:
        return Ranks(
            [
                DataLoader(
                    Drawn(),
                    batch,
                    sampler=DistributedSampler(Drawn(), world, rank),
                    num_workers=2,
                    prefetch_factor=3,
                    persistent_workers=persistent,
                    collate_fn=tuple,
                )
                for rank in range(world)
            ],
            state,
        )

    seen = []
    state = None
    index = 0
    outside = random_state()
    for world, batch, steps in [(2, 3, 4), (3, 2, 2), (1, 4, 6)]:  # 24 + 12 + 24 samples
        now = ranks(world, batch, state)
        for _ in range(steps):
            samples = now.step()
            seen += [sample for sample, _ in samples]
            seed_everything(mix(SEED, 0, index))
            drawn = [int(torch.randint(0, 10**6, ()).item()) for _ in range(batch)]
            assert [number for _, number in samples] == drawn * world
            index += 1
        assert now.epoch == 0
        state = now.state()
    set_random_state(outside)
    assert sorted(seen) == list(range(60))


def unbatched(world: int, rank: int) -> DataLoader[Any]:
    return DataLoader(
        range(31),
        batch_size=None,
        sampler=DistributedSampler(range(31), world, rank),
        collate_fn=lambda sample: [sample],
    )


def batched_by_its_sampler(world: int, rank: int) -> DataLoader[Any]:
    """A whole batch is one entry: for datasets that read many samples at once."""
    batches = BatchSampler(DistributedSampler(range(31), world, rank), 3, False)
    return DataLoader(
        torch.arange(31),
        batch_size=None,
        sampler=batches,
        collate_fn=lambda samples: samples.tolist(),
    )


@pytest.mark.parametrize("loader", [unbatched, batched_by_its_sampler])
def test_loaders_without_a_batch_size_are_dealt_anew(loader: Any) -> None:
    seen: list[int] = []
    state = None
    for world in (4, 3, 1):
        ranks = Ranks([loader(world, rank) for rank in range(world)], state)
        seen += ranks.step()
        state = ranks.state()
    seen += Ranks([loader(1, 0)], state).rest()[0]
    assert sorted(seen) == list(range(31))


class Own(Sampler[int]):
    """A user's sampler: the order of an epoch is in no seed that we know."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.epoch = rank, world, 0

    def __iter__(self) -> Iterator[int]:
        order = random.Random(self.epoch).sample(range(60), 60)
        return iter(order[self.rank :: self.world])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def own_loaders(world: int, batch: int) -> list[DataLoader[Any]]:
    return [
        DataLoader(range(60), batch, sampler=Own(rank, world), collate_fn=list)
        for rank in range(world)
    ]


def test_any_sampler_may_have_another_batch_size() -> None:
    ranks = Ranks(own_loaders(2, 4))
    seen = ranks.step() + ranks.step()
    ranks = Ranks(own_loaders(2, 3), ranks.state())
    seen += ranks.step()
    ranks = Ranks(own_loaders(2, 5), ranks.state())
    seen += ranks.rest()[0]
    assert sorted(seen) == list(range(60))


def test_an_unknown_order_goes_on_at_about_the_same_place_and_says_so_once() -> None:
    before = Ranks(own_loaders(3, 3))
    seen = before.step()
    said = (
        "samples of this epoch may be drawn again or be left out: the order of BatchSampler around "
        "Own can't be dealt out anew (DistributedSampler's can), and it was drawn from by 3 ranks "
        "in batches of 3 before and by 2 ranks in batches of 5 now"
    )
    with pytest.warns(UserWarning, match="^" + re.escape(said) + "$") as told:
        after = Ranks(own_loaders(2, 5), before.state())
    assert len(told) == 1
    state = after.state()
    rest, following = after.rest()
    assert Ranks(own_loaders(2, 5), state).rest() == (rest, following)  # nothing to say any more
    # This sampler deals as DistributedSampler does: one of the 9 is drawn again, to make it even.
    assert sorted(set(seen + rest)) == list(range(60))
    assert len(seen + rest) == 61
    assert following == Ranks(own_loaders(2, 5)).rest()[1]
    again = Ranks(own_loaders(2, 5), state)
    seen += again.step()
    with pytest.warns(UserWarning, match="by 1 rank in batches of 4 now"):
        alone = Ranks(own_loaders(1, 4), again.state())
    assert sorted(set(seen + alone.rest()[0])) == list(range(60))


class OwnBatches(Sampler[list[int]]):
    """A user's batch sampler."""

    batch_size = 4

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        starts = range(self.rank * 4, 60, self.world * 4)
        return iter([list(range(start, min(60, start + 4))) for start in starts])


def test_a_batch_sampler_of_the_users_repeats_rather_than_skips() -> None:
    def loaders(world: int) -> list[DataLoader[Any]]:
        return [
            DataLoader(range(60), batch_sampler=OwnBatches(rank, world), collate_fn=list)
            for rank in range(world)
        ]

    ranks = Ranks(loaders(1))
    seen = [sample for _ in range(5) for sample in ranks.step()]  # 20: two steps of 3 ranks less 4
    with pytest.warns(UserWarning, match="the order of OwnBatches can't be dealt out anew"):
        after = Ranks(loaders(3), ranks.state())
    seen += after.step()
    assert seen[20] == 12
    with pytest.warns(UserWarning, match="the order of OwnBatches can't be dealt out anew"):
        alone = Ranks(loaders(1), after.state())
    rest = alone.rest()[0]
    assert rest == list(range(24, 60))


def test_samples_that_a_dataset_gained_are_drawn_from_the_next_epoch_on() -> None:
    ranks = make(Job(40), 2, 4)
    seen = ranks.step()
    for world in (2, 3):  # 32 left: one more to divide by 3
        rest, _ = make(Job(44), world, 4, ranks.state()).rest()
        assert is_beginning(seen + rest, Job(40).order(2))
        assert len(seen + rest) == {2: 40, 3: 41}[world]


@pytest.mark.parametrize("world", [2, 3])
def test_a_dataset_that_lost_samples_has_another_order(world: int) -> None:
    ranks = make(Job(40), 2, 4)
    ranks.step()
    with pytest.warns(UserWarning, match="the dataset had 40 samples before and has 36 now"):
        after = make(Job(36), world, 4, ranks.state())
    assert len(after.rest()[0]) == {2: 28, 3: 30}[world]


def test_another_sampler_has_another_order() -> None:
    ranks = make(Job(60), 2, 4)
    ranks.step()
    with pytest.warns(UserWarning, match="another sampler before than by BatchSampler around Own"):
        after = Ranks(own_loaders(2, 4), ranks.state())
    state = after.state()
    assert after.step() == [
        sample for loader in own_loaders(2, 4) for sample in list(loader.sampler)[4:8]
    ]
    assert len(Ranks(own_loaders(2, 4), state).rest()[0]) == 52  # nothing to say any more


class Stream(IterableDataset[int]):
    """Every rank reads every n-th item."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 60, self.world))


@pytest.mark.filterwarnings("ignore:the DataLoader's dataset is an IterableDataset")
def test_a_stream_goes_on_at_about_the_same_place_and_says_so_once() -> None:
    def loaders(world: int, batch: int) -> list[DataLoader[Any]]:
        return [DataLoader(Stream(rank, world), batch, collate_fn=list) for rank in range(world)]

    ranks = Ranks(loaders(4, 2))
    seen = ranks.step() + ranks.step() + ranks.step()
    with pytest.warns(UserWarning, match="what an iterable yields can't be dealt out anew") as told:
        ranks = Ranks(loaders(2, 5), ranks.state())
    assert sum("dealt" in str(warning.message) for warning in told) == 1
    seen += ranks.rest()[0]
    assert sorted(seen) == sorted([*range(60), *range(20, 24)])  # steps of 10 samples


class Keeper:
    """Data with its own state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            self.at += 1
            yield [self.at]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_data_with_its_own_state_is_given_it_and_it_is_said_whose_it_is() -> None:
    ranks = Ranks([Keeper(), Keeper()])
    ranks.step()
    with pytest.warns(UserWarning, match="Keeper keeps one rank's state, and"):
        after = Ranks([Keeper(), Keeper(), Keeper()], ranks.state())
    assert after.step() == [2, 2, 2]
    assert Ranks([Keeper()] * 3, after.state()).step() == [3, 4, 5]


def test_where_nothing_is_dealt_out_nothing_changes() -> None:
    """No data, and samplers by which each rank reads all of it."""

    def subset() -> DataLoader[Any]:
        return DataLoader(
            range(9),
            2,
            sampler=SubsetRandomSampler(range(9)),
            collate_fn=list,
        )

    ranks = Ranks([subset(), subset()])
    seen = ranks.step()
    rest = Ranks([subset()], ranks.state()).rest()[0]
    assert sorted(seen[:2] + rest) == list(range(9))
    nothing = open_data(None, SEED, os.getpid(), world_size=2)
    nothing.next()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_data(None, SEED, os.getpid(), world_size=3).load(nothing.state())
