"""One snapshot manager process and its ranks."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from manager_process import Manager, Rank, state, until

from ftrain.checkpoint.files import LocalFile
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.comms import local
from ftrain.comms.errors import MemoryShortError, PeerLostError, StateError
from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.client import UNAVAILABLE
from ftrain.snapshot.protocol.messages import (
    Begin,
    CapturesFinished,
    ClientHello,
    Committed,
    FinishCaptures,
    Flush,
    Flushed,
    FlushRefused,
    ImageSealed,
    Reserve,
    SetupRefused,
    Withdrawn,
)


def v(step: int, epoch: int = 1) -> VersionId:
    return VersionId(epoch, step)


def steps_held(manager: Manager, rank: int = 0) -> list[int]:
    return sorted(held.version.step for held in manager.inventory() if held.rank == rank)


def test_captures_are_committed_and_restored(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(ranks=2)
        with (
            Rank(manager, 0, world_size=2) as one,
            Rank(manager, 1, world_size=2) as two,
        ):
            for step in range(1, 8):
                first, second = one.capture(step), two.capture(step)
                assert first
                assert second
            manager.newest_committed(v(7))
            assert {(h.version.step, h.rank) for h in manager.inventory()} >= {(7, 0), (7, 1)}
            assert [h for h in manager.inventory() if h.version == v(7)] == [first, second]
            assert one.restored(7) == {0: state(0, 7), 1: state(1, 7)}
            with pytest.raises(StateError, match="holds nothing"):
                one.client.open(v(99))


def test_slots_grow_and_keep_what_they_hold(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager, nbytes=10_000) as rank:
            rank.capture(1)
            rank.client.reserve(3_000_000)
            rank.client.reserve(1000)
            manager.newest_committed(v(1))
            assert rank.restored(1) == {0: state(0, 1, 10_000)}
            assert all(os.fstat(fd).st_size >= 3_000_000 for fd in manager.memory.values())
            buffer = rank.client.begin(v(2))
            assert buffer is not None
            assert len(buffer) >= 3_000_000


def test_too_little_memory_is_said_in_one_sentence(tmp_path: Path) -> None:
    with Manager(tmp_path, slots=2, memory_share_max=0.001) as manager:
        manager.group()
        with (
            Rank(manager) as rank,
            pytest.raises(
                MemoryShortError, match=r"2 snapshot slots need 2\.\d+ GiB.*snapshot\.slots"
            ),
        ):
            rank.client.reserve(1 << 30)
        with Rank(manager) as rank:
            assert rank.capture(2)


CHILD = """
import sys
sys.path[:0] = {path!r}
from manager_process import Rank
class Seen: socket_path, node, incarnation = {socket!r}, 0, 100
rank = Rank(Seen, {rank}, world_size={world}, epoch={epoch})
{body}
"""


def child(
    manager: Manager, body: str, rank: int = 0, world: int = 1, epoch: int = 1
) -> subprocess.Popen[str]:
    """A rank in a process of its own, with its standard input and output as pipes."""
    text = CHILD.format(
        path=[str(Path(__file__).parent)],
        socket=manager.socket_path,
        rank=rank,
        world=world,
        epoch=epoch,
        body=body,
    )
    return subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def slay(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_writer_killed_in_mid_copy_leaves_the_older_version(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        process = child(manager, "rank.capture(1); rank.start(2, 2); print('half'); input()")
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        slay(process)
        manager.rank_died(0)
        began_s = time.monotonic()
        held = manager.finish_captures(deadline_s=5.0)
        assert time.monotonic() - began_s < 1.0, "nobody is left who could finish it"
        assert [h.version for h in held] == [v(1)]
        manager.group(epoch=2, base=v(1))
        with Rank(manager, epoch=2) as rank:
            assert rank.restored(1, epoch=1) == {0: state(0, 1)}
            assert rank.capture(2)
            assert steps_held(manager) == [1, 2]


@pytest.mark.slow
def test_writers_killed_at_random_never_leave_a_wrong_version(tmp_path: Path) -> None:
    rng = random.Random(5)
    body = "step = int(input())\nprint('go', flush=True)\nwhile True: step += 1; rank.capture(step)"
    with Manager(tmp_path) as manager:
        base, step = None, 0
        for epoch in range(1, 13):
            manager.group(epoch=epoch, base=base)
            process = child(manager, body, epoch=epoch)
            process.stdin.write(f"{step}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "go\n"
            time.sleep(rng.uniform(0.0, 0.1))
            slay(process)
            manager.rank_died(0, epoch)
            held = manager.finish_captures(epoch)
            newest = max((h.version for h in held), default=base)
            assert base is None or newest >= base
            if newest is not None:
                base = newest
                step = base.step
        manager.group(epoch=20, base=base)
        with Rank(manager, epoch=20) as rank:
            assert rank.restored(base.step, base.epoch) == {0: state(0, base.step)}
        assert step > 20


@pytest.mark.slow
def test_managers_killed_at_random_never_lose_what_was_committed(tmp_path: Path) -> None:
    rng = random.Random(7)
    body = "step = 0\nprint('go', flush=True)\nwhile True: step += 1; rank.capture(step)"
    newest = v(0)
    with Manager(tmp_path) as manager:
        manager.group()
        process = child(manager, body)
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        for _ in range(12):
            manager.newest_committed(VersionId(1, newest.step + 1))
            time.sleep(rng.uniform(0.0, 0.05))
            manager.kill()
            told = [m.version for m in manager.inbox if isinstance(m, Committed)]
            newest = max([newest, *told])
            manager.inbox.clear()
            manager.start()
            assert max(held.version for held in manager.held) >= newest
            manager.group()
        slay(process)
        manager.rank_died(0)
        versions = {held.version for held in manager.finish_captures()}
        manager.group(epoch=2, base=max(versions))
        with Rank(manager, epoch=2) as rank:
            for version in versions:
                assert rank.restored(version.step, epoch=1) == {0: state(0, version.step)}
        assert newest.step > 12


def test_manager_killed_between_steps_loses_nothing(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager) as rank:
            for step in (1, 2, 3):
                assert rank.capture(step)
            before = manager.inventory()
            manager.kill()
            manager.start()
            assert set(before) <= set(manager.held)
            manager.group()
            manager.newest_committed(v(3))
            for step in (4, 5, 6):
                assert rank.capture(step), rank.client.denied
            assert rank.restored(6) == {0: state(0, 6)}


def test_manager_killed_in_mid_capture_costs_no_version(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager) as rank:
            rank.capture(1)
            writer = rank.start(2, 2)
            manager.kill()
            rank.fill(writer, 2, writer.missing_chunks())
            manager.start()
            manager.group()
            rank.seal(writer, 2)
            manager.newest_committed(v(2))
            manager.kill()
            writer = rank.start(3)  # in the slot that was granted ahead
            assert writer
            manager.start()
            assert v(2) in [h.version for h in manager.held]
            manager.group()
            rank.seal(writer, 3)
            manager.newest_committed(v(3))
            assert rank.restored(3) == {0: state(0, 3)}


def test_without_a_manager_captures_are_denied_soon_and_come_back(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager) as rank:
            rank.capture(1)
            manager.kill()
            assert rank.capture(2)  # granted ahead; who hears of it comes later
            began_s = time.monotonic()
            assert [rank.capture(step) for step in range(3, 20)] == [None] * 17
            assert time.monotonic() - began_s < 4.0
            assert rank.client.denied == UNAVAILABLE
            assert rank.client.fileno() == -1
            manager.start()
            assert [h.version for h in manager.held] == [v(1), v(2)]
            manager.group()
            until(lambda: rank.client.poll() is None and rank.client.fileno() >= 0)
            assert rank.capture(20)
            manager.newest_committed(v(20))


def half_captured(manager: Manager, step: int = 2) -> None:
    """Rank 1 of two captures the step before, and is killed in the middle of ``step``."""
    body = f"rank.capture({step - 1}); rank.start({step}, 2); print('half'); input()"
    process = child(manager, body, rank=1, world=2)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    slay(process)
    manager.rank_died(1)


def test_survivor_finishes_the_dead_ranks_image(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(ranks=2)
        with Rank(manager, 0, world_size=2) as survivor:
            survivor.capture(1)
            assert survivor.capture(2)
            half_captured(manager)
            request = survivor.task()
            assert (request.version, request.rank) == (v(2), 1)
            survivor.finish(request)
            held = manager.finish_captures(deadline_s=5.0)
            assert {h.rank for h in held if h.version == v(2)} == {0, 1}
            manager.newest_committed(v(2))
            manager.group(epoch=2, ranks=2, base=v(2))
            with Rank(manager, 1, epoch=2, world_size=2) as reborn:
                assert reborn.restored(2, epoch=1) == {0: state(0, 2), 1: state(1, 2)}


def test_survivor_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(ranks=2)
        with Rank(manager, 0, world_size=2) as survivor:
            survivor.capture(1)
            half_captured(manager)
            manager.link.send(FinishCaptures(1, 5.0))
            assert survivor.client.poll() is None
            survivor.capture(2)
            survivor.finish(survivor.task())
            held = manager.expect(CapturesFinished, timeout_s=2.0).held
            assert {h.rank for h in held if h.version == v(2)} == {0, 1}


def test_who_asked_after_a_new_manager_came_finishes_too(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(ranks=2)
        with Rank(manager, 0, world_size=2) as survivor:
            survivor.capture(1)
            survivor.capture(2)
            half_captured(manager)
            manager.kill()
            manager.start()
            manager.group(ranks=2, dead=(1,))
            survivor.finish(survivor.task())
            manager.newest_committed(v(2))


def test_what_nobody_can_finish_is_not_waited_for(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(ranks=2)
        with Rank(manager, 0, world_size=2) as survivor:
            survivor.capture(1)
            survivor.capture(2)
            half_captured(manager)
            began_s = time.monotonic()
            manager.link.send(FinishCaptures(1, 10.0))
            request = survivor.task()
            survivor.client.finished(request.version, request.rank, None)
            held = manager.expect(CapturesFinished).held
            assert time.monotonic() - began_s < 5.0
            assert {h.version for h in held if h.rank == 1} == {v(1)}


def test_finishing_ends_at_its_deadline(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(ranks=2)
        with Rank(manager, 0, world_size=2) as survivor:
            survivor.capture(1)
            half_captured(manager)  # the survivor never comes to step 2
            began_s = time.monotonic()
            manager.finish_captures(deadline_s=0.3)
            assert 0.25 < time.monotonic() - began_s < 2.0
            began_s = time.monotonic()
            manager.finish_captures(epoch=7, deadline_s=9.0)  # not our epoch: nothing to wait for
            assert time.monotonic() - began_s < 2.0


def test_flush_writes_the_first_committed_version_beside_captures(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(ranks=2)
        with (
            Rank(manager, 0, world_size=2, nbytes=2_000_000) as one,
            Rank(manager, 1, world_size=2, nbytes=2_000_000) as two,
        ):
            manager.link.send(Flush(v(5), fence=3))
            flushed = None
            for step in range(1, 60):
                assert one.capture(step), one.client.denied
                assert two.capture(step), two.client.denied
                manager.drain()
                if any(isinstance(message, Flushed) for message in manager.inbox):
                    break
            flushed = manager.expect(Flushed)
            assert (flushed.asked, flushed.version, flushed.fence) == (v(5), v(5), 3)
            for file in flushed.files:
                path = tmp_path / "checkpoints" / file.path
                assert path.stat().st_size == file.nbytes
                reader = SegmentReader(LocalFile(path))
                reader.verify()
                assert reader.digest == file.digest
                chunks = [bytes(reader.read(n, Scratch())) for n in range(reader.chunks)]
                reader.close()
                assert b"".join(chunks)[:2_000_000] == state(file.rank, 5, 2_000_000)
            newest = manager.inventory()[-1].version
            manager.link.send(Flush(newest, fence=3))
            assert manager.expect(Flushed).version == newest
            manager.link.send(Flush(v(6), fence=3))
            assert "passed" in manager.expect(FlushRefused).reason
            manager.link.send(Flush(v(6, epoch=9), fence=3))
            assert "epoch 9" in manager.expect(FlushRefused).reason


def test_flush_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with Manager(tmp_path, checkpoint_dir=str(tmp_path / "file" / "checkpoints")) as manager:
        manager.group()
        with Rank(manager) as rank:
            rank.capture(1)
            manager.newest_committed(v(1))
            manager.link.send(Flush(v(1), fence=1))
            assert "checkpoints" in manager.expect(FlushRefused).reason
            manager.link.send(Flush(v(9), fence=1))
            manager.group(epoch=2, base=v(1))
            assert "over" in manager.expect(FlushRefused).reason
            manager.link.send(Flush(v(1), fence=2))  # the restored version, of an older epoch
            assert "checkpoints" in manager.expect(FlushRefused).reason


def test_a_flush_that_fails_in_an_unforeseen_way_is_refused_and_the_next_is_tried(
    tmp_path: Path,
) -> None:
    with Manager(tmp_path, checkpoint_dir=f"{tmp_path}/no\0path") as manager:  # a ValueError
        manager.group()
        with Rank(manager) as rank:
            for step in (1, 2):
                rank.capture(step)
                manager.newest_committed(v(step))
                manager.link.send(Flush(v(step), fence=1))
                refused = manager.expect(FlushRefused)
                assert refused.asked == v(step)
                assert "ValueError: embedded null byte" in refused.reason
        manager.drain()
        assert [text.split(" ")[:2] for text in manager.notices] == [["step", "1"], ["step", "2"]]


def test_ranks_of_other_epochs(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group(epoch=3)
        with pytest.raises(StateError, match="epoch 2"):
            Rank(manager, epoch=2)
        process = child(manager, "print(rank.capture(1) is not None)", epoch=4)
        time.sleep(0.2)
        with Rank(manager, epoch=3) as rank:
            assert rank.capture(1)
            manager.group(epoch=4, base=v(1, 3))
            out, _ = process.communicate(timeout=10)
            assert out == "True\n"
            with pytest.raises(StateError, match="epoch 3"):
                rank.client.open(v(1, 3))


NONSENSE = [
    Begin(1, v(1)),
    ImageSealed(1, v(1), 0),
    Reserve(1, 1 << 60),
    ClientHello(1, -5, 1, 0, 1),
    ClientHello(1, 0, 1, 0, 1, slot=77, version=v(3)),
    Committed(v(1)),
]


def test_nonsense_on_the_local_socket_costs_only_that_connection(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager) as rank:
            rank.capture(1)
            for first in NONSENSE:
                for second in NONSENSE:
                    with local.connect_local(manager.socket_path, 2.0) as stranger:
                        try:
                            stranger.send(ClientHello(1, 0, 1, 0, 1))
                            stranger.send(first)
                            stranger.send(second)
                            stranger.settimeout(0.01)
                            stranger.receive()
                        except (PeerLostError, TimeoutError):
                            pass
            raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            raw.connect(manager.socket_path)
            raw.send(os.urandom(1000))
            raw.close()
            assert rank.restored(1) == {0: state(0, 1)}
            assert rank.capture(5), rank.client.denied
            assert manager.process.poll() is None


def test_an_image_that_is_not_one_is_not_kept(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager) as rank:
            held = rank.capture(1)
            writer = rank.start(2)
            writer.seal()
            writer._view[100] ^= 1
            writer._view[2048 + 100] ^= 1
            rank.client.sealed(v(2), replace(held, version=v(2)))
            until(lambda: manager.drain() or manager.notices)
            assert "not kept" in manager.notices[0]
            assert steps_held(manager) == [1]
            assert rank.capture(3)


def test_garbage_on_the_data_port_is_survived(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        host, _, port = manager.address.rpartition(":")
        for size in (0, 1, 100, 100_000):
            stranger = socket.create_connection((host, int(port)))
            with stranger, contextlib.suppress(OSError):
                stranger.sendall(os.urandom(size))
        with Rank(manager) as rank:
            assert rank.capture(1)


def test_manager_ends_with_its_agent(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    manager.close()
    assert manager.process.returncode == 0


def test_manager_starts_fast_and_without_torch() -> None:
    code = (
        "import sys, ftrain.snapshot.manager; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False False\n"


def test_a_withdrawn_version_is_not_held_not_flushed_and_not_found_again(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        manager.group()
        with Rank(manager) as rank:
            rank.capture(1)
            writer = rank.start(2)
            assert writer is not None
            rank.seal(writer, 2)
            manager.newest_committed(v(2))
            writer.abandon()
            rank.client.withdraw(v(2))
            assert manager.expect(Withdrawn).version == v(2)
            assert steps_held(manager) == [1]
            assert rank.restored(1) == {0: state(0, 1)}
            manager.link.send(Flush(v(2), fence=1))
            assert "passed" in manager.expect(FlushRefused).reason
            manager.kill()
            manager.start()
            manager.group()
            assert steps_held(manager) == [1]
            assert rank.capture(3)
            manager.newest_committed(v(3))
            assert steps_held(manager)[-1] == 3


def test_a_manager_that_can_not_serve_says_why_and_ends(tmp_path: Path) -> None:
    """Where no socket can be made, as on some file systems; and at a foreign address."""
    place = tmp_path / "gone"
    for settings, words in (
        ({}, f"no socket can be made at {place}/smp0.sock"),
        ({"bind": "192.0.2.1"}, "can't listen on 192.0.2.1:0"),
    ):
        with Manager(place, wait=False, **settings) as manager:
            refused = manager.expect(SetupRefused)
            assert words in refused.why
            assert refused.exit_code == 2
            assert manager.process.wait(10) == 2
