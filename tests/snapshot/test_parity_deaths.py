"""Managers that die, or stand still, in the middle of making parity and of rebuilding."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from manager_process import state
from parity_group import ParityNodes

from ftrain.comms.protocol.messages import RoundId, VersionId

MB = 1_000_000


def again(world: ParityNodes, node: int) -> None:
    """A node's manager dies and its agent starts another one over the same memory."""
    world.managers[node].kill()
    world.managers[node].start()


@pytest.mark.parametrize("node", [0, 2], ids=["leader", "other"])
def test_a_manager_that_dies_while_parity_is_made_makes_it_afterwards(
    tmp_path: Path, node: int
) -> None:
    sizes = [6 * MB] * 3
    with ParityNodes(tmp_path, 3, sizes=sizes, parity_bytes_per_s_max=15e6) as world:
        world.join()
        world.protect(1)
        world.capture(2)
        time.sleep(0.15)  # of the 0.4 s that fetching takes at that rate
        again(world, node)
        world.group(**world.last)
        world.protected(2)
        world.protect(3)
        require_rebuilt(world, (node + 1) % 3, 3)


@pytest.mark.parametrize("who", ["source", "destination"])
def test_a_manager_that_dies_while_a_node_is_rebuilt(tmp_path: Path, who: str) -> None:
    sizes = [60 * MB] * 3
    with ParityNodes(tmp_path, 3, sizes=sizes) as world:
        world.join()
        world.protect(1)
        newest = lose(world, 2)
        world.replace([2], [3], newest, VersionId(1, 1))
        time.sleep(0.05)
        again(world, 3 if who == "destination" else 0)
        world.group(**world.last)
        world.join()
        assert world.ranks[2].restored(1, epoch=1)[2].startswith(state(2, 1, sizes[2]))
        world.protect(2)


def test_the_node_in_its_place_is_lost_while_it_is_rebuilt(tmp_path: Path) -> None:
    """What the others keep of the round serves again, and once more for another node."""
    sizes = [30 * MB] * 3
    with ParityNodes(tmp_path, 3, sizes=sizes) as world:
        world.join()
        world.protect(1)
        newest = lose(world, 2)
        world.replace([2], [3], newest, VersionId(1, 1))
        time.sleep(0.05)
        world.lose(3)
        held = world.inventories()
        assert all(newest in {p.round for p in found} for found in held.values())
        world.replace([3], [4], newest, VersionId(1, 1), lost_as=2)
        world.join()
        assert world.ranks[2].restored(1, epoch=1)[2].startswith(state(2, 1, sizes[2]))
        world.protect(2)
        require_rebuilt(world, 0, 2)


def test_a_node_that_stands_still_delays_and_breaks_nothing(tmp_path: Path) -> None:
    with ParityNodes(tmp_path, 3, sizes=[2 * MB] * 3) as world:
        world.join()
        world.protect(1)
        world.capture(2)
        world.managers[1].process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        world.managers[1].process.send_signal(signal.SIGCONT)
        world.protected(2)
        world.protect(3)
        require_rebuilt(world, 1, 3)


def test_all_managers_at_once(tmp_path: Path) -> None:
    """Nothing is lost but the processes."""
    with ParityNodes(tmp_path, 3) as world:
        world.join()
        world.protect(1)
        for manager in world.managers.values():
            manager.kill()
        for manager in world.managers.values():
            manager.start()
        world.group(**world.last)
        world.protect(2)
        require_rebuilt(world, 2, 2)


def lose(world: ParityNodes, node: int) -> RoundId:
    """A node goes; the newest round that all others have whole."""
    world.lose(node)
    held = world.inventories()
    return max(set.intersection(*({p.round for p in found} for found in held.values())))


def require_rebuilt(world: ParityNodes, node: int, step: int) -> None:
    """A node's images of the newest version come back."""
    epoch, rank = world.epoch, world.seats.index(node)
    newest = lose(world, node)
    world.replace([node], [9], newest, VersionId(epoch, step))
    world.join()
    found = world.ranks[rank].restored(step, epoch=epoch)[rank]
    assert found.startswith(state(rank, step, world.sizes[rank]))
