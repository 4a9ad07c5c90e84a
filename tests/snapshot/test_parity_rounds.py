"""Versions protected by parity on other nodes, and rebuilt from it: real managers, real deaths."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from manager_process import Manager, Rank, state, until
from parity_group import ParityNodes

from ftrain.comms.process import available_memory_bytes
from ftrain.comms.protocol.messages import Notice, VersionId
from ftrain.snapshot.protocol.messages import PARITY


@pytest.mark.parametrize(("nodes", "parity", "lost"), [(2, 1, 1), (4, 1, 0), (5, 2, 3)])
def test_lost_nodes_are_rebuilt_on_spares(
    tmp_path: Path, nodes: int, parity: int, lost: int
) -> None:
    with ParityNodes(tmp_path, nodes, parity=parity) as world:
        world.join()
        world.protect(1)
        world.protect(2)
        gone = [lost, (lost + 2) % nodes][:parity]
        for node in gone:
            world.lose(node)
        held = world.inventories()
        rounds = {parity.round for found in held.values() for parity in found}
        newest = max(rounds)
        assert all(found[-1].version == VersionId(1, 2) for found in held.values())
        world.replace(gone, [nodes + n for n in range(parity)], newest, VersionId(1, 2))
        world.join()
        for number, rank in world.ranks.items():
            found = rank.restored(2, epoch=1)
            assert found[number].startswith(state(number, 2, world.sizes[number]))
        for node in world.seats:  # protected again at once, before anything new is captured
            world.managers[node].protected(VersionId(1, 2))
        world.protect(3)
        assert not any(manager.notices for manager in world.managers.values())


def test_what_is_replicated_needs_no_parity(tmp_path: Path) -> None:
    with ParityNodes(tmp_path, 3) as world:
        world.ranks = {n: Rank(world.managers[n], n, world_size=3, nbytes=20_000) for n in range(3)}
        for step in (1, 2, 3):
            world.capture(step)
        for manager in world.managers.values():
            manager.newest_committed(VersionId(1, 3))
        assert not any(found for found in world.inventories().values())


def test_a_version_under_way_costs_nothing_of_the_one_before(tmp_path: Path) -> None:
    """A node that dies in the middle of a round: the round before is whole on all others."""
    with ParityNodes(tmp_path, 3) as world:
        world.join()
        world.protect(1)
        world.capture(2)  # the round of it may be over, under way, or not begun
        world.lose(2)
        held = world.inventories()
        common = set.intersection(*({p.round for p in found} for found in held.values()))
        assert common
        newest = max(common)
        version = next(p.version for p in held[0] if p.round == newest)
        world.replace([2], [3], newest, version)
        world.join()
        restored = world.ranks[2].restored(version.step, epoch=1)
        assert restored[2].startswith(state(2, version.step, world.sizes[2]))


def test_a_manager_that_starts_again_has_its_parity(tmp_path: Path) -> None:
    with ParityNodes(tmp_path, 3) as world:
        world.join()
        world.protect(1)
        world.managers[1].kill()
        world.managers[1].start()
        world.group()
        world.protect(2)
        world.lose(0)
        held = world.inventories()
        newest = max(p.round for p in held[1])
        world.replace([0], [3], newest, VersionId(1, 2))
        world.join()
        assert world.ranks[0].restored(2, epoch=1)[0].startswith(state(0, 2, world.sizes[0]))


def test_a_damaged_chunk_is_done_without_or_said(tmp_path: Path) -> None:
    with ParityNodes(tmp_path, 4, parity=2) as world:
        world.join()
        world.protect(1)
        world.lose(3)
        held = world.inventories()
        newest = max(p.round for p in held[0])
        assert flip(world.managers[1], 1, -5000)
        world.replace([3], [4], newest, VersionId(1, 1))
        world.join()
        assert world.ranks[3].restored(1, epoch=1)[3].startswith(state(3, 1, world.sizes[3]))
        told = world.managers[4].expect(Notice, lambda notice: notice.kind == "rebuilt")
        assert "done without what is damaged" in told.text


def flip(manager: Manager, rank: int, at: int) -> int:
    """Flip a bit of every slot of a rank, or of parity; how many there are."""
    flipped = 0
    for (owner, _), fd in manager.memory.items():
        if owner == rank:
            with mmap.mmap(fd, os.fstat(fd).st_size) as view:
                view[at] ^= 1
                flipped += 1
    return flipped


@pytest.mark.parametrize(
    ("rank", "at"), [(1, -5000), (1, 3000), (1, 4100), (PARITY, -100)], ids=str
)
def test_damage_is_found_and_mended_in_the_background(tmp_path: Path, rank: int, at: int) -> None:
    """In an image's data, header and index, and in parity; so that it may be needed afterwards."""
    with ParityNodes(tmp_path, 4, scrub_every_s=0.2) as world:
        world.join()
        world.protect(1)
        world.managers[1].drain()
        assert flip(world.managers[1], rank, at)
        told = world.managers[1].expect(Notice, lambda notice: notice.kind == "repair")
        assert "mended from what nodes 0, 2, 3 hold" in told.text
        newest = max(p.round for p in world.inventories()[0])
        world.lose(3)
        world.replace([3], [4], newest, VersionId(1, 1))
        world.join()
        for number in (1, 3):
            found = world.ranks[number].restored(1, epoch=1)[number]
            assert found.startswith(state(number, 1, world.sizes[number]))
        rebuilt = world.managers[4].expect(Notice, lambda notice: notice.kind == "rebuilt")
        assert "damage" not in rebuilt.text


def test_too_much_lost_is_said(tmp_path: Path) -> None:
    with ParityNodes(tmp_path, 4) as world:
        world.join()
        world.protect(1)
        newest = max(p.round for p in world.inventories()[0])
        world.lose(1)
        world.lose(2)
        world.replace([1, 2], [4, 5], newest, VersionId(1, 1))
        notices = world.managers[4].notices
        until(lambda: world.managers[4].drain() or notices)
        assert "2 chunks are sound of a stripe that needs 3" in notices[0]


def test_too_little_memory_for_parity_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    sizes = [2_000_000] * 3
    slots = 4 * (sizes[0] + 20_000)
    share = (slots + 600_000) / available_memory_bytes()  # parity takes 1 MB for each version
    with ParityNodes(tmp_path, 3, sizes=sizes, memory_share_max=share) as world:
        world.join()
        for step in range(1, 6):
            world.capture(step)
            for manager in world.managers.values():
                manager.newest_committed(VersionId(1, step))
        notices = world.managers[1].notices
        until(lambda: world.managers[1].drain() or notices)
        (told,) = notices
        assert "parity that stands the loss of 1 of 3 nodes takes" in told
        assert "a larger snapshot.group takes less" in told
