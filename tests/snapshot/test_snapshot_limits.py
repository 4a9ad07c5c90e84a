"""One snapshot manager at its limits: memory, descriptors, many ranks."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest
from manager_process import Manager, Rank, until

from ftrain.comms import local
from ftrain.comms.errors import MemoryShortError
from ftrain.comms.protocol.messages import Notice, VersionId
from ftrain.snapshot.protocol.messages import ClientHello, ClientWelcome


def v(step: int, epoch: int = 1) -> VersionId:
    return VersionId(epoch, step)


def test_a_node_of_many_ranks(tmp_path: Path) -> None:
    """More slots than descriptors fit into one packet, and more records than bytes do."""
    count = 128
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(Manager(tmp_path))
        manager.group(ranks=count)
        ranks = [
            stack.enter_context(Rank(manager, rank, world_size=count, nbytes=1000))
            for rank in range(count)
        ]
        for step in (1, 2, 3):
            assert all(rank.capture(step) for rank in ranks)
        manager.newest_committed(v(3))
        before = manager.inventory()
        assert len(before) == 2 * count
        manager.kill()
        assert len(manager.memory) == 3 * count
        manager.start()
        assert set(manager.held) >= set(before)
        manager.group(ranks=count)
        assert all(rank.capture(4) for rank in ranks)
        manager.newest_committed(v(4))
        assert len(ranks[0].restored(4)) == count


def test_memory_is_gone_with_manager_and_agent(tmp_path: Path) -> None:
    size = 64 << 20
    before = shared_memory_bytes()
    with Manager(tmp_path, slots=2) as manager:
        manager.group()
        rank = Rank(manager, nbytes=size)
        assert shared_memory_bytes() - before >= 2 * size
        rank.close()
        manager.kill()
        assert shared_memory_bytes() - before >= 2 * size, "the agent holds it"
        manager.start()
    until(lambda: shared_memory_bytes() - before < size)
    assert not [name for name in os.listdir("/dev/shm") if "ftrain" in name]


def shared_memory_bytes() -> int:
    """Shared memory of this host that is in use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Shmem:"))
    return int(line.split()[1]) * 1024


def test_the_memory_that_is_stated_is_what_is_taken(tmp_path: Path) -> None:
    """Slots times state, measured as pages, also after the state has grown."""
    before, slots, size = shared_memory_bytes(), 3, 24 << 20
    with Manager(tmp_path, slots=slots) as manager:
        manager.group(ranks=2)
        with (
            Rank(manager, 0, world_size=2, nbytes=size // 3) as one,
            Rank(manager, 1, world_size=2, nbytes=size) as two,
        ):
            one.client.reserve(two.plan.total_bytes)  # with moments it is three times the size
            stated = manager.expect(Notice, lambda notice: notice.kind == "memory").data["bytes"]
            assert isinstance(stated, int)
            assert 0 <= stated - slots * 2 * size <= 0.01 * stated
            pages = {}  # by inode: a map holds a descriptor of its own
            for fd in Path(f"/proc/{manager.process.pid}/fd").iterdir():
                if "ftrain-rank" in os.readlink(fd):
                    pages[fd.stat().st_ino] = fd.stat().st_blocks * 512
            assert len(pages) == slots * 2
            assert 0 <= sum(pages.values()) - stated < slots * 2 * 4096
            for step in range(1, 12):
                one.capture(step)
                two.capture(step)
            # Others use shared memory as well, so this measure has some slack.
            assert shared_memory_bytes() - before < 1.1 * stated
    until(lambda: shared_memory_bytes() - before < 0.5 * stated)


def lowest_free_descriptor(process: subprocess.Popen[bytes]) -> int:
    """The number that the process's next descriptor will have."""
    taken = {int(name) for name in os.listdir(f"/proc/{process.pid}/fd")}
    return min(set(range(len(taken) + 1)) - taken)


def test_a_manager_out_of_descriptors_says_so_once_and_recovers(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(ranks=2)
        with Rank(manager, 0, world_size=2) as rank:
            pid, kind = manager.process.pid, resource.RLIMIT_NOFILE
            _, hard = limits = resource.prlimit(pid, kind)
            resource.prlimit(pid, kind, (lowest_free_descriptor(manager.process), hard))
            with pytest.raises(MemoryShortError):
                rank.client.reserve(3_000_000)
            with local.connect_local(manager.socket_path, 2.0) as late:
                late.send(ClientHello(1, 1, 2, 0, 1))
                until(lambda: manager.drain() or manager.notices)
                deadline_s = time.monotonic() + 1.0
                while time.monotonic() < deadline_s:
                    manager.drain()
                assert len(manager.notices) == 2
                assert "training goes on without new snapshots" in manager.notices[0]
                assert "can't take a rank in now" in manager.notices[1]
                resource.prlimit(pid, kind, limits)
                assert isinstance(late.receive()[0], ClientWelcome)
            rank.client.reserve(3_000_000)
            assert rank.capture(1)


def test_slots_that_grew_are_entered_one_by_one(tmp_path: Path) -> None:
    small, large = 100_000, 30 << 20
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager, nbytes=small) as rank:
            rank.capture(1)
            rank.client.reserve(large)
            before = mapped_shared_bytes()
            buffer = rank.client.begin(v(2))
            assert buffer is not None
            assert len(buffer) == large
            rank.client.enter()
            rank.client.enter()  # that of the version, and no other
            assert large <= mapped_shared_bytes() - before < 1.1 * large
            assert rank.client.enter_more()
            assert rank.client.enter_more()
            assert not rank.client.enter_more()
            assert mapped_shared_bytes() - before >= 3 * large
            manager.newest_committed(v(1))
            assert len(rank.restored(1)[0]) == small


def mapped_shared_bytes() -> int:
    """Shared memory that is in this process's page table."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssShmem:"))
    return int(line.split()[1]) * 1024


def test_slots_that_can_not_all_be_mapped_leave_those_that_are(tmp_path: Path) -> None:
    """A rank at its limit of address space loses versions, and no capture of it fails."""
    size, before = 64 << 20, resource.getrlimit(resource.RLIMIT_AS)
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager) as rank:
            assert rank.capture(1)
            opened = len(os.listdir("/proc/self/fd"))
            in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
            resource.setrlimit(resource.RLIMIT_AS, (in_use + size * 3 // 2, before[1]))
            try:
                with pytest.raises(OSError, match="Cannot allocate memory"):
                    rank.client.reserve(size)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
            assert len(os.listdir("/proc/self/fd")) == opened
            assert rank.capture(2)
            rank.client.reserve(size)
            assert rank.capture(3)
            manager.newest_committed(v(3))
