"""Quantised chunks: how far off, what is exact, what can't be said, which bytes."""

from __future__ import annotations

import math
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch

from ftrain.comms.collectives.quantise import (
    MAGNITUDE_MAX,
    PIECE,
    QUANTISED,
    Quantisation,
    Quantiser,
    Scheme,
    Scratch,
    error_bound,
)
from ftrain.comms.errors import UsageError

HOWS = [Quantisation(scheme, bits) for scheme, bits in product(Scheme, (4, 8))]
COUNTS = (1, 2, 3, 7, 999, PIECE - 1, PIECE, 2 * PIECE + 3)
SHAPES = {
    "normal": lambda x: x,
    "far from zero": lambda x: 1000 + x,
    "all negative": lambda x: -x.abs() - 0.1,
    "one is large": lambda x: torch.where(torch.arange(len(x)) == len(x) // 2, 3e4, x),
    "mostly zeros": lambda x: torch.where(x > 1, x, 0.0),
    "denormal": lambda x: x * 1e-42,
    "small": lambda x: x * 1e-30,
    "huge": lambda x: x.clamp(-4, 4) * 2.0**123,
}


def memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")


def pack(how: Quantisation, values: torch.Tensor, scratch: Scratch | None = None) -> bytearray:
    packed = bytearray(b"\xa5" * how.packed_bytes(values.numel()))
    quantiser = Quantiser(how, values.dtype, scratch or Scratch())
    quantiser.pack(memory(values), memoryview(packed))
    return packed


def unpack(how: Quantisation, packed: bytearray, count: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.full((count,), 77.0, dtype=dtype)
    Quantiser(how, dtype, Scratch()).unpack(memoryview(packed).toreadonly(), memory(values))
    return values


def samples(dtype: torch.dtype, count: int, shape: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    values = SHAPES[shape](torch.randn(count, generator=generator)).to(dtype)
    if dtype is torch.float16:  # which has no numbers that huge; half a step more has to fit
        values = values.clamp(-60_000, 60_000)
    return values


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_off_by_half_a_step_at_most(how: Quantisation, dtype: torch.dtype) -> None:
    scratch = Scratch()
    for count, shape in product(COUNTS, SHAPES):
        if count > PIECE and shape != "normal":
            continue
        values = samples(dtype, count, shape)
        packed = pack(how, values, scratch)
        got, exact = unpack(how, packed, count, dtype).double(), values.double()
        lo, hi = exact.min().item(), exact.max().item()
        if how.scheme is Scheme.ZERO_POINT and lo != hi:
            lo, hi = min(lo, 0.0), max(hi, 0.0)
        largest, info = max(-lo, hi), torch.finfo(dtype)
        step = max((hi - lo) / how.steps, 2.0**-103)
        rounding = largest * (2.0**-20 + info.eps / 2) + info.tiny * info.eps / 2 + 2.0**-112
        worst = (got - exact).abs().max().item()
        assert worst <= step / 2 + rounding, (count, shape, worst, step)
        if count > 500 and shape == "normal":  # it is as coarse as that
            assert worst > step / 2.1
        if how.scheme is Scheme.ZERO_POINT and lo != hi:
            assert not got[exact == 0].any()


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_the_bytes_depend_on_the_values_only(how: Quantisation) -> None:
    used = Scratch()
    pack(how, samples(torch.float32, 3 * PIECE, "huge"), used)
    for dtype, count in product(QUANTISED, COUNTS):
        values = samples(dtype, count, "normal")
        packed = pack(how, values, used)
        assert packed == pack(how, values)
        assert len(packed) == how.packed_bytes(count) == 8 + math.ceil(count * how.bits / 8)
        # Wider values are the same values, and so are those that came out of a chunk.
        assert packed == pack(how, values.float())
        room = bytearray(b"\xa5" * (len(packed) + 100))
        Quantiser(how, dtype, used).pack(memory(values), memoryview(room)[: len(packed)])
        assert room == packed + b"\xa5" * 100


def test_the_bytes_are_those_of_the_format() -> None:
    whole = torch.arange(256.0)
    packed = pack(Quantisation(), whole - 3)
    assert packed == struct.pack("<ff", -3, 1) + bytes(range(256))
    packed = pack(Quantisation(Scheme.ZERO_POINT), whole - 3)
    assert packed == struct.pack("<ff", 3, 1) + bytes(range(256))
    packed = pack(Quantisation(bits=4), torch.arange(16.0)[1:])
    step = struct.unpack_from("<f", packed, 4)[0]
    assert step == pytest.approx(14 / 15)
    packed = pack(Quantisation(bits=4), torch.tensor([0.0, 1, 2, 3, 15]))
    assert packed == struct.pack("<ff", 0, 1) + bytes([0x30, 0xF1, 0x02])
    # A second piece begins with a byte of its own.
    packed = pack(Quantisation(bits=4), torch.tensor([0.0] * PIECE + [15.0, 7.0]))
    assert packed[8:] == bytes(PIECE // 2) + b"\x7f"


@pytest.mark.parametrize("scheme", Scheme)
def test_rounds_half_to_even(scheme: Scheme) -> None:
    values = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 254.5, 255.0])
    assert pack(Quantisation(scheme), values)[8:] == bytes([0, 0, 2, 2, 4, 254, 255])


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_zero_point_between_two_codes_makes_no_code_too_large(how: Quantisation) -> None:
    """Least and largest both half a step outside: 254.5 codes of it are above zero, for one."""
    for below in np.arange(0.5, how.steps, 1):
        values = torch.tensor([-below, 0.0, how.steps - below], dtype=torch.float32)
        got = unpack(how, pack(how, values), 3, torch.float32)
        assert (got - values).abs().max() <= 0.5
        assert how.scheme is Scheme.MIN_MAX or got[1] == 0


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_equal_values_are_exact(how: Quantisation, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    large = min(info.max, MAGNITUDE_MAX)
    for value in (0.0, -0.0, 1 / 3, -7.1, info.tiny, info.tiny * info.eps, large, -large):
        values = torch.full((1001,), value).to(dtype)
        assert torch.equal(unpack(how, pack(how, values), 1001, dtype), values), value
    zeros = torch.tensor([0.0, -0.0, 0.0], dtype=dtype)
    assert not unpack(how, pack(how, zeros), 3, dtype).signbit().any()
    assert pack(how, values[:0]) == b""
    assert not unpack(how, bytearray(), 0, dtype).numel()


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_what_is_not_finite_is_nan_everywhere(how: Quantisation, dtype: torch.dtype) -> None:
    bad = [math.nan, -math.nan, math.inf, -math.inf]
    if dtype is not torch.float16:
        bad += [2.1 * 2.0**126, -2.1 * 2.0**126]
    for value, count in (*product(bad, (1, 5)), (math.nan, PIECE + 9), (math.inf, PIECE + 9)):
        for place in {count // 2, count - 1}:
            values = samples(dtype, count, "normal")
            values[place] = value
            packed = pack(how, values)
            got = unpack(how, packed, count, dtype)
            # All are the one NaN that a processor's conversions do not change.
            assert bytes(memory(got)) == bytes(memory(torch.full((count,), math.nan, dtype=dtype)))
            # And so they stay, whatever is added on the way.
            quantiser = Quantiser(how, dtype, Scratch())
            sums = quantiser.unpack_add(memoryview(packed), memory(torch.ones_like(values)))
            onward = bytearray(len(packed))
            quantiser.pack_sums(sums, memoryview(onward))
            assert unpack(how, onward, count, dtype).isnan().all()
    both = torch.tensor([math.inf, -math.inf], dtype=dtype)
    assert unpack(how, pack(how, both), 2, dtype).isnan().all()


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_adds_in_float32(how: Quantisation, dtype: torch.dtype) -> None:
    for count in COUNTS:
        came, own = samples(torch.float32, count, "normal"), samples(dtype, count, "one is large")
        packed = pack(how, came)
        sums = Quantiser(how, dtype, Scratch()).unpack_add(memoryview(packed), memory(own))
        assert sums.dtype == np.float32
        wanted = unpack(how, packed, count, torch.float32) + own.float()
        assert torch.equal(torch.from_numpy(sums), wanted)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_processors_that_flush_subnormals_get_the_same_bits(how: Quantisation) -> None:
    generator = torch.Generator().manual_seed(1)
    for exponent in range(-149, -90, 3):
        values = torch.randn(200, generator=generator) * 2.0**exponent
        packed = pack(how, torch.cat([values, values[:7] * 100]))

        def bits(flush: bool, packed: bytearray = packed) -> bytes:
            torch.set_flush_denormal(flush)  # of this thread
            return bytes(memory(unpack(how, packed, 207, torch.float32)))

        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            assert one.submit(bits, True).result() == other.submit(bits, False).result()


def test_a_sum_that_is_too_large_is_not_finite() -> None:
    how = Quantisation()
    half = torch.full((100,), 65504.0, dtype=torch.float16)
    quantiser, packed = Quantiser(how, torch.float16, Scratch()), pack(how, half)
    sums = quantiser.unpack_add(memoryview(packed), memory(half))
    quantiser.pack_sums(sums, memoryview(packed))
    assert unpack(how, packed, 100, torch.float16).isposinf().all()
    assert (unpack(how, packed, 100, torch.float32) == 131008).all()  # what an average divides
    wide = torch.full((100,), 3e38)
    packed = pack(how, wide / 4)
    sums = Quantiser(how, torch.float32, Scratch()).unpack_add(memoryview(packed), memory(wide))
    quantiser.pack_sums(sums, memoryview(packed))
    assert unpack(how, packed, 100, torch.float32).isnan().all()


def test_what_can_not_be_quantised_is_refused() -> None:
    for bits in (0, 3, 16):
        with pytest.raises(UsageError, match=f"to 8 or 4 bits, not {bits}"):
            Quantisation(bits=bits)
    for dtype in (torch.float64, torch.int32, torch.bool):
        with pytest.raises(UsageError, match="can't be quantised; these can: float32, float16, bf"):
            Quantiser(Quantisation(), dtype, Scratch())


def test_the_bound_in_a_case_done_by_hand() -> None:
    ranges = [(-1.0, 1.0), (-2.0, 2.0), (-3.0, 3.0)]
    for bits, steps in ((8, 255), (4, 15)):
        how = Quantisation(Scheme.MIN_MAX, bits)
        first = 1 / steps  # half of 2 / steps
        second = first + (2 + first) / steps
        final = second + (3 + second) / steps
        assert error_bound(how, ranges, average=False) == pytest.approx(final, rel=1e-3)
        third = second / 3 + (3 + second) / 3 / steps
        assert error_bound(how, ranges, average=True) == pytest.approx(third, rel=1e-3)
    shifted = [(lo + 10, hi + 10) for lo, hi in ranges]
    zero = error_bound(Quantisation(Scheme.ZERO_POINT), shifted, average=False)
    assert zero == pytest.approx((11 + 12 + 13) / 255 / 2, rel=0.02)
    assert error_bound(how, ranges[:1], average=True) == 0
    assert error_bound(how, [(0, 9e37)] * 2, average=False) == math.inf
    assert error_bound(how, [(0, 1e38)] * 2, average=True) == math.inf  # the first can't be sent
    assert error_bound(how, [(0, 65000)] * 2, average=False, dtype=torch.float16) == math.inf
    exact = [(3.0, 3.0)] * 2
    assert 0 < error_bound(how, exact, average=False) < 1e-4
    assert error_bound(how, exact, average=False, dtype=torch.bfloat16) > 3 * 2.0**-9
