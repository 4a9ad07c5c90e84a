"""The coordinator's store in etcd: see :class:`~ftrain.comms.store.base.CoordinatorStore`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ftrain.comms.store.base import Leader, check_address
from ftrain.comms.store.etcd import messages
from ftrain.comms.store.etcd.client import EtcdClient
from ftrain.comms.store.etcd.messages import LEASE_GRANT, TXN
from ftrain.comms.store.etcd.options import EtcdOptions
from ftrain.comms.store.etcd.term import EtcdTerm, now_s, revoke
from ftrain.comms.store.etcd.watch import EtcdLeaderWatch, leader_in

_LOOK_AGAIN_S = 1.0  # a candidate that was not told that nobody leads


class EtcdStore:
    """A :class:`~ftrain.comms.store.base.CoordinatorStore`; raises ConfigError as its client."""

    def __init__(self, options: EtcdOptions) -> None:
        self._options = options
        self._client = EtcdClient(options)
        self._terms: list[EtcdTerm] = []
        self._watches: list[EtcdLeaderWatch] = []

    def campaign(self, address: str, timeout_s: float) -> EtcdTerm | None:
        """As the protocol says."""
        check_address(address)
        deadline_s = time.monotonic() + timeout_s
        freed = threading.Event()
        watch = self.watch_leader(lambda leader: freed.set() if leader is None else None)
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                freed.clear()  # before asking, so that what changes after the answer is noticed
                if self.leader(left_s) is None:
                    term = self._try(address, max(0.001, deadline_s - time.monotonic()))
                    if term is not None:
                        return term
                freed.wait(max(0.0, min(deadline_s - time.monotonic(), _LOOK_AGAIN_S)))
            return None
        finally:
            watch.close()

    def leader(self, timeout_s: float) -> Leader | None:
        """As the protocol says."""
        return leader_in(self._client.get(self._options.leader_key, timeout_s)[0])

    def watch_leader(self, heard: Callable[[Leader | None], None]) -> EtcdLeaderWatch:
        """As the protocol says; through a node that hangs it may take 5 s and a call longer."""
        self._client.require_open()
        watch = EtcdLeaderWatch(self._client, heard)
        self._watches = [other for other in self._watches if not other.ended] + [watch]
        return watch

    def close(self) -> None:
        """As the protocol says."""
        for watch in self._watches:
            watch.close()
        for term in self._terms:
            term.resign()
        self._client.close()
        for watch in self._watches:
            watch.join()
        for term in self._terms:
            term.join()

    def _try(self, address: str, timeout_s: float) -> EtcdTerm | None:
        """Become the leader if nobody is."""
        key = self._options.leader_key
        deadline_s = time.monotonic() + timeout_s
        asked_s = now_s()
        granted = self._client.call(
            LEASE_GRANT, LEASE_GRANT.request(TTL=self._options.lease_s), timeout_s
        )
        won = False
        try:
            request = messages.transaction(
                [messages.created_at(key, 0)],
                [messages.put(key, address.encode(), granted.ID)],
                [messages.get(key)],
            )
            left_s = max(0.001, deadline_s - time.monotonic())
            answer = self._client.call(TXN, request, left_s)
            if answer.succeeded:
                number = answer.header.revision
            else:
                found = messages.read(answer.responses[0])
                if found is None or found.lease != granted.ID:
                    return None
                number = found.create_revision  # an attempt of which the answer was not heard
            won = True
        finally:
            if not won:
                revoke(self._client, granted.ID)
        term = EtcdTerm(self._client, granted.ID, granted.TTL, number, asked_s)
        self._terms = [other for other in self._terms if not other.ended] + [term]
        return term
