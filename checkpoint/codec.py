"""Small training state as bytes and back, without pickle.

A tree is made of None, bool, int of any size, float (bit for bit), complex, str, bytes, list,
tuple, set, frozenset, dict with any of these as keys, OrderedDict, Counter, defaultdict (comes back
as dict), NumPy scalars and arrays, torch tensors, dtypes, devices and sizes.  Types must match
exactly: a subclass, such as an enum or a named tuple, would come back as something else.  What is
shared or aliased comes back as copies; tensors come back on the CPU, without gradient.

Encoded as msgpack: plain values as themselves, everything else as an array that begins with a tag.
NumPy and torch are imported only when the tree holds something of theirs.
"""

from __future__ import annotations

import re
import struct
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable
from enum import IntEnum
from math import prod
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.msgpack import Ext

from ftrain.checkpoint.header import SMALL_BYTES_MAX
from ftrain.comms.errors import CorruptionError, StateError

if TYPE_CHECKING:
    import numpy as np
    import torch

DEPTH_MAX = 64
_MAGIC = b"FTTREE1\0"
_DIMENSIONS_MAX = 64
_NUMPY_DTYPE = re.compile(r"[<>|][biufcSUMm]\d{1,9}(\[\d{0,9}\w{1,2}\])?")


class _Tag(IntEnum):
    """First item of an encoded container; number of an extension type."""

    LIST = 0
    TUPLE = 1
    SET = 2
    FROZENSET = 3
    DICT = 4
    ORDERED_DICT = 5
    COUNTER = 6
    BIG_INT = 10  # Ext: little-endian two's complement
    COMPLEX = 11  # Ext: two float64
    SURROGATES = 12  # Ext: a str that UTF-8 refuses
    ARRAY = 20
    SCALAR = 21
    TENSOR = 30
    DTYPE = 31
    DEVICE = 32
    SIZE = 33


_SEQUENCES: dict[type, _Tag] = {
    list: _Tag.LIST,
    tuple: _Tag.TUPLE,
    set: _Tag.SET,
    frozenset: _Tag.FROZENSET,
}
_DICTS: dict[type, _Tag] = {
    dict: _Tag.DICT,
    defaultdict: _Tag.DICT,
    OrderedDict: _Tag.ORDERED_DICT,
    Counter: _Tag.COUNTER,
}
_VERBATIM = frozenset({type(None), bool, float, bytes})
_AS_THEY_ARE = _VERBATIM | {int, str}


class _RefusedError(Exception):
    """Why a value can't be encoded; ``steps`` grows towards the root on the way out."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[str] = []


def encode_tree(tree: object, name: str = "state") -> bytes:
    """``tree`` as bytes.

    Args:
        tree: what the module's first lines list.
        name: what errors call it, as in "optimizer.param_groups[0].lr".

    Raises:
        StateError: something else is in it, or it is deeper or larger than allowed.
    """
    try:
        encoded = _MAGIC + msgspec.msgpack.encode(_encode(tree, 0))
    except _RefusedError as refused:
        path = name + "".join(reversed(refused.steps))
        raise StateError(f"{path} {refused.reason}") from None
    if len(encoded) > SMALL_BYTES_MAX:
        raise StateError(
            f"{name} takes {len(encoded)} bytes, at most {SMALL_BYTES_MAX} can be saved this way: "
            "register large tensors as model or optimizer state"
        )
    return encoded


def decode_tree(data: bytes | memoryview) -> Any:
    """The tree that :func:`encode_tree` wrote; ``CorruptionError`` for anything else.

    Memory is bounded by a multiple of ``len(data)``, whatever the bytes say.
    """
    if bytes(data[: len(_MAGIC)]) != _MAGIC or len(data) > SMALL_BYTES_MAX:
        raise CorruptionError("these bytes are no training state: take another copy")
    body = memoryview(data)[len(_MAGIC) :]
    try:
        # Skips through everything without allocating: a length that lies is found out here.
        msgspec.msgpack.decode(body, type=msgspec.Raw)
        return _decode(msgspec.msgpack.decode(body), 0)
    except (
        msgspec.DecodeError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise CorruptionError(
            f"the training state is damaged ({error}): take another copy"
        ) from None


# ---- encoding


def _encode(value: Any, depth: int) -> object:
    kind = type(value)
    if kind in _VERBATIM:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else Ext(_Tag.BIG_INT.value, _int_bytes(value))
    if kind is str:
        return value if _is_utf8(value) else Ext(_Tag.SURROGATES.value, _surrogates(value))
    if kind is complex:
        return Ext(_Tag.COMPLEX.value, struct.pack("<dd", value.real, value.imag))
    if depth >= DEPTH_MAX:
        raise _RefusedError(f"is nested deeper than {DEPTH_MAX} levels, or contains itself")
    if (tag := _SEQUENCES.get(kind)) is not None:
        return _encode_sequence(tag, value, depth + 1)
    if (tag := _DICTS.get(kind)) is not None:
        return _encode_dict(tag, value, depth + 1)
    # A value can only be theirs when the module is imported already.
    if "numpy" in sys.modules and (encoded := _encode_numpy(value)) is not None:
        return encoded
    if "torch" in sys.modules and (encoded := _encode_torch(value)) is not None:
        return encoded
    raise _RefusedError(
        f"is a {kind.__module__}.{kind.__qualname__}, which can't be saved: keep plain values, "
        "arrays and tensors in the state"
    )


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _surrogates(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _int_bytes(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


def _encode_sequence(tag: _Tag, items: Collection[Any], depth: int) -> list[object]:
    encoded: list[object] = [tag.value]
    kinds = set(map(type, items))
    if kinds <= _VERBATIM or (  # long lists of plain values, at C speed
        kinds == {int} and min(items) >= -(2**63) and max(items) < 2**64
    ):
        encoded.extend(items)
        return encoded
    for index, item in enumerate(items):
        try:
            encoded.append(_encode(item, depth))
        except _RefusedError as refused:
            refused.steps.append(f"[{index}]")
            raise
    return encoded


def _encode_dict(tag: _Tag, items: dict[Any, Any], depth: int) -> list[object]:
    encoded: list[object] = [tag.value]
    for key, value in items.items():
        try:
            encoded += (_encode(key, depth), _encode(value, depth))
        except _RefusedError as refused:
            plain = type(key) is str and key.isidentifier()
            refused.steps.append(f".{key}" if plain else f"[{repr(key)[:80]}]")
            raise
    return encoded


def _encode_numpy(value: Any) -> list[object] | None:
    import numpy as np

    if type(value) is np.ndarray:
        array, head = np.ascontiguousarray(value), [_Tag.ARRAY.value, list(value.shape)]
    elif isinstance(value, np.generic):
        array, head = np.asarray(value), [_Tag.SCALAR.value, []]
    elif isinstance(value, np.dtype):
        raise _RefusedError("is a NumPy dtype, which can't be saved: keep its name instead")
    else:
        return None
    dtype = array.dtype.str
    if not _NUMPY_DTYPE.fullmatch(dtype) or not array.itemsize:
        raise _RefusedError(f"holds NumPy values of type {array.dtype}, which can't be saved")
    return [*head, dtype, array.tobytes()]


def _encode_torch(value: Any) -> list[object] | None:
    import torch

    if isinstance(value, torch.Tensor):
        return _encode_tensor(value)
    if type(value) is torch.dtype:
        return [_Tag.DTYPE.value, str(value).removeprefix("torch.")]
    if type(value) is torch.device:
        return [_Tag.DEVICE.value, str(value)]
    if type(value) is torch.Size:
        return [_Tag.SIZE.value, *value]
    return None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is just numbers in memory: not sparse, nested, quantized or without any."""
    import torch

    odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return tensor.layout is torch.strided and not odd


def _encode_tensor(tensor: torch.Tensor) -> list[object]:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise _RefusedError(
            f"is a tensor of class {type(tensor).__qualname__}, which can't be saved: "
            "save its local tensor"
        )
    if not is_plain(tensor):
        raise _RefusedError("is a sparse, nested, quantized or meta tensor, which can't be saved")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype == "uint8" and tensor.is_cpu and tensor.is_contiguous():  # generators' state: often
        return [_Tag.TENSOR.value, list(tensor.shape), dtype, tensor.numpy().data]
    # A view of all bytes in order; a copy where the tensor is not contiguous or not on the CPU.
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    try:
        data = plain.view(torch.uint8).numpy().data if plain.numel() else b""
    except RuntimeError as error:
        raise _RefusedError(f"is a {tensor.dtype} tensor, which can't be saved: {error}") from None
    return [_Tag.TENSOR.value, list(tensor.shape), dtype, data]


# ---- decoding


def _decode(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is Ext:
        return _EXTENSIONS[value.code](value.data)
    if kind is not list or not value or depth > DEPTH_MAX:
        raise ValueError("impossible structure")
    tag, *items = value
    make = _CONTAINERS.get(tag)
    if make is None:
        return _LEAVES[tag](*items)
    if set(map(type, items)) <= _AS_THEY_ARE:
        return make(items)
    return make(_decode(item, depth + 1) for item in items)


def _decode_dict(items: Iterable[Any]) -> dict[Any, Any]:
    flat = list(items)
    decoded = dict(zip(flat[::2], flat[1::2], strict=True))
    if 2 * len(decoded) != len(flat):
        raise ValueError("a key comes twice")
    return decoded


def _decode_complex(data: bytes) -> complex:
    return complex(*struct.unpack("<dd", data))


def _checked_shape(shape: Any, itemsize: int, data: Any) -> tuple[int, ...]:
    """``shape`` when it is one and describes exactly ``data``; ``ValueError``."""
    if type(shape) is not list or type(data) is not bytes or len(shape) > _DIMENSIONS_MAX:
        raise ValueError("impossible array")
    if any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
        raise ValueError("impossible shape")
    if prod(shape) * itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for shape {shape}")
    return tuple(shape)


def _decode_array(shape: Any, name: str, data: Any) -> np.ndarray[Any, Any]:
    import numpy as np

    if not _NUMPY_DTYPE.fullmatch(name):
        raise ValueError(f"dtype {name[:80]!r}")
    dtype = np.dtype(name)
    size = _checked_shape(shape, dtype.itemsize, data)
    return np.ndarray(size, dtype, buffer=bytearray(data))


def _decode_scalar(shape: Any, name: str, data: Any) -> Any:
    array = _decode_array(shape, name, data)
    if array.ndim:
        raise ValueError("a scalar with a shape")
    return array[()]


def _decode_dtype(name: str) -> torch.dtype:
    import torch

    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name[:80]!r}")
    return dtype


def _decode_tensor(shape: Any, name: str, data: Any) -> torch.Tensor:
    import torch

    dtype = _decode_dtype(name)
    size = _checked_shape(shape, dtype.itemsize, data)
    if not data:
        return torch.empty(size, dtype=dtype)
    owned = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()
    return owned.view(dtype).reshape(size)


def _decode_device(name: str) -> torch.device:
    import torch

    return torch.device(name)


def _decode_size(*sizes: int) -> torch.Size:
    import torch

    return torch.Size(sizes)


_EXTENSIONS: dict[int, Callable[[Any], Any]] = {
    _Tag.BIG_INT: lambda data: int.from_bytes(data, "little", signed=True),
    _Tag.COMPLEX: _decode_complex,
    _Tag.SURROGATES: lambda data: bytes(data).decode("utf-8", "surrogatepass"),
}
_CONTAINERS: dict[Any, Callable[[Iterable[Any]], Any]] = {
    _Tag.LIST: list,
    _Tag.TUPLE: tuple,
    _Tag.SET: set,
    _Tag.FROZENSET: frozenset,
    _Tag.DICT: _decode_dict,
    _Tag.ORDERED_DICT: lambda items: OrderedDict(_decode_dict(items)),
    _Tag.COUNTER: lambda items: Counter(_decode_dict(items)),
}
_LEAVES: dict[Any, Callable[..., Any]] = {
    _Tag.ARRAY: _decode_array,
    _Tag.SCALAR: _decode_scalar,
    _Tag.TENSOR: _decode_tensor,
    _Tag.DTYPE: _decode_dtype,
    _Tag.DEVICE: _decode_device,
    _Tag.SIZE: _decode_size,
}
