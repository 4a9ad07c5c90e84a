"""Slot memory and the manager's local links."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from ftrain.comms import local
from ftrain.comms.errors import MemoryShortError
from ftrain.comms.links import LocalLink
from ftrain.comms.process import available_memory_bytes
from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.memory import Budget, Region, map_fd, populate
from ftrain.snapshot.protocol.messages import Committed, Flush


def resident_bytes() -> int:
    """This process's mapped shared memory."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssShmem:")
    )
    return int(line.split()[1]) * 1024


def test_regions_are_shared_allocated_and_given_back() -> None:
    size = 8 << 20
    region = Region.create("ftrain-test", size)
    assert os.fstat(region.fd).st_blocks * 512 >= size, "allocated before it is written"
    before = resident_bytes()
    populate(region.view)
    assert resident_bytes() - before >= size
    region.view[:4] = b"test"
    reader = map_fd(region.fd, size, writable=False)
    assert bytes(reader[:4]) == b"test"
    with pytest.raises(TypeError):
        reader[0] = 0
    region.close()
    assert bytes(reader[:4]) == b"test", "a map outlives the descriptor"
    del reader
    assert resident_bytes() - before < size


def test_allocation_that_can_not_be_is_an_error_not_a_kill() -> None:
    with pytest.raises(MemoryShortError, match=r"GiB.*snapshot\.slots"):
        Region.create("ftrain-test", 1 << 50)  # refused before the kernel is asked


def test_budget_counts_what_is_taken_and_given_back() -> None:
    available = available_memory_bytes()
    budget = Budget(share_max=0.5, slots=3, taken_bytes=0)
    part = int(available * 0.2)
    budget.take(0, part)
    budget.take(1, part)
    with pytest.raises(
        MemoryShortError, match=r"rank 2's 3 snapshot slots need .*memory_share_max"
    ):
        budget.take(2, part)
    budget.give_back(part)
    budget.take(2, part)
    heir = Budget(share_max=0.5, slots=3, taken_bytes=available)
    with pytest.raises(MemoryShortError):
        heir.take(0, part)


def test_link_queues_for_a_slow_peer_and_keeps_order_and_descriptors() -> None:
    async def scenario() -> None:
        ours, theirs = local.pair()
        ended: list[str] = []
        link = LocalLink(ours, lambda message, fds: None, ended.append)
        shared = os.memfd_create("ftrain-test", os.MFD_CLOEXEC)
        sent = 0
        while len(link._queue) < 100:
            link.post(Committed(VersionId(1, sent)), [shared])
            sent += 1
        os.close(shared)
        theirs.settimeout(0)
        seen = 0
        while seen < sent:
            await asyncio.sleep(0)
            try:
                message, fds = theirs.receive()
            except TimeoutError:
                continue
            assert message == Committed(VersionId(1, seen))
            assert len(fds) == 1
            os.close(fds[0])
            seen += 1
        assert not link._queue
        while not ended:
            link.post(Flush(VersionId(1, 1), 1))
        assert "does not read" in ended[0]
        theirs.close()

    asyncio.run(scenario())


def test_link_hears_last_words_before_it_says_that_the_peer_is_gone() -> None:
    async def scenario() -> None:
        ours, theirs = local.pair()
        news: list[object] = []
        link = LocalLink(ours, lambda message, fds: news.append(message), news.append)
        link.post(Flush(VersionId(1, 1), 1))  # never read
        for step in range(3):
            theirs.send(Committed(VersionId(1, step)))
        theirs.close()
        link.post(Flush(VersionId(1, 2), 1))  # the first to notice
        assert news == []
        await asyncio.sleep(0.01)
        assert news[:3] == [Committed(VersionId(1, step)) for step in range(3)]
        assert len(news) == 4

    asyncio.run(scenario())


def test_link_says_once_that_the_peer_is_gone() -> None:
    async def scenario() -> None:
        ours, theirs = local.pair()
        ended: list[str] = []
        link = LocalLink(ours, lambda message, fds: None, ended.append)
        theirs.close()
        link.post(Committed(VersionId(1, 1)))
        await asyncio.sleep(0.01)
        link.post(Committed(VersionId(1, 1)))
        assert len(ended) == 1

    asyncio.run(scenario())
