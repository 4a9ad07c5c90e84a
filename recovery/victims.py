"""Processes that are broken on purpose, held so that never another one is hit."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from types import TracebackType

from ftrain.comms.errors import ConfigError
from ftrain.comms.process import start_ticks
from ftrain.recovery.node_file import NodeFile

_SCANS_MAX = 100
_CGROUP_MOUNT = Path("/sys/fs/cgroup")


class Victim:
    """One process, held by a descriptor: its number may be reused, this can't.

    ProcessLookupError when there is no such process, or when ``start`` (clock ticks since boot)
    shows that it is a later one of the same number.
    """

    def __init__(self, pid: int, start: int | None = None) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        try:
            later = start is not None and start_ticks(pid) != start
        except ProcessLookupError:
            later = True
        if later or self.ended:
            self.close()
            raise ProcessLookupError(f"process {pid} is gone")

    @property
    def ended(self) -> bool:
        """Whether it has ended (its parent may not have noticed yet)."""
        watched = select.poll()
        watched.register(self._fd, select.POLLIN)
        return bool(watched.poll(0))

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it is gone."""
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def seize_node(file: NodeFile) -> list[Victim]:
    """Stop every process of a node, those that it started meanwhile included; agent first.

    Stopped, none of them can start another or notice that one is missing; killed together after
    that, the node goes dark as if its power had failed.
    """
    victims: dict[int, Victim] = {}
    for _ in range(_SCANS_MAX):
        fresh = [pid for pid in _tree(file) if pid not in victims]
        if not fresh:
            break
        for pid in fresh:
            try:
                victims[pid] = Victim(pid, file.starts.get(pid))
            except ProcessLookupError:
                continue
            victims[pid].send(signal.SIGSTOP)
    return list(victims.values())


def _tree(file: NodeFile) -> list[int]:
    """The node's processes and all their descendants, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            parent, state = _parent(int(entry))
            if state not in "ZX":
                children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    waiting = [pid for pid in file.pids if _is_same(pid, file.starts.get(pid))]
    while waiting:
        pid = waiting.pop(0)
        if pid not in found:
            found.append(pid)
            waiting.extend(children.get(pid, ()))
    return found


def _is_same(pid: int, start: int | None) -> bool:
    try:
        return start is not None and start_ticks(pid) == start and _parent(pid)[1] not in "ZX"
    except ProcessLookupError:
        return False


def _parent(pid: int) -> tuple[int, str]:
    """Parent and state of a process; state X when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, "X"
    state, parent = text.rpartition(")")[2].split()[:2]
    return int(parent), state


class MemoryTrap:
    """A memory cgroup in which one process may allocate only a little more.

    The kernel then kills that process and no other for lack of memory.  Raises
    :class:`ConfigError` where no such cgroup can be made.
    """

    def __init__(self, pid: int, allowance_bytes: int) -> None:
        # What the process has now stays charged to the cgroup it comes from, in v1 and v2.
        version, mount = _memory_mount()
        self._path = mount / f"ftrain-oom-{pid}"
        try:
            self._path.mkdir(exist_ok=True)
            limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
            (self._path / limit).write_text(str(allowance_bytes))
            (self._path / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            self.remove()
            raise ConfigError(f"fault oom: can't use {self._path}: {error.strerror}") from None

    def remove(self) -> bool:
        """Take the cgroup away; False while its process has not quite gone."""
        try:
            self._path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


def check_memory_trap() -> None:
    """Raise :class:`ConfigError` unless this user can make a memory cgroup here."""
    _, mount = _memory_mount()
    probe = mount / f"ftrain-oom-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise ConfigError(
            f"fault oom: can't make a memory cgroup in {mount} ({error.strerror}), which takes"
            " root; leave the fault out"
        ) from None


def _memory_mount() -> tuple[int, Path]:
    """Version and top of the cgroup tree that limits memory."""
    first = _CGROUP_MOUNT / "memory"
    if (first / "memory.limit_in_bytes").exists():
        return 1, first
    try:
        controllers = (_CGROUP_MOUNT / "cgroup.subtree_control").read_text().split()
    except OSError:
        controllers = []
    if "memory" not in controllers:
        raise ConfigError(
            f"fault oom: {_CGROUP_MOUNT} has no memory controller to limit one process with;"
            " leave the fault out"
        )
    return 2, _CGROUP_MOUNT
