"""The process that uses an object store: asked without waiting, ended when it takes too long."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import pytest
from image_samples import TOPOLOGY
from remote_samples import save, segments_of
from s3_server import S3Server

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import read_manifest
from ftrain.checkpoint.remote.client import StoreClient
from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.protocol.messages import (
    Answer,
    StoreAskVersions,
    StoreBeginFences,
    StoreDone,
    StoreFetch,
    StoreFile,
    StoreProgress,
    StorePublish,
    StoreSweep,
    StoreUpload,
    StoreUploaded,
    StoreVersions,
)
from ftrain.comms.errors import (
    ConfigError,
    CorruptionError,
    ObjectStoreError,
    StateError,
    StoreRefusedError,
    StoreUnreachableError,
)
from ftrain.comms.protocol.messages import VersionId

S = 60.0  # a deadline that is only there in case
QUICK = Limits(connect_timeout_s=2, request_timeout_s=5, attempts=3, pause_s=0.05)
_T = TypeVar("_T", bound=Answer)


@pytest.fixture
def local(tmp_path: Path) -> DurableStore:
    return DurableStore(tmp_path / "checkpoints")


@pytest.fixture(params=["s3", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that works."""
    if request.param == "file":
        return (tmp_path / "mounted").as_uri()
    s3: S3Server = request.getfixturevalue("s3")
    return s3.uri("bucket/run")


def expect(kind: type[_T], answer: Answer) -> _T:
    """An answer of the kind that was asked for."""
    assert isinstance(answer, kind)
    return answer


async def send(client: StoreClient, store: DurableStore, step: int) -> StoreDone:
    """Upload and publish a version from disk, rank by rank as two nodes do."""
    expect(StoreDone, await client.ask(StoreBeginFences(str(store.directory)), S))
    files = []
    for rank in range(2):
        upload = StoreUpload(str(store.directory), 3, step, (rank,))
        files += expect(StoreUploaded, await client.ask(upload, S)).files
    publish = StorePublish(3, VersionId(3, step), "run", TOPOLOGY, 2, tuple(files))
    return expect(StoreDone, await client.ask(publish, S))


def test_a_version_goes_there_and_back(uri: str, local: DurableStore, tmp_path: Path) -> None:
    for step in (7, 8):
        save(local, 3, step)
    before = segments_of(local.directory)
    seen: list[StoreProgress] = []

    async def run() -> None:
        client = StoreClient(uri, QUICK)
        assert client.pid == 0
        for step in (7, 8):
            (where,) = (await send(client, local, step)).names
            assert where.endswith(f"3/{step}.json")
        held = expect(StoreVersions, await client.ask(StoreAskVersions(), S))
        assert [version.version for version in held.versions] == [VersionId(3, 8), VersionId(3, 7)]
        assert (held.hidden, held.problems, held.fence) == ((), (), 3)
        assert (held.versions[0].run_id, held.versions[0].world_size) == ("run", 2)
        for step in (7, 8):
            fetch = StoreFetch(str(tmp_path / "elsewhere"), 3, step)
            done = expect(StoreDone, await client.ask(fetch, S, on_progress=seen.append))
            assert read_manifest(done.names[0]).step == step
        await client.close()

    asyncio.run(run())
    assert segments_of(tmp_path / "elsewhere") == before
    assert seen
    assert all(0 < news.done_bytes <= news.total_bytes for news in seen)


def test_sweeping_by_order(local: DurableStore, tmp_path: Path) -> None:
    for step in (7, 8):
        save(local, 3, step)

    async def run() -> tuple[str, ...]:
        client = StoreClient((tmp_path / "mounted").as_uri(), QUICK)
        for step in (7, 8):
            await send(client, local, step)
        done = expect(StoreDone, await client.ask(StoreSweep(1, 0, "run", ()), S))
        await client.close()
        return done.names

    assert asyncio.run(run()) == ("3/7.json", "3/7/rank0.seg", "3/7/rank1.seg")


def test_stop_signals_are_not_for_it(tmp_path: Path) -> None:
    async def run() -> None:
        client = StoreClient((tmp_path / "mounted").as_uri(), QUICK)
        await client.ask(StoreAskVersions(), S)
        pid = client.pid
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
        await client.ask(StoreAskVersions(), S)
        assert client.pid == pid
        await client.close()

    asyncio.run(run())


def test_what_is_wrong_keeps_its_kind(
    s3: S3Server, local: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")

    async def run() -> None:
        client = StoreClient(s3.uri("bucket/run"), QUICK)
        with pytest.raises(StoreRefusedError, match="SIGNATURE_DOES_NOT_MATCH"):
            await client.ask(StoreAskVersions(), S)
        pid = client.pid
        with pytest.raises(CorruptionError, match=r"9\.json can't be read"):
            await client.ask(StoreUpload(str(local.directory), 3, 9, (0,)), S)
        assert client.pid == pid  # a request that fails ends nobody
        await client.close()

    asyncio.run(run())
    with pytest.raises(ConfigError, match="a URI such as"):
        asyncio.run(_made("nowhere"))


async def _made(uri: str) -> StoreClient:
    return StoreClient(uri)


def test_refusals_of_the_store_keep_their_kind(tmp_path: Path) -> None:
    async def run() -> None:
        client = StoreClient((tmp_path / "mounted").as_uri(), QUICK)
        files = (StoreFile(0, 4096, "0" * 32),)
        with pytest.raises(StateError, match="fence 3 was not begun"):
            await client.ask(StorePublish(3, VersionId(3, 7), "run", TOPOLOGY, 1, files), S)
        await client.close()

    asyncio.run(run())


def test_a_store_that_hangs_costs_a_deadline_and_no_more(s3: S3Server) -> None:
    """The parent's loop goes on, the process is gone, the next request is done by another one."""
    patient = Limits(connect_timeout_s=60, request_timeout_s=60)

    async def run() -> None:
        client = StoreClient(s3.uri("bucket/run"), patient)
        await client.ask(StoreAskVersions(), S)
        first = client.pid
        s3.pause()
        loop = asyncio.get_running_loop()
        pauses = []

        async def tick() -> None:
            while True:
                began = loop.time()
                await asyncio.sleep(0.01)
                pauses.append(loop.time() - began)

        ticking = loop.create_task(tick())
        began = loop.time()
        with pytest.raises(StoreUnreachableError, match=r"not done within 1 s: it was given up"):
            await client.ask(StoreAskVersions(), 1)
        assert loop.time() - began < 3
        ticking.cancel()
        assert max(pauses) < 0.5
        s3.resume()
        expect(StoreVersions, await client.ask(StoreAskVersions(), S))
        assert client.pid != first
        await client.close()
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)

    asyncio.run(run())


@pytest.mark.slow
def test_no_progress_ends_a_request_before_its_deadline(s3: S3Server, local: DurableStore) -> None:
    save(local, 3, 7, numbers=700_000, world_size=1)
    limits = Limits(connect_timeout_s=60, request_timeout_s=60, bytes_per_s=2_000_000)

    async def run() -> None:
        client = StoreClient(s3.uri("bucket/run"), limits)
        await client.ask(StoreAskVersions(), S)
        upload = StoreUpload(str(local.directory), 3, 7, (0,))

        def stop_it(news: StoreProgress) -> None:
            s3.pause()

        with pytest.raises(StoreUnreachableError, match=r"made no progress for 2 s"):
            await client.ask(upload, S, stall_s=2, on_progress=stop_it)
        s3.resume()
        expect(StoreUploaded, await client.ask(upload, S, stall_s=S))
        await client.close()

    asyncio.run(run())


def test_failed_attempts_are_told(s3: S3Server) -> None:
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        s3.start()

    async def run() -> None:
        client = StoreClient(s3.uri("bucket/run"), QUICK, tell)
        s3.kill()
        expect(StoreVersions, await client.ask(StoreAskVersions(), S))
        await client.close()

    asyncio.run(run())
    assert told[0].startswith("listing s3://bucket/run failed, attempt 1 of 3")


def test_a_killed_process_is_replaced(s3: S3Server) -> None:
    async def run() -> None:
        client = StoreClient(s3.uri("bucket/run"), QUICK)
        await client.ask(StoreAskVersions(), S)
        s3.pause()
        asked = asyncio.create_task(client.ask(StoreAskVersions(), S))
        await asyncio.sleep(0)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(ObjectStoreError, match=r"ended \(SIGKILL\): ask again"):
            await asked
        s3.resume()
        expect(StoreVersions, await client.ask(StoreAskVersions(), S))
        await client.close()

    asyncio.run(run())


def test_a_request_that_nobody_waits_for_is_ended(s3: S3Server) -> None:
    async def run() -> None:
        client = StoreClient(s3.uri("bucket/run"), QUICK)
        await client.ask(StoreAskVersions(), S)
        first = client.pid
        s3.pause()
        asked = asyncio.create_task(client.ask(StoreAskVersions(), S))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        s3.resume()
        both = await asyncio.gather(*(client.ask(StoreAskVersions(), S) for _ in range(2)))
        assert both[0] == both[1]
        assert client.pid not in (0, first)
        await client.close()

    asyncio.run(run())


def test_it_takes_what_training_leaves(tmp_path: Path) -> None:
    async def run() -> None:
        client = StoreClient(tmp_path.as_uri(), QUICK)
        await client.ask(StoreAskVersions(), S)
        tasks = os.listdir(f"/proc/{client.pid}/task")
        nice = {os.getpriority(os.PRIO_PROCESS, int(task)) for task in tasks}
        assert nice == {19}
        command = Path(f"/proc/{client.pid}/cmdline").read_bytes()
        assert tmp_path.name.encode() not in command  # a URI may hold secrets
        await client.close()

    asyncio.run(run())


_PARENT = """
import asyncio, sys
from ftrain.checkpoint.remote.client import StoreClient
from ftrain.checkpoint.remote.protocol.messages import StoreAskVersions
async def run():
    client = StoreClient(sys.argv[1])
    await client.ask(StoreAskVersions(), 60)
    print(client.pid, flush=True)
    await client.ask(StoreAskVersions(), 60)
    await asyncio.sleep(60)
asyncio.run(run())
"""


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PARENT, tmp_path.as_uri()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        assert select.select([worker], [], [], 10)[0]
    finally:
        os.close(worker)
