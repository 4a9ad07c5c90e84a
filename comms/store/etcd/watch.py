"""Who leads, told whenever that changes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc

from ftrain.comms.errors import FtrainError
from ftrain.comms.store.base import Leader
from ftrain.comms.store.etcd.client import EtcdClient, Watching
from ftrain.comms.store.etcd.messages import Message

# A node that hangs, or is cut off from the others, ends no stream. So each is given up after a
# while, and what came meanwhile is read from the cluster.
STREAM_S = 5.0
_PAUSE_S = 0.1
_DELETED = 1  # an Event's type


def leader_in(found: Message | None) -> Leader | None:
    """Whom the leader's key tells of."""
    if found is None:
        return None
    return Leader(found.value.decode(errors="replace"), found.create_revision)


class EtcdLeaderWatch:
    """A :class:`~ftrain.comms.store.base.LeaderWatch`: a thread with one stream of events.

    Whatever ends the stream (its time, a node's death, a compaction of events not seen yet) is
    answered in the same way: the key is read, and watched from the revision of that on. So nothing
    lies between, and what was missed before is in what was read.
    """

    def __init__(self, client: EtcdClient, heard: Callable[[Leader | None], None]) -> None:
        self.newest: Leader | None = None
        self.trouble: FtrainError | None = None
        self._client = client
        self._heard = heard
        self._told = False
        self._telling = threading.RLock()  # held while heard runs, which may close the watch
        self._stopping = threading.Event()
        self._stream: Watching | None = None
        self._thread = threading.Thread(target=self._run, name="leader-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """As the protocol says; the thread may take a call's time to end."""
        self._stopping.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()
        with self._telling:  # waits for a call of heard that is under way
            pass

    def join(self) -> None:
        """Wait until the thread has ended, after its client was closed."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether its thread is gone."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        options = self._client.options
        while not (self._stopping.is_set() or self._client.is_closed):
            try:
                found, revision = self._client.get(options.leader_key, options.call_timeout_s)
                self.trouble = None
                self._tell(leader_in(found))
                timely = self._follow(revision + 1)
            except FtrainError as error:
                self.trouble = error
                timely = False
            if not timely:
                self._stopping.wait(_PAUSE_S)

    def _follow(self, revision: int) -> bool:
        """Tell what the stream brings; whether it ended because its time was over."""
        options = self._client.options
        stream = self._client.watch(options.leader_key, revision, STREAM_S)
        self._stream = stream
        try:
            if self._stopping.is_set():  # closed before there was a stream to cancel
                return False
            for answer in stream:
                if answer.canceled:  # its events were compacted, or the token is stale
                    return False
                for event in answer.events:
                    self._tell(None if event.type == _DELETED else leader_in(event.kv))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return True
            self._client.turn_away_from(options.endpoints.index(stream.endpoint))
        finally:
            stream.cancel()
            self._stream = None
        return False

    def _tell(self, leader: Leader | None) -> None:
        with self._telling:
            if self._stopping.is_set() or (self._told and leader == self.newest):
                return
            self.newest, self._told = leader, True
            self._heard(leader)
