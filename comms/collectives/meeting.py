"""Where the ranks of a ring meet: each connects to its right neighbour and is found by its left.

Neighbours on one host share memory, others talk over TCP.  Every connection begins with the
challenge of :mod:`ftrain.comms.protocol.handshake`; what does not pass it is closed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ftrain.comms.addresses import format_address, listen_tcp, parse_address, tune
from ftrain.comms.bulk import limit_window
from ftrain.comms.channel_blocking import shake_hands
from ftrain.comms.collectives.lanes import InLane, OutLane, garbled
from ftrain.comms.collectives.ring import Ring
from ftrain.comms.collectives.shared_lane import SharedIn, SharedOut
from ftrain.comms.collectives.stream_lane import StreamIn, StreamOut
from ftrain.comms.errors import (
    FtrainError,
    MemoryShortError,
    PeerLostError,
    RemoteProtocolError,
    UsageError,
)
from ftrain.comms.protocol.chunk_frames import (
    CHUNK_BYTES_MAX,
    HEADER_BYTES,
    Head,
    HeadReceiver,
    Word,
)
from ftrain.comms.protocol.handshake import (
    NONCE_BYTES,
    Agreement,
    ClientHandshake,
    Identity,
    ServerHandshake,
)
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import OpId

_GREETING_S = 2.0  # for a stranger
_STRANGERS_MAX = 64  # of each listener; the oldest is dropped for a newer one
_ARRIVED_MAX = 256  # lanes that nobody has asked for yet; the same for them
_ARRIVED_FEW = 16  # more than a change needs: then those that have hung up are dropped
_BACKLOG = 256
_PAUSE_S = 0.02
_SHARED = 1  # phase of a JOIN whose lane is memory
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class RingSettings:
    """Equal on all ranks of a ring. Raises UsageError for what can't work."""

    chunk_bytes: int = 1024 * 1024
    starts: int = 3  # chunks of its own that a rank has in the ring
    connections: int = 1  # to a neighbour on another host
    share_memory: bool = True

    def __post_init__(self) -> None:
        if not 64 <= self.chunk_bytes <= CHUNK_BYTES_MAX:
            raise UsageError(f"a chunk has 64 to {CHUNK_BYTES_MAX} bytes, not {self.chunk_bytes}")
        if not (1 <= self.starts <= 64 and 1 <= self.connections <= 64):
            raise UsageError("starts and connections are numbers from 1 to 64")


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A lane that a left neighbour opened."""

    agreement: Agreement
    sock: socket.socket
    fd: int  # of its memory, or -1

    def ended(self) -> bool:
        """Whether its other end has hung up."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        self.sock.close()
        if self.fd >= 0:
            os.close(self.fd)


class Meeting:
    """One rank's place to meet others, for one ring after the other.

    Args:
        identity: this rank's.
        bind: host to listen on; any free port.
        host: under which others reach it; "": as ``bind`` says.
        state: see :class:`Place`.
    """

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        bind: str = "127.0.0.1",
        host: str = "",
        state: str = "",
    ) -> None:
        if bind in ("0.0.0.0", "::") and not host:
            raise UsageError(f"listening on {bind} needs a host name for others to connect to")
        self._identity = identity
        self._secret = secret
        self._listener = listen_tcp(format_address(bind, 0))
        name = f"ftrain-{os.getpid()}-{secrets.token_hex(8)}"
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind("\0" + name)
        self._unix.listen(_BACKLOG)
        address = format_address(host or bind, self._listener.getsockname()[1])
        self.place = Place(identity.node, identity.incarnation, address, _host(), name, state)
        self._changed = threading.Condition()
        self._arrived: dict[tuple[int, int, int, int], _Arrival] = {}  # oldest first
        self._epoch = 0  # newest ring: what comes for older ones is closed
        self._closed = False
        self._threads = [
            threading.Thread(target=self._accept, args=(one,), name="ftrain-meet", daemon=True)
            for one in (self._listener, self._unix)
        ]
        for thread in self._threads:
            thread.start()

    def join(
        self,
        epoch: int,
        places: Sequence[Place | None],
        settings: RingSettings,
        *,
        timeout_s: float,
        failed: Callable[[FtrainError], None] | None = None,
    ) -> Ring:
        """The ring of ``places``, in this order; this rank's own is among them, and of the others
        only the neighbours' have to be known.

        After a failure all ranks try again under a higher ``epoch``, so that nobody takes a lane
        of the attempt before.  ``failed`` is the ring's.

        Raises PeerLostError for a neighbour that is not there in time, MemoryShortError.
        """
        rank, ranks = places.index(self.place), len(places)
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._epoch = max(self._epoch, epoch)
            for old in [key for key in self._arrived if key[0] < epoch]:
                self._arrived.pop(old).close()
        right, left = places[(rank + 1) % ranks], places[(rank - 1) % ranks]
        assert right is not None
        assert left is not None
        with ExitStack() as undo:
            lanes_out: list[OutLane] = []
            lanes_in: list[InLane] = []
            for lane in range(self._lanes(right, settings) if ranks > 1 else 0):
                lanes_out.append(self._reach(right, epoch, lane, settings, deadline_s))
                undo.callback(lanes_out[-1].close, False)
            for lane in range(self._lanes(left, settings) if ranks > 1 else 0):
                lanes_in.append(self._found(left, epoch, lane, settings, deadline_s))
                undo.callback(lanes_in[-1].close)
            ring = Ring(
                rank,
                ranks,
                lanes_in,
                lanes_out,
                chunk_bytes=settings.chunk_bytes,
                starts=settings.starts,
                failed=failed,
            )
            undo.pop_all()
            return ring

    def close(self) -> None:
        """Be found no more; rings go on."""
        with self._changed:
            self._closed = True
            for arrival in self._arrived.values():
                arrival.close()
            self._arrived.clear()
            self._changed.notify_all()
        for listener in (self._listener, self._unix):
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        self._unix.close()

    # ------------------------------------------------------------ the right neighbour

    def _lanes(self, neighbour: Place, settings: RingSettings) -> int:
        return 1 if self._shares(neighbour, settings) else settings.connections

    def _shares(self, neighbour: Place, settings: RingSettings) -> bool:
        return settings.share_memory and neighbour.host == self.place.host

    def _reach(
        self, right: Place, epoch: int, lane: int, settings: RingSettings, deadline_s: float
    ) -> OutLane:
        shares = self._shares(right, settings)
        slots, nbytes = settings.starts + 1, settings.chunk_bytes
        join = Head(Word.JOIN, OpId(0, epoch), 0, lane, phase=_SHARED if shares else 0)
        with ExitStack() as undo:
            sock = undo.enter_context(_connect(right, shares, deadline_s))
            nonce = secrets.token_bytes(NONCE_BYTES)
            handshake = ClientHandshake(self._identity, self._secret, nonce)
            out: OutLane
            try:
                agreement = shake_hands(sock, handshake, deadline_s)
                _expect(agreement.peer, right)
                key, peer = agreement.send_key, agreement.peer
                sock.setblocking(True)
                if shares:
                    with _memory(slots * nbytes) as fd:
                        out = SharedOut(sock, key, peer, fd, slots, nbytes, join)
                else:
                    limit_window(sock, socket.SO_SNDBUF)
                    out = StreamOut(sock, key, peer, slots, nbytes)
                    out.say(join)
            except FtrainError:  # some of which are OSErrors as well
                raise
            except OSError as error:
                why = error.strerror or "no answer in time"
                raise _unreached(right, f"can't connect: {why}") from None
            undo.pop_all()
            return out

    # ------------------------------------------------------------ the left neighbour

    def _found(
        self, left: Place, epoch: int, lane: int, settings: RingSettings, deadline_s: float
    ) -> InLane:
        key = (epoch, lane, left.node, left.incarnation)
        with self._changed:
            while key not in self._arrived:
                left_s = deadline_s - time.monotonic()
                if self._closed:
                    raise PeerLostError("the meeting was closed here")
                if left_s <= 0:
                    raise _unreached(left, "it did not come in time")
                self._changed.wait(left_s)
            arrival = self._arrived.pop(key)
        peer, sock, fd = arrival.agreement.peer, arrival.sock, arrival.fd
        slots, nbytes = settings.starts + 1, settings.chunk_bytes
        with ExitStack() as undo:
            undo.callback(arrival.close)
            if (fd >= 0) != self._shares(left, settings):
                raise garbled(peer, "it opened another kind of lane")
            received = arrival.agreement.receive_key
            if fd < 0:
                limit_window(sock, socket.SO_RCVBUF)
                undo.pop_all()
                return StreamIn(sock, received, peer, nbytes, frames=1)
            if os.fstat(fd).st_size != slots * nbytes:
                raise garbled(peer, "it shares other memory than was agreed on")
            try:
                lane_in = SharedIn(sock, received, peer, fd, slots, nbytes, frames=1)
            except OSError as error:
                raise garbled(peer, f"its memory can't be mapped: {error.strerror}") from None
            undo.pop_all()
            os.close(fd)
            return lane_in

    def _accept(self, listener: socket.socket) -> None:
        strangers: dict[socket.socket, None] = {}
        while not self._closed:
            try:
                sock, _ = listener.accept()
            except OSError:
                if not self._closed:  # no descriptors left: the kernel keeps it meanwhile
                    time.sleep(_PAUSE_S)
                continue
            with self._changed:
                if len(strangers) >= _STRANGERS_MAX:
                    oldest = next(iter(strangers))
                    del strangers[oldest]
                    with suppress(OSError):
                        oldest.shutdown(socket.SHUT_RDWR)
                strangers[sock] = None
            try:
                threading.Thread(target=self._greet, args=(sock, strangers), daemon=True).start()
            except RuntimeError:  # no thread to be had
                sock.close()

    def _make_room(self, key: tuple[int, int, int, int]) -> None:
        """For a lane; the lock is held.  Nobody takes more than half, so that who opens lanes that
        are of no ring does not keep the others out."""
        if before := self._arrived.pop(key, None):
            before.close()
        if len(self._arrived) >= _ARRIVED_FEW:
            for ended in [old for old, one in self._arrived.items() if one.ended()]:
                self._arrived.pop(ended).close()
        own = [old for old in self._arrived if old[2:] == key[2:]]
        if len(own) >= _ARRIVED_MAX // 2 or len(self._arrived) >= _ARRIVED_MAX:
            self._arrived.pop((own or list(self._arrived))[0]).close()

    def _greet(self, sock: socket.socket, strangers: dict[socket.socket, None]) -> None:
        fds: list[int] = []
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            deadline_s = time.monotonic() + _GREETING_S
            handshake = ServerHandshake(self._identity, self._secret, nonce)
            agreement = shake_hands(sock, handshake, deadline_s)
            header = _receive_header(sock, fds, deadline_s)
            sock.setblocking(True)
            if sock.family != socket.AF_UNIX:
                tune(sock)
            head = HeadReceiver(agreement.receive_key).open(header)
            shared = head.phase == _SHARED
            if head.word is not Word.JOIN or len(fds) != shared or not _sealed(fds):
                raise RemoteProtocolError("a lane begins with JOIN")
            peer = agreement.peer
            with self._changed:
                strangers.pop(sock, None)
                if self._closed or head.op.number < self._epoch:
                    raise RemoteProtocolError("it is of no ring here")
                key = (head.op.number, head.number, peer.node, peer.incarnation)
                self._make_room(key)
                fd = fds.pop() if shared else -1
                self._arrived[key] = _Arrival(agreement, sock, fd)
                self._changed.notify_all()
        except (FtrainError, OSError):
            sock.close()
        finally:
            with self._changed:
                strangers.pop(sock, None)
            for fd in fds:
                os.close(fd)


def _connect(right: Place, shares: bool, deadline_s: float) -> socket.socket:
    where = right.local if shares else right.address
    try:
        left_s = max(0.001, deadline_s - time.monotonic())
        if not shares:
            sock = socket.create_connection(parse_address(right.address), left_s)
            tune(sock)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(left_s)
            while True:
                try:
                    sock.connect("\0" + right.local)
                    return sock
                except BlockingIOError:  # a unix socket does not wait while many others connect
                    if time.monotonic() >= deadline_s:
                        raise
                    time.sleep(_PAUSE_S)
        except BaseException:  # whatever it is, the socket is nobody's
            sock.close()
            raise
    except (OSError, UnicodeError, UsageError) as error:  # or its address is none
        why = getattr(error, "strerror", str(error)) or "no answer in time"
        raise _unreached(right, f"can't connect to {where}: {why}") from None


def _expect(peer: Identity, place: Place) -> None:
    if (peer.node, peer.incarnation) != (place.node, place.incarnation):
        raise _unreached(place, f"{peer} (incarnation {peer.incarnation}) answered in its place")


def _unreached(place: Place, why: str) -> PeerLostError:
    text = f"node {place.node} (incarnation {place.incarnation}): {why}"
    return PeerLostError(text, node=place.node, reached=False)


@contextmanager
def _memory(nbytes: int) -> Iterator[int]:
    try:
        fd = os.memfd_create("ftrain-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise MemoryShortError(f"there is no memory to share: {error.strerror}") from None
    try:
        try:
            os.posix_fallocate(fd, 0, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise MemoryShortError(f"{nbytes} bytes to share: {error.strerror}") from None
        yield fd
    finally:
        os.close(fd)


def _sealed(fds: Sequence[int]) -> bool:
    """Whether the memory can't be cut off under us, which would kill this process."""
    try:
        return all(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS for fd in fds)
    except OSError:
        return False


def _receive_header(sock: socket.socket, fds: list[int], deadline_s: float) -> bytes:
    """A header; the descriptors that came with it are put into ``fds``."""
    data = b""
    while len(data) < HEADER_BYTES:
        sock.settimeout(max(0.001, deadline_s - time.monotonic()))
        flags = socket.MSG_CMSG_CLOEXEC
        part, found, _, _ = socket.recv_fds(sock, HEADER_BYTES - len(data), 2, flags)
        fds.extend(found)
        if not part:
            raise PeerLostError("it closed the connection")
        data += part
    return data


def _host() -> str:
    """Equal for processes that see each other's abstract sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"
