"""Hostile bytes on the port: garbage, floods, slowness. The server lives, its peers are served."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import socket
import struct
import time
from collections.abc import Awaitable, Callable

import pytest

from ftrain.comms import channel as module
from ftrain.comms.channel import Channel, Identity, Server, connect, serve
from ftrain.comms.errors import FtrainError, PeerLostError, ProtocolError
from ftrain.comms.protocol.handshake import NONCE_BYTES, ClientHandshake
from ftrain.comms.protocol.messages import Notice

SECRET = b"a secret of this test"
HOST = Identity("run", "coordinator", -1, 1)
GUEST = Identity("run", "agent", 0, 2)
MESSAGE = Notice("info", "text", {})


async def echo(channel: Channel) -> None:
    while True:
        await channel.send(await channel.receive())


def attack(body: Callable[[Server], Awaitable[None]]) -> None:
    """Run ``body`` against a server, then require that an honest peer is still served."""

    async def main() -> None:
        server = await serve("127.0.0.1:0", HOST, SECRET, echo)
        try:
            await body(server)
            async with await connect(server.address, GUEST, SECRET) as honest:
                await honest.send(MESSAGE)
                assert await honest.receive() == MESSAGE
        finally:
            server.close()
            await server.wait_closed()

    asyncio.run(main())


def dial(server: Server) -> socket.socket:
    host, port = server.address.split(":")
    sock = socket.create_connection((host, int(port)))
    sock.setblocking(False)
    return sock


async def read_all(sock: socket.socket) -> bytes:
    """Everything until the server closes; a reset is an end too."""
    data = b""
    try:
        while chunk := await asyncio.get_running_loop().sock_recv(sock, 65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def test_garbage_instead_of_a_greeting() -> None:
    rng = random.Random(1)

    async def body(server: Server) -> None:
        for _ in range(100):
            with dial(server) as sock:
                sock.send(rng.randbytes(rng.randint(20, 3000)))
                assert len(await read_all(sock)) < 100
        assert server.refused == 100

    attack(body)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"ftrain" + struct.pack("<HBH", 1, 1, 65535),
        b"ftrain" + struct.pack("<HBH", 1, 2, 32) + bytes(32),
        b"ftrain" + struct.pack("<HBH", 7, 1, 4) + b"\1\2\3\4",
    ],
    ids=["http", "oversized", "proof first", "newer version"],
)
def test_a_stranger_gets_one_short_refusal(request_bytes: bytes) -> None:
    async def body(server: Server) -> None:
        with dial(server) as sock:
            sock.send(request_bytes)
            answer = await read_all(sock)
        assert answer.startswith(b"ftrain")
        assert len(answer) == 12

    attack(body)


def test_a_silent_or_slow_stranger_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.2)

    async def body(server: Server) -> None:
        greeting = ClientHandshake(GUEST, SECRET, os.urandom(NONCE_BYTES)).start()
        started = time.monotonic()
        with dial(server) as silent, dial(server) as slow:
            ends = asyncio.gather(read_all(silent), read_all(slow))
            for byte in greeting:
                try:
                    slow.send(bytes([byte]))
                except OSError:
                    break
                await asyncio.sleep(0.01)
            await ends
        assert 0.15 < time.monotonic() - started < 1.5
        assert server.refused == 2

    attack(body)


def test_many_strangers_do_not_keep_an_honest_peer_out() -> None:
    async def body(server: Server) -> None:
        strangers = [dial(server) for _ in range(module.HANDSHAKES_MAX + 60)]
        try:
            started = time.monotonic()
            (await connect(server.address, GUEST, SECRET)).close()
            assert time.monotonic() - started < 1.0
            assert server.refused >= 60
        finally:
            for sock in strangers:
                sock.close()

    attack(body)


def test_garbage_after_the_handshake() -> None:
    rng = random.Random(2)

    async def body(server: Server) -> None:
        for round_ in range(60):
            channel = await connect(server.address, GUEST, SECRET)
            data = bytearray(rng.randbytes(rng.randint(40, 500)))
            if round_ % 3 == 0:  # an ordinary header with a wrong tag
                data[:24] = struct.pack("<IB3xQQ", len(data) - 40, 1, 0, 0)
            elif round_ % 3 == 1:  # a length far over the limit
                data[:24] = struct.pack("<IB3xQQ", 2**32 - 1, 1, 0, 0)
            channel._socket.send(data)
            channel._socket.shutdown(socket.SHUT_WR)
            with pytest.raises(PeerLostError):
                await channel.receive()

    attack(body)


def test_a_truncated_message_is_a_lost_peer() -> None:
    async def main() -> None:
        ends: list[Exception] = []

        async def handler(channel: Channel) -> None:
            try:
                await channel.receive()
            except FtrainError as error:
                ends.append(error)

        server = await serve("127.0.0.1:0", HOST, SECRET, handler)
        for keep in (1, 39, 40, 60):
            client = await connect(server.address, GUEST, SECRET)
            frame = client._sender.control(b"x" * 40)
            client._socket.send(frame[:keep])
            client.close()
        while len(ends) < 4:
            await asyncio.sleep(0.001)
        assert {type(error) for error in ends} == {PeerLostError}
        server.close()
        await server.wait_closed()

    asyncio.run(main())


async def relay(source: socket.socket, sink: socket.socket, flip: int, counts: list[int]) -> None:
    """Pass bytes on until the end, with bit ``flip`` of the stream changed; count the bytes."""
    loop, position = asyncio.get_running_loop(), 0
    try:
        while data := bytearray(await loop.sock_recv(source, 65536)):
            if position <= flip // 8 < position + len(data):
                data[flip // 8 - position] ^= 1 << flip % 8
            position += len(data)
            await loop.sock_sendall(sink, data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    finally:
        counts.append(position)


async def send_through_relay(server: Server, flip: int) -> int:
    """One connection and one message through a relay; how many bytes the client sent."""
    loop, counts = asyncio.get_running_loop(), list[int]()
    with socket.create_server(("127.0.0.1", 0)) as listener, dial(server) as inner:
        listener.setblocking(False)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        connecting = asyncio.ensure_future(connect(address, GUEST, SECRET, timeout_s=0.3))
        outer, _ = await loop.sock_accept(listener)
        with outer:
            there = asyncio.ensure_future(relay(outer, inner, flip, counts))
            back = asyncio.ensure_future(relay(inner, outer, -1, []))
            try:
                async with await connecting as channel:
                    await channel.send(MESSAGE)
                    await channel.finish(0.1)
            except (OSError, ProtocolError):
                pass
            there.cancel()
            back.cancel()
            await asyncio.wait([there, back])
    return counts[0]


def test_a_man_in_the_middle_changes_nothing_unnoticed() -> None:
    """A connection through a relay that flips any one bit ends with a typed error; no changed
    message is ever delivered."""
    rng = random.Random(3)
    delivered: list[object] = []

    async def handler(channel: Channel) -> None:
        while True:
            delivered.append(await channel.receive())

    async def main() -> None:
        server = await serve("127.0.0.1:0", HOST, SECRET, handler)
        try:
            sent_bytes = await send_through_relay(server, -1)
            assert delivered == [MESSAGE]
            for _ in range(40):
                await send_through_relay(server, rng.randrange(sent_bytes * 8))
            assert delivered == [MESSAGE]
        finally:
            server.close()
            await server.wait_closed()

    asyncio.run(main())


def test_running_out_of_descriptors_is_survived() -> None:
    async def body(server: Server) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        strangers = [socket.socket() for _ in range(4)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 5, before[1]))
        try:
            host, port = server.address.split(":")
            for sock in strangers:
                sock.connect((host, int(port)))
            await asyncio.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for sock in strangers:
                sock.close()

    attack(body)
