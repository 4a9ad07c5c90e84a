"""The store in a directory: writers that are killed, files that are damaged, broken variants."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_samples import Candidate, won

from ftrain.comms.errors import LeadershipLostError, RunDirectoryError, StoreUnreachableError
from ftrain.comms.store import files
from ftrain.comms.store.files import FileStore, FileTerm


def check_killed_savers(folder: Path) -> None:
    """The state is whole, and not older than what was said to be saved."""
    rng, last = random.Random(3), 0
    for _ in range(4):
        candidate = Candidate({"folder": str(folder)}, "a:1")
        assert candidate.line().startswith("leads")
        for number in range(last + 1, last + 61):
            candidate.say(f"{number} " * 20_000)
        saved = last
        for _ in range(rng.randint(1, 20)):
            assert candidate.line() == "saved"
            saved += 1
        time.sleep(rng.uniform(0, 0.002))  # anywhere in a save
        candidate.kill()
        store = FileStore(folder)
        term = won(store, "b:1")
        words = (term.load() or b"").decode().split()
        store.close()
        assert len(words) == 20_000
        assert len(set(words)) == 1, f"a mixture of {set(words)}"
        last = int(words[0])
        assert last >= saved


def test_the_state_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    check_killed_savers(tmp_path)


def check_put_aside(folder: Path) -> None:
    """Whose lock was taken away stores nothing more, also before the other one has stored."""
    one, other = FileStore(folder), FileStore(folder)
    try:
        first = won(one, "a:1")
        first.save(b"1")
        (folder / "lock").unlink()
        assert won(other, "b:1").number > first.number
        with pytest.raises(LeadershipLostError):
            first.save(b"late")
    finally:
        one.close()
        other.close()


def never_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FileTerm, "_check", lambda self: None)


def never_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "_newest_term", lambda directory: 0)


@pytest.mark.parametrize("mutant", [never_checked, never_counted])
def test_a_broken_variant_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_put_aside(tmp_path / "right")
    with monkeypatch.context() as patch:
        mutant(patch)
        with pytest.raises((AssertionError, LeadershipLostError, pytest.fail.Exception)):
            check_put_aside(tmp_path / "wrong")


def test_a_leader_that_has_not_given_its_address_is_not_confused_with_the_last_one(
    tmp_path: Path,
) -> None:
    store = FileStore(tmp_path)
    term = won(store, "a:1")
    (tmp_path / "term").write_text(f"{term.number + 1}\n")
    assert store.leader(1) is None
    store.close()


def test_what_can_not_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"can't hold the coordinator's state .*another"):
        FileStore(tmp_path / "file" / "store")
    store = FileStore(tmp_path / "store")
    term = won(store, "a:1")
    (tmp_path / "store" / "leader").write_bytes(b"{")
    with pytest.raises(RunDirectoryError, match="leader does not hold what"):
        store.leader(1)
    (tmp_path / "store" / "term").write_text("first")
    with pytest.raises(RunDirectoryError, match="term does not hold what"):
        term.save(b"")
    (tmp_path / "store" / "term").write_text(f"{term.number}")
    (tmp_path / "store" / "state.new").mkdir()
    with pytest.raises(StoreUnreachableError, match=r"can't be used .*look at the directory"):
        term.save(b"")
    (tmp_path / "store" / "state.new").rmdir()
    term.save(b"again")
    assert term.load() == b"again"
    store.close()
