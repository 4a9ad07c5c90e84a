"""Small state: exact round trips, refusals that name the place, and no harm from garbage."""

from __future__ import annotations

import enum
import random
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from ftrain.checkpoint.codec import DEPTH_MAX, decode_tree, encode_tree
from ftrain.comms.errors import CorruptionError, StateError

Point = namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 1


@dataclass
class Record:
    value: int = 0


def same(left: Any, right: Any) -> bool:
    """Equal in value, type and bits, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, np.ndarray | np.generic):
        return bool(
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


NAN = struct.unpack("<d", b"\x01\x02\x03\x04\x05\x06\xf8\xff")[0]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63 - 1,
    -(2**63),
    2**64 - 1,
    2**64,
    -(2**63) - 1,
    7**400,
    -(7**400),
    128,
    255,
    -128,
    -129,
    0.0,
    -0.0,
    0.1,
    5e-324,
    float("inf"),
    -float("inf"),
    float("nan"),
    NAN,
    1 + 2j,
    complex(-0.0, NAN),
    "",
    "größer 🙂",
    "\udcff lone surrogate",
    b"",
    b"\0\xff",
    [],
    (),
    set(),
    frozenset(),
    {},
    [1, [2, (3, {4})], None],
    (1,),
    {1, 2.5, "a", (1, 2), frozenset({3})},
    {1: "int", "1": "str", (1, "x"): [], None: 0, 1.5: {}, b"k": {2: 3}, frozenset({1}): 4},
    OrderedDict([("b", 1), ("a", 2)]),
    Counter({10: 2, 20: 1}),
    np.float32(1.5),
    np.float64("nan"),
    np.int64(-5),
    np.bool_(True),
    np.complex64(1 - 1j),
    np.datetime64("2020-01-01T00:00:00", "ns"),
    np.array(3.5),
    np.arange(12, dtype=">i4").reshape(3, 4),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 3), dtype=np.uint8),
    np.array(["ab", "c"]),
    np.array([b"ab", b"c"]),
    np.random.RandomState(1).randint(0, 2**31, 624),
    torch.float32,
    torch.bfloat16,
    torch.device("cpu"),
    torch.device("cuda", 1),
    torch.Size([2, 3]),
    torch.Size([]),
    torch.tensor(2.5),
    torch.empty(0, 4),
    torch.arange(24).reshape(2, 3, 4)[:, ::2],
    torch.arange(6.0).reshape(2, 3).t(),
    torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16),
    torch.tensor([True, False]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}")
def test_values_come_back_bit_for_bit(value: object) -> None:
    assert same(decode_tree(encode_tree(value)), value)


def _dtypes() -> list[torch.dtype]:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted(found, key=str)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", _dtypes(), ids=str)
def test_tensors_of_every_type_come_back(dtype: torch.dtype) -> None:
    tensor = torch.arange(8 * dtype.itemsize, dtype=torch.uint8).view(dtype)
    assert same(decode_tree(encode_tree([tensor])), [tensor])


def test_what_comes_back_is_writable_and_apart() -> None:
    tensor, array = torch.zeros(4), np.zeros(4)
    back = decode_tree(encode_tree([tensor, tensor, array]))
    back[0][0] = 1
    back[2][0] = 1
    assert back[1][0] == tensor[0] == array[0] == 0


def test_parameters_views_and_conjugates_are_plain_tensors() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert same(decode_tree(encode_tree(parameter)), torch.ones(2))
    conjugate = torch.tensor([1 + 2j]).conj()
    assert same(decode_tree(encode_tree(conjugate)), torch.tensor([1 - 2j]))


def test_a_defaultdict_comes_back_as_dict() -> None:
    assert same(decode_tree(encode_tree(defaultdict(list, a=[1]))), {"a": [1]})


def test_states_of_real_objects() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedulers: list[Any] = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5]),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    generator = np.random.default_rng(3)
    states = [
        optimizer.state_dict(),
        *(scheduler.state_dict() for scheduler in schedulers),
        torch.amp.GradScaler("cpu").state_dict(),
        random.getstate(),
        np.random.get_state(),
        generator.bit_generator.state,
        torch.get_rng_state(),
    ]
    assert same(decode_tree(encode_tree(states)), states)


def test_random_trees() -> None:
    rng = random.Random(5)
    for _ in range(200):
        tree = _random_tree(rng, 5)
        assert same(decode_tree(encode_tree(tree)), tree)


def _random_tree(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind < 4:
        return rng.choice(VALUES)
    if kind == 4:
        return rng.getrandbits(rng.randrange(1, 200)) - rng.getrandbits(64)
    items = [_random_tree(rng, depth - 1) for _ in range(rng.randrange(5))]
    if kind == 5:
        return items
    if kind == 6:
        return tuple(items)
    return {rng.choice((i, str(i), (i, "k"))): item for i, item in enumerate(items)}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"groups": [{"lr": Colour.RED}]}, r"optimizer\.groups\[0\]\.lr is a .*Colour"),
        ({"a b": (1, {2: Record()})}, r"optimizer\['a b'\]\[1\]\[2\] is a .*Record"),
        ([Point(1, 2)], r"optimizer\[0\] is a .*Point"),
        ([1, len], r"optimizer\[1\] is a builtins\.builtin_function_or_method"),
        ([lambda: None], r"optimizer\[0\] is a builtins\.function"),
        ({Colour.RED: 1}, r"optimizer\[<Colour\.RED: 1>\] is a .*Colour"),
        (np.array([None]), "optimizer holds NumPy values of type object"),
        (np.zeros(2, dtype="i4,f4"), "optimizer holds NumPy values"),
        (np.dtype("f4"), "optimizer is a NumPy dtype"),
        (torch.zeros(2).to_sparse(), "optimizer is a sparse"),
        (torch.zeros(2, device="meta"), "optimizer is a .*meta tensor"),
        (bytearray(b"x"), "optimizer is a builtins.bytearray"),
        (torch.Generator(), "optimizer is a torch.*Generator"),
    ],
)
def test_what_can_not_be_saved_is_named(value: object, path: str) -> None:
    with pytest.raises(StateError, match=path):
        encode_tree(value, "optimizer")


def test_depth_is_limited() -> None:
    tree: list[Any] = []
    for _ in range(DEPTH_MAX - 1):
        tree = [tree]
    assert same(decode_tree(encode_tree(tree)), tree)
    with pytest.raises(StateError, match="deeper than"):
        encode_tree([tree])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(StateError, match="contains itself"):
        encode_tree(loop)


def test_garbage_is_refused_in_one_sentence() -> None:
    rng = random.Random(6)
    whole = encode_tree(VALUES)
    for _ in range(3000):
        damaged = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        for data in (bytes(damaged), whole[:8] + b"\x93" + rng.randbytes(rng.randrange(40))):
            try:
                decode_tree(data)  # may be right by chance
            except CorruptionError as error:
                assert "take another copy" in str(error)  # noqa: PT017
    for data in (b"", b"garbage", whole[:8], whole[:-1], whole + b"\0"):
        with pytest.raises(CorruptionError):
            decode_tree(data)


_BOMB = """
import resource, struct
from ftrain.checkpoint.codec import decode_tree, encode_tree
from ftrain.comms.errors import CorruptionError
magic = encode_tree(None)[:8]
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
count = struct.pack(">I", 500_000)
for bomb in (
    (b"\\xdd" + count) * 900 + bytes(500_000),
    b"\\xdd\\xff\\xff\\xff\\xff",
    b"\\xc6\\xff\\xff\\xff\\xff",
    b"\\x91" * 100_000,
    b"\\x94\\x14\\x91\\xcf\\x00\\x00\\x00\\xff\\x00\\x00\\x00\\x00\\xa3<f4\\xc4\\x00",
):
    try:
        decode_tree(magic + bomb)
    except CorruptionError:
        continue
    raise SystemExit("accepted")
status = open("/proc/self/status").read()
peak_kib = int(status.partition("VmHWM:")[2].split()[0])
raise SystemExit(0 if peak_kib < 100_000 else f"{peak_kib} KiB")
"""


def test_bombs_take_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _BOMB], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_WITHOUT_TORCH = """
import sys
import ftrain.checkpoint.codec as codec, ftrain.checkpoint.durable, ftrain.checkpoint.image
assert codec.decode_tree(codec.encode_tree({"a": (1, 2.5)})) == {"a": (1, 2.5)}
assert not {"torch", "numpy"} & set(sys.modules)
"""


def test_torch_and_numpy_are_imported_only_when_needed() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_TORCH], check=True)
