"""The random number generators of a process as one small value."""

from __future__ import annotations

import ctypes
import random
import struct
from typing import Any

import numpy as np
import torch
import xxhash

from ftrain.checkpoint.codec import encode_tree
from ftrain.comms.errors import StateError

_MT19937_BYTES = 624 * 4 + 4  # the generator's words and its position in them


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's, torch's and every CUDA device's default generator.

    CUDA generators are read only when CUDA was already initialised, so that asking never is what
    initialises it.
    """
    state: dict[str, Any] = {
        "python": _plain_python(random.getstate()),
        "numpy": _numpy.read(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def newcomer_random_state(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """The random state of a rank that was not there when another rank captured ``state``.

    It follows from the two alone and is unlike that of every other rank, so that no two ranks draw
    the same numbers.  Raises as :func:`set_random_state`.
    """
    seed = mix(_digest(state), rank)
    # Of their own each: Python's and NumPy's generators draw the same from the same seed.
    derived: dict[str, Any] = {
        "python": _plain_python(random.Random(mix(seed, 2)).getstate()),
        "numpy": _newcomer_numpy(state["numpy"], mix(seed, 1)),
        "torch": torch.Generator().manual_seed(mix(seed, 3)).get_state(),
    }
    if "cuda" in state and torch.cuda.is_available():
        derived["cuda"] = [
            torch.Generator(f"cuda:{device}").manual_seed(mix(seed, 4, device)).get_state()
            for device in range(torch.cuda.device_count())
        ]
    return derived


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` returned.

    Raises StateError if NumPy's global generator is of another kind here.
    """
    _require_same_kind(state["numpy"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(int(word) for word in words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        # Saved where more devices were visible, it has those of devices that are not here.
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch from one number (any non-negative int)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers (splitmix64 finaliser, Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1


def _plain_python(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, words, gauss = state
    packed = struct.pack(f"={len(words)}I", *words)  # a third of the time of np.array(words)
    return version, np.frombuffer(packed, np.uint32), gauss


class _NumpyGenerator:
    """NumPy's global generator; what it was last is said again while its memory has not changed,
    because to ask NumPy takes longer than everything else here."""

    def __init__(self) -> None:
        self._memory = b""
        self._state: tuple[Any, ...] = ()

    def read(self) -> tuple[Any, ...] | dict[str, Any]:
        """As :func:`numpy.random.get_state` says it, of plain values; of another generator than the
        usual one a dict."""
        generator = _bit_generator()
        if type(generator) is not np.random.MT19937:
            return dict(np.random.get_state(legacy=False))
        memory = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
        # A second Gaussian number may be held ready, which lies elsewhere: to take it draws none.
        if memory != self._memory or self._state[3]:
            self._state = _plain_numpy(np.random.get_state(legacy=True))
            self._memory = memory
        return self._state


_numpy = _NumpyGenerator()


def _bit_generator() -> Any:
    module: Any = np.random  # whose stubs lack it
    return module.get_bit_generator()


def _require_same_kind(state: Any) -> None:
    """StateError unless NumPy's global generator is of the class that has this state."""
    there = str(state["bit_generator"] if isinstance(state, dict) else state[0])
    here = type(_bit_generator()).__name__
    if there != here:
        raise StateError(
            f"the saved run drew NumPy's random numbers from {there}, this script from {here}: "
            f"call np.random.set_bit_generator(np.random.{there}()) before the Session is made"
        )


def _newcomer_numpy(captured: Any, seed: int) -> tuple[Any, ...] | dict[str, Any]:
    """The state of a generator of the same kind that begins with ``seed``."""
    _require_same_kind(captured)
    if isinstance(captured, dict):
        return {**captured, **type(_bit_generator())(seed).state, "has_gauss": 0}
    generator = np.random.RandomState([seed % 2**32, seed >> 32])
    return _plain_numpy(generator.get_state(legacy=True))


def _plain_numpy(state: Any) -> tuple[Any, ...]:
    name, keys, position, has_gauss, cached = state
    return str(name), np.asarray(keys), int(position), int(has_gauss), float(cached)


def _digest(state: dict[str, Any]) -> int:
    """A number for what the generators would draw next."""
    hasher = xxhash.xxh3_64()
    _, words, gauss = state["python"]
    hasher.update(np.asarray(words, dtype=np.uint32).tobytes())
    if isinstance(state["numpy"], dict):
        hasher.update(encode_tree([gauss, state["numpy"]]))
    else:
        _, keys, position, *cached = state["numpy"]
        hasher.update(np.asarray(keys, dtype=np.uint32).tobytes())
        hasher.update(repr((gauss, position, cached)).encode())
    for tensor in (state["torch"], *state.get("cuda", ())):
        hasher.update(tensor.numpy().tobytes())
    return hasher.intdigest()
