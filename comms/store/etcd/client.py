"""A small etcd client: several nodes, deadlines, TLS, authentication."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from ftrain.comms.errors import ConfigError, FtrainError, StoreUnreachableError
from ftrain.comms.store.etcd.messages import AUTHENTICATE, RANGE, WATCH, Message, Method
from ftrain.comms.store.etcd.options import EtcdOptions
from ftrain.comms.store.etcd.trouble import (
    closed,
    explain,
    is_stale_token,
    needs_no_token,
    unreachable,
)

_PAUSE_S = 0.1  # after all nodes failed, before they are asked again

_CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),  # it is done here, where the other nodes are known
    ("grpc.enable_http_proxy", 0),  # a proxy for the web is not the way to a cluster's own nodes
    ("grpc.use_local_subchannel_pool", 1),  # so that closing a channel closes its connection
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 3000),  # how long a connection may take to come about
    ("grpc.keepalive_time_ms", 10_000),  # etcd's limit is 5 s
    ("grpc.keepalive_timeout_ms", 3_000),
)


class Watching:
    """One stream of a key's events, from one node."""

    def __init__(self, endpoint: str, call: Any, ended: threading.Event) -> None:
        self.endpoint = endpoint
        self._call = call
        self._ended = ended

    def __iter__(self) -> Iterator[Message]:
        """Answers; raises grpc.RpcError when the stream ends."""
        return iter(self._call)

    def cancel(self) -> None:
        """End it, also under another thread that waits for an answer."""
        self._ended.set()
        self._call.cancel()


class EtcdClient:
    """Calls to a cluster, from any thread.

    A call goes to the node that answered last, and to the next one when that fails; it is made
    again until its deadline, and so may be done twice: every request has to be one for which that
    makes no difference.

    Raises ConfigError when a certificate or key can't be read.
    """

    def __init__(self, options: EtcdOptions) -> None:
        self.options = options
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._at = 0  # the node that is asked first
        self._token = ""
        credentials = _credentials(options)
        self._channels = [
            grpc.secure_channel(endpoint, credentials, _CHANNEL_OPTIONS)
            if credentials
            else grpc.insecure_channel(endpoint, _CHANNEL_OPTIONS)
            for endpoint in options.endpoints
        ]

    def call(self, method: Method, request: Message, timeout_s: float) -> Message:
        """The answer of the first node that gives one.

        Raises StoreUnreachableError by the deadline, StoreRefusedError, StoreFullError, and
        ObjectStoreError for what this client does not expect.
        """
        deadline_s = time.monotonic() + timeout_s
        share_s = timeout_s / len(self._channels)
        last: FtrainError | None = None
        failed = 0
        while (left_s := deadline_s - time.monotonic()) > 0:
            at = self._at
            try:
                return self._ask(at, method, request, min(left_s, share_s))
            except grpc.RpcError as error:
                trouble = explain(error, self.options.endpoints[at], self.options)
                if not isinstance(trouble, StoreUnreachableError):
                    raise trouble from None
                last = trouble
            self.turn_away_from(at)
            failed += 1
            if failed % len(self._channels) == 0:
                self._closed.wait(min(_PAUSE_S, max(0.0, deadline_s - time.monotonic())))
        raise unreachable(self.options, timeout_s, last)

    def get(self, key: bytes, timeout_s: float) -> tuple[Message | None, int]:
        """A key with its value, None if there is none, and the revision that was looked at.

        What any client's earlier call did is seen. Raises as :meth:`call`.
        """
        answer = self.call(RANGE, RANGE.request(key=key), timeout_s)
        return (answer.kvs[0] if answer.kvs else None), answer.header.revision

    def watch(self, key: bytes, revision: int, timeout_s: float) -> Watching:
        """What becomes of a key from ``revision`` on, for ``timeout_s``."""
        ended = threading.Event()
        create = WATCH.request(create_request={"key": key, "start_revision": revision})

        def requests() -> Iterator[Message]:
            yield create
            ended.wait()  # the end of requests may be taken for the end of the watch

        at = self._at
        call = self._callable(at, WATCH, "stream_stream")(
            requests(), timeout=timeout_s, metadata=self._metadata()
        )
        return Watching(self.options.endpoints[at], call, ended)

    def turn_away_from(self, at: int) -> None:
        """Ask the next node first, unless another thread has seen to that."""
        with self._lock:
            if self._at == at:
                self._at = (at + 1) % len(self._channels)

    @property
    def is_closed(self) -> bool:
        """Whether no call will ever be answered again."""
        return self._closed.is_set()

    def require_open(self) -> None:
        """Raise StoreUnreachableError when it was closed."""
        if self.is_closed:
            raise closed(self.options)

    def close(self) -> None:
        """End all calls, which raise StoreUnreachableError, and the connections."""
        self._closed.set()
        for channel in self._channels:
            channel.close()

    def _ask(self, at: int, method: Method, request: Message, timeout_s: float) -> Message:
        deadline_s = time.monotonic() + timeout_s
        if self.options.user and not self._token:
            self._authenticate(at, timeout_s)
        token = self._token
        try:
            return self._send(at, method, request, deadline_s)
        except grpc.RpcError as error:
            if not (token and is_stale_token(error)):
                raise
        self._token = ""
        self._authenticate(at, deadline_s - time.monotonic())
        return self._send(at, method, request, deadline_s)

    def _authenticate(self, at: int, timeout_s: float) -> None:
        request = AUTHENTICATE.request(name=self.options.user, password=self.options.password)
        try:
            answer = self._send(at, AUTHENTICATE, request, time.monotonic() + timeout_s)
        except grpc.RpcError as error:
            if not needs_no_token(error):
                raise
        else:
            self._token = answer.token

    def _send(self, at: int, method: Method, request: Message, deadline_s: float) -> Message:
        call = self._callable(at, method, "unary_unary")
        try:
            return call(
                request,
                timeout=max(0.001, deadline_s - time.monotonic()),
                metadata=self._metadata(),
            )
        except grpc.RpcError:
            self.require_open()
            raise
        except ValueError:  # what grpc raises for a channel that was closed
            raise closed(self.options) from None

    def _callable(self, at: int, method: Method, kind: str) -> Any:
        self.require_open()
        return getattr(self._channels[at], kind)(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self._token),) if self._token else ()


def _credentials(options: EtcdOptions) -> Any:
    if not options.ca:
        return None
    return grpc.ssl_channel_credentials(
        _content(options.ca),
        _content(options.key) if options.key else None,
        _content(options.certificate) if options.certificate else None,
    )


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}): give the PEM file for etcd's TLS"
        ) from None
