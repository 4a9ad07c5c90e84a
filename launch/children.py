"""The front's child processes: started together, noticed when they end, none left behind.

The front is a subreaper: whatever an ended agent leaves behind becomes the front's child, and is
killed at that moment.  So "no child is left" means that nothing of the job is left; own_process.py
sees to it that the front has no children of others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ftrain.comms.environment import inherited_environment
from ftrain.comms.process import (
    NO_DESCRIPTOR,
    become_subreaper,
    describe_returncode,
    python_command,
)
from ftrain.launch.pulse import Pulse


class Child:
    """One started process."""

    def __init__(
        self, name: str, popen: subprocess.Popen[bytes], pulse: Pulse | None = None
    ) -> None:
        self.name = name
        self.pid = popen.pid
        self.started_s = time.monotonic()
        self.popen = popen
        self.pulse = pulse
        self.lost = ""  # why it was given up and killed, in words

    @property
    def ended(self) -> str:
        """How it ended, in words; empty while it lives."""
        code = self.popen.returncode
        return "" if code is None else self.lost or describe_returncode(code)

    @property
    def age_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.started_s

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        if self.popen.returncode is None:  # not waited for, so the number is still its own
            os.kill(self.pid, number)


class Children:
    """All child processes of the front. Call :meth:`reap` on SIGCHLD."""

    def __init__(self) -> None:
        become_subreaper()
        self._children: dict[int, tuple[Child, Callable[[Child], None]]] = {}

    def start(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        on_end: Callable[[Child], None],
        *,
        pass_fds: Sequence[int] = (),
        stdout: int | None = None,
        stderr: int | None = None,
        pulse: Pulse | None = None,
    ) -> Child:
        """Start ``python -m module arguments`` in a process group of its own, so that a Ctrl-C at
        the terminal reaches the front alone. One with a ``pulse`` has to answer it. OSError: the
        system has no process or descriptor left."""
        if pulse is not None:
            arguments = [*arguments, "--pulse-fd", str(pulse.child_fd)]
            pass_fds = [*pass_fds, pulse.child_fd]
        try:
            popen = subprocess.Popen(
                [*python_command(), "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=inherited_environment(),
                pass_fds=pass_fds,
                process_group=0,
            )
        except OSError:
            if pulse is not None:
                pulse.close()
            raise
        if pulse is not None:
            pulse.started()
        child = Child(name, popen, pulse)
        self._children[child.pid] = (child, on_end)
        return child

    def reap(self) -> None:
        """Notice every child that ended, and end everything that came to us as an orphan."""
        while (pid := ended_child()) is not None:
            known = self._children.pop(pid, None)
            if known is None:
                os.waitpid(pid, 0)
                continue
            child, on_end = known
            child.popen.wait()
            if child.pulse is not None:
                child.pulse.close()
            on_end(child)
        self._kill_orphans()

    def kill_silent(self) -> list[Child]:
        """Kill the children that are stopped or do not answer any more; ``lost`` says which it is.
        To be called every ``PERIOD_S``."""
        found = []
        for child, _ in list(self._children.values()):
            if child.pulse is None or child.lost:
                continue
            child.lost = child.pulse.look(child.pid)
            if child.lost:
                child.kill()
                found.append(child)
        return found

    def kill_all(self) -> None:
        """SIGKILL every child."""
        for child, _ in list(self._children.values()):
            child.kill()
        self._kill_orphans()

    def none_left(self) -> bool:
        """Whether every child and every orphan is gone."""
        self.reap()
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        return False

    def _kill_orphans(self) -> None:
        try:
            found = children_of(os.getpid())
        except OSError:  # no descriptor left: they are looked for again with the next end
            return
        for pid in found:
            if pid not in self._children:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def children_of(parent: int) -> list[int]:
    """Pids of the live processes whose parent is ``parent``. OSError: no descriptor is left."""
    found: list[int] = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                raise
            continue  # it ended meanwhile
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def ended_child() -> int | None:
    """A child that has ended and was not waited for yet, left as it is."""
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if info is None else info.si_pid
