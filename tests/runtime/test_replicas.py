"""Gradients in buckets, and samples that are leased to replica groups which come and go."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ftrain.runtime.data import LoaderPosition
from ftrain.runtime.replicas.buckets import Bucket, make_buckets

SAMPLES, BATCH = 97, 3


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def test_buckets_hold_every_parameter_once_last_ones_first() -> None:
    tensors = parameters(1000, 10, 2000, 5)
    frozen = torch.zeros(7)
    buckets = make_buckets([*tensors, frozen], 2, bucket_bytes=8100)
    held = [parameter for bucket in buckets for parameter in bucket.parameters]
    assert [id(parameter) for parameter in held] == [id(tensor) for tensor in reversed(tensors)]
    assert len(buckets) == 2
    assert [bucket.words.numel() for bucket in buckets] == [0, 2 + 4]


def test_words_travel_in_a_bucket_of_their_own_where_the_last_one_is_of_half_precision() -> None:
    buckets = make_buckets(parameters(4, 4, dtype=torch.bfloat16), 2)
    assert [len(bucket.parameters) for bucket in buckets] == [2, 0]
    assert buckets[-1].flat.dtype is torch.float32
    assert buckets[-1].words.numel() == 2 + 2


def test_an_average_leaves_gradients_alone_until_it_is_known() -> None:
    first, second, third = parameters(3, 4, 2)
    first.grad, second.grad = torch.full((3,), 6.0), None
    bucket = Bucket([first, second, third])
    for _ in range(2):  # an average that was undone is packed again
        bucket.pack()
        assert bucket.flat.tolist() == [6.0] * 3 + [0.0] * 6
        bucket.flat.fill_(8.0)  # what others added
        assert first.grad.tolist() == [6.0] * 3
    bucket.unpack(4, [True, True, False])
    assert first.grad.tolist() == [2.0] * 3
    assert second.grad is not None
    assert second.grad.tolist() == [2.0] * 4  # another one had a gradient
    assert third.grad is None  # nobody had


class Groups:
    """Replica groups that draw samples, each as its own Session would have it."""

    def __init__(self, shuffle: bool, drop_last: bool) -> None:
        self.shuffle, self.drop_last = shuffle, drop_last
        self.positions: dict[int, LoaderPosition] = {}
        self.members: tuple[int, ...] = ()  # of the newest average

    def position(self) -> LoaderPosition:
        loader = DataLoader(
            TensorDataset(torch.arange(SAMPLES)),
            batch_size=BATCH,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
        )
        return LoaderPosition(loader, 11, 0)

    def come(self, group: int) -> None:
        fresh = self.position()
        if self.positions:
            fresh.load(next(iter(self.positions.values())).state())
        self.positions[group] = fresh

    def step(self, lost: set[int]) -> tuple[int, list[int]]:
        """Epoch and samples averaged; ``lost`` were there at the beginning, and not at the end."""
        roster = (*self.members, *(g for g in self.positions if g not in self.members))
        drawn: dict[int, list[int]] = {}
        epoch = -1
        for group, position in self.positions.items():
            position.deal(len(roster), roster.index(group))
            drawn[group] = position.next()[0].tolist()
            epoch = position.epoch
        for group in lost:
            del self.positions[group]
        self.members = tuple(group for group in roster if group in self.positions)
        gone = tuple(n for n, group in enumerate(roster) if group not in self.members)
        if gone:
            for position in self.positions.values():
                assert position.give_back(gone)
        return epoch, [sample for group in self.members for sample in drawn[group]]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_every_sample_of_an_epoch_is_averaged_once_whoever_comes_and_goes(
    shuffle: bool, drop_last: bool
) -> None:
    for seed in range(25):
        rng = random.Random(seed)
        groups = Groups(shuffle, drop_last)
        next_group = rng.randint(1, 4)
        for group in range(next_group):
            groups.come(group)
        taken: Counter[int] = Counter()
        largest = 1
        while True:
            present = list(groups.positions)
            lost = {rng.choice(present)} if len(present) > 1 and rng.random() < 0.15 else set()
            largest = max(largest, len(present))
            epoch, samples = groups.step(lost)
            if epoch > 0:
                break
            taken.update(samples)
            if rng.random() < 0.15 and len(groups.positions) < 5:
                groups.come(next_group)
                next_group += 1
        rest = (largest + 1) * BATCH  # made to divide at the end
        if drop_last:
            assert max(taken.values()) == 1
            assert len(taken) > SAMPLES - rest
        else:
            assert len(taken) == SAMPLES, f"seed {seed}: {SAMPLES - len(taken)} were left out"
            assert sum(taken.values()) < SAMPLES + 2 * rest


def test_two_groups_draw_apart_and_in_the_same_order_as_one() -> None:
    groups = Groups(shuffle=True, drop_last=True)
    groups.come(0)
    _, alone = groups.step(set())
    both = Groups(shuffle=True, drop_last=True)
    both.come(0)
    both.come(1)
    _, first = both.step(set())
    assert first[:BATCH] == alone
    assert len(set(first)) == 2 * BATCH
