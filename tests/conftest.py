"""A test that leaves a process, thread, socket or memory file behind fails.

Mark a test ``@pytest.mark.may_leak("why")`` where that can't be helped.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import S3Server

# Inherited by whatever a test starts, so that processes whose parent is gone are found as well.
SESSION_VARIABLE = "PYTEST_OF_FTRAIN_SESSION"  # FTRAIN_… is not handed down
SESSION = f"{os.getpid()}-{uuid.uuid4()}"
os.environ[SESSION_VARIABLE] = SESSION

GRACE_S = 2.0  # a killed process takes a moment to go


def pytest_configure(config: pytest.Config) -> None:
    """Declare the opt-out."""
    config.addinivalue_line("markers", "may_leak(why): exempt from the leak check")


def _parent(pid: int) -> int:
    """The parent's pid; 0 for a process that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, parent = stat.rpartition(")")[2].split()[:2]
    return 0 if state in "ZX" else int(parent)


def _is_ours(pid: int) -> bool:
    """Whether a process was started, directly or not, by this test session."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    if b"multiprocessing.resource_tracker" in command:  # one per process, by design
        return False
    return f"{SESSION_VARIABLE}={SESSION}".encode() in environment.split(b"\0")


def processes() -> set[str]:
    """Living processes of this session besides pytest itself."""
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        parent = _parent(int(entry))
        if parent and (parent == os.getpid() or _is_ours(int(entry))):
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(entry) == forkserver._forkserver._forkserver_pid:  # type: ignore[attr-defined]
                continue  # one per process, by design; started again when it ended
            if b"multiprocessing.resource_tracker" not in command:
                found.add(f"process {entry}: {command.decode(errors='replace').strip()[:200]}")
    return found


def threads() -> set[str]:
    """Living Python threads besides the main one."""
    return {
        f"thread {thread.name} ({thread.ident})"
        for thread in threading.enumerate()
        if thread is not threading.main_thread()
    }


def descriptors() -> set[str]:
    """Open sockets, process descriptors and memory files."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            continue
        if target.startswith(("socket:", "/memfd:", "anon_inode:[pidfd]", "/dev/shm/")):
            found.add(f"descriptor {fd}: {target}")
    return found


def mappings() -> set[str]:
    """Mapped memory files."""
    with open("/proc/self/maps") as maps:
        return {f"mapping {line.strip()}" for line in maps if "/memfd:" in line}


KINDS: tuple[Callable[[], set[str]], ...] = (processes, threads, descriptors, mappings)


def _inventory() -> set[str]:
    return set().union(*(kind() for kind in KINDS))


def _leaked(before: set[str]) -> set[str]:
    """What is there now and was not before, after garbage collection and a grace period."""
    if not _inventory() - before:
        return set()
    gc.collect()
    deadline = time.monotonic() + GRACE_S
    while (leaked := _inventory() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return leaked


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves something behind; set up first, so torn down last."""
    before = _inventory()
    yield
    if request.node.get_closest_marker("may_leak") is not None:
        return
    leaked = _leaked(before)
    for leak in leaked:
        if leak.startswith("process "):  # not to disturb the tests that follow
            try:
                os.kill(int(leak.split()[1].rstrip(":")), signal.SIGKILL)
            except ProcessLookupError:
                pass
    if leaked:
        pytest.fail("left behind: " + "; ".join(sorted(leaked)), pytrace=False)


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that an S3 client of the test server needs."""
    from s3_server import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(tmp_path: Path, s3_credentials: None) -> Iterator[S3Server]:
    """An S3 server with a bucket called ``bucket``, and its credentials in the environment."""
    from s3_server import S3Server

    (tmp_path / "served" / "bucket").mkdir(parents=True)
    server = S3Server(tmp_path / "served")
    server.start()
    yield server
    server.kill()
