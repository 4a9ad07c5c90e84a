"""What grpc and etcd say went wrong, as a sentence and a way to go on."""

from __future__ import annotations

import re

import grpc

from ftrain.comms.errors import (
    FtrainError,
    ObjectStoreError,
    StoreFullError,
    StoreRefusedError,
    StoreUnreachableError,
)
from ftrain.comms.store.etcd.options import EtcdOptions

_Code = grpc.StatusCode

# etcd's words, which are part of its interface: its clients in other languages go by them too.
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old")
_NO_AUTHENTICATION = "authentication is not enabled"
_WRONG_PASSWORD = "authentication failed"
_NO_USER = "user name is empty"
_WRONG_CERTIFICATE = ("certificate_verify_failed", "hostname verification check failed")
_NO_TLS = ("wrong_version_number", "handshake failed", "unwrap failed")

_GRPC_PLACE = re.compile(r"^\w+: (ipv[46]|dns|unix):\S+: ")


def details(error: grpc.RpcError) -> str:
    """What it says, in small letters and without etcd's name before it."""
    return str(error.details() or error.code().name).lower().removeprefix("etcdserver: ")


def is_stale_token(error: grpc.RpcError) -> bool:
    """Whether another token would help: they end after some time, and when etcd starts again."""
    return any(words in details(error) for words in _STALE_TOKEN)


def needs_no_token(error: grpc.RpcError) -> bool:
    """Whether the cluster has no authentication."""
    return _NO_AUTHENTICATION in details(error)


def explain(error: grpc.RpcError, endpoint: str, options: EtcdOptions) -> ObjectStoreError:
    """The error to raise; StoreUnreachableError may not come again, or not from another node."""
    code, said = error.code(), details(error)
    place = f"etcd at {endpoint}"
    if _WRONG_PASSWORD in said:
        return StoreRefusedError(
            f"{place} does not take the password of user {options.user!r}: give the right one"
        )
    if _NO_USER in said:
        return StoreRefusedError(f"{place} wants to know who asks: give user and password")
    if code is _Code.PERMISSION_DENIED:
        return StoreRefusedError(
            f"{place} does not let user {options.user!r} use its keys: grant a role that reads and"
            f" writes what begins with {options.prefix}/"
        )
    if any(words in said for words in _WRONG_CERTIFICATE):
        return StoreRefusedError(
            f"{place} has a certificate that {options.ca} does not vouch for, or of another name:"
            " give the right ca, and the name or address that the certificate has"
        )
    if any(words in said for words in _NO_TLS):
        return StoreUnreachableError(
            f"{place} and this client do not come to terms about TLS ({_shortened(said)})"
        )
    if code is _Code.RESOURCE_EXHAUSTED and "space" in said:
        return StoreFullError(f"{place} has no space left: compact and defragment it")
    if code in (_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED, _Code.CANCELLED, _Code.UNKNOWN):
        return StoreUnreachableError(f"{place}: {_shortened(said)}")
    refused = StoreRefusedError if code is _Code.UNAUTHENTICATED else ObjectStoreError
    return refused(f"{place} did not do what it was asked ({said}): look at what etcd says")


def unreachable(options: EtcdOptions, timeout_s: float, last: FtrainError | None) -> FtrainError:
    """The error to raise when nobody did it in time."""
    why = f" (the last: {last})" if last else ""
    return StoreUnreachableError(
        f"{options.place} did not answer within {round(timeout_s, 1):g} s{why}: look whether most"
        " of its nodes run and can be reached from here"
    )


def closed(options: EtcdOptions) -> FtrainError:
    """The error to raise for a call of what was closed."""
    return StoreUnreachableError(f"the store in {options.place} was closed here: open it again")


def _shortened(said: str) -> str:
    """The end is the cause; before it stands what grpc was about."""
    return _GRPC_PLACE.sub("", said.rpartition("last error: ")[2])[:200]
