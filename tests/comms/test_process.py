"""Processes: who dies with whom, exits in words, memory that is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftrain.comms import process
from ftrain.comms.errors import LocalProtocolError


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def wait_gone(pid: int, timeout_s: float = 5.0) -> bool:
    """Whether ``pid`` ends within the time; it need not be our child."""
    try:
        fd = process.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)


PARENT = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
signal.pause()
"""

CHILD = """
import os, signal, sys
from ftrain.comms.process import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
signal.pause()
"""


def test_a_child_dies_with_its_parent() -> None:
    with run(PARENT, CHILD) as parent:
        child = int(line(parent))
        parent.kill()
        assert wait_gone(child)


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    with run(CHILD, 1) as orphan:  # its parent is this test, not process 1
        assert orphan.wait(10) == -signal.SIGKILL
        assert line(orphan) == ""


def test_arming_from_another_thread_is_our_own_fault() -> None:
    errors: list[Exception] = []

    def body() -> None:
        try:
            process.die_with_parent(os.getppid())
        except LocalProtocolError as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_a_subreaper_waits_for_its_grandchildren() -> None:
    code = """
import os
from ftrain.comms.process import become_subreaper, describe_exit
become_subreaper()
middle = os.fork()
if middle == 0:
    if os.fork() == 0:
        while os.getppid() == middle: pass
        os._exit(7)
    os._exit(0)
ends = sorted(describe_exit(os.wait()[1]) for _ in range(2))
print(ends)
"""
    with run(code) as child:
        assert line(child) == "['exit code 0', 'exit code 7']"
        assert child.wait(10) == 0


def test_exits_in_words() -> None:
    for code, words in [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "signal 40"),
        ("raise SystemExit(3)", "exit code 3"),
        ("", "exit code 0"),
    ]:
        pid = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", code], os.environ)
        assert process.describe_exit(os.waitpid(pid, 0)[1]) == words
    assert process.describe_returncode(-15) == "SIGTERM"


def test_pidfds_tell_of_an_end_and_start_times_tell_processes_apart() -> None:
    with run("input()") as child:
        fd = process.pidfd_open(child.pid)
        assert not select.select([fd], [], [], 0)[0]
        ticks = process.start_ticks(child.pid)
        now = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        assert now - 1000 < ticks <= now
        assert process.start_ticks(os.getpid()) <= ticks
        child.kill()
        assert select.select([fd], [], [], 5)[0]
        os.close(fd)
    with pytest.raises(ProcessLookupError):
        process.start_ticks(child.pid)
    with pytest.raises(ProcessLookupError):
        process.pidfd_open(child.pid)


def test_the_kernel_is_told_whom_to_spare() -> None:
    code = """
from ftrain.comms.process import set_oom_score_adj
print(set_oom_score_adj(500), open("/proc/self/oom_score_adj").read().strip())
print(set_oom_score_adj(5000))
"""
    with run(code) as child:
        assert line(child) == "True 500"
        assert line(child) == "False"


def host(root: Path, *, available_kb: int, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available_kb} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_memory_is_what_the_tightest_limit_leaves(tmp_path: Path) -> None:
    assert 0 < process.available_memory_bytes() < 2**50
    plain = host(tmp_path / "plain", available_kb=1000, cgroup="0::/\n", files={})
    assert process.available_memory_bytes(plain) == 1000 * 1024
    version2 = {
        "job/memory.max": "700000\n",
        "job/memory.current": "500000\n",
        "job/memory.stat": "anon 1\ninactive_file 100000\n",
        "job/deep/memory.max": "max\n",
        "job/deep/memory.current": "5\n",
        "memory.events": "oom 3\noom_kill 2\n",
    }
    root = host(tmp_path / "v2", available_kb=1000, cgroup="0::/job/deep\n", files=version2)
    assert process.available_memory_bytes(root) == 300_000
    before = process.oom_kills(root)
    assert before == process.OomKills(own=0, host=2)
    assert before.explain(before) == ""
    (root / "proc/vmstat").write_text("oom_kill 9\n")
    others = process.oom_kills(root)
    assert "probably" in others.explain(before)
    (root / "sys/fs/cgroup/job/deep/memory.events").write_text("oom 1\noom_kill 1\n")
    assert process.oom_kills(root).explain(others) == "killed by the kernel because memory ran out"
    version1 = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "5\n",
        "memory/a/memory.limit_in_bytes": "1000\n",
        "memory/a/memory.usage_in_bytes": "4000\n",
        "memory/a/memory.oom_control": "oom_kill_disable 0\noom_kill 4\n",
    }
    names = "5:cpu,cpuacct:/x\n4:memory:/a/unseen\n0::/\n"
    root = host(tmp_path / "v1", available_kb=1000, cgroup=names, files=version1)
    assert process.available_memory_bytes(root) == 0
    assert process.oom_kills(root) == process.OomKills(own=4, host=4)
