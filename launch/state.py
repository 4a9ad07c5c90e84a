"""The coordinator's hard state on disk.

One thing must never be lost: the highest epoch granted, because an epoch granted twice could be two
groups' fence.  It has a small file of its own, overwritten in place and synced (0.1 ms where a
synced rename takes ten times as long), and is written first.  The rest only has to survive the
process, since a host that loses power loses the agents and ranks that it speaks of as well.

A disk that takes nothing does not end the training: the state is kept in memory and stored later.
Until then an epoch is unique by what else knows of it: the agents' reports, and the fences of the
durable versions, above which a coordinator always begins.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from ftrain.checkpoint.durable import DurableStore
from ftrain.comms.errors import FtrainError, RunDirectoryError
from ftrain.comms.events import read_events
from ftrain.comms.protocol.messages import VersionId
from ftrain.comms.protocol.records import MembershipHard
from ftrain.comms.wire import BAD_INPUT

_DIGITS = 20


class HardStore:
    """``coordinator.json`` and ``epoch`` in ``directory``.

    Raises :class:`RunDirectoryError` when they can't be read or written: guessing is not allowed.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "coordinator.json"
        self._epoch_path = directory / "epoch"
        self._unsaved: MembershipHard | None = None
        try:
            self._fd = os.open(self._epoch_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._epoch = self._read_epoch()
        except (OSError, ValueError) as error:
            raise RunDirectoryError(
                f"{self._epoch_path} can't be used ({error}): use another run directory"
            ) from None

    def load(self) -> MembershipHard | None:
        """What an earlier coordinator of this run stored; None when there was none."""
        try:
            hard = msgspec.json.decode(self._path.read_bytes(), type=MembershipHard)
        except FileNotFoundError:
            return MembershipHard(epoch=self._epoch) if self._epoch else None
        except BAD_INPUT:
            # Only the epoch is synced; the rest may be lost with the host, and with its agents.
            return MembershipHard(epoch=self._epoch) if self._epoch else None
        except OSError as error:
            raise RunDirectoryError(
                f"{self._path} can't be read as the coordinator's state ({error}): use another "
                "run directory"
            ) from None
        if self._epoch > hard.epoch:  # granted, and then the process or the host died
            return replace(hard, epoch=self._epoch, formation=None)
        return hard

    def save(self, hard: MembershipHard) -> str:
        """Store; when this returns the epoch is on stable storage. Otherwise the answer is why the
        disk does not take it, and :meth:`retry` tries again."""
        self._unsaved = hard
        return self.retry()

    def retry(self) -> str:
        """Store what could not be stored; why it still can't, or empty: all is."""
        hard = self._unsaved
        if hard is None:
            return ""
        fresh = self._path.with_suffix(".json.new")
        try:
            if hard.epoch > self._epoch:
                os.pwrite(self._fd, b"%0*d" % (_DIGITS, hard.epoch), 0)
                os.fdatasync(self._fd)
                self._epoch = hard.epoch
            fresh.write_bytes(msgspec.json.encode(hard))
            fresh.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                fresh.unlink()  # a part of it would take what room there is
            return error.strerror or str(error)
        self._unsaved = None
        return ""

    def close(self) -> None:
        """Close the files."""
        os.close(self._fd)

    def _read_epoch(self) -> int:
        text = os.pread(self._fd, _DIGITS, 0)
        if not text:
            os.pwrite(self._fd, b"0" * _DIGITS, 0)
            os.fsync(self._fd)
            directory = os.open(self._epoch_path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(directory)  # the file itself has to be found again too
            os.close(directory)
        return int(text or b"0")


def withdrawn_in(events: Path) -> set[VersionId]:
    """What ranks withdrew before this process began: such versions look as good as any."""
    found = set()
    for event in read_events(events):
        if event["kind"] == "withdrawn":
            with suppress(msgspec.ValidationError):
                found.add(msgspec.convert(event.get("data"), VersionId))
    return found


def begin_with(
    hard: MembershipHard | None, launch: str, store: DurableStore, withdrawn: Collection[VersionId]
) -> MembershipHard:
    """What a coordinator of ``launch`` goes on from, given what the one before stored.

    It counts on no version that was withdrawn, and begins above every fence in the checkpoint
    directory: ranks that ran without a launcher count their own fences, and what they saved is to
    be resumed from too; and a full disk may have kept an epoch from being stored.
    """
    hard = hard or MembershipHard()
    if hard.durable in withdrawn:
        hard = replace(hard, durable=None)
    try:
        newest = store.survey().fence
    except FtrainError:
        if hard.launch != launch:
            raise
        newest = 0  # a directory that went away while the job runs is not this process's end
    return replace(hard, epoch=newest, formation=None) if newest > hard.epoch else hard
