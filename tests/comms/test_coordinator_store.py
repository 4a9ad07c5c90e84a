"""What holds for every kind of coordinator store."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_server import EtcdCluster
from store_samples import TAKE_OVER_S_MAX, Backend, Candidate, Heard, eventually, won

from ftrain.comms.errors import LeadershipLostError, StoreUnreachableError, UsageError
from ftrain.comms.store.base import STATE_BYTES_MAX, Leader


@pytest.fixture(scope="module", params=["files", "etcd"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdCluster | None]:
    """None: a directory is used."""
    if request.param == "files":
        yield None
        return
    found = EtcdCluster(tmp_path_factory.mktemp("etcd"), 1)
    try:
        found.start()
        yield found
    finally:
        found.kill()


@pytest.fixture
def backend(
    request: pytest.FixtureRequest, cluster: EtcdCluster | None, tmp_path: Path
) -> Iterator[Backend]:
    folder = tmp_path / "store" if cluster is None else None
    found = Backend(folder, cluster, prefix=f"/ftrain/{request.node.name}")
    yield found
    found.close()


class TestCoordinatorStore:
    def test_one_wins_and_the_other_takes_its_place(self, backend: Backend) -> None:
        one, other = backend.open(), backend.open()
        first = won(one, "host-a:1")
        began = time.monotonic()
        assert other.campaign("host-b:1", 0.4) is None
        assert 0.4 <= time.monotonic() - began < 2
        assert first.assured_s() > 0
        first.resign()
        second = won(other, "host-b:1", 1.0)
        assert second.number > first.number
        assert first.lost.is_set()
        assert not second.lost.is_set()

    def test_state_goes_from_term_to_term(self, backend: Backend) -> None:
        one, other = backend.open(), backend.open()
        first = won(one, "a:1")
        assert first.load() is None
        for state in (b"", b"one", bytes(range(256)) * 16, b"two"):
            first.save(state)
            assert first.load() == state
        first.resign()
        second = won(other, "b:1")
        assert second.load() == b"two"
        second.save(b"x" * STATE_BYTES_MAX)
        assert second.load() == b"x" * STATE_BYTES_MAX

    def test_who_resigned_stores_nothing(self, backend: Backend) -> None:
        store = backend.open()
        first = won(store, "a:1")
        first.save(b"kept")
        first.resign()
        first.resign()
        assert first.assured_s() <= 0
        with pytest.raises(LeadershipLostError, match=rf"term {first.number} .* is over"):
            first.save(b"late")
        with pytest.raises(LeadershipLostError):
            first.load()
        assert won(store, "a:1").load() == b"kept"

    def test_who_was_put_aside_stores_nothing(self, backend: Backend) -> None:
        one, other = backend.open(), backend.open()
        first = won(one, "a:1")
        first.save(b"first")
        backend.put_leader_aside()
        second = won(other, "b:1")
        assert second.load() == b"first"
        second.save(b"second")
        with pytest.raises(LeadershipLostError):
            first.save(b"late")
        assert first.lost.is_set()
        first.resign()
        assert second.load() == b"second"
        assert other.leader(1) == Leader("b:1", second.number)

    def test_anybody_finds_the_leader(self, backend: Backend) -> None:
        one, other = backend.open(), backend.open()
        assert other.leader(1) is None
        term = won(one, "[::1]:4711")
        assert other.leader(1) == one.leader(1) == Leader("[::1]:4711", term.number)
        term.resign()
        assert other.leader(1) is None

    def test_a_watch_tells_of_every_change(self, backend: Backend) -> None:
        one, other = backend.open(), backend.open()
        heard, late = Heard(), Heard()
        watch = other.watch_leader(heard)
        heard.wait_for(None)
        numbers = []
        for address in ("a:1", "b:1", "c:1"):
            term = won(one, address)
            numbers.append(term.number)
            heard.wait_for(Leader(address, term.number))
            assert watch.newest == Leader(address, term.number)
            assert watch.trouble is None
            term.resign()
            heard.wait_for(None)
        assert numbers == sorted(set(numbers))
        watch.close()
        before = list(heard.leaders)
        term = won(one, "d:1")
        other.watch_leader(late)
        late.wait_for(Leader("d:1", term.number))
        assert heard.leaders == before

    def test_a_watch_can_be_closed_from_within(self, backend: Backend) -> None:
        store, told = backend.open(), threading.Event()

        def close(leader: Leader | None) -> None:
            eventually(lambda: bool(watches))
            watches[0].close()
            told.set()

        watches: list[object] = []
        watches.append(store.watch_leader(close))
        assert told.wait(5)

    def test_a_killed_leader_is_replaced(self, backend: Backend) -> None:
        candidate = Candidate(backend.where, "killed:1")
        try:
            number = int(candidate.line().removeprefix("leads "))
            candidate.say("its state")
            assert candidate.line() == "saved"
            store = backend.open()
            assert store.leader(1) == Leader("killed:1", number)
            assert store.campaign("b:1", 0.3) is None
        finally:
            candidate.kill()
        began = time.monotonic()
        term = won(store, "b:1", TAKE_OVER_S_MAX)
        print(f"took over after {time.monotonic() - began:.2f} s")
        assert term.number > number
        assert term.load() == b"its state"

    def test_a_stopped_leader(self, backend: Backend) -> None:
        """In etcd it is replaced, and can store nothing when it goes on; on one host it stays."""
        candidate = Candidate(backend.where, "stopped:1")
        try:
            candidate.line()
            candidate.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, candidate.process.pid, os.WSTOPPED)
            store = backend.open()
            if backend.is_files:
                assert store.campaign("b:1", 1.0) is None
                candidate.process.send_signal(signal.SIGCONT)
                candidate.say("on")
                assert candidate.line() == "saved"
                return
            term = won(store, "b:1", TAKE_OVER_S_MAX)
            term.save(b"new")
            candidate.process.send_signal(signal.SIGCONT)
            candidate.say("late")
            assert candidate.line() == "LeadershipLostError True False"
            assert term.load() == b"new"
        finally:
            candidate.kill()

    def test_never_two_at_once(self, backend: Backend) -> None:
        numbers: list[int] = []
        leading: list[str] = []
        troubles: list[str] = []

        def take_turns(address: str) -> None:
            store = backend.open()
            for _ in range(3):
                term = won(store, address, 20)
                leading.append(address)
                numbers.append(term.number)
                term.save(f"{len(numbers)}".encode())
                if leading != [address] or term.load() != f"{len(numbers)}".encode():
                    troubles.append(f"{leading} at once")
                leading.remove(address)
                term.resign()

        threads = [threading.Thread(target=take_turns, args=(f"{n}:1",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert troubles == []
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 12

    def test_what_can_not_be_stored_is_refused(self, backend: Backend) -> None:
        store = backend.open()
        for address in ("", "x" * 1025):
            with pytest.raises(UsageError, match="has 1 to 1024 bytes"):
                store.campaign(address, 1)
        term = won(store, "a:1")
        with pytest.raises(UsageError, match="is more than the 1048576"):
            term.save(b"x" * (STATE_BYTES_MAX + 1))
        assert term.load() is None

    def test_close_ends_everything(self, backend: Backend) -> None:
        """The leak check sees to threads and descriptors."""
        store, other = backend.open(), backend.open()
        heard = Heard()
        store.watch_leader(heard)
        term = won(store, "a:1")
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 2
        assert term.lost.is_set()
        with pytest.raises(StoreUnreachableError, match="was closed here"):
            store.campaign("a:1", 1)
        assert other.leader(1) is None
        assert not any(t.name in ("lease", "leader-watch") for t in threading.enumerate())
