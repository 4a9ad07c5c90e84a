"""Where the ranks of a ring meet: each connects to its right neighbour and is found by its left.

Neighbours on one host share memory, others talk over TCP.  Every connection begins with the
challenge of :mod:`ftrain.comms.protocol.handshake`; what does not pass it is closed.
"""

from __future__ import annotations

import array
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ftrain.comms.addresses import bound_address, listen_tcp, parse_address, tune
from ftrain.comms.bulk import limit_window
from ftrain.comms.channel_blocking import shake_hands
from ftrain.comms.collectives.lanes import InLane, OutLane
from ftrain.comms.collectives.ring import Ring
from ftrain.comms.collectives.shared_lane import SharedIn, SharedOut
from ftrain.comms.collectives.stream_lane import StreamIn, StreamOut
from ftrain.comms.errors import FtrainError, PeerLostError, RemoteProtocolError
from ftrain.comms.protocol.chunk_frames import HEADER_BYTES, Head, HeadReceiver, Word
from ftrain.comms.protocol.handshake import (
    NONCE_BYTES,
    Agreement,
    ClientHandshake,
    Identity,
    ServerHandshake,
)

_GREETING_S = 2.0  # for a stranger
_STRANGERS_MAX = 64
_SHARED = 1  # phase of a JOIN whose lane is memory
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is found.

    ``host`` is equal for ranks that can share memory; ``local`` is an abstract unix socket there.
    """

    node: int
    incarnation: int
    address: str  # host:port
    host: str
    local: str


@dataclass(frozen=True, slots=True)
class RingSettings:
    """Equal on all ranks of a ring."""

    chunk_bytes: int = 1024 * 1024
    starts: int = 3  # chunks of its own that a rank has in the ring
    connections: int = 1  # to a neighbour on another host
    share_memory: bool = True


class Meeting:
    """One rank's place to meet others, for one ring after the other.

    Args:
        identity: this rank's.
        bind: host to listen on; any free port.
    """

    def __init__(self, identity: Identity, secret: bytes, bind: str = "127.0.0.1") -> None:
        self._identity = identity
        self._secret = secret
        self._listener = listen_tcp(f"{bind}:0")
        name = f"ftrain-{os.getpid()}-{secrets.token_hex(8)}"
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind("\0" + name)
        self._unix.listen(16)
        self.place = Place(
            identity.node, identity.incarnation, bound_address(self._listener), _host(), name
        )
        self._changed = threading.Condition()
        self._arrived: dict[tuple[int, int], tuple[Head, Agreement, socket.socket, int]] = {}
        self._epoch = 0  # newest ring: what comes for older ones is closed
        self._closed = False
        self._strangers = threading.Semaphore(_STRANGERS_MAX)
        self._threads = [
            threading.Thread(target=self._accept, args=(one,), name="ftrain-meet", daemon=True)
            for one in (self._listener, self._unix)
        ]
        for thread in self._threads:
            thread.start()

    def join(
        self, epoch: int, places: Sequence[Place], settings: RingSettings, *, timeout_s: float
    ) -> Ring:
        """The ring of ``places``, in this order; this rank's own is among them.

        Raises PeerLostError for a neighbour that is not there in time.
        """
        rank, ranks = places.index(self.place), len(places)
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._epoch = max(self._epoch, epoch)
            for old in [key for key in self._arrived if key[0] < epoch]:
                _discard(*self._arrived.pop(old)[2:])
        options = {"chunk_bytes": settings.chunk_bytes, "starts": settings.starts}
        if ranks == 1:
            return Ring(rank, ranks, [], [], **options)
        right, left = places[(rank + 1) % ranks], places[(rank - 1) % ranks]
        lanes_out: list[OutLane] = []
        lanes_in: list[InLane] = []
        try:
            lanes_out.extend(
                self._reach(right, epoch, lane, settings, deadline_s)
                for lane in range(self._lanes(right, settings))
            )
            lanes_in.extend(
                self._found(left, epoch, lane, settings, deadline_s)
                for lane in range(self._lanes(left, settings))
            )
        except FtrainError:
            for lane_out in lanes_out:
                lane_out.close()
            for lane_in in lanes_in:
                lane_in.close()
            raise
        return Ring(rank, ranks, lanes_in, lanes_out, **options)

    def close(self) -> None:
        """Be found no more; rings go on."""
        with self._changed:
            self._closed = True
            for entry in self._arrived.values():
                _discard(*entry[2:])
            self._arrived.clear()
        for listener in (self._listener, self._unix):
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------ the right neighbour

    def _lanes(self, neighbour: Place, settings: RingSettings) -> int:
        return 1 if self._shares(neighbour, settings) else settings.connections

    def _shares(self, neighbour: Place, settings: RingSettings) -> bool:
        return settings.share_memory and neighbour.host == self.place.host

    def _reach(
        self, right: Place, epoch: int, lane: int, settings: RingSettings, deadline_s: float
    ) -> OutLane:
        shares = self._shares(right, settings)
        sock = _connect(right, shares, deadline_s)
        try:
            handshake = ClientHandshake(
                self._identity, self._secret, secrets.token_bytes(NONCE_BYTES)
            )
            agreement = shake_hands(sock, handshake, deadline_s)
            _expect(agreement.peer, right)
            sock.setblocking(True)
            slots = settings.starts + 1
            join = Head(Word.JOIN, epoch, lane, phase=_SHARED if shares else 0)
            if not shares:
                limit_window(sock, socket.SO_SNDBUF)
                out = StreamOut(
                    sock, agreement.send_key, str(agreement.peer), slots, settings.chunk_bytes
                )
                out.say(join)
                return out
            fd = _memory(slots * settings.chunk_bytes)
            return SharedOut(
                sock,
                agreement.send_key,
                str(agreement.peer),
                fd,
                slots,
                settings.chunk_bytes,
                join,
            )
        except OSError as error:
            sock.close()
            raise PeerLostError(f"{right.address}: can't connect: {error.strerror}") from None
        except FtrainError:
            sock.close()
            raise

    # ------------------------------------------------------------ the left neighbour

    def _found(
        self, left: Place, epoch: int, lane: int, settings: RingSettings, deadline_s: float
    ) -> InLane:
        with self._changed:
            while (epoch, lane) not in self._arrived and not self._closed:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise PeerLostError(f"node {left.node} did not come in time")
                self._changed.wait(left_s)
            if self._closed:
                raise PeerLostError("the meeting was closed here")
            head, agreement, sock, fd = self._arrived.pop((epoch, lane))
        peer, key = str(agreement.peer), agreement.receive_key
        try:
            _expect(agreement.peer, left)
            if head.phase != _SHARED:
                limit_window(sock, socket.SO_RCVBUF)
                return StreamIn(sock, key, peer, settings.chunk_bytes, frames=1)
            slots = settings.starts + 1
            if fd < 0 or os.fstat(fd).st_size != slots * settings.chunk_bytes:
                raise RemoteProtocolError(f"{peer} shares other memory than was agreed on")
            return SharedIn(sock, key, peer, fd, slots, settings.chunk_bytes, frames=1)
        except FtrainError:
            _discard(sock, fd)
            raise

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                sock, _ = listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError:
                if self._closed or listener.fileno() < 0:
                    return
                time.sleep(0.05)  # no descriptors left: the kernel keeps the connection meanwhile
                continue
            self._strangers.acquire()
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        fds: list[int] = []
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            handshake = ServerHandshake(self._identity, self._secret, nonce)
            agreement = shake_hands(sock, handshake, time.monotonic() + _GREETING_S)
            sock.settimeout(_GREETING_S)
            header, fds = _receive_header(sock)
            sock.setblocking(True)
            if sock.family != socket.AF_UNIX:
                tune(sock)
            head = HeadReceiver(agreement.receive_key).open(header)
            shared = head.phase == _SHARED
            if head.word is not Word.JOIN or len(fds) != shared or not _sealed(fds):
                raise RemoteProtocolError("a lane begins with JOIN")
            with self._changed:
                key = (head.operation, head.number)
                if self._closed or head.operation < self._epoch or key in self._arrived:
                    raise RemoteProtocolError("it is of no ring here")
                self._arrived[key] = (head, agreement, sock, fds.pop() if shared else -1)
                self._changed.notify_all()
        except (FtrainError, OSError):
            sock.close()
        finally:
            for fd in fds:
                os.close(fd)
            self._strangers.release()


def _connect(right: Place, shares: bool, deadline_s: float) -> socket.socket:
    left_s = max(0.001, deadline_s - time.monotonic())
    try:
        if not shares:
            sock = socket.create_connection(parse_address(right.address), left_s)
            tune(sock)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(left_s)
            sock.connect("\0" + right.local)
        except OSError:
            sock.close()
            raise
        return sock
    except OSError as error:
        where = f"node {right.node} ({right.local if shares else right.address})"
        why = error.strerror or "no answer in time"
        raise PeerLostError(f"{where}: can't connect: {why}") from None


def _expect(peer: Identity, place: Place) -> None:
    if (peer.node, peer.incarnation) != (place.node, place.incarnation):
        raise PeerLostError(
            f"{peer} (incarnation {peer.incarnation}) answered for node {place.node} "
            f"(incarnation {place.incarnation}), which is gone"
        )


def _memory(nbytes: int) -> int:
    fd = os.memfd_create("ftrain-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def _sealed(fds: Sequence[int]) -> bool:
    """Whether the memory can't be cut off under us, which would kill this process."""
    try:
        return all(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS for fd in fds)
    except OSError:
        return False


def _receive_header(sock: socket.socket) -> tuple[bytes, list[int]]:
    """A header and the descriptors that came with it."""
    fds = array.array("i")
    data, notes, _, _ = sock.recvmsg(HEADER_BYTES, socket.CMSG_SPACE(2 * fds.itemsize))
    for level, kind, value in notes:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
    while len(data) < HEADER_BYTES:
        more = sock.recv(HEADER_BYTES - len(data))
        if not more:
            break
        data += more
    if len(data) < HEADER_BYTES:
        for fd in fds:
            os.close(fd)
        raise PeerLostError("it closed the connection")
    return data, list(fds)


def _discard(sock: socket.socket, fd: int) -> None:
    sock.close()
    if fd >= 0:
        os.close(fd)


def _host() -> str:
    """Equal for processes that see each other's abstract sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"
