"""The process that uses an object store, so that nobody else waits for it.

``python -m ftrain.checkpoint.remote.worker --fd N``: descriptor N is a local socket to the process
that started it (client.py), whose first message is :class:`StoreSetup`.  It does one request at a
time, at the lowest priority, and ends with its parent.  A request can't be taken back: who does not
want to wait any longer kills the process.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import FileRecord, read_manifest
from ftrain.checkpoint.remote.fetch import fetch, fetch_fences
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.protocol.messages import (
    Answer,
    StoreAskVersions,
    StoreBeginFences,
    StoreDone,
    StoreFailed,
    StoreFetch,
    StoreFetchFences,
    StoreFile,
    StoreProgress,
    StorePublish,
    StoreSetup,
    StoreSweep,
    StoreTold,
    StoreUpload,
    StoreUploaded,
    StoreVersion,
    StoreVersions,
)
from ftrain.checkpoint.remote.store import RemoteStore, RemoteVersion
from ftrain.checkpoint.retention import Retention
from ftrain.comms.errors import CorruptionError, FtrainError, PeerLostError, RemoteProtocolError
from ftrain.comms.local import LocalSocket, close_all, from_descriptor
from ftrain.comms.process import die_with_parent, ignore_stop_signals, set_oom_score_adj

_NICE = 19  # of the disk as well: its priority follows that of the CPU
_OOM_SCORE = 500  # the first to go: what it does can be done again
_PROGRESS_S = 0.2


class Worker:
    """Does what its parent asks for."""

    def __init__(self, sock: LocalSocket, setup: StoreSetup) -> None:
        self._socket = sock
        self._setup = setup
        self._lock = threading.Lock()  # several threads report
        self._done_bytes = self._total_bytes = 0
        self._next_s = 0.0
        self._handlers: dict[type, Callable[[Any], Answer]] = {
            StoreBeginFences: self._begin_fences,
            StoreUpload: self._upload,
            StorePublish: self._publish,
            StoreAskVersions: self._versions,
            StoreFetch: self._fetch,
            StoreFetchFences: self._fetch_fences,
            StoreSweep: self._sweep,
        }

    def serve(self) -> None:
        """Answer until the parent is gone: PeerLostError."""
        while True:
            request, fds = self._socket.receive()
            close_all(fds)
            handler = self._handlers.get(type(request))
            if handler is None:
                raise RemoteProtocolError(f"a {type(request).__name__} is no request to a store")
            self._begin(0)
            answer: Answer | StoreFailed
            try:
                answer = handler(request)
            except FtrainError as error:
                answer = StoreFailed(type(error).__name__, str(error))
            self._say(answer)

    # ---- requests

    @cached_property
    def _store(self) -> RemoteStore:
        return RemoteStore(Place(self._setup.uri, self._setup.limits, self._tell))

    def _begin_fences(self, request: StoreBeginFences) -> Answer:
        self._store.begin_fences(DurableStore(request.directory).fence_files())
        return StoreDone()

    def _upload(self, request: StoreUpload) -> Answer:
        path = Path(request.directory, str(request.fence), f"{request.step}.json")
        version = read_manifest(path)
        if not set(request.ranks) <= set(range(version.world_size)):
            raise CorruptionError(f"{path} has {version.world_size} ranks, not {request.ranks}")
        self._begin(sum(version.manifest.files[rank].nbytes for rank in request.ranks))

        def upload(rank: int) -> FileRecord:
            reader = version.open(rank)
            try:
                return self._store.upload(request.fence, reader, self._progress)
            finally:
                reader.close()

        files = self._store.place.side_by_side(upload, request.ranks)
        return StoreUploaded(tuple(StoreFile(*astuple(file)) for file in files))

    def _publish(self, request: StorePublish) -> Answer:
        published = self._store.publish(
            request.fence,
            request.version,
            request.run_id,
            request.topology,
            request.world_size,
            [FileRecord(*astuple(file)) for file in request.files],
        )
        return StoreDone((published.where,))

    def _versions(self, request: StoreAskVersions) -> Answer:
        survey = self._store.survey()
        return StoreVersions(
            tuple(map(_described, survey.versions)),
            tuple(map(_described, survey.hidden)),
            survey.problems,
            survey.fence,
        )

    def _fetch(self, request: StoreFetch) -> Answer:
        survey = self._store.survey()
        for version in (*survey.versions, *survey.hidden):
            if version.key == (request.fence, request.step):
                self._begin(version.nbytes)
                target = DurableStore(request.directory)
                return StoreDone((str(fetch(self._store, version, target, self._progress)),))
        raise CorruptionError(
            f"{self._store.place.where(f'{request.fence}/{request.step}.json')} is not a version "
            "that is whole: take the next older one"
        )

    def _fetch_fences(self, request: StoreFetchFences) -> Answer:
        fetch_fences(self._store, DurableStore(request.directory))
        return StoreDone()

    def _sweep(self, request: StoreSweep) -> Answer:
        policy = Retention(request.keep_last, request.keep_every)
        return StoreDone(self._store.sweep(policy, request.run_id, active=request.active))

    # ---- reports

    def _begin(self, total_bytes: int) -> None:
        self._done_bytes, self._total_bytes, self._next_s = 0, total_bytes, 0.0

    def _progress(self, nbytes: int) -> None:
        with self._lock:
            self._done_bytes += nbytes
            now = time.monotonic()
            if now < self._next_s:
                return
            self._next_s = now + _PROGRESS_S
            self._socket.send(StoreProgress(self._done_bytes, self._total_bytes))

    def _tell(self, text: str) -> None:
        self._say(StoreTold(text))

    def _say(self, message: object) -> None:
        with self._lock:
            self._socket.send(message)


def _described(version: RemoteVersion) -> StoreVersion:
    manifest = version.manifest
    return StoreVersion(
        manifest.fence,
        version.version,
        manifest.run_id,
        manifest.topology,
        manifest.world_size,
        version.nbytes,
        manifest.written_s,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="ftrain.checkpoint.remote.worker")
    parser.add_argument("--fd", type=int, required=True, help="local socket to the parent")
    sock = from_descriptor(parser.parse_args(argv).fd)
    die_with_parent(sock.peer_pid)
    ignore_stop_signals()
    set_oom_score_adj(_OOM_SCORE)
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)  # threads that come later inherit it
    try:
        setup, fds = sock.receive()
        close_all(fds)
        if not isinstance(setup, StoreSetup):
            raise RemoteProtocolError("the first message has to be a StoreSetup")
        Worker(sock, setup).serve()
    except PeerLostError:
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
