"""Messages between processes of one host, with descriptors passed along.

Unix sockets of kind SEQPACKET keep message boundaries, so there is no framing; the kernel vouches
for the peer's user, so there is no challenge. A message that is too large for one packet travels as
a memfd, and descriptors that are too many for one packet in the queue of a socket that is passed
along: either way a message is one packet, sent as a whole or not at all.
"""

from __future__ import annotations

import array
import os
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ftrain.comms import wire
from ftrain.comms.errors import (
    AuthenticationError,
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    RunDirectoryError,
)

PACKET_BYTES_MAX = 100_000
PACKET_DESCRIPTORS_MAX = 250  # the kernel's own limit is 253
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
DESCRIPTORS_MAX = 8192

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(frozen=True, slots=True)
class Enclosure:
    """Stands for a message that one packet can't carry.

    Comes with a memfd that holds its bytes and, if it has descriptors, a socket to read them from.
    """

    nbytes: int
    descriptors: int


wire.register(Enclosure)


class LocalSocket:
    """One end of a connection. Closes itself as a context manager.

    ``send`` and ``receive`` may wait as long as :meth:`settimeout` says (default: for ever; 0: not
    at all), then raise :class:`TimeoutError` and have done nothing.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket; AuthenticationError when another user holds its peer."""
        self._socket = sock
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PACKET_BYTES_MAX)
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self.peer_pid, uid, _ = _CREDENTIALS.unpack(credentials)
            if uid != os.getuid():
                raise AuthenticationError(
                    f"a process of user {uid} connected to a socket of user {os.getuid()}: refused"
                )
        except OSError:
            sock.close()
            raise

    def send(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send a message with copies of ``fds`` (still open here afterwards).

        Raises :class:`LocalProtocolError` over 64 MiB or 8192 descriptors, :class:`PeerLostError`
        when the peer is gone, :class:`TimeoutError` when it does not read.
        """
        data = wire.encode(message)
        if len(data) > MESSAGE_BYTES_MAX or len(fds) > DESCRIPTORS_MAX:
            raise LocalProtocolError(
                f"a {type(message).__name__} of {len(data)} bytes with {len(fds)} descriptors is"
                f" over the limit of {MESSAGE_BYTES_MAX} and {DESCRIPTORS_MAX}: use a memfd"
            )
        if len(data) <= PACKET_BYTES_MAX and len(fds) <= PACKET_DESCRIPTORS_MAX:
            self._send(data, fds)
            return
        carriers = _enclose(data, fds)
        try:
            self._send(wire.encode(Enclosure(len(data), len(fds))), carriers)
        finally:
            close_all(carriers)

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.send(data)
        except (BlockingIOError, TimeoutError):
            raise TimeoutError("the local peer does not read its messages") from None
        except OSError as error:
            raise PeerLostError(f"the local peer is gone: {error.strerror}") from None

    def receive(self) -> tuple[Any, list[int]]:
        """The next message and its descriptors, which are now the caller's to close.

        Raises :class:`PeerLostError` at the end, :class:`RemoteProtocolError` for anything that
        is not a message (its descriptors are closed), :class:`TimeoutError` when none came.
        """
        try:
            try:
                data, fds, whole = _read_packet(self._socket)
            except ConnectionResetError:
                # Said once, and before what the peer still sent: the queue is behind it.
                data, fds, whole = _read_packet(self._socket)
        except (BlockingIOError, TimeoutError):
            raise TimeoutError("no message came from the local peer") from None
        except OSError as error:
            raise PeerLostError(f"the local peer is gone: {error.strerror}") from None
        try:
            if not whole:
                raise RemoteProtocolError("a local message is over the limit")
            if not data:
                raise PeerLostError("the local peer closed the connection")
            message = wire.decode(data)
        except (RemoteProtocolError, PeerLostError):
            close_all(fds)
            raise
        if not isinstance(message, Enclosure):
            return message, fds
        try:
            return _disclose(message, fds)
        finally:
            close_all(fds)

    def fileno(self) -> int:
        """The descriptor, for event loops; -1 once closed."""
        return self._socket.fileno()

    def settimeout(self, timeout_s: float | None) -> None:
        """How long one call may wait: None for ever, 0 not at all."""
        self._socket.settimeout(timeout_s)

    def close(self) -> None:
        """Close this end; the peer reads :class:`PeerLostError`."""
        self._socket.close()

    def detach(self) -> int:
        """Give the descriptor away, to hand it to a child process."""
        return self._socket.detach()

    def __enter__(self) -> LocalSocket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def listen_local(path: str | os.PathLike[str]) -> socket.socket:
    """A listening socket at ``path``, for its owner only; replaces a dead process's socket there.

    Raises :class:`RunDirectoryError` when that can't be.
    """
    path = Path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: there is no moment with a wider mode
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        with _ShortPath(path) as short:
            listener.bind(short)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise RunDirectoryError(f"no socket can be made at {path}: {error.strerror}") from None
    return listener


def accept_local(listener: socket.socket) -> LocalSocket:
    """Accept one connection; as ``listener.accept`` and :class:`LocalSocket` raise."""
    sock, _ = listener.accept()
    return LocalSocket(sock)


def connect_local(path: str | os.PathLike[str], timeout_s: float) -> LocalSocket:
    """Connect within ``timeout_s``, which later calls inherit.

    Raises :class:`PeerLostError` when nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(timeout_s)
        with _ShortPath(Path(path)) as short:
            sock.connect(short)
    except OSError as error:
        sock.close()
        raise PeerLostError(f"nobody listens at {path}: {error.strerror or error}") from None
    return LocalSocket(sock)


def pair() -> tuple[LocalSocket, LocalSocket]:
    """Two connected ends, one of them for a child process."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return LocalSocket(left), LocalSocket(right)


def from_descriptor(fd: int) -> LocalSocket:
    """The end that a parent process handed down as descriptor ``fd``."""
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    return LocalSocket(sock)


class _ShortPath:
    """``path`` in few characters: a socket's name has room for 107 bytes, run directories may be
    longer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._directory = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) < 100:
            return str(self._path)
        self._directory = os.open(self._path.parent, os.O_PATH | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{self._path.name}"

    def __exit__(self, *_: object) -> None:
        if self._directory >= 0:
            os.close(self._directory)


def _read_packet(sock: socket.socket) -> tuple[bytes, list[int], bool]:
    """The next packet, its descriptors, and whether all of it fitted; raises OSError."""
    space = socket.CMSG_SPACE(PACKET_DESCRIPTORS_MAX * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(PACKET_BYTES_MAX, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, found in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(found[: len(found) - len(found) % fds.itemsize])
    return data, fds.tolist(), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def _enclose(data: bytes, fds: Sequence[int]) -> list[int]:
    """Descriptors that carry a message's bytes and descriptors; PeerLostError."""
    carriers: list[int] = []
    try:
        carriers.append(os.memfd_create("ftrain-message", os.MFD_CLOEXEC))
        view = memoryview(data)
        while view:
            view = view[os.write(carriers[0], view) :]
        if fds:
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            carriers.append(far.detach())
            with near:
                near.setblocking(False)
                for start in range(0, len(fds), PACKET_DESCRIPTORS_MAX):
                    socket.send_fds(near, [b"."], list(fds[start : start + PACKET_DESCRIPTORS_MAX]))
    except OSError as error:
        close_all(carriers)
        why = os.strerror(error.errno or 0)
        raise PeerLostError(f"{len(fds)} descriptors can't be passed on: {why}") from None
    return carriers


def _disclose(enclosure: Enclosure, carriers: Sequence[int]) -> tuple[Any, list[int]]:
    """The message that :func:`_enclose` made these of; RemoteProtocolError."""
    nbytes, count = enclosure.nbytes, enclosure.descriptors
    if not (0 <= nbytes <= MESSAGE_BYTES_MAX and 0 <= count <= DESCRIPTORS_MAX):
        raise RemoteProtocolError(f"a local message of {nbytes} bytes is over the limit")
    if len(carriers) != 1 + (count > 0):
        raise RemoteProtocolError("a large local message without what carries it")
    fds: list[int] = []
    try:
        if os.fstat(carriers[0]).st_size != nbytes:
            raise RemoteProtocolError("a large local message that is cut off")
        message = wire.decode(os.pread(carriers[0], nbytes, 0))
        if isinstance(message, Enclosure):
            raise RemoteProtocolError("a large local message in a large local message")
        if count:
            _read_descriptors(carriers[1], count, fds)
    except (OSError, RemoteProtocolError) as error:
        close_all(fds)
        raise RemoteProtocolError(f"a large local message can't be read: {error}") from None
    return message, fds


def _read_descriptors(carrier: int, count: int, fds: list[int]) -> None:
    """Add ``count`` descriptors from a carrier; RemoteProtocolError, OSError."""
    sock = socket.socket(fileno=carrier)
    try:
        sock.setblocking(False)
        while len(fds) < count:
            data, found, whole = _read_packet(sock)
            fds += found
            if not data or not whole:
                raise RemoteProtocolError("descriptors are missing")
    finally:
        sock.detach()  # its descriptor is the caller's
    if len(fds) != count:
        raise RemoteProtocolError("there are more descriptors than were said")


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
