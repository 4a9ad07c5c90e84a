"""Bulk data that a thread sends, beside messages and cancellations of the loop."""

from __future__ import annotations

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from ftrain.comms.addresses import listen_tcp
from ftrain.comms.bulk import WINDOW_BYTES
from ftrain.comms.channel import Channel, Identity, connect, connect_blocking, serve
from ftrain.comms.errors import PeerLostError
from ftrain.comms.protocol.frames import DATA_BYTES_MAX
from ftrain.comms.protocol.messages import StopRequest

SECRET = bytes(32)
SIZES = (1, 1 << 20, 3 * (1 << 20) + 17)


async def pair(handler: object) -> tuple[Channel, object]:
    listener = listen_tcp("127.0.0.1:0")
    server = await serve(listener, Identity("r", "smp", 0, 1), SECRET, handler)  # type: ignore[arg-type]
    channel = await connect(server.address, Identity("r", "smp", 1, 1), SECRET)
    return channel, server


def test_messages_that_are_sent_meanwhile_follow_behind() -> None:
    data = [memoryview(os.urandom(size)) for size in SIZES]

    async def run() -> None:
        pool = ThreadPoolExecutor(1)

        async def handler(channel: Channel) -> None:
            await channel.receive()
            bulk = asyncio.create_task(channel.send_data_by(pool, data))
            await asyncio.sleep(0.05)  # the pipe is full: the thread is in the middle
            channel.post(StopRequest("posted"))
            await channel.send(StopRequest("sent"))
            await bulk
            await channel.send(StopRequest("behind"))
            await channel.receive()

        channel, server = await pair(handler)
        await channel.send(StopRequest("go"))
        await asyncio.sleep(0.1)
        for view in data:
            room = bytearray(len(view))
            await channel.receive_data_into(room)
            assert room == view
        assert [(await channel.receive()).cause for _ in range(3)] == ["posted", "sent", "behind"]
        channel.close()
        server.close()  # type: ignore[attr-defined]

    asyncio.run(run())


def test_a_cancelled_transfer_ends_the_channel_and_the_thread() -> None:
    async def run() -> None:
        pool = ThreadPoolExecutor(1)
        seen: list[BaseException] = []

        async def handler(channel: Channel) -> None:
            await channel.receive()
            bulk = asyncio.create_task(channel.send_data_by(pool, [memoryview(bytes(1 << 26))]))
            await asyncio.sleep(0.1)
            bulk.cancel()
            try:
                await bulk
            except asyncio.CancelledError as error:
                seen.append(error)
            assert channel.closed

        channel, server = await pair(handler)
        await channel.send(StopRequest("go"))
        await asyncio.sleep(0.3)  # the pipe stays full until then
        with pytest.raises(PeerLostError):
            await channel.receive_data_into(bytearray(1 << 26))
        server.close()  # type: ignore[attr-defined]
        await asyncio.wait_for(asyncio.to_thread(pool.shutdown), 5)
        assert seen

    asyncio.run(run())


def test_a_peer_that_goes_is_said() -> None:
    async def run() -> None:
        pool = ThreadPoolExecutor(1)
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def handler(channel: Channel) -> None:
            await channel.receive()
            try:
                await channel.send_data_by(pool, [memoryview(bytes(1 << 26))])
            except PeerLostError as error:
                over.set_result(str(error))
                raise

        channel, server = await pair(handler)
        await channel.send(StopRequest("go"))
        await channel.receive_data_into(bytearray(DATA_BYTES_MAX))
        channel.close()
        assert "lost smp of node 1" in await asyncio.wait_for(over, 5)
        server.close()  # type: ignore[attr-defined]

    asyncio.run(run())


def buffer_bytes(channel: object, option: int) -> int:
    return channel._socket.getsockopt(socket.SOL_SOCKET, option)  # type: ignore[attr-defined,no-any-return]


def test_little_queues_up_on_a_line_as_short_as_loopback() -> None:
    async def run() -> None:
        pool = ThreadPoolExecutor(1)
        data = memoryview(os.urandom(5 << 20))
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def handler(channel: Channel) -> None:
            await channel.receive()
            await channel.send_data_by(pool, [data])
            seen.set_result(buffer_bytes(channel, socket.SO_SNDBUF))
            await channel.receive()

        listener = listen_tcp("127.0.0.1:0")
        server = await serve(listener, Identity("r", "smp", 0, 1), SECRET, handler)

        def ask() -> bytearray:
            who = Identity("r", "smp", 1, 1)
            with connect_blocking(server.address, who, SECRET) as channel:
                assert buffer_bytes(channel, socket.SO_RCVBUF) <= 2 * WINDOW_BYTES
                channel.send(StopRequest("go"))
                room = bytearray(len(data))
                channel.receive_into(room)
                return room

        assert await asyncio.to_thread(ask) == data
        assert await seen <= 2 * WINDOW_BYTES  # Linux doubles what is asked for
        server.close()

    asyncio.run(run())


def test_a_slow_peer_is_waited_for_and_a_silent_one_is_not() -> None:
    """The limit is for silence, however long a frame takes."""

    async def run() -> None:
        async def handler(channel: Channel) -> None:
            await channel.receive()
            data = memoryview(os.urandom(400))
            stream = channel._sender.data(data) + bytes(data)
            for start in range(0, len(stream) - 40, 40):
                channel._socket.send(stream[start : start + 40])
                await asyncio.sleep(0.05)
            await channel.receive()  # the last bytes never come

        listener = listen_tcp("127.0.0.1:0")
        server = await serve(listener, Identity("r", "smp", 0, 1), SECRET, handler)

        def ask() -> bytearray:
            who = Identity("r", "smp", 1, 1)
            room = bytearray(400)
            with connect_blocking(server.address, who, SECRET) as channel:
                channel.settimeout(0.2)
                channel.send(StopRequest("go"))
                with pytest.raises(PeerLostError, match=r"nothing moved for 0\.2 s"):
                    channel.receive_into(room)
            return room

        room = await asyncio.to_thread(ask)
        assert any(room[340:360])  # what came slowly was taken
        assert not any(room[360:])
        server.close()

    asyncio.run(run())
