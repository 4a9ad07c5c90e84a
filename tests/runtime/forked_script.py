"""Python run in processes that are forked from one in which much is imported already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest

FORKED = multiprocessing.get_context("forkserver")


@contextmanager
def imported(*modules: str, **environment: str) -> Iterator[None]:
    """While this lasts, processes of FORKED begin with these modules, which take seconds to import,
    and with threads as ``environment`` wants them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", **environment}.items():
            patch.setenv(name, value)
        FORKED.set_forkserver_preload(list(modules))
        forkserver.ensure_running()
        yield
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # by itself only at the end


def run(command: list[str], environment: dict[str, str], log: Path, fresh: bool = False) -> None:
    """As ``python COMMAND`` with this environment besides the one that is there; ``fresh``: in an
    interpreter of its own."""
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    os.chdir(log.parent)
    os.environ.update(environment)
    if fresh:
        os.execv(sys.executable, [sys.executable, *command])
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
