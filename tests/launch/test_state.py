from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from launching import small_disk

from ftrain.comms.errors import RunDirectoryError
from ftrain.comms.protocol.messages import VersionId
from ftrain.comms.protocol.records import MembershipHard
from ftrain.launch.state import HardStore

HARD = MembershipHard(launch="1", epoch=7, durable=VersionId(6, 40), failures_in_row=2)


def reopened(directory: Path) -> MembershipHard | None:
    store = HardStore(directory)
    hard = store.load()
    store.close()
    return hard


def saved(directory: Path, *states: MembershipHard) -> None:
    store = HardStore(directory)
    for hard in states:
        store.save(hard)
    store.close()


def test_state_survives_the_process(tmp_path: Path) -> None:
    assert reopened(tmp_path) is None
    saved(tmp_path, HARD, dataclasses.replace(HARD, failures_in_row=3))
    assert reopened(tmp_path) == dataclasses.replace(HARD, failures_in_row=3)


def test_epoch_survives_what_the_rest_does_not(tmp_path: Path) -> None:
    """Power is lost between the two files, or before the second reached the disk."""
    saved(tmp_path, HARD)
    before = (tmp_path / "coordinator.json").read_bytes()
    saved(tmp_path, dataclasses.replace(HARD, epoch=8))
    (tmp_path / "coordinator.json").write_bytes(before)
    assert reopened(tmp_path) == dataclasses.replace(HARD, epoch=8, formation=None)
    (tmp_path / "coordinator.json").unlink()
    assert reopened(tmp_path) == MembershipHard(epoch=8)


def test_a_full_disk_keeps_nothing_from_the_coordinator(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as fill:
        store = HardStore(tmp_path / "disk")
        assert store.save(HARD) == ""
        fill(True)
        newer = dataclasses.replace(HARD, epoch=8, failures_in_row=3)
        assert "No space left" in store.save(newer)
        assert "No space left" in store.retry()
        # the epoch is overwritten in place, so it is there whatever dies now
        assert reopened(tmp_path / "disk") == dataclasses.replace(HARD, epoch=8)
        fill(False)
        assert store.retry() == ""
        assert reopened(tmp_path / "disk") == newer
        store.close()


@pytest.mark.parametrize("torn", ["", '{"launch": "1", "ep', "no state at all"])
def test_what_was_not_synced_may_be_torn(tmp_path: Path, torn: str) -> None:
    saved(tmp_path, HARD)
    (tmp_path / "coordinator.json").write_text(torn)
    assert reopened(tmp_path) == MembershipHard(epoch=7)


def test_a_garbled_epoch_is_not_guessed_at(tmp_path: Path) -> None:
    saved(tmp_path, HARD)
    (tmp_path / "epoch").write_text("no state at all")
    with pytest.raises(RunDirectoryError, match="epoch can't be"):
        reopened(tmp_path)
