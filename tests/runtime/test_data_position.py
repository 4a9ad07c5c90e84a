"""A position in the data: what was consumed is never drawn again, what was not is never skipped."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from ftrain.runtime.data import DataPosition, open_data

SAMPLES = 23


class Numbers(Dataset[Any]):
    """Sample i is (i, a random number): shows the order and the workers' random state."""

    loaded: int = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, int, float, int]:
        Numbers.loaded += 1
        return (
            index,
            int(torch.randint(0, 10**6, ()).item()),
            random.random(),
            int(np.random.randint(10**6)),
        )


def loader(workers: int = 0, **options: Any) -> DataLoader[Any]:
    options.setdefault("shuffle", True)
    return DataLoader(Numbers(), batch_size=4, num_workers=workers, **options)


def draw(position: DataPosition, count: int) -> list[Any]:
    return [
        [part.tolist() if isinstance(part, torch.Tensor) else part for part in position.next()]
        for _ in range(count)
    ]


def resumed(make: Any, at: int, more: int) -> tuple[list[Any], list[Any]]:
    """What an undisturbed run draws after ``at`` batches, and what a resumed one draws."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    undisturbed = open_data(make(), 7, os.getpid())
    draw(undisturbed, at)
    state = undisturbed.state()
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = draw(undisturbed, more)
    torch.manual_seed(99)  # a new process
    again = open_data(make(), 7, os.getpid())
    again.load(state)
    torch.set_rng_state(generators[0])
    random.setstate(generators[1])
    np.random.set_state(generators[2])
    return expected, draw(again, more)


@pytest.mark.parametrize("at", [0, 1, 3, 5, 6, 11])
def test_resuming_a_shuffled_loader_draws_the_same_batches(at: int) -> None:
    expected, found = resumed(loader, at, 9)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_the_same_random_numbers_after_resuming(persistent: bool) -> None:
    expected, found = resumed(
        lambda: loader(2, persistent_workers=persistent, prefetch_factor=3), 4, 6
    )
    assert found == expected


def test_skipped_samples_are_not_loaded() -> None:
    position = open_data(loader(), 7, os.getpid())
    position.load({"epoch": 0, "index": 5, "seed": 7, "random": None})
    Numbers.loaded = 0
    draw(position, 1)
    assert Numbers.loaded == SAMPLES - 5 * 4


def test_every_epoch_holds_every_sample_once_and_epochs_differ() -> None:
    position = open_data(loader(), 7, os.getpid())
    epochs = [[i for batch in draw(position, 6) for i in batch[0]] for _ in range(3)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_distributed_sampler_is_given_its_epoch() -> None:
    def make() -> DataLoader[Any]:
        sampler: DistributedSampler[Any] = DistributedSampler(
            Numbers(), num_replicas=2, rank=1, shuffle=True
        )
        return DataLoader(Numbers(), batch_size=4, sampler=sampler)

    expected, found = resumed(make, 4, 5)  # 3 batches an epoch
    assert found == expected
    position = open_data(make(), 7, os.getpid())
    first, second = draw(position, 3), draw(position, 3)
    assert [batch[0] for batch in first] != [batch[0] for batch in second]


def test_an_unbatched_loader_resumes() -> None:
    expected, found = resumed(lambda: DataLoader(Numbers(), batch_size=None, shuffle=True), 5, 25)
    assert found == expected


def test_the_global_generators_are_not_touched_by_iterating() -> None:
    position = open_data(DataLoader(list(range(8)), batch_size=2, shuffle=True), 7, os.getpid())
    before = torch.get_rng_state()
    for _ in range(10):
        position.next()
    assert torch.equal(before, torch.get_rng_state())


def test_an_iterable_dataset_resumes_with_a_warning() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(20))

    with pytest.warns(UserWarning, match="IterableDataset"):
        expected, found = resumed(lambda: DataLoader(Stream(), batch_size=2), 3, 4)
    assert found == expected


def test_data_with_its_own_state_keeps_it() -> None:
    class Own:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Any:
            while self.at < 100:
                self.at += 1
                yield [torch.tensor(self.at)]

        def state_dict(self) -> dict[str, Any]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.at = state["at"]

    expected, found = resumed(Own, 7, 5)
    assert found == expected == [[8], [9], [10], [11], [12]]


def test_no_data_counts_steps_and_empty_data_ends() -> None:
    nothing = open_data(None, 7, os.getpid())
    assert [nothing.next() for _ in range(3)] == [None] * 3
    with pytest.raises(StopIteration):
        open_data([], 7, os.getpid()).next()


def test_the_ledger_names_each_batch_once() -> None:
    position = open_data(loader(), 7, os.getpid())
    entries = []
    for _ in range(12):
        position.next()
        entries.append(position.ledger())
    assert [(entry["epoch"], entry["index"]) for entry in entries] == [
        (epoch, index) for epoch in (0, 1) for index in range(6)
    ]
    assert len({entry["digest"] for entry in entries}) == 12


def test_others_who_iterate_the_loader_get_whole_epochs() -> None:
    """As torch.optim.swa_utils.update_bn does when the training is over."""
    torch.manual_seed(1)
    data = loader()
    undisturbed = open_data(data, 7, os.getpid())
    draw(undisturbed, 3)
    state = undisturbed.state()
    draw(undisturbed, 1)
    expected = [batch[0].tolist() for batch in data]
    again_data = loader()
    again = open_data(again_data, 7, os.getpid())
    again.load(state)
    draw(again, 1)
    assert [batch[0].tolist() for batch in again_data] == expected
    assert len(expected) == len(again_data)
    assert again.ledger()["digest"]


def test_a_samplers_own_generator_decides_the_order() -> None:
    """It is equal on all ranks where the session's seed may not be."""

    def drawn(seed: int, own: int) -> list[Any]:
        sampler = torch.utils.data.RandomSampler(
            Numbers(), generator=torch.Generator().manual_seed(own)
        )
        position = open_data(loader(shuffle=False, sampler=sampler), seed, os.getpid())
        return [batch[0] for batch in draw(position, 4)]

    assert drawn(1, 5) == drawn(2, 5)
    assert drawn(1, 5) != drawn(1, 6)


class OwnSampler(torch.utils.data.Sampler[int]):
    """Draws from a generator of another kind."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        yield from self.generator.permutation(len(Numbers())).tolist()

    def __len__(self) -> int:
        return len(Numbers())


def test_a_samplers_generator_of_another_kind_stays_its_own() -> None:
    position = open_data(loader(shuffle=False, sampler=OwnSampler()), 1, os.getpid())
    draw(position, 2)
