"""The generators of a rank that joins: its own, and the same whenever it joins there."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ftrain.checkpoint.codec import decode_tree, encode_tree
from ftrain.runtime.random_state import (
    newcomer_random_state,
    random_state,
    seed_everything,
    set_random_state,
)


def draws(state: dict[str, Any]) -> tuple[float, float, float]:
    outside = random_state()
    set_random_state(state)
    drawn = random.random(), float(np.random.random()), float(torch.rand(()).item())
    set_random_state(outside)
    return drawn


def test_ranks_that_join_draw_numbers_of_their_own() -> None:
    seed_everything(5)
    captured = random_state()
    random.random()
    later = random_state()
    states = [captured, *(newcomer_random_state(captured, rank) for rank in (2, 3, 4))]
    states += [newcomer_random_state(later, rank) for rank in (2, 3, 4)]
    numbers = [number for state in states for number in draws(state)]
    assert len(set(numbers)) == len(numbers) == 21


def test_every_generator_counts() -> None:
    seed_everything(5)
    captured = random_state()
    found = {draws(newcomer_random_state(captured, 2))}
    # Twice: the second draw moves only the place within the words that the first one made.
    for advance in (random.random, np.random.random, lambda: torch.rand(())) * 2:
        advance()
        found.add(draws(newcomer_random_state(random_state(), 2)))
    assert len(found) == 7


def test_joining_again_draws_the_same_and_touches_nothing() -> None:
    seed_everything(5)
    captured = random_state()
    encoded = encode_tree(captured)
    expected = draws(newcomer_random_state(captured, 2))
    derived = newcomer_random_state(decode_tree(encoded), 2)
    assert draws(decode_tree(encode_tree(derived))) == expected
    assert encode_tree(captured) == encode_tree(random_state()) == encoded
    set_random_state(derived)
    assert encode_tree(random_state()) == encode_tree(derived)  # of the form that is captured
