"""Addresses, and who may listen where."""

from __future__ import annotations

import socket

import pytest

from ftrain.comms.addresses import (
    bound_address,
    check_bind,
    format_address,
    is_loopback,
    listen_tcp,
    loopback_behind,
    parse_address,
)
from ftrain.comms.errors import UsageError


def test_addresses_come_apart_and_together() -> None:
    for text, parts in {
        "127.0.0.1:80": ("127.0.0.1", 80),
        "node-1.example:29500": ("node-1.example", 29500),
        "[::1]:0": ("::1", 0),
    }.items():
        assert parse_address(text) == parts
        assert format_address(*parts) == text


@pytest.mark.parametrize("text", ["", "host", ":80", "host:", "host:x", "host:65536", "host:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write host:port"):
        parse_address(text)


def test_only_loopback_may_be_bound_without_a_secret() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        assert is_loopback(host)
        check_bind(host, secret_given=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        assert not is_loopback(host)
        check_bind(host, secret_given=True)
        with pytest.raises(UsageError, match="FTRAIN_SECRET"):
            check_bind(host, secret_given=False)


def test_a_name_may_stand_for_loopback() -> None:
    for host, address in {
        "127.0.1.1": "127.0.1.1",
        "127.1": "127.0.0.1",  # only the resolver understands this one
        "192.0.2.1": "",
        "no such host.invalid": "",
    }.items():
        assert loopback_behind(host) == address


def test_a_port_in_use_is_said_in_one_sentence() -> None:
    with listen_tcp("127.0.0.1:0") as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        with pytest.raises(UsageError, match="Address already in use; choose another"):
            listen_tcp(bound_address(listener))
    with pytest.raises(UsageError, match=r"can't listen on 192\.0\.2\.1:0"):
        listen_tcp("192.0.2.1:0")
