"""Channels between real sockets: messages, bulk data, back-pressure, cancelling, closing."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ftrain.comms.channel import (
    QUEUED_BYTES_HIGH,
    QUEUED_BYTES_MAX,
    Channel,
    Identity,
    Server,
    connect,
    connect_blocking,
    serve,
)
from ftrain.comms.errors import (
    AuthenticationError,
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    UsageError,
)
from ftrain.comms.protocol.messages import Notice, StopRequest

SECRET = b"a secret of this test"
HOST = Identity("run", "coordinator", -1, 1)
GUEST = Identity("run", "agent", 0, 2)
Handler = Callable[[Channel], Awaitable[None]]


def notice(number: int, bytes_: int = 0) -> Notice:
    return Notice("info", "x" * bytes_, {"number": number})


@asynccontextmanager
async def served(handler: Handler, secret: bytes = SECRET) -> AsyncIterator[Server]:
    server = await serve("127.0.0.1:0", HOST, secret, handler)
    try:
        yield server
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Channel, Channel]]:
    """A client's and a server's end of one connection."""
    arrived: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def handler(channel: Channel) -> None:
        arrived.set_result(channel)
        await over.wait()

    async with served(handler) as server:
        async with await connect(server.address, GUEST, SECRET) as client:
            yield client, await arrived
        over.set()


async def echo(channel: Channel) -> None:
    while True:
        await channel.send(await channel.receive())


def test_messages_arrive_in_order_and_whole() -> None:
    async def main() -> None:
        async with connected() as (client, host):
            assert client.peer == HOST
            assert host.peer == GUEST
            sent = [notice(n, random.Random(n).randint(0, 3000)) for n in range(500)]
            for message in sent:
                client.post(message)
            assert [await host.receive() for _ in sent] == sent
            for message in sent:
                await host.send(message)
                assert await client.receive() == message

    asyncio.run(main())


def test_both_ends_have_nodelay_set() -> None:
    async def main() -> None:
        async with connected() as ends:
            for channel in ends:
                option = (socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert channel._socket.getsockopt(*option) == 1

    asyncio.run(main())


def test_bulk_data_goes_both_ways_at_once_with_messages_between() -> None:
    data = random.Random(1).randbytes(9 * 1024 * 1024 + 17)

    async def one(channel: Channel) -> list[object]:
        buffer = bytearray(len(data))
        sending = asyncio.ensure_future(channel.send_data(data))
        for number in range(10):
            await channel.send(notice(number))
        await channel.receive_data_into(buffer)
        await sending
        assert buffer == data
        return [await channel.receive() for _ in range(10)]

    async def main() -> None:
        async with connected() as ends:
            for messages in await asyncio.gather(*map(one, ends)):
                assert messages == [notice(number) for number in range(10)]
            # Nothing at all is a transfer too.
            await ends[0].send_data(b"")
            await ends[1].receive_data_into(bytearray())

    asyncio.run(main())


def test_sender_waits_for_a_slow_reader_and_loses_nothing() -> None:
    async def main() -> None:
        async with connected() as (client, host):
            sent = 0

            async def flood() -> None:
                nonlocal sent
                for number in range(300):
                    await client.send(notice(number, 100_000))
                    sent += 1

            flooding = asyncio.ensure_future(flood())
            while client.queued_bytes <= QUEUED_BYTES_HIGH:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert sent < 300
            assert client.queued_bytes < QUEUED_BYTES_HIGH + 2 * 100_100
            for number in range(300):
                assert (await host.receive()).data == {"number": number}
            await flooding
            assert client.queued_bytes == 0

    asyncio.run(main())


def test_post_gives_up_on_a_peer_that_never_reads() -> None:
    async def main() -> None:
        async with connected() as (client, _):
            while client.queued_bytes + 1_100_000 < QUEUED_BYTES_MAX:
                client.post(notice(0, 1_000_000))
            with pytest.raises(PeerLostError, match="does not read"):
                client.post(notice(1, 2_000_000))
            assert client.closed

    asyncio.run(main())


def test_cancelled_receives_lose_no_byte() -> None:
    rng = random.Random(5)

    async def main() -> None:
        async with connected() as (client, host):

            async def talk() -> None:
                for number in range(300):
                    await client.send(notice(number, rng.choice([0, 200_000])))
                    if rng.random() < 0.3:
                        await asyncio.sleep(0.0005)

            talking = asyncio.ensure_future(talk())
            number = 0
            cancelled = 0
            while number < 300:
                receiving = asyncio.ensure_future(host.receive())
                for _ in range(rng.randint(0, 3)):
                    await asyncio.sleep(0)
                receiving.cancel()
                try:
                    message = await receiving
                except asyncio.CancelledError:
                    cancelled += 1
                    continue
                assert message.data == {"number": number}
                number += 1
            await talking
            assert cancelled > 20

    asyncio.run(main())


def test_cancelled_sends_go_out_whole() -> None:
    async def main() -> None:
        async with connected() as (client, host):
            for number in range(100):
                sending = asyncio.ensure_future(client.send(notice(number, 100_000)))
                await asyncio.sleep(0)
                sending.cancel()
            for number in range(100):
                assert (await host.receive()).data == {"number": number}

    asyncio.run(main())


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_cancelled_bulk_transfer_closes_the_channel(side: str) -> None:
    async def main() -> None:
        async with connected() as (client, host):
            if side == "send":
                transfer = asyncio.ensure_future(client.send_data(bytes(64 * 1024 * 1024)))
            else:
                transfer = asyncio.ensure_future(client.receive_data_into(bytearray(10)))
            await asyncio.sleep(0.02)
            transfer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await transfer
            assert client.closed
            with pytest.raises((PeerLostError, RemoteProtocolError)):
                await host.receive()

    asyncio.run(main())


def test_closing_wakes_whoever_waits() -> None:
    async def main() -> None:
        async with connected() as (client, host):
            waiting = [
                asyncio.ensure_future(client.receive()),
                asyncio.ensure_future(client.send_data(bytes(64 * 1024 * 1024))),
                asyncio.ensure_future(host.receive_data_into(bytearray(1 << 27))),
            ]
            await asyncio.sleep(0.01)
            client.close()
            for task in waiting:
                with pytest.raises(PeerLostError):
                    await task
            client.close()
            for use in (client.send(notice(1)), client.receive(), client.send_data(b"x")):
                with pytest.raises(PeerLostError, match="closed here"):
                    await use
            with pytest.raises(PeerLostError):
                client.post(notice(1))

    asyncio.run(main())


def test_finish_lets_the_last_words_arrive() -> None:
    async def main() -> None:
        async with connected() as (client, host):
            for number in range(50):
                host.post(notice(number, 100_000))
            for _ in range(20):
                client.post(notice(0))  # unread by the host: closing over it would reset the stream
            finishing = asyncio.ensure_future(host.finish())
            for number in range(50):
                assert (await client.receive()).data == {"number": number}
            with pytest.raises(PeerLostError, match="closed the connection"):
                await client.receive()
            client.close()
            await finishing
            assert host.closed

    asyncio.run(main())


def test_misuse_is_our_own_fault() -> None:
    async def main() -> None:
        async with connected() as (client, host):
            receiving = asyncio.ensure_future(client.receive())
            await asyncio.sleep(0)
            with pytest.raises(LocalProtocolError, match="two tasks"):
                await client.receive()
            with pytest.raises(LocalProtocolError, match="not registered"):
                await host.send(object())
            with pytest.raises(LocalProtocolError, match="over the limit"):
                await host.send(notice(0, 9_000_000))
            await host.send(notice(3))  # none of which harmed the channel
            assert await receiving == notice(3)

    asyncio.run(main())


def test_data_where_a_message_is_expected_ends_the_channel() -> None:
    async def main() -> None:
        async with connected() as (client, host):
            await client.send_data(b"bulk")
            with pytest.raises(RemoteProtocolError, match="agent of node 0 broke the protocol"):
                await host.receive()
            with pytest.raises(PeerLostError):
                await client.receive()

    asyncio.run(main())


def test_connecting_to_nobody_says_where() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(PeerLostError, match=rf"{address}: can't connect: \w+"):
            await connect(address, GUEST, SECRET)
        with pytest.raises(UsageError, match="write host:port"):
            await connect("nowhere", GUEST, SECRET)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(PeerLostError, match=r"no answer within 0.1 s"):
                await connect(address, GUEST, SECRET, timeout_s=0.1)
            with pytest.raises(PeerLostError, match=r"no answer within 0.1 s"):
                await asyncio.to_thread(connect_blocking, address, GUEST, SECRET, timeout_s=0.1)

    asyncio.run(main())


@pytest.mark.parametrize("blocking", [False, True])
def test_strangers_are_refused_and_the_server_lives(blocking: bool) -> None:
    async def attempt(address: str, identity: Identity, secret: bytes) -> None:
        if blocking:
            await asyncio.to_thread(connect_blocking, address, identity, secret)
        else:
            await connect(address, identity, secret)

    async def main() -> None:
        async with served(echo) as server:
            with pytest.raises(AuthenticationError, match=f"{server.address}.*secret differs"):
                await attempt(server.address, GUEST, b"wrong")
            other = Identity("other", "agent", 0, 2)
            with pytest.raises(AuthenticationError, match="another run"):
                await attempt(server.address, other, SECRET)
            assert server.refused == 2
            async with await connect(server.address, GUEST, SECRET) as channel:
                await channel.send(notice(1))
                assert await channel.receive() == notice(1)

    asyncio.run(main())


def test_a_server_survives_its_handlers_and_reports_bugs() -> None:
    reports: list[str] = []

    async def handler(channel: Channel) -> None:
        message = await channel.receive()
        if isinstance(message, StopRequest):
            raise RuntimeError("a bug")
        raise PeerLostError("an ordinary end")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: reports.append(repr(context["exception"]))
        )
        async with served(handler) as server:
            for message in (notice(1), StopRequest("x"), notice(2)):
                async with await connect(server.address, GUEST, SECRET) as channel:
                    await channel.send(message)
                    with pytest.raises(PeerLostError):
                        await channel.receive()
        assert reports == ["RuntimeError('a bug')"]

    asyncio.run(main())


def test_a_server_takes_over_a_listening_socket() -> None:
    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        server = await serve(listener, HOST, SECRET, echo)
        assert server.address == f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"can't listen on {server.address}.*in use"):
            await serve(server.address, HOST, SECRET, echo)
        server.close()
        server.close()
        assert listener.fileno() == -1
        await server.wait_closed()

    asyncio.run(main())


def test_the_blocking_twin_talks_to_a_server() -> None:
    data = random.Random(2).randbytes(5 * 1024 * 1024 + 3)

    async def handler(channel: Channel) -> None:
        await channel.send(notice(1))
        buffer = bytearray(len(data))
        await channel.receive_data_into(buffer)
        channel.post(notice(2))
        await channel.send_data(buffer)
        await channel.finish()

    def rank(address: str) -> None:
        with connect_blocking(address, GUEST, SECRET, timeout_s=5) as channel:
            assert channel.peer == HOST
            assert channel.receive() == notice(1)
            channel.send_data(data)
            buffer = bytearray(len(data))
            channel.receive_into(buffer)
            assert buffer == data
            assert channel.receive() == notice(2)
            with pytest.raises(PeerLostError, match="closed the connection"):
                channel.receive()
            with pytest.raises(PeerLostError):
                channel.send(notice(3))

    async def main() -> None:
        async with served(handler) as server:
            await asyncio.to_thread(rank, server.address)

    asyncio.run(main())


def test_the_blocking_twin_gives_up_on_silence_and_on_garbage() -> None:
    async def silent(channel: Channel) -> None:
        await channel.receive()
        channel._socket.send(b"garbage" * 100)
        await channel.receive()

    def rank(address: str) -> None:
        with connect_blocking(address, GUEST, SECRET, timeout_s=2) as channel:
            channel.settimeout(0.05)
            with pytest.raises(PeerLostError, match=r"nothing moved for 0.05 s"):
                channel.receive()
        with connect_blocking(address, GUEST, SECRET, timeout_s=2) as channel:
            channel.send(notice(1))
            with pytest.raises(RemoteProtocolError, match="coordinator broke the protocol"):
                channel.receive()
            assert channel.fileno() == -1

    async def main() -> None:
        async with served(silent) as server:
            await asyncio.to_thread(rank, server.address)

    asyncio.run(main())
    assert threading.active_count() == 1


def test_a_flooding_peer_does_not_starve_the_loop() -> None:
    """Another task gets a turn at least every few messages, however fast they come."""

    async def main() -> None:
        async with connected() as (client, host):
            for number in range(2000):
                client.post(notice(number))
            await asyncio.sleep(0.02)
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.ensure_future(count())
            for _ in range(2000):
                await host.receive()
            counting.cancel()
            assert turns >= 2000 // 20

    asyncio.run(main())
