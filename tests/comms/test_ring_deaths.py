"""A rank of a ring is killed in the middle of a sum: the others are told at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ring_process.py")


@contextmanager
def ranks(count: int, elements: int, links: str) -> Iterator[list[subprocess.Popen[str]]]:
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(elements), links],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        places = [heard(process) for process in started]
        for process in started:
            assert process.stdin is not None
            process.stdin.write(json.dumps(places) + "\n")
            process.stdin.flush()
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


def heard(process: subprocess.Popen[str]) -> object:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


@pytest.mark.parametrize("links", ["memory", "tcp"])
def test_the_others_are_told_that_a_rank_is_gone(links: str) -> None:
    with ranks(3, 4_000_000, links) as started:
        for process in started:
            assert heard(process) == [0, 6.0]
        started[1].kill()
        killed_s = time.monotonic()
        for process in (started[0], started[2]):
            while isinstance(said := heard(process), list):
                assert said[1] == 6.0
            assert str(said).startswith("PeerLostError: ")
            assert process.wait(10) == 0  # nothing hangs
        assert time.monotonic() - killed_s < 5
