"""Mutual challenge that begins every connection, without I/O.

::

    client                                  server
      HELLO  identity, nonce        ->
                                    <-  HELLO  identity, nonce      or REFUSED why
      PROOF  HMAC(secret, client+transcript) ->
                                    <-  PROOF  HMAC(secret, server+transcript)  or REFUSED why

The transcript is both HELLO messages as sent, so the proofs are bound to the protocol version, the
run, both identities and both fresh nonces. Each side's proof has a label of its own: sent back to
its author it is worth nothing. The server proves nothing to a client that has not proved itself.
Each direction of the session then has its own key, derived from secret and transcript.

Every message: magic, version u16, kind u8, body bytes u16, body of at most 512 bytes. The prefix
keeps its layout in all versions, so that a peer of another version can be told so.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from ftrain.comms.errors import (
    AuthenticationError,
    FtrainError,
    LocalProtocolError,
    RemoteProtocolError,
)

PROTOCOL_VERSION = 2
NONCE_BYTES = 32

_MAGIC = b"ftrain"
_PREFIX = struct.Struct("<6sHBH")
_BODY_BYTES_MAX = 512
_PROOF_BYTES = 32
_NUMBERS = struct.Struct("<iq")

_HELLO = 1
_PROOF = 2
_REFUSED = 3

_WHY_VERSION = 1
_WHY_RUN = 2
_WHY_SECRET = 3
_WHY_GARBAGE = 4
_WORDS = {
    _WHY_VERSION: "it speaks another protocol version: install the same ftrain on every node",
    _WHY_RUN: "it belongs to another run: check the address and the run id",
    _WHY_SECRET: "the job secret differs: give every node the same FTRAIN_SECRET",
    _WHY_GARBAGE: "it did not understand the greeting: check the address",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a process is. Raises LocalProtocolError for what does not fit the wire."""

    run_id: str
    role: str  # agent | coordinator | front | smp | rank | cli
    node: int  # -1: belongs to no node
    incarnation: int

    def __post_init__(self) -> None:
        if not (0 < len(self.run_id.encode()) <= 200 and 0 < len(self.role.encode()) <= 32):
            raise LocalProtocolError(
                "a run id must have 1 to 200 bytes and a role 1 to 32,"
                f" not {self.run_id!r} and {self.role!r}"
            )
        if not (-(2**31) <= self.node < 2**31 and -(2**63) <= self.incarnation < 2**63):
            raise LocalProtocolError(f"node {self.node} or incarnation is out of range")

    def __str__(self) -> str:
        return self.role if self.node < 0 else f"{self.role} of node {self.node}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a finished handshake leaves behind."""

    peer: Identity
    send_key: bytes
    receive_key: bytes


class Handshake(ABC):
    """One side of the challenge; use :class:`ClientHandshake` or :class:`ServerHandshake`.

    Send :meth:`start`'s bytes; then read exactly :meth:`needed` bytes, hand them to
    :meth:`feed`, send what it returns, until :attr:`agreement` or :attr:`error` is set. On an
    error send what was returned (the refusal), then close.
    """

    def __init__(self, identity: Identity, secret: bytes, nonce: bytes) -> None:
        if len(nonce) != NONCE_BYTES or not secret:
            raise LocalProtocolError("a handshake needs a secret and a fresh nonce of 32 bytes")
        self._identity = identity
        self._secret = secret
        self._hello = _message(_HELLO, nonce + _pack_identity(identity))
        self._transcript = b""
        self._gathered = b""
        self._peer: Identity | None = None
        self._step: Callable[[int, bytes], bytes] = self._on_hello
        self.agreement: Agreement | None = None
        self.error: FtrainError | None = None

    def start(self) -> bytes:
        """What to send before anything was received."""
        return b""

    def needed(self) -> int:
        """How many bytes to read next; 0 when the handshake is over."""
        if self.agreement is not None or self.error is not None:
            return 0
        if len(self._gathered) < _PREFIX.size:
            return _PREFIX.size - len(self._gathered)
        body_bytes: int = _PREFIX.unpack_from(self._gathered)[3]
        return _PREFIX.size + body_bytes - len(self._gathered)

    def feed(self, data: bytes) -> bytes:
        """Take up to :meth:`needed` bytes; returns what to send in answer."""
        if not 0 < len(data) <= self.needed():
            raise LocalProtocolError(f"{len(data)} bytes are not what the handshake needs")
        self._gathered += data
        if len(self._gathered) < _PREFIX.size:
            return b""
        magic, version, kind, body_bytes = _PREFIX.unpack_from(self._gathered)
        if magic != _MAGIC or body_bytes > _BODY_BYTES_MAX:
            return self._fail(_WHY_GARBAGE, RemoteProtocolError("the greeting is not ftrain's"))
        if self.needed() > 0:
            return b""
        whole, self._gathered = self._gathered, b""
        body = whole[_PREFIX.size :]
        if kind == _REFUSED:
            why = _WORDS.get(body[0] if body else 0, "no reason that is known here was given")
            self.error = AuthenticationError(f"the peer refused the connection: {why}")
            return b""
        if version != PROTOCOL_VERSION:
            return self._refuse(
                _WHY_VERSION, f"the peer speaks protocol version {version}, not {PROTOCOL_VERSION}"
            )
        return self._step(kind, body)

    @abstractmethod
    def _on_hello(self, kind: int, body: bytes) -> bytes:
        """The first step, the only one that differs in order between the two sides."""

    def _take_hello(self, kind: int, body: bytes) -> bytes:
        """Check the peer's HELLO; returns the refusal, or b"" when it is in order."""
        peer = _unpack_identity(body[NONCE_BYTES:]) if kind == _HELLO else None
        if peer is None:
            return self._fail(_WHY_GARBAGE, RemoteProtocolError("the greeting is malformed"))
        if peer.run_id != self._identity.run_id:
            return self._refuse(_WHY_RUN, f"the peer belongs to run {peer.run_id!r}, not to ours")
        if _message(_HELLO, body) == self._hello:
            return self._refuse(_WHY_SECRET, "the peer sent our own greeting back")
        self._peer = peer
        return b""

    def _proof_is_right(self, label: bytes, kind: int, body: bytes) -> bool:
        return kind == _PROOF and hmac.compare_digest(body, self._keyed(label))

    def _agree(self, send_label: bytes, receive_label: bytes) -> None:
        assert self._peer is not None
        self.agreement = Agreement(self._peer, self._keyed(send_label), self._keyed(receive_label))

    def _keyed(self, label: bytes) -> bytes:
        return hmac.digest(self._secret, label + self._transcript, hashlib.sha256)

    def _refuse(self, why: int, words: str) -> bytes:
        return self._fail(why, AuthenticationError(f"{words}: connection refused"))

    def _fail(self, why: int, error: FtrainError) -> bytes:
        self.error = error
        return _message(_REFUSED, bytes([why]))


class ClientHandshake(Handshake):
    """The side that connects."""

    def start(self) -> bytes:
        """The client's greeting."""
        return self._hello

    def _on_hello(self, kind: int, body: bytes) -> bytes:
        if refusal := self._take_hello(kind, body):
            return refusal
        self._transcript = self._hello + _message(_HELLO, body)
        self._step = self._on_proof
        return _message(_PROOF, self._keyed(b"client proof"))

    def _on_proof(self, kind: int, body: bytes) -> bytes:
        if not self._proof_is_right(b"server proof", kind, body):
            return self._refuse(_WHY_SECRET, "the peer does not hold the job secret")
        self._agree(b"client key", b"server key")
        return b""


class ServerHandshake(Handshake):
    """The side that accepts."""

    def _on_hello(self, kind: int, body: bytes) -> bytes:
        if refusal := self._take_hello(kind, body):
            return refusal
        self._transcript = _message(_HELLO, body) + self._hello
        self._step = self._on_proof
        return self._hello

    def _on_proof(self, kind: int, body: bytes) -> bytes:
        if not self._proof_is_right(b"client proof", kind, body):
            return self._refuse(_WHY_SECRET, "the peer does not hold the job secret")
        self._agree(b"server key", b"client key")
        return _message(_PROOF, self._keyed(b"server proof"))


def _message(kind: int, body: bytes) -> bytes:
    return _PREFIX.pack(_MAGIC, PROTOCOL_VERSION, kind, len(body)) + body


def _pack_identity(identity: Identity) -> bytes:
    run_id, role = identity.run_id.encode(), identity.role.encode()
    numbers = _NUMBERS.pack(identity.node, identity.incarnation)
    return numbers + bytes([len(run_id)]) + run_id + bytes([len(role)]) + role


def _unpack_identity(data: bytes) -> Identity | None:
    """The identity in ``data``, or None unless it is exactly one."""
    try:
        node, incarnation = _NUMBERS.unpack_from(data)
        rest = data[_NUMBERS.size :]
        run_id, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        role = rest[1 : 1 + rest[0]]
        identity = Identity(run_id.decode(), role.decode(), node, incarnation)
    except (struct.error, IndexError, UnicodeDecodeError, LocalProtocolError):
        return None
    return identity if _pack_identity(identity) == data else None
