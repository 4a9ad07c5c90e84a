"""Addresses as ``host:port`` (``[host]:port`` for IPv6), and sockets listening on them."""

from __future__ import annotations

import ipaddress
import socket

from ftrain.comms.errors import UsageError


def parse_address(address: str) -> tuple[str, int]:
    """Host and port; :class:`UsageError` when it is not ``host:port``."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise UsageError(f"{address!r} is not an address: write host:port")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """``host:port``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only processes of this host can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def loopback_behind(host: str) -> str:
    """The loopback address that ``host`` stands for on this host; empty when it is another one.

    A name may: many systems map their own name to 127.0.1.1 in /etc/hosts.
    """
    if is_loopback(host):
        return host
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""  # who connects or binds says what is wrong
    addresses = [str(entry[4][0]) for entry in found]
    return addresses[0] if all(is_loopback(address) for address in addresses) else ""


def check_bind(host: str, secret_given: bool) -> None:
    """Refuse to listen where other hosts can connect unless the user chose a secret.

    Raises :class:`UsageError`.
    """
    if not secret_given and not is_loopback(host):
        raise UsageError(
            f"listening on {host} lets other hosts connect: set FTRAIN_SECRET to the same value on"
            " every node, or bind to 127.0.0.1"
        )


def listen_tcp(address: str) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises :class:`UsageError` when it can't be."""
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit both buffer sizes and this option.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"can't listen on {address}: {error.strerror}; choose another address or port"
        ) from None
    return listener


def bound_address(listener: socket.socket) -> str:
    """Where ``listener`` listens, as ``host:port``."""
    host, port = listener.getsockname()[:2]
    return format_address(host, port)


def tune(sock: socket.socket) -> None:
    """Options of every TCP connection: no Nagle delay, and a peer host that lost its power (and so
    sends no FIN) is noticed after about ten seconds."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
