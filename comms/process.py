"""Facts and duties of Linux processes: parents, ends, memory."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ftrain
from ftrain.comms.errors import LocalProtocolError

# What an OSError says when this process, or the system, has no descriptor left.
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})

# What asks a whole job to save and stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_DESCRIPTORS = 65536  # some programs close as many at start as they may have
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # glibc has no function for this system call
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63


def die_with_parent(expected_parent_pid: int) -> None:
    """Make the kernel SIGKILL this process when its parent dies.

    To be called from the main thread, because the kernel forgets the wish when the thread that
    made it ends. A parent that died before the call would never be noticed, so the parent is
    looked at again afterwards; if it is not ``expected_parent_pid`` this process kills itself.
    The parent must have forked from a thread that lives as long as it: the kernel watches that
    thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise LocalProtocolError("die_with_parent must be called from the main thread")
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected_parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def ignore_stop_signals() -> None:
    """Outlive the signals that ask the job to stop: systemd and SLURM send them to everybody, but
    saving needs this process. Who started it decides when it ends, by SIGKILL."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def become_subreaper() -> None:
    """Make this process the parent of its orphaned descendants, so that it can wait for them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def lower_priority(nice: int) -> None:
    """Let others go first: of this thread the CPU time, and its disk accesses as far as the disk's
    scheduler heeds that. Best effort: a sandbox may forbid it."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, nice)  # on Linux a thread has one of its own
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        who_process, lowest_best_effort = 1, 2 << 13 | 7
        ctypes.CDLL(None).syscall(number, who_process, thread, lowest_best_effort)


def let_others_run_on() -> None:
    """This thread takes its share of CPU time, but no core away in the moment when it is woken.

    Who wakes it would otherwise stand still for a time slice.  Best effort: a sandbox may forbid
    it.
    """
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # 0: this thread


def pidfd_open(pid: int) -> int:
    """A descriptor that becomes readable when process ``pid`` ends (ProcessLookupError: gone)."""
    return os.pidfd_open(pid)


def start_ticks(pid: int) -> int:
    """When ``pid`` started, in clock ticks since boot; with it a pid can't be mistaken for a later
    process of the same number. Raises ProcessLookupError when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"there is no process {pid}") from None
    return int(text.rpartition(")")[2].split()[19])  # the name in brackets may hold anything


def allow_many_descriptors() -> None:
    """Raise this process's limit of open descriptors, as far as it may and not beyond reason.

    A node with many ranks holds several for each of them. Children inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def set_oom_score_adj(score: int) -> bool:
    """Ask the kernel to prefer (positive) or spare (negative) this process when memory runs out.

    Returns whether it agreed: lowering needs a privilege that containers seldom have.
    """
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError:
        return False
    return True


def describe_exit(status: int) -> str:
    """A wait status in words: ``SIGKILL``, ``exit code 3``."""
    return describe_returncode(os.waitstatus_to_exitcode(status))


def describe_returncode(code: int) -> str:
    """An exit code in words; negative means a signal, as in :mod:`subprocess`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # real-time signals have no names of their own
        return f"signal {-code}"


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken without swapping or being killed, in bytes.

    The least of MemAvailable and what every enclosing cgroup (v1 or v2) still allows; its page
    cache counts as free, because the kernel gives it back. ``root`` is for tests.
    """
    limits = [_meminfo_bytes(root / "proc/meminfo")]
    for directory in _memory_cgroups(root):
        limit = _number(directory, "memory.max", "memory.limit_in_bytes")
        usage = _number(directory, "memory.current", "memory.usage_in_bytes")
        if limit is not None and usage is not None and limit < _UNLIMITED_BYTES:
            limits.append(max(0, limit - usage + _reclaimable_bytes(directory)))
    return min(limits)


@dataclass(frozen=True, slots=True)
class OomKills:
    """How many processes the kernel has killed for lack of memory so far; 0: it does not count."""

    own: int  # in this cgroup and those below it
    host: int  # anywhere that can be seen

    def explain(self, before: OomKills) -> str:
        """How surely a SIGKILL between ``before`` and now was such a kill; empty: it was not."""
        if self.own > before.own:
            return "killed by the kernel because memory ran out"
        if self.host > before.host:
            return "killed, probably by the kernel because memory ran out"
        return ""


def oom_kills(root: Path = Path("/")) -> OomKills:
    """The present counts, to be compared with earlier ones."""
    own, host = 0, _keyed_number(root / "proc/vmstat", "oom_kill")
    for number, directory in enumerate(_memory_cgroups(root)):
        for name in ("memory.events", "memory.oom_control"):
            count = _keyed_number(directory / name, "oom_kill")
            own = count if number == 0 and count else own
            host = max(host, count)
    return OomKills(own, host)


def python_command() -> list[str]:
    """The interpreter, keeping the user's directory off the module path (a ``queue.py`` there must
    not shadow the standard library's), unless that is where ftrain itself is run from."""
    root = Path(ftrain.__file__).resolve().parent.parent
    first = Path(sys.path[0] or ".").resolve()
    return [sys.executable] if first == root else [sys.executable, "-P"]


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def _meminfo_bytes(path: Path) -> int:
    return _keyed_number(path, "MemAvailable:") * 1024


def _memory_cgroups(root: Path) -> Iterator[Path]:
    """This process's memory cgroup and all that enclose it, where they can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
        elif not controllers:
            mount = root / "sys/fs/cgroup"
        else:
            continue
        # Inside a container the name may lie outside what is mounted: then the mount's own top
        # is the container's group.
        directory = mount / name.lstrip("/")
        while directory != mount:
            if directory.is_dir():
                yield directory
            directory = directory.parent
        yield mount


def _number(directory: Path, *names: str) -> int | None:
    for name in names:
        try:
            return int((directory / name).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None


def _reclaimable_bytes(directory: Path) -> int:
    stat = directory / "memory.stat"
    return _keyed_number(stat, "total_inactive_file") or _keyed_number(stat, "inactive_file")


def _keyed_number(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == key:
            return int(words[1])
    return 0
