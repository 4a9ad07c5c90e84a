"""Messages as bytes: exact round trips, and nothing else let in."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
import pytest

from ftrain.comms import wire
from ftrain.comms.errors import LocalProtocolError, RemoteProtocolError
from ftrain.comms.protocol import messages
from ftrain.comms.protocol.messages import (
    Directive,
    Formation,
    Held,
    NodePlace,
    NodeReport,
    NodeState,
    Notice,
    Order,
    RankFailure,
    RestorePlan,
    Sealed,
    Share,
    StopRequest,
    VersionId,
)

HELD = Held(VersionId(2, 7), 1, "ab" * 16, (Share("0-3", 0, 1, 4), Share("1", 0, 0, 1)), True, 9)
REPORT = NodeReport(
    node=1,
    incarnation=2**62,
    sequence=3,
    epoch=2,
    state=NodeState.RUNNING,
    local_world=2,
    host="127.0.0.1",
    smp_address="127.0.0.1:1",
    held=(HELD, HELD),
    failures=(RankFailure(1, "signal", "SIGKILL", 12),),
    committed=VersionId(2, 6),
    boundaries=(7, 8),
    loss=float("inf"),
)
FORMATION = Formation(
    epoch=3,
    places=(NodePlace(0, 1, 0, 2, "h", "a"),),
    store_host="h",
    store_port=1,
    restore=RestorePlan("memory", VersionId(2, 7), sources=(0, 1)),
    restarts=1,
)
SAMPLES = [
    REPORT,
    Directive(3, Order.RUN, FORMATION),
    Directive(3, Order.WAIT),
    Sealed(VersionId(1, 1), 0, 1, (HELD,), (b"\0\xff" * 50,)),
    Notice("info", "text", {"a": 1, "b": [1.5, None, {"c": "d"}], "e": True, "f": b"x"}),
    StopRequest("SIGTERM"),
]


class Colour(Enum):
    RED = 1


@dataclass(frozen=True)
class WirePaint:
    colours: frozenset[int]
    names: dict[str, tuple[int, ...]]
    colour: Colour
    ratio: float


@dataclass(frozen=True)
class WireNothing:
    """A message that says all by its name."""


wire.register(WirePaint, WireNothing)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_messages_come_back_equal(message: object) -> None:
    data = wire.encode(message)
    assert wire.decode(data) == message
    assert wire.decode(memoryview(data)) == message


def test_sets_enums_and_mappings_travel() -> None:
    paint = WirePaint(frozenset({3, 1}), {"a": (1, 2)}, Colour.RED, 1)
    assert wire.decode(wire.encode(paint)) == paint


def test_a_message_may_have_no_fields() -> None:
    assert wire.decode(wire.encode(WireNothing())) == WireNothing()
    with pytest.raises(RemoteProtocolError, match="unknown fields"):
        wire.decode(with_fields("WireNothing", {"x": 1}))


def test_every_message_of_the_contract_is_registered() -> None:
    names = {name for name, cls in vars(messages).items() if dataclasses.is_dataclass(cls)}
    assert "NodeReport" in names
    assert names <= set(wire._types)


def test_only_registered_dataclasses_are_sent() -> None:
    @dataclass
    class Unknown:
        x: int

    class NodeReport:
        """The same name, another class."""

    for message in (Unknown(1), NodeReport(), 5, None, {"a": 1}):
        with pytest.raises(LocalProtocolError, match="not registered"):
            wire.encode(message)
    with pytest.raises(LocalProtocolError, match="two messages"):
        wire.register(dataclass(NodeReport))
    with pytest.raises(LocalProtocolError, match="not a dataclass"):
        wire.register(int)
    with pytest.raises(LocalProtocolError, match="can't be encoded"):
        wire.encode(Notice("a", "b", {"c": object()}))
    with pytest.raises(LocalProtocolError, match="can't be encoded"):
        wire.encode(Notice("a", "b", {"c": 2**70}))


def fields_of(message: Any) -> dict[str, Any]:
    return dict(msgspec.msgpack.decode(wire.encode(message))[1])


def with_fields(name: str, fields: object) -> bytes:
    return msgspec.msgpack.encode([name, fields])


def test_every_field_must_be_there_and_no_other() -> None:
    for message in SAMPLES:
        name, fields = type(message).__name__, fields_of(message)
        for key in fields:
            less = {k: v for k, v in fields.items() if k != key}
            with pytest.raises(RemoteProtocolError):
                wire.decode(with_fields(name, less))
        with pytest.raises(RemoteProtocolError, match="unknown fields"):
            wire.decode(with_fields(name, fields | {"extra": 1}))
    nested = fields_of(REPORT)
    nested["failures"][0]["extra"] = 1
    with pytest.raises(RemoteProtocolError):
        wire.decode(with_fields("NodeReport", nested))
    nested = fields_of(REPORT)
    del nested["phases"]["forked_ns"]
    with pytest.raises(RemoteProtocolError):
        wire.decode(with_fields("NodeReport", nested))


@pytest.mark.parametrize(
    "change",
    [
        {"node": "1"},
        {"node": 1.0},
        {"node": True},
        {"node": None},
        {"state": "flying"},
        {"held": {}},
        {"host": b"x"},
        {"boundaries": ["1"]},
        {"committed": [1, 2]},
    ],
)
def test_wrong_types_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode(with_fields("NodeReport", fields_of(REPORT) | change))


def nest(depth: int) -> bytes:
    head = msgspec.msgpack.encode(["Notice"])[1:]
    fields = msgspec.msgpack.encode({"kind": "a", "text": "b", "data": 0})[:-1]
    return b"\x92" + head + fields + b"\x81\xa1a" * depth + b"\x80"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x90",
        b"\xc1",
        msgspec.msgpack.encode(["Nobody", {}]),
        msgspec.msgpack.encode(["NodeReport"]),
        msgspec.msgpack.encode({"NodeReport": {}}),
        msgspec.msgpack.encode(["Notice", ["a", "b", {}]]),
        wire.encode(SAMPLES[0]) + b"\0",
        wire.encode(SAMPLES[0])[:-1],
        b"\x92\xa4\xff\xff\xff\xff\x80",  # a name that is not UTF-8
        with_fields(
            "Notice", {"kind": "a", "text": "b", "data": {"x": msgspec.msgpack.Ext(5, b"x")}}
        ),
        with_fields("Notice", {"kind": "a", "text": "b", "data": {1: 2}}),
        b"\x92\xa6Notice\xdf\xff\xff\xff\xff",  # four billion fields announced
        nest(600),
        nest(900),
        nest(10_000),
        nest(1_000_000),
    ],
    ids=range(17),
)
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode(data)


def test_mutated_messages_are_refused_or_valid() -> None:
    """Whatever a few changed bytes make of a message: a typed refusal, or a message whose own bytes
    decode to itself."""
    rng = random.Random(11)
    samples = [wire.encode(message) for message in SAMPLES]
    refused = 0
    for _ in range(30_000):
        data = bytearray(rng.choice(samples))
        for _ in range(rng.randint(1, 3)):
            where = rng.randrange(len(data))
            change = rng.random()
            if change < 0.6:
                data[where] = rng.randrange(256)
            elif change < 0.8:
                del data[where]
            else:
                data.insert(where, rng.randrange(256))
        try:
            message = wire.decode(bytes(data))
        except RemoteProtocolError:
            refused += 1
        else:
            again = wire.decode(wire.encode(message))
            assert repr(again) == repr(message)  # NaN is not equal to itself
    assert refused > 10_000


def test_random_bytes_are_refused() -> None:
    rng = random.Random(12)
    for _ in range(20_000):
        with pytest.raises(RemoteProtocolError):
            wire.decode(rng.randbytes(rng.randint(0, 60)))
