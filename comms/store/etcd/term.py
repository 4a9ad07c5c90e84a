"""One coordinator's leadership, under a lease in etcd."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from ftrain.comms.errors import FtrainError, LeadershipLostError
from ftrain.comms.store.base import check_state
from ftrain.comms.store.etcd import messages
from ftrain.comms.store.etcd.client import EtcdClient
from ftrain.comms.store.etcd.messages import LEASE_KEEP_ALIVE, LEASE_REVOKE, TXN, Message
from ftrain.comms.store.etcd.watch import leader_in

_RENEWALS = 3  # in the time of a lease
_PAUSE_S = 0.1
_REVOKE_S = 1.0


def now_s() -> float:
    """A clock that goes on while the host sleeps, as the lease's does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def revoke(client: EtcdClient, lease: int) -> None:
    """Give a lease back if that can be done quickly; else it ends by itself."""
    with suppress(FtrainError):
        client.call(LEASE_REVOKE, LEASE_REVOKE.request(ID=lease), _REVOKE_S)


class EtcdTerm:
    """A :class:`~ftrain.comms.store.base.Term`: the leader's key, kept by a thread.

    ``number`` is the revision at which the key was created: etcd's revisions only rise. The term
    is over when the key is gone or is another's, whatever the lease was said to be.
    """

    def __init__(
        self, client: EtcdClient, lease: int, lease_s: float, number: int, granted_s: float
    ) -> None:
        self.number = number
        self.lost = threading.Event()
        self._client = client
        self._lease = lease
        self._assured_until_s = granted_s + lease_s
        self._renewal_s = lease_s / _RENEWALS
        self._successor = ""
        self._saving = threading.Lock()
        self._state_revision = 0  # at which the state was last written, as far as is known
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._thread.start()

    def assured_s(self) -> float:
        """As the protocol says: what is left of the lease since it was last asked to be renewed."""
        return 0.0 if self.lost.is_set() else self._assured_until_s - now_s()

    def save(self, state: bytes) -> None:
        """As the protocol says.

        A request may be on its way for long, while the same or a later state is stored through
        another node. So each is only good for the revision of the state that it was made for.
        """
        check_state(state)
        with self._saving:
            deadline_s = time.monotonic() + self._client.options.call_timeout_s
            while True:
                self._check()
                left_s = max(0.001, deadline_s - time.monotonic())
                answer = self._client.call(TXN, self._save_request(state), left_s)
                if answer.succeeded:
                    self._state_revision = answer.header.revision
                    return
                leader, stored = map(messages.read, answer.responses)
                self._check_leader(leader)
                self._state_revision = stored.mod_revision if stored is not None else 0
                if stored is not None and stored.value == state:
                    return  # an attempt of which the answer was not heard

    def load(self) -> bytes | None:
        """As the protocol says."""
        self._check()
        options = self._client.options
        request = messages.transaction(
            [messages.created_at(options.leader_key, self.number)],
            [messages.get(options.state_key)],
            [messages.get(options.leader_key)],
        )
        answer = self._client.call(TXN, request, options.call_timeout_s)
        found = messages.read(answer.responses[0])
        if not answer.succeeded:
            self._check_leader(found)
        return None if found is None else bytes(found.value)

    def resign(self) -> None:
        """As the protocol says; takes up to a second when etcd does not answer."""
        if not self._stopping.is_set():
            self._stopping.set()
            self.lost.set()
            revoke(self._client, self._lease)

    def join(self) -> None:
        """Wait until the thread has ended, after its client was closed."""
        self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether its thread is gone."""
        return not self._thread.is_alive()

    def _save_request(self, state: bytes) -> Message:
        options = self._client.options
        return messages.transaction(
            [
                messages.created_at(options.leader_key, self.number),
                messages.modified_at(options.state_key, self._state_revision),
            ],
            [messages.put(options.state_key, state)],
            [messages.get(options.leader_key), messages.get(options.state_key)],
        )

    def _keep_alive(self) -> None:
        pause_s = self._renewal_s
        while not self._stopping.wait(pause_s):
            try:
                renewed = self._renew()
            except LeadershipLostError:
                return
            except FtrainError:  # said by whoever saves; the lease is asked for until it is gone
                renewed = False
                if self._client.is_closed:
                    self.lost.set()
                    return
            pause_s = self._renewal_s if renewed else _PAUSE_S

    def _renew(self) -> bool:
        """Whether the lease was renewed. A node may know of none yet, or no more, while the key is
        there: only the key counts."""
        asked_s = now_s()
        request = LEASE_KEEP_ALIVE.request(ID=self._lease)
        answer = self._client.call(LEASE_KEEP_ALIVE, request, self._renewal_s)
        found, _ = self._client.get(self._client.options.leader_key, self._renewal_s)
        self._check_leader(found)
        if answer.TTL <= 0:
            return False
        self._assured_until_s = asked_s + answer.TTL
        return True

    def _check_leader(self, found: Message | None) -> None:
        leader = leader_in(found)
        if leader is None or leader.term != self.number:
            if leader is not None:
                self._successor = f", the leader of term {leader.term} is at {leader.address}"
            self.lost.set()
            self._check()

    def _check(self) -> None:
        if self.lost.is_set():
            raise LeadershipLostError(
                f"this coordinator's term {self.number} in {self._client.options.place} is over"
                f"{self._successor}: ask the store who leads"
            )
