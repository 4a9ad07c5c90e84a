"""The front's processes: noticed when they end, and nothing of theirs is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from ftrain.launch.children import children_of

# A front in small: starts `python -m family`, whose grandchild outlives it, and says what it saw.
# In a process of its own, because a subreaper stays one.
FRONT = """
import os, signal, sys, time
from ftrain.launch.children import Children

children = Children()
ended = []
child = children.start("family", "family", [sys.argv[1]], lambda c: ended.append(c.ended))
deadline = time.monotonic() + 20
while not os.path.exists(sys.argv[1]) and time.monotonic() < deadline:
    time.sleep(0.005)
os.kill(child.pid, signal.SIGKILL)
while not ended and time.monotonic() < deadline:
    children.reap()
    time.sleep(0.002)
began = time.monotonic()
while not children.none_left() and time.monotonic() < deadline:
    time.sleep(0.002)
print(ended[0], child.ended, round(time.monotonic() - began, 1))
child.kill()  # of an ended process: nobody is hit
"""
FAMILY = """
import os, sys, time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open(sys.argv[1] + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(60)
time.sleep(60)
"""


def test_grandchildren_of_a_killed_child_are_killed(tmp_path: Path) -> None:
    (tmp_path / "family.py").write_text(FAMILY)
    (tmp_path / "front.py").write_text(textwrap.dedent(FRONT))
    marker = tmp_path / "grandchild"
    done = subprocess.run(
        [sys.executable, "front.py", str(marker)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    *ends, seconds = done.stdout.split()
    assert (ends, done.stderr) == (["SIGKILL", "SIGKILL"], "")
    assert float(seconds) < 1.0
    assert not Path("/proc", marker.read_text()).exists()


def test_children_of_sees_direct_children_that_live() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert child.pid in children_of(os.getpid())
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert child.pid not in children_of(os.getpid())


def test_a_users_module_does_not_shadow_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemError('shadowed')\n")
    program = (
        "from ftrain.launch.children import Children\n"
        "children = Children()\n"
        "child = children.start('doctor', 'ftrain.launch.cli', ['--version'], lambda c: None)\n"
        "child.popen.wait()\n"
        "print(child.ended)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "exit code 0"
