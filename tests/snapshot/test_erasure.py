"""The erasure code beside reedsolo's, and every engine beside the arithmetic of field.py."""

from __future__ import annotations

import random
import threading
from itertools import combinations

import pytest
import reedsolo

from ftrain.comms.errors import StateError
from ftrain.snapshot.erasure import engines
from ftrain.snapshot.erasure.code import ErasureCode
from ftrain.snapshot.erasure.engines import Engine
from ftrain.snapshot.erasure.field import dot, inverse, inverted, multiply, product

CODES = [ErasureCode(data, parity) for data in range(1, 9) for parity in range(4)]


def every_engine() -> list[Engine]:
    best = engines.engine().engine
    return [best, engines.Numpy(), engines.Reedsolo()]


def encoded(engine: Engine, code: ErasureCode, chunks: list[bytes]) -> list[bytearray]:
    """The parity, of chunks that may be shorter than the longest."""
    longest = max(map(len, chunks))
    found = []
    for row in code.parity_rows:
        parity = bytearray(longest)
        for factor, chunk in zip(row, chunks, strict=True):
            engine.add(factor, memoryview(chunk), memoryview(parity))
        found.append(parity)
    return found


def test_the_field_is_one() -> None:
    for a in range(1, 256):
        assert multiply(a, inverse(a)) == 1
        assert reedsolo.gf_inverse(a) == inverse(a)
    draw = random.Random(1)
    for _ in range(500):
        a, b, c = (draw.randrange(256) for _ in range(3))
        assert multiply(a, b ^ c) == multiply(a, b) ^ multiply(a, c)
        assert multiply(a, multiply(b, c)) == multiply(multiply(a, b), c)
        assert multiply(a, b) == reedsolo.gf_mul(a, b)
    with pytest.raises(ZeroDivisionError, match="no inverse"):
        inverse(0)
    with pytest.raises(ZeroDivisionError, match="singular"):
        inverted([(1, 2), (1, 2)])


@pytest.mark.parametrize("code", CODES, ids=str)
def test_parity_is_reedsolos_and_any_loss_is_made_good(code: ErasureCode) -> None:
    draw = random.Random(code.chunks)
    data = [draw.randrange(256) for _ in range(code.data)]
    parity = [dot(row, data) for row in code.parity_rows]
    if code.parity:
        codec = reedsolo.RSCodec(code.parity, nsize=code.chunks)
        assert bytes(data + parity) == codec.encode(bytes(data))
    whole = data + parity
    for count in range(code.parity + 1):
        for lost in combinations(range(code.chunks), count):
            present = [number for number in range(code.chunks) if number not in lost]
            rows = code.recovery_rows(lost, present)
            used = [whole[number] for number in present[: code.data]]
            assert [dot(row, used) for row in rows] == [whole[number] for number in lost]


def test_one_parity_chunk_is_the_exclusive_or() -> None:
    assert all(ErasureCode(data, 1).parity_rows == ((1,) * data,) for data in range(1, 255))
    unit = tuple(tuple(int(i == j) for j in range(9)) for i in range(9))
    matrix = ErasureCode(9, 9).parity_rows
    assert product(matrix, inverted(matrix)) == unit


def test_impossible_codes_and_losses_are_refused() -> None:
    for data, parity in ((0, 1), (1, -1), (200, 56)):
        with pytest.raises(StateError, match="is impossible"):
            ErasureCode(data, parity)
    code = ErasureCode(3, 2)
    for lost, present in (((0, 1, 2), (3, 4)), ((0,), (1, 2, 7)), ((9,), (0, 1, 2))):
        with pytest.raises(StateError, match="a stripe that needs 3"):
            code.recovery_rows(lost, present)


@pytest.mark.parametrize("engine", every_engine(), ids=lambda engine: engine.name.split()[0])
def test_chunks_of_unequal_length_come_back_as_reedsolo_says(engine: Engine) -> None:
    draw = random.Random(2)
    for _ in range(30):
        code = ErasureCode(draw.randrange(1, 8), draw.randrange(1, 4))
        chunks = [draw.randbytes(draw.choice((0, 1, 17, 63, 200))) for _ in range(code.data)]
        chunks[draw.randrange(code.data)] = draw.randbytes(200)
        parity = encoded(engine, code, chunks)
        padded = [chunk.ljust(200, b"\0") for chunk in chunks]
        codec = reedsolo.RSCodec(code.parity, nsize=code.chunks)
        columns = [bytes(column) for column in zip(*padded, strict=True)]
        assert list(zip(*parity, strict=True)) == [
            tuple(codec.encode(c)[code.data :]) for c in columns
        ]
        whole = [*padded, *map(bytes, parity)]
        lost = draw.sample(range(code.chunks), draw.randint(1, code.parity))
        present = sorted(set(range(code.chunks)) - set(lost))
        for number, row in zip(lost, code.recovery_rows(lost, present), strict=True):
            rebuilt = bytearray(200)
            for factor, source in zip(row, present, strict=False):
                engine.add(factor, memoryview(whole[source]), memoryview(rebuilt))
            assert rebuilt == whole[number]


@pytest.mark.parametrize("engine", every_engine(), ids=lambda engine: engine.name.split()[0])
def test_an_engine_refuses_what_does_not_fit(engine: Engine) -> None:
    with pytest.raises(StateError, match="5 bytes can't be added to 4 writable ones"):
        engine.add(1, memoryview(bytes(5)), memoryview(bytearray(4)))
    with pytest.raises(StateError, match="read-only"):
        engine.add(1, memoryview(bytes(4)), memoryview(bytes(4)))


def test_the_fastest_engine_works_in_several_threads() -> None:
    engine = engines.engine().engine
    source, target = random.Random(3).randbytes(1 << 20), bytearray(1 << 20)
    parts = [slice(at, at + (1 << 18)) for at in range(0, 1 << 20, 1 << 18)]

    def work(part: slice) -> None:
        for _ in range(3):
            engine.add(29, memoryview(source)[part], memoryview(target)[part])

    threads = [threading.Thread(target=work, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once = bytearray(1 << 20)
    engines.Numpy().add(29, memoryview(source), memoryview(once))
    assert target == once  # added twice it is nothing


class Wrong:
    """Computes rightly but for one factor."""

    name = "wrong"

    def add(self, factor: int, source: memoryview, target: memoryview) -> None:
        engines.Numpy().add(factor if factor != 200 else 201, source, target)


def test_an_engine_that_computes_wrongly_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [
        ("gone", lambda: engines.Isal("libgone.so")),
        ("other", lambda: engines.Isal("libc.so.6")),
        ("wrong", Wrong),
        ("NumPy", engines.Numpy),
    ]
    monkeypatch.setattr(engines, "_candidates", lambda: iter(candidates))
    choice = engines.engine.__wrapped__()
    assert choice.engine.name == "NumPy"
    gone, other, wrong = choice.refused
    assert gone.startswith("gone: libgone.so: cannot open shared object")
    assert "undefined symbol: ec_encode_data_update" in other
    assert wrong.endswith("by 200 wrongly")
    monkeypatch.setattr(engines, "_candidates", lambda: iter([("wrong", Wrong)]))
    with pytest.raises(StateError, match="no engine for erasure coding computes rightly: wrong"):
        engines.engine.__wrapped__()
