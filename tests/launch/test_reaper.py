from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import pytest
from serving import gone

from ftrain.launch.reaper import Reaper

# A child that leaves one process in its group, and one in a session of its own.
PARENT = """
import subprocess, sys, time
first = subprocess.Popen(["sleep", "60"])
second = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(first.pid, second.pid, flush=True)
time.sleep(60)
"""


def run(test: Callable[[Reaper], Awaitable[None]]) -> None:
    async def main() -> None:
        reaper = Reaper()
        try:
            await test(reaper)
        finally:
            assert await reaper.kill_all()

    asyncio.run(main())


def start(reaper: Reaper, ends: list[tuple[int, float]], module: str, *arguments: str) -> int:
    def ended(status: int) -> None:
        ends.append((os.waitstatus_to_exitcode(status), time.monotonic()))

    return reaper.start(module, arguments, ended, environment=dict(os.environ))


async def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def test_an_end_is_noticed_at_once() -> None:
    async def test(reaper: Reaper) -> None:
        ends: list[tuple[int, float]] = []
        pid = start(reaper, ends, "timeit", "-n1", "-r1", "import time; time.sleep(60)")
        await asyncio.sleep(0.2)
        began = time.monotonic()
        reaper.kill(pid)
        await wait_for(lambda: ends)
        assert ends[0][0] == -9
        assert ends[0][1] - began < 0.1
        reaper.kill(pid)  # gone: nothing happens

    run(test)


def test_exit_codes_and_late_watchers() -> None:
    async def test(reaper: Reaper) -> None:
        ends: list[tuple[int, float]] = []
        start(reaper, ends, "json.tool", "/nowhere")
        orphan = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
        await wait_for(lambda: ends and gone(orphan.pid, 0))
        assert ends[0][0] in (1, 2)
        late: list[int] = []
        await asyncio.sleep(0.05)
        reaper.watch(orphan.pid, late.append)  # its end was seen before anybody asked
        await wait_for(lambda: late)
        assert os.waitstatus_to_exitcode(late[0]) == 7
        orphan.returncode = 7

    run(test)


@pytest.mark.parametrize("free", [0, 1])
def test_without_descriptors_strays_are_unknown_and_not_absent(free: int) -> None:
    async def test(reaper: Reaper) -> None:
        stray = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
        lowest = os.open("/", os.O_RDONLY)
        os.close(lowest)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
        try:
            found = reaper.strays()
            ended = await reaper.kill_strays(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if free == 0:
            assert found is None
            assert not ended
        else:  # as the kernel has it: one is enough, or not
            assert found is None or stray.pid in found
        assert await reaper.kill_strays()
        assert gone(stray.pid)
        stray.returncode = -9

    run(test)


def test_group_dies_with_its_leader_and_strays_are_found() -> None:
    async def test(reaper: Reaper) -> None:
        leader = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, process_group=0
        )
        assert leader.stdout is not None
        first, second = (int(word) for word in leader.stdout.readline().split())
        leader.stdout.close()
        ends: list[int] = []
        reaper.watch(leader.pid, ends.append)
        reaper.kill(leader.pid)
        await wait_for(lambda: ends)
        leader.returncode = -9
        assert gone(first)
        await wait_for(lambda: second in (reaper.strays() or ()))
        assert await reaper.kill_strays()
        assert gone(second)

    run(test)
