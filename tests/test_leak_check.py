"""The leak check itself: a suite of planted leaks, run as users run pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PLANTED = '''
import os, socket, subprocess, sys, threading, mmap
import pytest

kept = []

def test_process():
    kept.append(subprocess.Popen(["sleep", "600"]))

def test_orphan():
    """Its parent is gone, so that only the environment tells whose it is."""
    code = "import subprocess; subprocess.Popen(['sleep', '601'])"
    subprocess.run([sys.executable, "-c", code], check=True)

def test_thread():
    threading.Thread(target=threading.Event().wait, args=(30,), daemon=True).start()

def test_socket():
    kept.append(socket.socket())

def test_memory_file():
    kept.append(os.memfd_create("leak"))

def test_mapping():
    fd = os.memfd_create("leak")
    os.ftruncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096))
    os.close(fd)

@pytest.mark.may_leak("to test the opt-out")
def test_allowed():
    kept.append(socket.socket())

def test_clean():
    subprocess.run(["true"], check=True)
    socket.socket().close()
'''


def has_ended(pid: str) -> bool:
    """Whether a process is gone, or is only waiting for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_every_kind_of_leak_is_caught(tmp_path: Path) -> None:
    """Each leaking test errs by name; the clean and the exempt one do not; processes are killed."""
    check = Path(__file__).with_name("conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(check.replace("GRACE_S = 2.0", "GRACE_S = 0.1"))
    (tmp_path / "test_planted.py").write_text(PLANTED)
    command = [sys.executable, "-m", "pytest", "-q", "-rE", "-p", "no:cacheprovider", str(tmp_path)]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    for leak in ("process", "orphan", "thread", "socket", "memory_file", "mapping"):
        assert f"ERROR test_planted.py::test_{leak} - Failed: left behind" in text, text
    assert "8 passed, 6 errors" in text, text
    left_behind = re.findall(r"left behind: process (\d+): sleep", text)
    assert len(left_behind) >= 2, text
    assert all(has_ended(pid) for pid in left_behind), text
