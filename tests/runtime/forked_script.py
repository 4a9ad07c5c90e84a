"""A script run in a process that was forked from one in which much is imported already."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def run(command: list[str], environment: dict[str, str], log: Path, fresh: bool) -> None:
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
