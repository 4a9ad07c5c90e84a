"""Messages as bytes: msgpack of ``[type name, fields]``, checked against the dataclass.

Nothing but a known dataclass with exactly its fields, each of its declared type, is let in.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from functools import cache
from typing import Any

import msgspec

from ftrain.comms.errors import LocalProtocolError, RemoteProtocolError
from ftrain.comms.fleet.protocol import messages as fleet_messages
from ftrain.comms.protocol import messages

_types: dict[str, type] = {}
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {}
_encoder = msgspec.msgpack.Encoder()
_envelope = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_plain = msgspec.msgpack.Decoder()

_SCALARS = (str, int, float, bytes, Enum)
# What msgspec raises on hostile input, found by fuzzing: bad UTF-8 is a UnicodeDecodeError, a map
# as a map's key a TypeError, a deep nest a RecursionError.
BAD_INPUT = (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError)


def register(*types: type) -> None:
    """Let these dataclasses travel. Their class names are their names on the wire.

    Raises :class:`LocalProtocolError` for a class that is no dataclass, or a name taken already.
    """
    for cls in types:
        if not dataclasses.is_dataclass(cls):
            raise LocalProtocolError(f"{cls.__name__} is not a dataclass and can't be a message")
        taken = _types.setdefault(cls.__name__, cls)
        if taken is not cls:
            raise LocalProtocolError(
                f"two messages are called {cls.__name__}: in {taken.__module__} and"
                f" {cls.__module__}"
            )


def encode(message: object) -> bytes:
    """The message's bytes; :class:`LocalProtocolError` for what is not a registered message."""
    cls = type(message)
    if _types.get(cls.__name__) is not cls:
        raise LocalProtocolError(f"{cls.__name__} is not registered as a message")
    try:
        return _encoder.encode((cls.__name__, message))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.EncodeError) as error:
        raise LocalProtocolError(f"a {cls.__name__} can't be encoded: {error}") from None


def decode(data: bytes | memoryview) -> Any:
    """The message in ``data``; :class:`RemoteProtocolError` unless it is exactly a known one."""
    try:
        name, fields = _envelope.decode(data)
        if name not in _types:
            raise RemoteProtocolError(f"unknown message {name[:80]!r}")
        message = _decoder(name).decode(fields)
        if not _same_shape(_plain.decode(fields), message):
            raise RemoteProtocolError(f"a {name} with missing or unknown fields")
    except BAD_INPUT as error:
        raise RemoteProtocolError(f"bytes that are no message: {str(error)[:200]}") from None
    return message


def _decoder(name: str) -> msgspec.msgpack.Decoder[Any]:
    # Built at first use: building resolves type hints, which costs up to a millisecond each.
    decoder = _decoders.get(name)
    if decoder is None:
        decoder = _decoders[name] = msgspec.msgpack.Decoder(_types[name], strict=True)
    return decoder


@cache
def _field_names(cls: type) -> tuple[str, ...] | None:
    if not dataclasses.is_dataclass(cls):
        return None
    return tuple(field.name for field in dataclasses.fields(cls))


def _same_shape(raw: Any, value: Any) -> bool:
    """Whether ``raw`` has exactly the fields of ``value``.

    msgspec passes over unknown fields of dataclasses, fills in missing ones, and lets any
    extension type into a field declared as ``object``; a peer of the same version sends neither.
    """
    if value is None or isinstance(value, _SCALARS):
        return True
    names = _field_names(value.__class__)
    if names is not None:
        return len(raw) == len(names) and all(
            name in raw and _same_shape(raw[name], getattr(value, name)) for name in names
        )
    if isinstance(value, (tuple, list, set, frozenset)):
        return len(raw) == len(value) and all(map(_same_shape, raw, value))
    if isinstance(value, dict):
        return len(raw) == len(value) and all(
            isinstance(key, (str, int)) and _same_shape(raw_item, item)
            for (key, item), raw_item in zip(value.items(), raw.values(), strict=True)
        )
    return False


register(
    *(
        cls
        for cls in (*vars(messages).values(), *vars(fleet_messages).values())
        if dataclasses.is_dataclass(cls) and isinstance(cls, type)
    )
)
