"""An object store that is not there, refuses, hangs, is slow or dies: said in a sentence, and
training's versions are none the worse for it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_samples import names_in, save, segments_of
from s3_server import KEY, SECRET, S3Server, free_port
from sending import send

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.pace import Pace
from ftrain.checkpoint.remote.fetch import fetch
from ftrain.checkpoint.remote.filesystems import place_name
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.store import RemoteStore
from ftrain.checkpoint.remote.trouble import sentence
from ftrain.comms.errors import (
    ConfigError,
    FtrainError,
    ObjectStoreError,
    StoreFullError,
    StoreMissingError,
    StoreRefusedError,
    StoreUnreachableError,
)

ONCE = Limits(connect_timeout_s=2, request_timeout_s=2, attempts=1)
MIB = 1024 * 1024


@pytest.fixture
def local(tmp_path: Path) -> DurableStore:
    return DurableStore(tmp_path / "checkpoints")


def refusals(uri: str, limits: Limits = ONCE) -> list[FtrainError]:
    """What reading and writing there raise, each in one line."""
    found = []
    store = RemoteStore(Place(uri, limits))
    for action in (store.survey, lambda: store.place.put("3/fence.json", b"x")):
        with pytest.raises(FtrainError) as caught:
            action()
        found.append(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    store.place.close()
    return found


def test_wrong_secrets_are_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    for error in refusals(s3.uri("bucket/run")):
        assert isinstance(error, StoreRefusedError)
        assert "s3://bucket/run refuses access (SIGNATURE_DOES_NOT_MATCH" in str(error)
        assert "AWS_SECRET_ACCESS_KEY" in str(error)
        assert "guessed" not in str(error)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    for error in refusals(s3.uri("bucket/run")):
        assert isinstance(error, StoreRefusedError)
        assert error.exit_code == 2


def test_secrets_in_the_uri_work_and_are_never_shown(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, local: DurableStore
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    uri = s3.uri("bucket/run").replace("s3://", f"s3://{KEY}:{SECRET}@")
    place = Place(uri, ONCE)
    assert place.name == "s3://bucket/run"
    send(RemoteStore(place), save(local, 3, 7, world_size=1))
    assert [v.where for v in RemoteStore(place).versions()] == ["s3://bucket/run/3/7.json"]
    place.close()
    for error in refusals(uri.replace(SECRET, "wrong-secret").replace("bucket/run", "bucket/x")):
        assert isinstance(error, StoreRefusedError)
        assert "wrong-secret" not in str(error)


def test_a_bucket_that_is_not_there_is_named(s3: S3Server) -> None:
    for error in refusals(s3.uri("other/run")):
        assert isinstance(error, StoreMissingError)
        assert "the bucket of s3://other/run does not exist" in str(error)


def test_nobody_there_is_said_after_every_attempt(s3_credentials: None) -> None:
    told: list[str] = []
    uri = f"s3://bucket/run?endpoint_override=127.0.0.1:{free_port()}&scheme=http"
    limits = Limits(connect_timeout_s=1, attempts=3, pause_s=0.01)
    place = Place(uri, limits, told.append)
    with pytest.raises(StoreUnreachableError, match=r"can't be reached \(NETWORK_CONNECTION"):
        place.sizes()
    place.close()
    assert len(told) == 2
    assert told[0].startswith("listing s3://bucket/run failed, attempt 1 of 3, again in 0.0 s: ")


def test_a_server_that_does_not_answer_is_given_up(s3_credentials: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"s3://b/r?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http"
        place = Place(uri, Limits(connect_timeout_s=1, request_timeout_s=1, attempts=1))
        began = time.monotonic()
        with pytest.raises(StoreUnreachableError, match="can't be reached"):
            place.get("3/7.json")
        assert time.monotonic() - began < 20
        place.close()


def test_a_server_that_hangs_for_a_while_is_waited_for(s3: S3Server, local: DurableStore) -> None:
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        s3.resume()

    limits = Limits(connect_timeout_s=1, request_timeout_s=1, attempts=4, pause_s=0.1)
    store = RemoteStore(Place(s3.uri("bucket/run"), limits, tell))
    version = save(local, 3, 7)
    s3.pause()
    sent = send(store, version)
    assert told
    assert "again in" in told[0]
    assert store.versions() == (sent,)
    store.place.close()


@pytest.mark.slow
def test_a_server_killed_during_an_upload_and_started_again(
    s3: S3Server, local: DurableStore, tmp_path: Path
) -> None:
    told: list[str] = []
    sent_bytes = 0

    def tell(text: str) -> None:
        told.append(text)
        if len(told) == 1:
            assert not (s3.folder / "bucket/run/3/7/rank0.seg").exists()
            s3.start()

    def progress(nbytes: int) -> None:
        nonlocal sent_bytes
        sent_bytes += nbytes
        if sent_bytes >= 15 * MIB and not told:  # a part is there, the second one is not whole
            s3.kill()

    limits = Limits(connect_timeout_s=2, request_timeout_s=5, attempts=4, pause_s=0.1)
    store = RemoteStore(Place(s3.uri("bucket/run"), limits, tell))
    version = save(local, 3, 7, world_size=1, numbers=7_000_000, chunk_bytes=4 * MIB)
    before = segments_of(local.directory)
    reader = version.open(0)
    record = store.upload(3, reader, progress)
    reader.close()
    assert told[0].startswith("uploading s3://bucket/run/3/7/rank0.seg failed, attempt 1 of 4")
    store.begin_fences(local.fence_files())
    sent = store.publish(3, version.version, "run", version.manifest.topology, 1, [record])
    target = DurableStore(tmp_path / "elsewhere")
    fetch(store, sent, target)
    assert segments_of(target.directory) == before
    store.place.close()


_UPLOADER = """
import sys
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.store import RemoteStore
(version,) = DurableStore(sys.argv[1]).versions()
store = RemoteStore(Place(sys.argv[2], Limits(bytes_per_s=2_000_000)))
for rank in range(version.world_size):
    store.upload(3, version.open(rank), lambda nbytes: print(rank, flush=True))
"""


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_an_uploader_killed_in_the_middle(
    kind: str, request: pytest.FixtureRequest, local: DurableStore, tmp_path: Path
) -> None:
    if kind == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        folder, uri = s3.folder / "bucket/run", s3.uri("bucket/run")
    else:
        folder = tmp_path / "mounted"
        uri = folder.as_uri()
    version = save(local, 3, 7, numbers=300_000)
    command = [sys.executable, "-c", _UPLOADER, local.directory, uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "1\n":  # rank 0's is there, rank 1's is on its way
                process.kill()
                break
    assert segments_of(folder).keys() == {"3/7/rank0.seg"}
    store = RemoteStore(Place(uri, ONCE))
    assert store.versions() == ()
    counted: list[int] = []
    reader = version.open(0)
    store.upload(3, reader, counted.append)
    reader.close()
    assert not counted
    assert send(store, version) == store.versions()[0]
    store.place.close()


def test_the_cap_is_kept_by_all_threads_together() -> None:
    pace = Pace(4_000_000)
    began = time.monotonic()
    threads = [
        threading.Thread(target=lambda: [pace.wait(100_000) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began > 0.7  # a second, less what may be made up for after a pause


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_no_space_is_said_and_older_versions_stay(local: DurableStore, small_disk: Path) -> None:
    store = RemoteStore(Place(small_disk.as_uri(), ONCE))
    older = send(store, save(local, 3, 6, world_size=1, numbers=5_000))
    with pytest.raises(StoreFullError, match=r"is full \(.*No space left.*\): make room there"):
        send(store, save(local, 3, 7, world_size=1))
    assert names_in(small_disk) == {"3/fence.json", "3/6.json", "3/6/rank0.seg"}
    assert store.versions() == (older,)


def test_a_full_server_is_said(local: DurableStore, small_disk: Path, s3_credentials: None) -> None:
    (small_disk / "bucket").mkdir()
    server = S3Server(small_disk)
    server.start()
    store = RemoteStore(Place(server.uri("bucket/run"), ONCE))
    with pytest.raises(ObjectStoreError, match="s3://bucket/run"):
        send(store, save(local, 3, 7, world_size=2))
    assert store.versions() == ()
    store.place.close()
    server.kill()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("ftp://host/x", "a URI such as s3://bucket/prefix, "),
        ("/just/a/path", "a URI such as s3://"),
        ("s4://key:abc@bucket/x?y=abc", "^'s4://bucket/x' is no place for checkpoints: write"),
        ("s3://key:abc/de@bucket/x", "^'s3://bucket/x' is no place .* with %2F for each / in a s"),
        ("s3:///prefix", "without a bucket"),
        ("file://", "without a path"),
        ("file://mnt/copies", "file://mnt would be a host: write file:/// and"),
        ("s3://bucket/x?secret_key=abc", "s3://bucket/x: no option is called secret_key, use"),
        ("s3://bucket:notaport/x", "a URI such as s3://"),
        ("s3://key:12/abc@bucket/x", "a colon in the bucket's name: write the server's address"),
        ("file:///x y%zz\n", "no URI that can be used"),
    ],
)
def test_a_wrong_uri_is_one_sentence(uri: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Place(uri, ONCE).sizes()
    assert "abc" not in str(caught.value)


def test_names_of_places() -> None:
    assert place_name("s3://key:se%2Fcret@Bucket/a/b/?region=x") == "s3://Bucket/a/b"
    assert place_name("hdfs://user@host:8020/x") == "hdfs://host:8020/x"
    assert place_name("hdfs://[::1]:8020/x") == "hdfs://[::1]:8020/x"
    assert place_name("file:///a%20b/") == "file:///a b"


def test_hdfs_without_java_is_said() -> None:
    with pytest.raises(ObjectStoreError, match=r"^hdfs://host:1/p can't be used \(") as caught:
        Place("hdfs://host:1/p", ONCE).sizes()
    assert len(str(caught.value).splitlines()) == 1
    assert "install Java" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "error", "advice"),
    [
        ("gs://b", OSError("PERMISSION_DENIED"), "GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3://b", OSError("ACCESS_DENIED"), "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("hdfs://b", OSError("AccessControlException"), "give credentials"),
        ("file:///b", PermissionError(errno.EACCES, "no"), "has to be allowed to list, read, wr"),
        ("s3://b", OSError("curlCode: 35; TLS: wrong version number"), "scheme=http"),
    ],
)
def test_what_to_do_fits_the_store(place: str, error: OSError, advice: str) -> None:
    assert advice in str(sentence(place, error))


def test_a_server_over_http_and_requests_without_credentials(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreUnreachableError, match="write scheme=http into the URI"):
        Place(s3.uri("bucket/run").replace("&scheme=http", ""), ONCE).sizes()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StoreRefusedError, match="give credentials"):
        Place(s3.uri("bucket/run"), ONCE).sizes()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("AWS Error SLOW_DOWN during PutObject operation: Please reduce", StoreUnreachableError),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject", StoreUnreachableError),
        ("AWS Error UNKNOWN (HTTP status 507) during PutObject", StoreFullError),
        ("AWS Error EXPIRED_TOKEN during PutObject operation: x", StoreRefusedError),
        ("google::cloud::Status(PERMISSION_DENIED: no)", StoreRefusedError),
        ("google::cloud::Status(UNAVAILABLE: no)", StoreUnreachableError),
        ("something else", ObjectStoreError),
    ],
)
def test_other_stores_words_are_understood(text: str, kind: type[ObjectStoreError]) -> None:
    found = sentence("s3://b", OSError(text))
    assert type(found) is kind
    assert found.transient == (kind not in (StoreFullError, StoreRefusedError))


_LAZY = """
import sys
import ftrain, ftrain.checkpoint.remote.store, ftrain.checkpoint.remote.fetch
import ftrain.launch.rank_main, ftrain.launch.worker_server, ftrain.runtime.session
import ftrain.snapshot.manager
assert ftrain.Session
print([name for name in sys.modules if name.split(".")[0] in ("pyarrow", "zstandard")])
"""


def test_nothing_of_a_rank_imports_pyarrow() -> None:
    """It has threads, and the worker server forks."""
    done = subprocess.run([sys.executable, "-c", _LAZY], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
