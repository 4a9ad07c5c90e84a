"""What strangers and broken members send to a fleet: recorded frames, changed at random."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash
from fleet_samples import SECRET

from ftrain.comms import wire
from ftrain.comms.addresses import parse_address
from ftrain.comms.channel_blocking import shake_hands
from ftrain.comms.errors import FtrainError
from ftrain.comms.fleet.protocol.messages import PeerStatus
from ftrain.comms.protocol.chunk_frames import Head, HeadSender, Word
from ftrain.comms.protocol.frames import FrameSender
from ftrain.comms.protocol.handshake import (
    NONCE_BYTES,
    Agreement,
    ClientHandshake,
    Identity,
    ServerHandshake,
)
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId

Dial = Callable[[], socket.socket]
HOSTILE_S = 5.0


def dial_tcp(address: str) -> socket.socket:
    return socket.create_connection(parse_address(address), HOSTILE_S)


def dial_unix(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(HOSTILE_S)
    while True:
        try:
            sock.connect("\0" + name)
            return sock
        except BlockingIOError:  # its queue is full
            time.sleep(0.001)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """The same with one to three things wrong."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed)) if changed else 0
        how = rng.randrange(6)
        if how == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[at:]  # truncated
        elif how == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 600))
        elif how == 3:
            changed[at : at + 4] = b"\xff\xff\xff\xff"  # a length far over the limit
        elif how == 4:
            changed += changed[at:]  # said twice
        else:
            del changed[at : at + rng.randint(1, 40)]
    return bytes(changed)


def recorded_session(who: Identity) -> bytes:
    """All that a client sent in a session that went well, with another server."""
    server = Identity(who.run_id, "rank", 0, 1)
    client_side = ClientHandshake(who, SECRET, os.urandom(NONCE_BYTES))
    server_side = ServerHandshake(server, SECRET, os.urandom(NONCE_BYTES))
    hello = client_side.start()
    proof = _feed(client_side, _feed(server_side, hello))
    _feed(client_side, _feed(server_side, proof))
    assert client_side.agreement is not None
    key = client_side.agreement.send_key
    place = Place(who.node, who.incarnation, "127.0.0.1:1", "", "")
    status = PeerStatus(who.node, who.incarnation, 1, place)
    frame = FrameSender(key, xxhash.xxh3_64_intdigest).control(wire.encode(status))
    join = HeadSender(key).seal(Head(Word.JOIN, OpId(0, 1), phase=1))
    return hello + proof + frame + join


def _feed(side: ClientHandshake | ServerHandshake, data: bytes) -> bytes:
    answer = b""
    while data:
        count = side.needed()
        answer, data = side.feed(data[:count]), data[count:]
    return answer


def strangers(rng: random.Random, dial: Dial, frames: int) -> None:
    """So many connections that never authenticate themselves."""
    who = Identity("run", "rank", 9, 1)
    session = recorded_session(who)
    for number in range(frames):
        with dial() as sock, suppress(OSError):
            if number % 10 == 0:  # replayed as it was: the nonce is another one
                sock.sendall(session)
                assert ended(sock), "a replayed session was let in"
            elif number % 10 == 1:
                _wrong_secret(sock, who)
            else:
                sock.sendall(mutate(rng, session if number % 2 else session[: len(session) // 3]))


def _wrong_secret(sock: socket.socket, who: Identity) -> None:
    handshake = ClientHandshake(who, b"another secret", os.urandom(NONCE_BYTES))
    with suppress(FtrainError):
        shake_hands(sock, handshake, time.monotonic() + HOSTILE_S)
        raise AssertionError("another secret was let in")


def ended(sock: socket.socket) -> bool:
    """Whether the other end closes, whatever it says before."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def known(sock: socket.socket, who: Identity) -> Agreement:
    """Authenticate, as somebody who holds the secret."""
    handshake = ClientHandshake(who, SECRET, os.urandom(NONCE_BYTES))
    agreement = shake_hands(sock, handshake, time.monotonic() + HOSTILE_S)
    sock.settimeout(HOSTILE_S)
    return agreement


def wrong_frames(rng: random.Random, dial: Dial, who: Identity, frames: int) -> None:
    """Authenticated connections, on each of which one control frame is wrong."""
    place = Place(who.node, who.incarnation, "127.0.0.1:1", "", "")
    payload = wire.encode(PeerStatus(who.node, who.incarnation, 1, place))
    for number in range(frames):
        with dial() as sock, suppress(OSError):
            key = known(sock, who).send_key
            right = FrameSender(key, xxhash.xxh3_64_intdigest)
            how = number % 4
            if how == 0:  # keyed by somebody else
                right = FrameSender(bytes(32), xxhash.xxh3_64_intdigest)
            elif how == 1:
                right.control(payload)  # one is left out
            body = mutate(rng, payload) if how == 2 else payload
            frame = right.control(body)
            sock.sendall(mutate(rng, frame) if how == 3 else frame)
            sock.shutdown(socket.SHUT_WR)
            assert ended(sock)


def wrong_joins(
    rng: random.Random, dial: Dial, who: Identity, joins: int, fds: Callable[[], Sequence[int]]
) -> None:
    """Authenticated connections to a peer that begin with a wrong word, or wrong descriptors."""
    for number in range(joins):
        with dial() as sock, suppress(OSError):
            sender = HeadSender(known(sock, who).send_key)
            word = rng.choice(list(Word)) if number % 3 else Word.JOIN
            epoch = rng.choice((0, 1, 2**31, 2**32 - 1))
            head = Head(word, OpId(0, epoch), 0, rng.randrange(2**32), rng.randrange(3))
            header = sender.seal(head)
            if number % 3 == 2:
                header = mutate(rng, header)
            passed = list(fds()) if sock.family == socket.AF_UNIX and rng.random() < 0.7 else []
            try:
                if passed and header:
                    socket.send_fds(sock, [header], passed)
                else:
                    sock.sendall(header)
            finally:
                for fd in passed:
                    os.close(fd)


def resources(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads and resident KiB of a process."""
    root = Path(f"/proc/{pid}")
    resident = (root / "statm").read_text().split()[1]
    descriptors, threads = len(list((root / "fd").iterdir())), len(list((root / "task").iterdir()))
    return descriptors, threads, int(resident) * 4
