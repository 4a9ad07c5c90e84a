"""Python run in processes that are forked from one in which much is imported already."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess

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


def python(folder: Path, *command: str, timeout_s: float = 100) -> CompletedProcess[str]:
    """``python COMMAND`` in a folder, without the seconds that its imports take."""
    process = FORKED.Process(target=_script, args=(list(command), folder))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError((folder / ".stderr").read_text())
    said = [(folder / name).read_text() for name in (".stdout", ".stderr")]
    return CompletedProcess(list(command), process.exitcode, *said)


def _script(command: list[str], folder: Path) -> None:
    """Begins and ends as an interpreter does."""
    for number, name in ((1, ".stdout"), (2, ".stderr")):
        fd = os.open(folder / name, os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o644)
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(folder)
    sys.argv = command
    sys.path.insert(0, str(folder))
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # the root of a process
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
