"""Local sockets: messages with descriptors between processes of one host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftrain.comms.errors import (
    AuthenticationError,
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    RunDirectoryError,
)
from ftrain.comms.local import (
    DESCRIPTORS_MAX,
    MESSAGE_BYTES_MAX,
    PACKET_BYTES_MAX,
    PACKET_DESCRIPTORS_MAX,
    Enclosure,
    LocalSocket,
    accept_local,
    connect_local,
    from_descriptor,
    listen_local,
    pair,
)
from ftrain.comms.protocol.messages import Notice, StopRequest
from ftrain.comms.wire import encode

MESSAGE = Notice("info", "text", {"a": 1})


@pytest.fixture
def ends() -> Iterator[tuple[LocalSocket, LocalSocket]]:
    left, right = pair()
    with left, right:
        yield left, right


def raw(end: LocalSocket) -> socket.socket:
    """The plain socket below, to misbehave with."""
    return socket.socket(fileno=os.dup(end.fileno()))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_keep_their_boundaries(ends: tuple[LocalSocket, LocalSocket]) -> None:
    left, right = ends
    for number in range(50):
        left.send(StopRequest("x" * number))
    for number in range(50):
        assert right.receive() == (StopRequest("x" * number), [])


@pytest.mark.parametrize("count", [1, PACKET_DESCRIPTORS_MAX, PACKET_DESCRIPTORS_MAX + 1, 640])
def test_descriptors_travel_and_the_memory_is_shared(
    ends: tuple[LocalSocket, LocalSocket], count: int
) -> None:
    left, right = ends
    before = open_descriptors()
    fds = [os.memfd_create(f"slot{n}") for n in range(count)]
    left.send(MESSAGE, fds)
    left.send(MESSAGE)
    message, received = right.receive()
    assert message == MESSAGE
    assert len(received) == count
    for number, fd in enumerate(fds):
        os.write(fd, b"seen%d" % number)
        assert os.pread(received[number], 10, 0) == b"seen%d" % number
    assert not any(os.get_inheritable(fd) for fd in received)
    assert right.receive() == (MESSAGE, [])
    for fd in fds + received:
        os.close(fd)
    assert open_descriptors() == before


@pytest.mark.parametrize("nbytes", [PACKET_BYTES_MAX - 100, PACKET_BYTES_MAX, 10_000_000])
def test_large_messages_travel(ends: tuple[LocalSocket, LocalSocket], nbytes: int) -> None:
    left, right = ends
    before = open_descriptors()
    large = Notice("info", "x" * nbytes, {})
    fd = os.memfd_create("slot")
    left.send(large, [fd])
    message, received = right.receive()
    assert message == large
    for each in (fd, *received):
        os.close(each)
    assert len(received) == 1
    assert open_descriptors() == before


def test_too_large_messages_are_our_own_fault(ends: tuple[LocalSocket, LocalSocket]) -> None:
    left, _ = ends
    with pytest.raises(LocalProtocolError, match="use a memfd"):
        left.send(Notice("info", "x" * MESSAGE_BYTES_MAX, {}))
    with pytest.raises(LocalProtocolError, match="descriptors"):
        left.send(MESSAGE, [0] * (DESCRIPTORS_MAX + 1))


def test_a_large_message_that_is_not_read_is_not_sent_in_part(
    ends: tuple[LocalSocket, LocalSocket],
) -> None:
    left, right = ends
    left.settimeout(0)
    before = open_descriptors()
    fd = os.memfd_create("slot")
    sent = 0
    with pytest.raises(TimeoutError):  # noqa: PT012 - until it is full
        while True:
            left.send(MESSAGE, [fd] * 300)
            sent += 1
    for _ in range(sent):
        message, received = right.receive()
        assert (message, len(received)) == (MESSAGE, 300)
        for each in received:
            os.close(each)
    os.close(fd)
    right.settimeout(0)
    with pytest.raises(TimeoutError):
        right.receive()
    assert open_descriptors() == before


def test_enclosures_that_are_not_what_they_say_are_refused_and_closed(
    ends: tuple[LocalSocket, LocalSocket],
) -> None:
    left, right = ends
    before = open_descriptors()
    memory = os.memfd_create("bytes")
    os.write(memory, encode(MESSAGE))
    size = os.fstat(memory).st_size
    nested = os.memfd_create("nested")
    os.write(nested, encode(Enclosure(size, 0)))
    reading, writing = os.pipe()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    socket.send_fds(near, [b"."], [memory] * 9)
    lies: list[tuple[Enclosure, list[int]]] = [
        (Enclosure(size, 0), []),
        (Enclosure(size, 0), [memory, memory]),
        (Enclosure(size, 1), [memory]),
        (Enclosure(size, 1), [memory, memory]),
        (Enclosure(size, 5), [memory, far.fileno()]),
        (Enclosure(size, 5), [memory, far.fileno()]),  # its queue is empty by now
        (Enclosure(size + 1, 0), [memory]),
        (Enclosure(1 << 60, 0), [memory]),
        (Enclosure(size, 1 << 60), [memory, far.fileno()]),
        (Enclosure(-1, -1), [memory]),
        (Enclosure(0, 0), [reading]),
        (Enclosure(os.fstat(nested).st_size, 0), [nested]),
    ]
    for lie, fds in lies:
        left.send(lie, fds)
        with pytest.raises(RemoteProtocolError):
            right.receive()
    left.send(Enclosure(size, 0), [memory])
    assert right.receive() == (MESSAGE, [])
    near.close()
    far.close()
    for fd in (memory, nested, reading, writing):
        os.close(fd)
    assert open_descriptors() == before


def test_last_words_are_heard_although_the_peer_left_without_listening(
    ends: tuple[LocalSocket, LocalSocket],
) -> None:
    left, right = ends
    right.send(MESSAGE)  # never read: what makes the end a reset
    fd = os.memfd_create("slot")
    for number in range(3):
        left.send(StopRequest(str(number)), [fd])
    left.close()
    os.close(fd)
    for number in range(3):
        message, fds = right.receive()
        assert message == StopRequest(str(number))
        os.close(*fds)
    with pytest.raises(PeerLostError):
        right.receive()


@pytest.mark.parametrize("data", [b"garbage", b"\x92", b"x" * (PACKET_BYTES_MAX + 50)])
def test_garbage_is_refused_and_its_descriptors_are_closed(
    ends: tuple[LocalSocket, LocalSocket], data: bytes
) -> None:
    left, right = ends
    fd = os.memfd_create("unwanted")
    with raw(left) as plain:
        before = open_descriptors()
        socket.send_fds(plain, [data], [fd, fd, fd])
        with pytest.raises(RemoteProtocolError):
            right.receive()
        assert open_descriptors() == before
    os.close(fd)
    left.send(MESSAGE)  # the boundary was kept, so the connection is as good as before
    assert right.receive() == (MESSAGE, [])


def test_too_many_descriptors_are_refused_and_closed(
    ends: tuple[LocalSocket, LocalSocket],
) -> None:
    left, right = ends
    fd = os.memfd_create("unwanted")
    with raw(left) as plain:
        before = open_descriptors()
        socket.send_fds(plain, [b"x"], [fd] * 253)
        with pytest.raises(RemoteProtocolError):
            right.receive()
        assert open_descriptors() == before
    os.close(fd)


def test_timeouts_do_nothing_else(ends: tuple[LocalSocket, LocalSocket]) -> None:
    left, right = ends
    for timeout_s in (0, 0.01):
        left.settimeout(timeout_s)
        right.settimeout(timeout_s)
        with pytest.raises(TimeoutError, match="no message"):
            right.receive()
        sent = 0
        with pytest.raises(TimeoutError, match="does not read"):  # noqa: PT012 - until it is full
            while True:
                left.send(StopRequest(str(sent)))
                sent += 1
        assert sent > 5
        for number in range(sent):
            assert right.receive() == (StopRequest(str(number)), [])


def test_the_end_is_a_lost_peer(ends: tuple[LocalSocket, LocalSocket]) -> None:
    left, right = ends
    left.send(MESSAGE)
    left.close()
    assert right.receive() == (MESSAGE, [])
    for _ in range(2):
        with pytest.raises(PeerLostError):
            right.receive()
    with pytest.raises(PeerLostError):
        right.send(MESSAGE)
    with pytest.raises(PeerLostError):
        left.receive()
    assert left.fileno() == -1


def test_a_listening_path_is_private_and_can_be_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "smp.sock"
    with pytest.raises(PeerLostError, match=f"nobody listens at {path}"):
        connect_local(path, 1.0)
    listen_local(path).close()
    assert path.exists()
    with pytest.raises(PeerLostError):
        connect_local(path, 1.0)
    with listen_local(path) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        with connect_local(path, 1.0) as client, accept_local(listener) as server:
            client.send(MESSAGE)
            assert server.receive() == (MESSAGE, [])
            assert server.peer_pid == os.getpid()


def test_paths_may_be_longer_than_the_kernel_allows(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / ("e" * 100) / "smp.sock"
    path.parent.mkdir(parents=True)
    for _ in range(2):
        with (
            listen_local(path) as listener,
            connect_local(path, 1.0) as client,
            accept_local(listener) as server,
        ):
            server.send(MESSAGE)
            assert client.receive() == (MESSAGE, [])


def test_a_place_that_can_not_hold_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="No such file"):
        listen_local(tmp_path / "missing" / "smp.sock")
    occupied = tmp_path / "file"
    occupied.write_text("precious")
    with pytest.raises(RunDirectoryError, match="in use"):
        listen_local(occupied)
    assert occupied.read_text() == "precious"


def test_other_users_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel names the peer's user; here it is our idea of our own that differs."""
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with right:
        with pytest.raises(AuthenticationError, match="refused"):
            LocalSocket(left)
        assert left.fileno() == -1


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_another_users_process_is_refused(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(0o755)
    path = tmp_path / "open.sock"
    code = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.connect(sys.argv[1])\n"
        "sys.exit(0 if s.recv(100) == b'' else 1)\n"
    )
    with listen_local(path) as listener:
        path.chmod(0o777)
        with subprocess.Popen([sys.executable, "-I", "-c", code, path]) as stranger:
            with pytest.raises(AuthenticationError, match="user 65534"):
                accept_local(listener)
            assert stranger.wait(10) == 0


def test_an_end_is_handed_down_to_a_child(ends: tuple[LocalSocket, LocalSocket]) -> None:
    left, right = ends
    code = (
        "import os, sys\n"
        "from ftrain.comms.local import from_descriptor\n"
        "with from_descriptor(int(sys.argv[1])) as end:\n"
        "    message, fds = end.receive()\n"
        "    os.write(fds[0], message.text.encode())\n"
        "    end.send(message)\n"
        "    assert not os.get_inheritable(end.fileno())\n"
    )
    memory = os.memfd_create("shared")
    command = [sys.executable, "-W", "error", "-c", code, str(right.fileno())]
    with subprocess.Popen(command, pass_fds=[right.fileno()]) as child:
        right.close()
        left.send(MESSAGE, [memory])
        assert left.receive() == (MESSAGE, [])
        assert os.pread(memory, 10, 0) == b"text"
        with pytest.raises(PeerLostError):
            left.receive()
        assert child.wait(10) == 0
    os.close(memory)


def test_a_receiver_in_a_thread_is_woken(ends: tuple[LocalSocket, LocalSocket]) -> None:
    left, right = ends
    received: list[object] = []
    thread = threading.Thread(target=lambda: received.append(right.receive()))
    thread.start()
    left.send(MESSAGE)
    thread.join(5)
    assert received == [(MESSAGE, [])]


def test_a_detached_end_lives_on(ends: tuple[LocalSocket, LocalSocket]) -> None:
    left, right = ends
    with from_descriptor(left.detach()) as again:
        again.send(MESSAGE)
        assert right.receive() == (MESSAGE, [])
