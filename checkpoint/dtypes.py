"""Element types by their torch names, and their sizes: torch is not needed to read a file."""

from __future__ import annotations

from ftrain.comms.errors import StateError

ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "complex32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}


def item_bytes(dtype: str) -> int:
    """Bytes of one element; ``StateError`` for a type that versions can't hold."""
    size = ITEM_BYTES.get(dtype)
    if size is None:
        raise StateError(
            f"tensors of type {dtype!r} can't be saved: keep them as one of {', '.join(ITEM_BYTES)}"
        )
    return size
