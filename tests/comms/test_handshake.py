"""The challenge: who gets in, and who can't by any trick."""

from __future__ import annotations

import random
import struct

import pytest

from ftrain.comms.errors import (
    AuthenticationError,
    FtrainError,
    LocalProtocolError,
    RemoteProtocolError,
)
from ftrain.comms.protocol import handshake as module
from ftrain.comms.protocol.handshake import (
    NONCE_BYTES,
    ClientHandshake,
    Handshake,
    Identity,
    ServerHandshake,
)

SECRET = b"the job secret"
AGENT = Identity("run", "agent", 3, 77)
COORDINATOR = Identity("run", "coordinator", -1, 5)
rng = random.Random(7)


def nonce() -> bytes:
    return rng.randbytes(NONCE_BYTES)


def client(identity: Identity = AGENT, secret: bytes = SECRET) -> ClientHandshake:
    return ClientHandshake(identity, secret, nonce())


def server(identity: Identity = COORDINATOR, secret: bytes = SECRET) -> ServerHandshake:
    return ServerHandshake(identity, secret, nonce())


def give(side: Handshake, data: bytes, pieces: random.Random | None = None) -> bytes:
    """Feed ``data`` as a socket would; what the side answers. Bytes after the end are dropped."""
    answer = b""
    while data and side.needed():
        count = min(side.needed(), len(data))
        if pieces:
            count = pieces.randint(1, count)
        answer += side.feed(data[:count])
        data = data[count:]
    return answer


def converse(left: Handshake, right: Handshake, pieces: random.Random | None = None) -> list[bytes]:
    """Let both talk until nobody has anything to say; the messages, in turn."""
    spoken = []
    data = left.start()
    speaker, listener = left, right
    while data:
        spoken.append(data)
        data = give(listener, data, pieces)
        speaker, listener = listener, speaker
    return spoken


def test_both_agree_on_peers_and_keys() -> None:
    for pieces in (None, random.Random(1)):
        one, two = client(), server()
        assert len(converse(one, two, pieces)) == 4
        assert one.agreement is not None
        assert two.agreement is not None
        assert one.agreement.peer == COORDINATOR
        assert two.agreement.peer == AGENT
        assert one.agreement.send_key == two.agreement.receive_key
        assert one.agreement.receive_key == two.agreement.send_key
        assert one.agreement.send_key != one.agreement.receive_key


def test_every_session_has_its_own_keys() -> None:
    keys = set()
    for _ in range(20):
        one, two = client(), server()
        converse(one, two)
        assert one.agreement is not None
        keys |= {one.agreement.send_key, one.agreement.receive_key}
    assert len(keys) == 40


@pytest.mark.parametrize(
    ("guest", "ours", "theirs"),
    [
        (client(secret=b"wrong"), "does not hold the job secret", "the job secret differs"),
        (client(Identity("other", "agent", 3, 77)), "belongs to run 'other'", "another run"),
    ],
)
def test_strangers_are_refused_in_plain_words(guest: Handshake, ours: str, theirs: str) -> None:
    host = server()
    converse(guest, host)
    assert guest.agreement is None
    assert host.agreement is None
    assert isinstance(host.error, AuthenticationError)
    assert ours in str(host.error)
    assert isinstance(guest.error, AuthenticationError)
    assert theirs in str(guest.error)


def test_another_protocol_version_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    host = server()
    monkeypatch.setattr(module, "PROTOCOL_VERSION", 9)
    guest = client()
    greeting = guest.start()
    monkeypatch.undo()
    refusal = give(host, greeting)
    assert "speaks protocol version 9, not 2" in str(host.error)
    give(guest, refusal)
    assert "install the same ftrain" in str(guest.error)


def test_a_server_without_the_secret_is_refused() -> None:
    guest, host = client(), server(secret=b"wrong")
    hello = give(host, guest.start())
    give(guest, hello)
    # The false server has seen the client's proof; it can do no better than guess its own.
    for proof in (rng.randbytes(32), bytes(32)):
        guest = client()
        give(guest, give(server(secret=b"wrong"), guest.start()))
        give(guest, module._message(module._PROOF, proof))
        assert guest.agreement is None
        assert "does not hold the job secret" in str(guest.error)


def test_reflection_is_refused() -> None:
    """A side's own words, sent back to it, get nobody in."""
    guest = client()
    give(guest, guest.start())
    assert "our own greeting back" in str(guest.error)
    # The client's own proof in place of the server's.
    guest, host = client(), server()
    proof = give(guest, give(host, guest.start()))
    give(guest, proof)
    assert guest.agreement is None
    assert isinstance(guest.error, AuthenticationError)
    # A server's greeting as the greeting of a client of the same server, and its proof, obtained
    # through an honest client, as the proof of that client.
    honest, host, second = client(), server(), server()
    server_hello = give(host, honest.start())
    server_proof = give(host, give(honest, server_hello))
    give(second, server_hello)
    give(second, server_proof)
    assert second.agreement is None
    assert isinstance(second.error, AuthenticationError)


def test_a_recorded_conversation_can_not_be_replayed() -> None:
    one, two = client(), server()
    spoken = converse(one, two)
    replayed = server()
    give(replayed, spoken[0])
    give(replayed, spoken[2])
    assert replayed.agreement is None
    assert isinstance(replayed.error, AuthenticationError)
    victim = client()
    give(victim, spoken[1])
    give(victim, spoken[3])
    assert victim.agreement is None


def test_every_flipped_bit_of_the_conversation_breaks_it() -> None:
    lengths = [len(data) for data in converse(client(), server())]
    for turn, length in enumerate(lengths):
        for bit in range(length * 8):
            one, two = client(), server()
            sides: list[Handshake] = [one, two]
            data = one.start()
            for now in range(4):
                if now == turn:
                    broken = bytearray(data)
                    broken[bit // 8] ^= 1 << bit % 8
                    data = bytes(broken)
                data = give(sides[(now + 1) % 2], data)
            # The last word is the server's: a client that can't read it does not go on.
            assert one.agreement is None
            assert turn == 3 or two.agreement is None


def test_random_bytes_do_nothing_but_fail() -> None:
    noise = random.Random(8)
    outcomes = set()
    for _ in range(5000):
        side: Handshake = noise.choice([client, server])()
        data = noise.randbytes(noise.randint(1, 700))
        if noise.random() < 0.8:
            size = noise.choice([0, 1, 32, 60, 512, 513])
            head = struct.pack("<6sHBH", b"ftrain", 1, noise.randint(0, 4), size)
            data = head + data
        answer = give(side, data, noise)
        assert side.agreement is None
        assert len(answer) <= 200
        assert side.error is None or isinstance(side.error, FtrainError)
        outcomes.add(type(side.error))
    assert {RemoteProtocolError, AuthenticationError, type(None)} == outcomes


def test_a_refusal_of_unknown_kind_is_still_a_refusal() -> None:
    for body in (b"", b"\xff", b"\x03 and words"):
        guest = client()
        give(guest, module._message(module._REFUSED, body))
        assert isinstance(guest.error, AuthenticationError)


def test_misuse_is_our_own_fault() -> None:
    for bad in (("", "agent", 0, 0), ("r", "", 0, 0), ("r", "a", 2**31, 0), ("x" * 300, "a", 0, 0)):
        with pytest.raises(LocalProtocolError):
            Identity(*bad)
    with pytest.raises(LocalProtocolError):
        ClientHandshake(AGENT, b"", nonce())
    with pytest.raises(LocalProtocolError):
        ClientHandshake(AGENT, SECRET, b"short")
    with pytest.raises(LocalProtocolError):
        client().feed(b"x" * 1000)
