"""etcd that is killed, hangs and forgets; requests that come late; and broken variants."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from etcd_server import EtcdCluster
from store_samples import LEASE_S, Heard, eventually, open_store, won

from ftrain.comms.errors import ConfigError, LeadershipLostError, StoreUnreachableError
from ftrain.comms.store.base import CoordinatorStore, Leader
from ftrain.comms.store.etcd import EtcdOptions, messages, open_etcd, term
from ftrain.comms.store.etcd.client import EtcdClient
from ftrain.comms.store.etcd.messages import TXN, Message, Method
from ftrain.comms.store.etcd.store import EtcdStore
from ftrain.comms.store.etcd.watch import EtcdLeaderWatch, leader_in

FOLDER = Path(messages.__file__).parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    found = EtcdCluster(tmp_path_factory.mktemp("etcd"), 1)
    try:
        found.start()
        yield found
    finally:
        found.kill()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[EtcdCluster]:
    """One that a test may kill and start again."""
    found = EtcdCluster(tmp_path / "etcd", 1)
    try:
        found.start()
        yield found
    finally:
        found.kill()


Opener = Callable[[], EtcdStore]


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens a store; a call of it takes at most a second."""
    own = "mortal" in request.fixturenames
    cluster: EtcdCluster = request.getfixturevalue("mortal" if own else "cluster")
    stores: list[CoordinatorStore] = []
    where = {"endpoints": cluster.endpoints, "prefix": f"/{request.node.name}"}

    def opener() -> EtcdStore:
        found = open_store(where, call_timeout_s=1.0)
        assert isinstance(found, EtcdStore)
        stores.append(found)
        return found

    yield opener
    for each in stores:
        each.close()


def unanswered_s(call: Callable[[], object]) -> float:
    """How long it takes until it says that nobody answers."""
    began = time.monotonic()
    with pytest.raises(StoreUnreachableError, match=r"did not answer within 1 s .*look whether"):
        call()
    return time.monotonic() - began


@pytest.mark.slow
def test_a_term_goes_on_after_etcd_was_down(mortal: EtcdCluster, opened: Opener) -> None:
    """For longer than a lease, which etcd counts anew when it starts."""
    one, heard = opened(), Heard()
    leading = won(one, "a:1")
    leading.save(b"before")
    watch = opened().watch_leader(heard)
    heard.wait_for(Leader("a:1", leading.number))
    mortal.kill()
    began = time.monotonic()
    for call in (lambda: leading.save(b"while"), leading.load, lambda: one.leader(1.0)):
        assert unanswered_s(call) < 2
    eventually(lambda: isinstance(watch.trouble, StoreUnreachableError))
    assert leading.assured_s() < 0
    assert not leading.lost.is_set()
    assert time.monotonic() - began > LEASE_S
    mortal.start()
    began = time.monotonic()
    eventually(lambda: leading.assured_s() > 0)
    eventually(lambda: watch.trouble is None)
    print(f"the term went on {time.monotonic() - began:.2f} s after etcd answered")
    assert leading.load() == b"before"
    leading.save(b"after")
    assert heard.leaders == [Leader("a:1", leading.number)]
    leading.resign()
    heard.wait_for(None)
    later = won(one, "b:1")
    heard.wait_for(Leader("b:1", later.number))
    assert later.load() == b"after"


@pytest.mark.slow
def test_a_term_is_lost_while_etcd_hangs(cluster: EtcdCluster, opened: Opener) -> None:
    """For longer than a lease, which etcd's clock ends."""
    one = opened()
    leading = won(one, "a:1")
    leading.save(b"before")
    (node,) = cluster.nodes
    node.pause()
    try:
        assert unanswered_s(lambda: leading.save(b"while")) < 2
        eventually(lambda: leading.assured_s() < 0)
        assert not leading.lost.is_set()
        time.sleep(1.0)  # nothing happens while it hangs, so that there is nothing to wait for
    finally:
        node.resume()
    assert leading.lost.wait(5)
    with pytest.raises(LeadershipLostError):
        leading.save(b"late")
    assert won(one, "b:1").load() in (b"before", b"while")  # the latter was on its way


def test_a_watch_gets_over_a_compaction(cluster: EtcdCluster, opened: Opener) -> None:
    """Which comes between its read and its stream, together with another leader."""
    one, heard, numbers = opened(), Heard(), []

    class Client(EtcdClient):
        def watch(self, key: bytes, revision: int, timeout_s: float) -> Any:
            if not numbers:
                first = won(one, "a:1")
                first.resign()
                numbers.append(won(one, "b:1").number)
                cluster.compact()
            return super().watch(key, revision, timeout_s)

    client = Client(one._options)
    watch = EtcdLeaderWatch(client, heard)
    try:
        eventually(lambda: bool(numbers))
        assert heard.wait_for(Leader("b:1", numbers[0])) < 1
    finally:
        watch.close()
        client.close()
        watch.join()


def test_a_candidate_whose_word_was_not_heard_leads(cluster: EtcdCluster, opened: Opener) -> None:
    """Its transaction was done, the answer was lost, and it was sent again."""
    one = opened()
    real, sent = one._client.call, []

    def twice(method: Method, request: Message, timeout_s: float) -> Message:
        if method is TXN and not sent:
            sent.append(real(method, request, timeout_s))
            assert sent[0].succeeded
        return real(method, request, timeout_s)

    one._client.call = twice  # type: ignore[method-assign]
    leading = won(one, "a:1", 2.0)
    assert leading.number == sent[0].header.revision
    leading.save(b"state")


# What a term promises, as functions that a broken variant must fail.


def check_late_requests(opener: Opener) -> None:
    """Whatever a term asked for is asked for again, in any order, and changes nothing."""
    one = opener()
    leading = won(one, "a:1")
    real, asked = one._client.call, []

    def recorded(method: Method, request: Message, timeout_s: float) -> Message:
        if method is TXN:
            asked.append(request)
        return real(method, request, timeout_s)

    one._client.call = recorded  # type: ignore[method-assign]
    rng = random.Random(7)
    for number in range(20):
        leading.save(f"{number}".encode())
        for request in rng.sample(asked, min(3, len(asked))):
            real(TXN, request, 1.0)
        assert leading.load() == f"{number}".encode()
    leading.resign()
    later = won(opener(), "b:1")
    for request in asked:
        real(TXN, request, 1.0)
    assert later.load() == b"19"


def check_an_unheard_save(opener: Opener) -> None:
    """A save that was given up is done after all, before the next one."""
    one = opener()
    leading = won(one, "a:1")
    assert isinstance(leading, term.EtcdTerm)
    leading.save(b"1")
    late = leading._save_request(b"2")
    assert one._client.call(TXN, late, 1.0).succeeded
    leading.save(b"3")
    one._client.call(TXN, late, 1.0)
    assert leading.load() == b"3"


def check_zombie(opener: Opener) -> None:
    """Who does not know yet that another one leads stores nothing."""
    one, other = opener(), opener()
    leading = won(one, "a:1")
    assert isinstance(leading, term.EtcdTerm)
    leading.save(b"1")
    leading._client.call(messages.LEASE_REVOKE, _lease(leading), 1.0)
    later = won(other, "b:1")
    with suppress(LeadershipLostError):
        leading.save(b"late")
    assert later.load() == b"1"
    assert leading.lost.is_set()


def check_one_leader(opener: Opener) -> None:
    """A candidate that was told that nobody leads comes too late."""
    one, other = opener(), opener()
    leading = won(one, "a:1")
    assert other._try("b:1", 1.0) is None
    leading.save(b"1")
    assert one.leader(1.0) == Leader("a:1", leading.number)


def check_beaten_keeps_quiet(opener: Opener) -> None:
    """A leader whose key is another's learns it without being asked to save."""
    one, other = opener(), opener()
    leading = won(one, "a:1")
    assert isinstance(leading, term.EtcdTerm)
    leading._client.call(messages.LEASE_REVOKE, _lease(leading), 1.0)
    won(other, "b:1")
    assert leading.lost.wait(2 * LEASE_S)


def _lease(leading: term.EtcdTerm) -> Message:
    return messages.LEASE_REVOKE.request(ID=leading._lease)


CHECKS = (
    check_late_requests,
    check_an_unheard_save,
    check_zombie,
    check_one_leader,
    check_beaten_keeps_quiet,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_promise(check: Callable[[Opener], None], cluster: EtcdCluster, opened: Opener) -> None:
    check(opened)


def always(key: bytes, revision: int) -> Message:
    """A condition that holds."""
    compare = messages._Compare
    return compare(result=compare.GREATER, target=compare.VERSION, key=key, version=-1)


def no_fence(patch: pytest.MonkeyPatch) -> None:
    """A save that does not ask who leads."""
    patch.setattr(messages, "created_at", always)


def no_order(patch: pytest.MonkeyPatch) -> None:
    """A save that is good for any revision of the state."""
    patch.setattr(messages, "modified_at", always)


def any_candidate(patch: pytest.MonkeyPatch) -> None:
    """A candidate that takes the key whosever it is."""
    real = messages.created_at
    patch.setattr(messages, "created_at", lambda key, at: real(key, at) if at else always(key, at))


def lease_only(patch: pytest.MonkeyPatch) -> None:
    """A term that does not look at its key as long as etcd answers."""
    patch.setattr(term.EtcdTerm, "_check_leader", lambda self, found: None)


MUTANTS = (
    (no_fence, check_zombie),
    (no_order, check_late_requests),
    (no_order, check_an_unheard_save),
    (any_candidate, check_one_leader),
    pytest.param(lease_only, check_beaten_keeps_quiet, marks=pytest.mark.slow),
)


@pytest.mark.parametrize(
    ("mutant", "check"), MUTANTS, ids=lambda each: getattr(each, "__name__", "")
)
def test_a_broken_variant_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Opener], None],
    cluster: EtcdCluster,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        mutant(patch)
        with pytest.raises(AssertionError):
            check(opened)


def test_the_description_is_that_of_the_proto_files(tmp_path: Path) -> None:
    """``rpc.proto`` says how to make it."""
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed")
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    made = tmp_path / "made.protoset"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--include_imports"]
    subprocess.run([*command, f"--descriptor_set_out={made}", "rpc.proto"], cwd=FOLDER, check=True)
    kept = FileDescriptorSet.FromString((FOLDER / "etcd.protoset").read_bytes())
    assert FileDescriptorSet.FromString(made.read_bytes()) == kept


def test_grpc_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys, ftrain, ftrain.comms.store.files, ftrain.comms.store.etcd as etcd\n"
        "assert not {'grpc', 'google.protobuf'} & set(sys.modules)\n"
        "sys.modules['grpc'] = None\n"
        "try: etcd.open_etcd(etcd.EtcdOptions(endpoints=('127.0.0.1:1',), prefix='x'))\n"
        "except etcd.UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert "pip install ftrain[etcd]" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"endpoints": ()}, "no address"),
        ({"prefix": ""}, "need a prefix"),
        ({"lease_s": 1}, "grants no lease of 1 s"),
        ({"call_timeout_s": 0}, "can't take 0 s"),
        ({"certificate": "c.pem", "key": "k.pem"}, "all of ca, certificate and key"),
        ({"ca": "ca.pem", "key": "k.pem"}, "all of ca, certificate and key"),
        ({"user": "u"}, "both user and password"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EtcdOptions(**({"endpoints": ("127.0.0.1:1",), "prefix": "p"} | options))


def test_a_closed_port_is_a_sentence() -> None:
    found = open_etcd(EtcdOptions(endpoints=("127.0.0.1:1",), prefix="p", password="", user=""))
    try:
        began = time.monotonic()
        with pytest.raises(
            StoreUnreachableError,
            match=r"^etcd at 127.0.0.1:1 did not answer within 0.5 s \(the last.* refused\): look",
        ):
            found.campaign("a:1", 0.5)
        assert time.monotonic() - began < 0.8
    finally:
        found.close()


def test_a_leader_key_that_others_wrote_is_no_crash() -> None:
    assert leader_in(None) is None
    found = messages._POOL.FindMessageTypeByName("mvccpb.KeyValue")
    made = messages.GetMessageClass(found)(value=b"\xff:1", create_revision=3)
    assert leader_in(made) == Leader("\ufffd:1", 3)
