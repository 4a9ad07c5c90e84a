"""Copies of durable versions in an object store: fetched before a run, made beside it, and the last
one behind it.

The durable files of all ranks lie in one directory that every host of a job sees, so the
coordinator's host copies them all: nobody else has to know of the store.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import DurableVersion
from ftrain.checkpoint.remote.client import StoreClient
from ftrain.checkpoint.remote.filesystems import place_name
from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.protocol.messages import (
    Answer,
    Request,
    StoreAskVersions,
    StoreBeginFences,
    StoreDone,
    StoreFetch,
    StoreFetchFences,
    StorePublish,
    StoreSweep,
    StoreUpload,
    StoreUploaded,
    StoreVersion,
    StoreVersions,
)
from ftrain.checkpoint.retention import VersionKey
from ftrain.comms.errors import CorruptionError, FtrainError, ObjectStoreError, StateError
from ftrain.comms.events import EventLog
from ftrain.configs.schema import CheckpointConfig

_SMALL_S_MAX = 600.0  # for a request that moves no version
_STALL_S = 300.0  # without progress
_QUIET_S = 2.0  # what takes longer is said
_MIB = 1 << 20
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_T = TypeVar("_T", bound=Answer)

Say = Callable[[str], None]


class RemoteCopies:
    """Copies the newest durable version to the store, again and again.

    Args:
        config: where to, how often, how fast; ConfigError when the URI is none.
        durable: the versions.
        run_id: whose versions in the store may be removed.
        on_copied: told what was copied, as fields of an event.
        on_failed: told a sentence, and the kind of the error; ``again``: as the time before.
        on_told: told a sentence for each attempt that failed and is made again.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        durable: DurableStore,
        run_id: str,
        *,
        on_copied: Callable[[dict[str, object]], None],
        on_failed: Callable[[str, str, bool], None],
        on_told: Say,
    ) -> None:
        self.active: frozenset[VersionKey] = frozenset()  # being copied: not to be removed
        self.failures: Counter[str] = Counter()  # by kind
        self._config = config
        self._durable = durable
        self._run_id = run_id
        self._on_copied = on_copied
        self._on_failed = on_failed
        self._client = _client(config, on_told)
        self._copied: VersionKey | None = None
        self._turn = 0  # of remote_every_steps: the newest that came
        self._due = asyncio.Event()
        self._unswept = False  # older copies could not be removed, last time
        self._failing = ""  # kind of the newest failure; "": the newest copy went well

    async def run(self) -> None:
        """Copy every ``checkpoint.remote_every_steps`` or ``remote_every_s``, until cancelled."""
        try:
            while True:
                if self._config.remote_every_steps:
                    await self._due.wait()
                    self._due.clear()
                else:
                    await asyncio.sleep(self._config.remote_every_s)
                await self.copy_newest()
        finally:
            await self._client.close()

    def published(self, step: int) -> None:
        """There is a new durable version: perhaps it is the turn of this one."""
        every = self._config.remote_every_steps
        if every and step // every != self._turn:
            self._turn = step // every
            self._due.set()

    async def begin_fences(self) -> None:
        """Say in the store what the present epoch goes on from, so that what an earlier one may
        still publish there is not seen; each copy does so as well."""
        await self._guarded("the beginning of an epoch", self._begin_fences())

    async def copy_newest(self) -> bool:
        """Copy the newest version, if it is not there; whether the newest one is there now."""
        return await self._guarded("the newest durable version", self._copy_newest())

    async def close(self) -> None:
        """End the process that copies."""
        await self._client.close()

    async def _guarded(self, what: str, work: Coroutine[Any, Any, None]) -> bool:
        try:
            await work
        except FtrainError as error:
            kind = type(error).__name__
            self.failures[kind] += 1
            again, self._failing = self._failing == kind, kind
            self._on_failed(f"{what} could not be copied: {error}", kind, again)
            return False
        self._failing = ""
        return True

    async def _begin_fences(self) -> None:
        request = StoreBeginFences(str(self._durable.directory))
        await _ask(self._client, request, StoreDone)

    async def _copy_newest(self) -> None:
        versions = await asyncio.to_thread(self._durable.versions)
        if not versions or versions[0].key == self._copied:
            return
        version = versions[0]
        self.active = frozenset({version.key})
        began_s = time.monotonic()
        try:
            await self._begin_fences()
            nbytes = await self._copy(version)
        finally:
            self.active = frozenset()
        self._copied = version.key
        self._on_copied(
            {
                "fence": version.fence,
                "step": version.step,
                "place": self._client.name,
                "bytes": nbytes,
                "took_s": round(time.monotonic() - began_s, 3),
                "behind_s": round(time.time() - version.manifest.written_s, 3),
            }
        )
        await self._sweep()

    async def _sweep(self) -> None:
        """Delete older copies; where that is not allowed, the new one is there all the same."""
        keep_last, keep_every = self._config.remote_keep_last, self._config.remote_keep_every
        sweep = StoreSweep(keep_last, keep_every, self._run_id, ())
        try:
            await _ask(self._client, sweep, StoreDone)
        except FtrainError as error:
            kind, again = type(error).__name__, self._unswept
            self._unswept = True
            self._on_failed(f"older copies could not be removed: {error}", kind, again)
        else:
            self._unswept = False

    async def _copy(self, version: DurableVersion) -> int:
        ranks = tuple(range(version.world_size))
        folder = str(self._durable.directory)
        upload = StoreUpload(folder, version.fence, version.step, ranks)
        files = (await _ask(self._client, upload, StoreUploaded, moves=True)).files
        manifest = version.manifest
        if not await asyncio.to_thread(version.path.is_file):
            raise StateError(f"step {version.step} was deleted here while it was copied")
        publish = StorePublish(
            version.fence,
            version.version,
            manifest.run_id,
            manifest.topology,
            version.world_size,
            files,
        )
        await _ask(self._client, publish, StoreDone)
        return sum(file.nbytes for file in files)


async def fetch_newest(config: CheckpointConfig, durable: DurableStore, say: Say) -> str:
    """Put the newest version of the store that is whole into ``durable``, if it is newer than all
    that is whole there and of the same history.

    Returns:
        The id of the run whose history it is of; empty when nothing was fetched.

    Raises:
        CorruptionError: neither here nor there is a whole version, although there are some.
        FtrainError: the store can't be used, and nothing is here; or nothing can be put there.
    """
    here = await asyncio.to_thread(durable.versions)
    client = _client(config, say)
    try:
        return await _fetch_newer(client, durable, here, say)
    except ObjectStoreError as error:
        if not here:
            raise
        say(f"{error}; goes on from what is here, step {here[0].step}")
        return ""
    finally:
        await client.close()


async def _fetch_newer(
    client: StoreClient, durable: DurableStore, here: Sequence[DurableVersion], say: Say
) -> str:
    held = await _ask(client, StoreAskVersions(), StoreVersions)
    for problem in held.problems:
        say(problem)
    lacks = f"step {here[0].step} is the newest whole one here" if here else "none is here"
    for version in held.versions:
        step, size = version.version.step, -(-version.nbytes // _MIB)
        if here and not _goes_beyond(version, here[0], durable):
            continue
        say(f"durable versions: {lacks}, step {step} comes from {client.name} ({size} MiB)")
        fetch = StoreFetch(str(durable.directory), version.fence, step)
        try:
            await _ask(client, fetch, StoreDone, moves=True)
        except CorruptionError as error:
            say(str(error))
            continue
        # The version may be of another run: one that was imported, which this run began with.
        records = await asyncio.to_thread(durable.fence_files)
        return records[-1].run_id if records else version.run_id  # damaged ones do not come
    if not here and (held.versions or held.problems):
        raise CorruptionError(
            f"no version in {client.name} is whole: mend it, or begin anew with"
            " checkpoint.remote= at another place"
        )
    if not here:  # epochs go on from those that were said there
        await _ask(client, StoreFetchFences(str(durable.directory)), StoreDone)
    return ""


def _goes_beyond(copied: StoreVersion, here: DurableVersion, durable: DurableStore) -> bool:
    """Whether a version in the store is a later one of the same history."""
    key = (copied.fence, copied.version.step)
    same = copied.run_id == here.manifest.run_id
    return same and key > here.key and durable.counts(copied.fence, copied.version)


async def copy_last(
    config: CheckpointConfig, folder: Path, run_id: str, events: EventLog, say: Say
) -> None:
    """Copy the newest version once the run is over, within ``checkpoint.remote_end_s``; a stop
    signal ends it as well."""
    loop = asyncio.get_running_loop()

    def copied(fields: dict[str, object]) -> None:
        patience.cancel()  # what is left is to remove older ones
        events.write("copied", **fields)
        say(f"step {fields['step']} was copied to {fields['place']}")

    def failed(text: str, kind: str, again: bool) -> None:
        events.write("copy_failed", text=text, reason=kind)
        say(text)

    copies = RemoteCopies(
        config,
        DurableStore(folder),
        run_id,
        on_copied=copied,
        on_failed=failed,
        on_told=say,
    )
    name = place_name(config.remote)
    patience = loop.call_later(
        _QUIET_S, say, f"copying the last version to {name}; Ctrl-C leaves it out"
    )
    task = loop.create_task(copies.copy_newest())
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a background job
            loop.add_signal_handler(number, task.cancel)
    try:
        async with asyncio.timeout(config.remote_end_s):
            await task
    except TimeoutError:
        say(
            f"the last version was not copied within {config.remote_end_s:g} s: run again, or give"
            " it longer with checkpoint.remote_end_s"
        )
    except asyncio.CancelledError:
        say("the last version was not copied: stopped")
    finally:
        patience.cancel()
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)
        await copies.close()


def _client(config: CheckpointConfig, on_told: Say) -> StoreClient:
    return StoreClient(config.remote, Limits(bytes_per_s=config.remote_bytes_per_s_max), on_told)


async def _ask(client: StoreClient, request: Request, kind: type[_T], *, moves: bool = False) -> _T:
    """The answer; ``moves``: a version is moved, which takes as long as it takes."""
    deadline_s = math.inf if moves else _SMALL_S_MAX
    answer = await client.ask(request, deadline_s, stall_s=_STALL_S if moves else None)
    if not isinstance(answer, kind):
        raise ObjectStoreError(f"{client.name} answered with a {type(answer).__name__}")
    return answer
