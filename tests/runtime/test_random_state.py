"""The generators of a rank that joins: its own, and the same whenever it joins there."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from ftrain.checkpoint.codec import decode_tree, encode_tree
from ftrain.comms.errors import StateError
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


def test_a_gaussian_number_held_ready_counts() -> None:
    seed_everything(5)
    np.random.standard_normal()  # draws two and keeps one, outside the generator's words
    captured = random_state()
    kept = np.random.standard_normal()
    without = random_state()
    assert encode_tree(captured) != encode_tree(without)
    expected = np.random.standard_normal()
    set_random_state(captured)
    assert np.random.standard_normal() == kept
    set_random_state(without)
    assert np.random.standard_normal() == expected


def test_another_generator_in_numpys_place_is_seen() -> None:
    seed_everything(5)
    module: Any = np.random  # whose stubs lack the two functions
    before = module.get_bit_generator()
    captured = random_state()
    try:
        module.set_bit_generator(np.random.MT19937(7))
        replaced = random_state()
        assert encode_tree(replaced) != encode_tree(captured)
        expected = np.random.random()
        set_random_state(replaced)
        assert np.random.random() == expected
    finally:
        module.set_bit_generator(before)
    assert encode_tree(random_state()["numpy"]) == encode_tree(captured["numpy"])


def test_what_is_said_again_is_what_numpy_says() -> None:
    seed_everything(5)
    draw = random.Random(3)
    for _ in range(300):
        captured = random_state()["numpy"]
        told: Any = np.random.get_state(legacy=True)
        name, words, *rest = told
        assert (captured[0], *captured[2:]) == (name, *rest)
        assert captured[1].tobytes() == words.tobytes()
        kind = draw.randrange(4)
        if kind == 0:
            np.random.standard_normal()
        elif kind == 1:
            np.random.random(draw.randrange(700))
        elif kind == 2:
            np.random.seed(draw.randrange(3))


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_a_generator_of_another_kind_is_kept_and_told_from_the_usual_one(kind: Any) -> None:
    module: Any = np.random
    usual, before = random_state(), module.get_bit_generator()
    try:
        module.set_bit_generator(kind(5))
        np.random.standard_normal()
        captured = decode_tree(encode_tree(random_state()))
        expected = [np.random.standard_normal() for _ in range(3)]
        set_random_state(captured)
        assert [np.random.standard_normal() for _ in range(3)] == expected
        assert draws(newcomer_random_state(captured, 2)) != draws(
            newcomer_random_state(captured, 3)
        )
        with pytest.raises(StateError, match=rf"from MT19937, this script from {kind.__name__}"):
            set_random_state(usual)
    finally:
        module.set_bit_generator(before)
