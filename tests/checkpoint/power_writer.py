"""A process that saves and publishes versions until the power is cut, by itself or from outside.

What it says on its standard output is what its caller had been told before the cut.  Usage::

    power_writer.py DIRECTORY SEED CUT_AT [HOW]

``CUT_AT``: how many operations on the file system it does before the cut; 0: somebody else cuts.
``HOW``: "kill" to be killed instead of having the power cut, or an operation that it leaves out.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import struct
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from image_samples import make_identity, make_image, make_plan

import ftrain.checkpoint.directory
import ftrain.checkpoint.durable
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.files import NewFile
from ftrain.checkpoint.retention import Retention
from ftrain.comms.errors import FtrainError
from ftrain.comms.protocol.messages import VersionId

RUN = "run"
RANKS = 2
KEEP = 2
VERSIONS = 7
OPERATIONS = 420  # about as many as a writer does in all
SIZES = (30_000, 9_000)

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2
_OPERATIONS = (
    *("open", "posix_fallocate", "pwrite", "fsync"),
    *("link", "replace", "unlink", "mkdir", "rmdir"),
)


def cut_power(fd: int) -> None:
    """Make the ext4 file system that has the open ``fd`` forget what is not on the disk."""
    fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))


@cache
def image_of(fence: int, step: int, rank: int) -> bytearray:
    """What a rank saves: the same whenever it is asked for."""
    identity = make_identity(step, rank, RANKS, RUN, epoch=fence)
    return make_image(identity, make_plan(SIZES), seed=(fence * 10_000 + step) * 10 + rank)


class Countdown:
    """Cuts the power before or after a certain one of this process's operations."""

    def __init__(self, folder: str, cut_at: int, how: str = "") -> None:
        self._fd = os.open(folder, os.O_RDONLY)
        self._killed = how == "kill"
        self._left = cut_at
        self._lock = threading.Lock()
        for name in _OPERATIONS if cut_at else ():
            setattr(os, name, self._counted(getattr(os, name)))

    def step(self) -> None:
        """One operation more was done, or is about to be."""
        with self._lock:
            self._left -= 1
            if self._left == 0 and self._killed:
                os.kill(os.getpid(), signal.SIGKILL)
            elif self._left == 0:
                cut_power(self._fd)

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.step()
            done = operation(*arguments, **options)
            self.step()
            return done

        return counted


class Writer:
    """Saves versions as a job does that is restarted now and then."""

    def __init__(self, directory: str, seed: int, countdown: Countdown) -> None:
        self._store = DurableStore(directory)
        self._chance = random.Random(seed)
        self._countdown = countdown
        self._fence = self._store.survey().fence
        self._step = 0
        self._held: VersionId | None = None  # in memory

    def run(self) -> None:
        """Until the power is gone, or all is done."""
        self._begin()
        for _ in range(VERSIONS):
            self._step += self._chance.randrange(1, 4)
            self._held = VersionId(self._fence, self._step + self._chance.randrange(3))
            self._save(self._fence, self._step)
            self._store.sweep(Retention(KEEP), RUN)
            if self._chance.random() < 0.25:
                older, late = self._fence, self._step + 50
                self._begin()
                self._save(older, late)  # by a process of the epoch that is over
        self._say("done")

    def _begin(self) -> None:
        survey = self._store.survey()
        self._fence = survey.fence + 1
        parent = survey.versions[0].version if survey.versions else None
        if self._held is not None and self._chance.random() < 0.5:
            parent = max(self._held, parent or self._held)
        self._step = parent.step if parent else 0
        words = f"{self._fence} {parent.epoch if parent else 0} {self._step}"
        self._say(f"begins {words}")
        self._store.begin_fence(self._fence, RUN, parent)
        self._say(f"begun {words}")

    def _save(self, fence: int, step: int) -> None:
        version = VersionId(fence, step)
        for rank in range(RANKS):
            self._store.write_image(fence, version, rank, image_of(fence, step, rank))
        self._say(f"publishes {fence} {step}")
        self._store.publish_written(fence, version, RUN, RANKS)
        self._say(f"published {fence} {step}")

    def _say(self, words: str) -> None:
        os.write(1, f"{words}\n".encode())
        self._countdown.step()


def main(directory: str, seed: str, cut_at: str, how: str = "") -> None:
    if how == "no folder sync":
        for module in (ftrain.checkpoint.directory, ftrain.checkpoint.durable):
            module.sync_folder = lambda folder: None
    elif how == "no file sync":
        NewFile.sync = lambda file: None  # type: ignore[method-assign]
    elif how not in ("", "kill"):
        raise SystemExit(f"there is no {how!r}")
    Path(directory).mkdir(exist_ok=True)
    try:
        Writer(directory, int(seed), Countdown(directory, int(cut_at), how)).run()
    except FtrainError as error:  # one sentence, never a traceback
        print(f"failed: {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
