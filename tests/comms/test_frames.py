"""Frames: what a stream lets through, and what it refuses."""

from __future__ import annotations

import random

import pytest
import xxhash

from ftrain.comms.errors import LocalProtocolError, RemoteProtocolError
from ftrain.comms.protocol.frames import (
    DATA_BYTES_MAX,
    HEADER_BYTES,
    ControlFrame,
    DataFrame,
    FrameReceiver,
    FrameSender,
)

KEY = b"k" * 32
checksum = xxhash.xxh3_64_intdigest


def feed(receiver: FrameReceiver, data: bytes, rng: random.Random | None = None) -> list[object]:
    """Hand ``data`` over in pieces of any size; the frames that came out."""
    frames: list[object] = []
    while data:
        room = receiver.next_buffer()
        count = min(len(room), len(data), rng.randint(1, 4096) if rng else len(data))
        room[:count] = data[:count]
        data = data[count:]
        frame = receiver.advance(count)
        if frame is not None:
            frames.append(frame)
    return frames


def both(**options: int) -> tuple[FrameSender, FrameReceiver]:
    return FrameSender(KEY, checksum, **options), FrameReceiver(KEY, checksum, **options)


def test_frames_arrive_whole_whatever_the_pieces() -> None:
    rng = random.Random(1)
    for _ in range(50):
        sender, receiver = both()
        sent = [rng.randbytes(rng.choice([0, 1, 39, 40, 41, 5000])) for _ in range(20)]
        stream = b"".join(sender.control(payload) for payload in sent)
        assert feed(receiver, stream, rng) == [ControlFrame(payload) for payload in sent]


def test_data_lands_in_the_expected_buffer() -> None:
    sender, receiver = both()
    data = random.Random(2).randbytes(DATA_BYTES_MAX + 12345)
    view = memoryview(data)
    first, rest = view[:DATA_BYTES_MAX], view[DATA_BYTES_MAX:]
    stream = sender.data(first) + bytes(first) + sender.control(b"between")
    stream += sender.data(rest) + bytes(rest)
    target = bytearray(len(data))
    receiver.expect_data(memoryview(target))
    frames = feed(receiver, stream, random.Random(3))
    assert frames == [DataFrame(len(first)), ControlFrame(b"between"), DataFrame(len(rest))]
    assert target == data


def test_a_repeated_or_missing_frame_is_refused() -> None:
    sender, receiver = both()
    one, two, three = (sender.control(bytes([n])) for n in range(3))
    assert feed(receiver, one) == [ControlFrame(b"\0")]
    with pytest.raises(RemoteProtocolError, match="frame 0 came in place of 1"):
        feed(receiver, one)
    _, receiver = both()
    feed(receiver, one)
    with pytest.raises(RemoteProtocolError, match="frame 2 came in place of 1"):
        feed(receiver, three)
    assert two


def test_another_key_is_refused() -> None:
    sender, _ = both()
    with pytest.raises(RemoteProtocolError, match="tag is wrong"):
        feed(FrameReceiver(b"x" * 32, checksum), sender.control(b"hello"))


def test_limits_hold_on_both_sides() -> None:
    sender, receiver = both(control_bytes_max=100)
    assert feed(receiver, sender.control(b"x" * 100)) == [ControlFrame(b"x" * 100)]
    with pytest.raises(LocalProtocolError, match="over the limit"):
        sender.control(b"x" * 101)
    generous = FrameSender(KEY, checksum)
    generous.control(b"")
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        feed(receiver, generous.control(b"x" * 101)[:HEADER_BYTES])
    for size in (0, DATA_BYTES_MAX + 1):
        with pytest.raises(LocalProtocolError):
            sender.data(memoryview(bytes(size)))


def test_data_is_refused_where_none_or_less_is_expected() -> None:
    payload = memoryview(b"x" * 100)
    for room in (None, memoryview(bytearray(99))):
        sender, receiver = both()
        receiver.expect_data(room)
        with pytest.raises(RemoteProtocolError):
            feed(receiver, sender.data(payload) + bytes(payload))


def test_every_flipped_bit_is_noticed() -> None:
    """No bit of a control or data frame can change unnoticed; nothing but the typed error."""
    payload = memoryview(b"some bytes of bulk data")
    for bulk in (False, True):
        sender, _ = both()
        stream = sender.data(payload) + bytes(payload) if bulk else sender.control(bytes(payload))
        for bit in range(len(stream) * 8):
            broken = bytearray(stream)
            broken[bit // 8] ^= 1 << bit % 8
            _, receiver = both()
            receiver.expect_data(memoryview(bytearray(len(payload))) if bulk else None)
            if bit // 8 < 4:  # a longer length may just wait for more
                broken += bytes(8 * 1024 * 1024) if bit // 8 < 3 else b""
            with pytest.raises(RemoteProtocolError):
                feed(receiver, bytes(broken))


def test_nothing_works_after_an_error() -> None:
    _, receiver = both()
    with pytest.raises(RemoteProtocolError):
        feed(receiver, bytes(HEADER_BYTES))
    with pytest.raises(LocalProtocolError):
        receiver.advance(1)


def test_random_bytes_give_only_the_typed_error() -> None:
    rng = random.Random(4)
    for _ in range(2000):
        _, receiver = both(control_bytes_max=1000)
        receiver.expect_data(memoryview(bytearray(1000)) if rng.random() < 0.5 else None)
        head = bytearray(rng.randbytes(2000))
        head[2:4] = bytes(2)
        head[4] = rng.choice([1, 2, head[4]])
        head[8:16] = bytes(8)
        with pytest.raises(RemoteProtocolError):
            feed(receiver, bytes(head), rng)
