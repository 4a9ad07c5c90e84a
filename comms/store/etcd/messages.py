"""etcd's messages and calls, made from their description in ``etcd.protoset``.

There is no generated code, which would demand one version of protobuf, and nothing is registered
where another etcd client of this process would find its own messages taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

Message = Any  # the classes are made here, and no type checker sees their fields


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    content = Path(__file__).with_name("etcd.protoset").read_bytes()
    for file in FileDescriptorSet.FromString(content).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _pool()


def _class(name: str) -> Any:
    return GetMessageClass(_POOL.FindMessageTypeByName(f"etcdserverpb.{name}"))


@dataclass(frozen=True, slots=True)
class Method:
    """A call: its path, and how its messages become bytes and are made of them."""

    path: str
    request: Any
    response: Any


def _method(service: str, name: str, messages: str) -> Method:
    return Method(
        f"/etcdserverpb.{service}/{name}",
        _class(f"{messages}Request"),
        _class(f"{messages}Response"),
    )


RANGE = _method("KV", "Range", "Range")
TXN = _method("KV", "Txn", "Txn")
LEASE_GRANT = _method("Lease", "LeaseGrant", "LeaseGrant")
LEASE_REVOKE = _method("Lease", "LeaseRevoke", "LeaseRevoke")
# A stream each way. One request and the end of requests are what a call with one answer sends, too,
# and etcd then gives one answer and ends: so it needs no thread and has a deadline.
LEASE_KEEP_ALIVE = _method("Lease", "LeaseKeepAlive", "LeaseKeepAlive")
WATCH = _method("Watch", "Watch", "Watch")
AUTHENTICATE = _method("Auth", "Authenticate", "Authenticate")

_Compare = _class("Compare")
_RequestOp = _class("RequestOp")


def created_at(key: bytes, revision: int) -> Message:
    """The condition that a key was created at ``revision``; 0: that there is none."""
    return _Compare(
        result=_Compare.EQUAL, target=_Compare.CREATE, key=key, create_revision=revision
    )


def modified_at(key: bytes, revision: int) -> Message:
    """The condition that a key was last written at ``revision``; 0: that there is none."""
    return _Compare(result=_Compare.EQUAL, target=_Compare.MOD, key=key, mod_revision=revision)


def get(key: bytes) -> Message:
    """The operation that reads a key."""
    return _RequestOp(request_range=RANGE.request(key=key))


def put(key: bytes, value: bytes, lease: int = 0) -> Message:
    """The operation that writes a key."""
    return _RequestOp(request_put={"key": key, "value": value, "lease": lease})


def transaction(
    conditions: Iterable[Message], then: Iterable[Message], otherwise: Iterable[Message]
) -> Message:
    """What etcd does at once, and for good or not at all."""
    return TXN.request(compare=conditions, success=then, failure=otherwise)


def read(operation: Message) -> Message | None:
    """The key and value that :func:`get` found in a transaction; None: there is none."""
    found = operation.response_range.kvs
    return found[0] if found else None
