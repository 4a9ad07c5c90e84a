"""Launches of small scripts as users make them, for the tests of the front."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MARK = "LAUNCH_UNDER_TEST"  # inherited by every process of a launch


class Launch:
    """One ``ftrain launch`` as a process of its own."""

    def __init__(self, folder: Path, *tokens: str, script: str = "train.py") -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self._mark = f"{MARK}={uuid.uuid4()}"
        name, value = self._mark.split("=")
        self._log = folder / f"launch-{value}.err"
        with self._log.open("wb") as log:
            program = [sys.executable, "-m", "ftrain.launch.cli", "launch", "--run-dir", "run"]
            self.popen = subprocess.Popen(
                [*program, *tokens, script],
                cwd=folder,
                env={**os.environ, name: value},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def shown(self) -> str:
        """All that was printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def steps(self) -> bool:
        """Whether progress was shown."""
        return re.search(r"^step \d", self.shown, re.MULTILINE) is not None

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code; the launch must end by itself."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launch did not end; it printed:\n{self.shown}") from None

    def processes(self) -> dict[int, str]:
        """Live processes of this launch besides the front: pid -> command line."""
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) in (os.getpid(), self.popen.pid):
                continue
            with contextlib.suppress(OSError):
                environment = Path("/proc", entry, "environ").read_bytes().split(b"\0")
                if self._mark.encode() in environment:
                    command = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry)] = command.decode(errors="replace")
        return found

    def pid_of(self, module: str) -> int:
        """The process that runs ``module`` and is a child of the front."""
        return wait_for(lambda: self._find(module))

    def kill(self, module: str) -> int:
        """SIGKILL the process that runs ``module``; returns its pid."""
        pid = self.pid_of(module)
        os.kill(pid, signal.SIGKILL)
        return pid

    def _find(self, module: str) -> int:
        for pid, command in self.processes().items():
            if f"-m {module} " in command:
                return pid
        return 0

    def gone_after(self, limit_s: float) -> bool:
        """Whether every process is gone within the limit."""
        deadline = time.monotonic() + limit_s
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


@contextlib.contextmanager
def launched(folder: Path, source: str, *tokens: str) -> Iterator[Launch]:
    """Launch a script with this source; whatever is left at the end is killed and is a failure."""
    (folder / "train.py").write_text(source)
    launch = Launch(folder, *tokens)
    try:
        yield launch
    except BaseException as error:
        error.add_note(f"the launch showed:\n{launch.shown}")
        raise
    finally:
        launch.popen.kill()
        launch.popen.wait()
        left = {} if launch.gone_after(1.0) else launch.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"left behind: {left}"


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[bool], None]]:
    """A file system of that size at ``place``; what is yielded fills it up, or makes room again."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user can't mount a file system")
    filler = place / "filler"

    def fill(full: bool) -> None:
        if not full:
            filler.unlink()
            return
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):  # a full disk raises
                pass

    try:
        yield fill
    finally:
        subprocess.run(["umount", str(place)], check=True)


def wait_for(question: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + timeout_s
    while not (answer := question()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(0.005)
    return answer
