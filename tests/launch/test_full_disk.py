"""A disk that takes no logs costs the logs, not the job."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import launched

pytestmark = pytest.mark.slow

TALKING = """
import os
for number in range(500):
    print("line", number, "of rank", os.environ["RANK"])
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages."""
    place = tmp_path / "logs"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave room for names and for no bytes."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        while os.statvfs(disk).f_bavail:
            file.write(bytes(4096))


@pytest.mark.parametrize("redirects", ["0", "3"])
def test_what_ranks_print_is_shown_although_no_log_can_be_written(
    tmp_path: Path, disk: Path, redirects: str
) -> None:
    fill(disk)
    options = ("--nproc-per-node", "2", "--log-dir", str(disk), "--redirects", redirects)
    with launched(tmp_path, TALKING, *options, "--tee", "0" if redirects == "3" else "3") as launch:
        assert launch.wait() == 0, launch.shown
        assert launch.gone_after(0)
    for rank in range(2):
        assert launch.shown.count(f"of rank {rank}\n") == 500
    assert launch.shown.count("what ranks print is not kept") == 1
    assert os.strerror(errno.ENOSPC) in launch.shown


def test_a_directory_that_is_read_only_is_refused_at_start(tmp_path: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with launched(tmp_path, TALKING, "--log-dir", str(disk / "logs")) as launch:
        assert launch.wait() == 2, launch.shown
    assert "choose another with --log-dir" in launch.shown
    with launched(tmp_path, TALKING, f"checkpoint.dir={disk}/versions") as launch:
        assert launch.wait() == 2, launch.shown
    assert f"({disk}: Read-only file system): choose another directory with" in launch.shown
