"""Capture behind the step: complete before the optimizer, torn never, finished for the dead."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from capture_samples import (
    CHUNK_BYTES,
    Finish,
    Memory,
    capturing,
    contents,
    identity,
    share_of,
    unfinished,
)

from ftrain.checkpoint.capture import CaptureEngine
from ftrain.checkpoint.frozen import FrozenChunks
from ftrain.checkpoint.header import ImageState
from ftrain.checkpoint.image import ImageReader, ImageWriter
from ftrain.checkpoint.tensors import Changes, StateTensor, plan_image
from ftrain.comms.errors import CorruptionError, MemoryShortError
from ftrain.comms.protocol.messages import Held, VersionId


def tensors(scale: float = 1.0) -> tuple[StateTensor, ...]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(100, 300), (7,), (1,), (50, 33), (300, 400)]
    return tuple(
        StateTensor.whole(f"model/{i}", torch.randn(size, generator=generator) * scale, "0,1")
        for i, size in enumerate(sizes)
    )


@pytest.fixture
def memory() -> Iterator[Memory]:
    found = Memory()
    yield found
    found.close()


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def engine(memory: Memory, notes: list[str]) -> Iterator[CaptureEngine]:
    with capturing(memory, lambda key: share_of(0), CHUNK_BYTES, notes) as found:
        yield found


def test_two_ranks_parts_make_the_whole() -> None:
    held: dict[str, dict[int, int]] = {}
    for rank in (0, 1):
        plan = plan_image(tensors(), lambda key, rank=rank: share_of(rank), 1024, CHUNK_BYTES)
        for segment in plan.segments:
            for byte in (segment.start, segment.start + segment.nbytes - 1):
                held.setdefault(segment.name, {})[byte] = rank
            held[segment.name].setdefault(-1, 0)
            held[segment.name][-1] += segment.nbytes
    for tensor in tensors():
        assert held[tensor.name][-1] == tensor.tensor.numel() * 4


def test_a_version_is_complete_when_the_barrier_returns(
    engine: CaptureEngine, memory: Memory
) -> None:
    state = tensors()
    engine.start(VersionId(1, 5), state, b"small", 17)
    engine.barrier(10)
    before = {t.name: t.tensor.clone() for t in state}
    for tensor in state:
        tensor.tensor.add_(1)  # the optimizer
    image = memory.image()
    image.verify()
    assert image.state is ImageState.SEALED
    assert image.small == b"small"
    assert image.collectives == 17
    for (name, start), data in contents(image).items():
        raw = before[name].numpy().tobytes()
        assert data == raw[start : start + len(data)]
    assert engine.statistics().captured == 1
    assert engine.drain(10)
    assert memory.handed_in[-1][0] == VersionId(1, 5)


def test_a_step_does_not_wait_for_what_is_done_with_a_sealed_image(
    engine: CaptureEngine, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner answers late, and the version stays what the owner was told it is."""
    answer, sealed = threading.Event(), memory.sealed

    def sealed_slowly(version: VersionId, held: Held) -> None:
        assert answer.wait(10)
        sealed(version, held)

    monkeypatch.setattr(memory, "sealed", sealed_slowly)
    state = tensors()
    engine.start(VersionId(1, 5), state, b"small")
    engine.barrier(5)
    engine.barrier(0.0)  # another optimizer's: nor is it given up now
    assert not answer.is_set()
    answer.set()
    assert engine.drain(10)
    assert memory.handed_in == [(VersionId(1, 5), memory.handed_in[0][1])]
    assert (engine.statistics().captured, engine.statistics().skipped) == (1, 0)
    memory.image().verify()


def test_a_write_found_before_the_owner_knows_the_version_is_told_behind_it(
    engine: CaptureEngine, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, sealed, withdraw = [], memory.sealed, memory.withdraw

    def sealed_slowly(version: VersionId, held: Held) -> None:
        time.sleep(0.3)
        sealed(version, held)
        told.append("sealed")

    def withdraw_then(version: VersionId) -> None:
        withdraw(version)
        told.append("withdrawn")

    monkeypatch.setattr(memory, "sealed", sealed_slowly)
    monkeypatch.setattr(memory, "withdraw", withdraw_then)
    state = (StateTensor.whole("model", torch.zeros(2 * 65536), "0,1"),)
    engine.start(VersionId(1, 5), state, b"")
    while not engine.statistics().captured:
        time.sleep(0.001)
    state[0].tensor.add_(1)  # not by the optimizer
    engine.barrier(10)
    assert told == ["sealed", "withdrawn"]


def test_an_error_that_nobody_expects_costs_one_version(
    engine: CaptureEngine, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its thread the engine would have every step wait in vain."""
    with monkeypatch.context() as patched:
        patched.setattr(memory, "enter", lambda: {}["nothing"])
        engine.start(VersionId(1, 0), tensors(), b"")
        engine.barrier(10)
    assert engine.statistics().skipped == 1
    with monkeypatch.context() as patched:
        patched.setattr(memory, "enter_more", lambda: 1 // 0)
        engine.start(VersionId(1, 1), tensors(), b"")
        engine.barrier(10)
        assert engine.drain(10)
    engine.start(VersionId(1, 2), tensors(), b"")
    engine.barrier(10)
    assert engine.drain(10)
    assert memory.handed_in[-1][0] == VersionId(1, 2)


def test_room_for_what_the_first_step_makes_is_reserved_behind_it(
    engine: CaptureEngine, memory: Memory
) -> None:
    state = tensors()
    engine.start(VersionId(1, 0), state, b"small")
    engine.barrier(10)
    moments = [
        StateTensor.whole(f"optimizer/{t.name}", torch.empty_like(t.tensor, device="meta"), t.share)
        for t in state
    ]
    engine.expect((*state, *moments))
    assert memory.room_made.wait(10)
    (first, begun), (second, expected) = memory.reserved
    assert (first, second) == ("MainThread", "ftrain-capture")
    real = [StateTensor.whole(m.name, torch.ones(m.tensor.shape), m.share) for m in moments]
    engine.start(VersionId(1, 1), (*state, *real), b"larger" * 6_000)
    engine.barrier(10)
    assert engine.statistics().captured == 2
    assert begun < memory.image().total_bytes <= expected


def test_room_that_can_not_be_had_ends_nothing(engine: CaptureEngine, memory: Memory) -> None:
    state = tensors()
    engine.start(VersionId(1, 0), state, b"small")
    engine.barrier(10)
    vast = torch.empty(2**30, device="meta")
    engine.expect((*state, StateTensor.whole("vast", vast, "0,1")))
    engine.start(VersionId(1, 1), state, b"small")
    engine.barrier(10)
    assert engine.statistics().captured == 2


def test_a_denied_version_is_counted_with_its_reason(
    engine: CaptureEngine, memory: Memory, notes: list[str]
) -> None:
    memory.deny = True
    for step in range(12):
        engine.start(VersionId(1, step), tensors(), b"")
        engine.barrier(10)
    assert engine.statistics().skipped == 12
    assert "all slots are taken" in engine.statistics().skip_reason
    assert len(notes) == 2  # the 1st and the 10th


def test_too_little_memory_is_said_and_training_goes_on(
    engine: CaptureEngine, notes: list[str]
) -> None:
    huge = StateTensor.whole("model/huge", torch.empty(2**28, dtype=torch.uint8), "0,1")
    engine.start(VersionId(1, 1), (huge, huge, huge), b"")
    engine.barrier(10)
    assert "more memory than there is" in notes[0]
    with pytest.raises(MemoryShortError):  # nothing of the run can be kept: it should not begin
        engine.start(VersionId(1, 0), (huge, huge, huge), b"")


def test_a_write_outside_the_optimizer_is_noticed_and_answered_with_eager_copies(
    engine: CaptureEngine, memory: Memory, notes: list[str]
) -> None:
    state = tensors()
    for step in range(20):
        engine.start(VersionId(1, step), state, b"")
        engine.drain(10)
        for tensor in state:
            tensor.tensor.mul_(1.5)  # an EMA swap, say
        engine.barrier(10)
        if engine.statistics().eager:
            break
    assert "between a boundary and the next optimizer.step" in notes[0]
    assert memory.withdrawn == [VersionId(1, step)]
    with pytest.raises(CorruptionError, match="no valid header"):
        memory.image()
    before = state[0].tensor.clone()
    engine.start(VersionId(1, 99), state, b"")  # returns when all is copied
    state[0].tensor.zero_()
    first = contents(memory.image())["model/0", 0]
    assert first == before.numpy().tobytes()[: len(first)]


def test_slots_do_not_change_while_a_version_begins_in_one(
    engine: CaptureEngine, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for more is made in another thread, and replaces the slots."""
    state, more = tensors(), StateTensor.whole("more", torch.zeros(200_000), "0,1")
    engine.start(VersionId(1, 0), state, b"")
    engine.barrier(10)
    begin, reserved = memory.begin, list(memory.reserved)

    def begin_slowly(version: VersionId, wait_s: float | None = None) -> memoryview | None:
        memory.room_made.clear()
        engine.expect((*state, more))
        assert not memory.room_made.wait(0.3)
        assert memory.reserved == reserved
        return begin(version, wait_s)

    monkeypatch.setattr(memory, "begin", begin_slowly)
    engine.start(VersionId(1, 1), state, b"")
    engine.barrier(10)
    assert memory.room_made.wait(10)  # by and by
    assert engine.drain(10)
    assert len(memory.reserved) == len(reserved) + 1
    assert memory.handed_in[-1][0] == VersionId(1, 1)


def test_a_step_of_two_optimizers_leaves_nothing_out_of_the_samples(
    engine: CaptureEngine, memory: Memory
) -> None:
    """Each of them calls the barrier, and at the second one there is nothing to compare."""
    names = ("first", "second")
    state = tuple(StateTensor.whole(name, torch.zeros(2 * 65536), "0,1") for name in names)
    for step in range(6):  # this rank captures the first half: both stretches of one tensor
        engine.start(VersionId(1, step), state, b"")
        engine.drain(10)
        state[0].tensor[-1] += 1
        engine.barrier(10)
        engine.barrier(10)
    assert engine.statistics().eager
    assert len(memory.withdrawn) == 1


def on_each_device(state: tuple[StateTensor, ...]) -> list[tuple[StateTensor, ...]]:
    found = [state]
    if torch.cuda.is_available():
        found.append(tuple(StateTensor.whole(t.name, t.tensor.cuda(), t.share) for t in state))
    return found


def test_a_version_that_was_given_up_is_nobodys_image(
    engine: CaptureEngine, memory: Memory
) -> None:
    """The optimizer writes from then on: what is copied too late must not be finished by others."""
    for state in on_each_device(tensors()):
        step, before = memory.turn, engine.statistics()
        memory.open.clear()
        engine.start(VersionId(1, 0), state, b"")
        engine.barrier(0.01)
        assert engine.statistics().skipped == before.skipped + 1
        slot = memory.turn
        memory.open.set()
        while engine.statistics().captured == before.captured:  # the late copy has to end first
            step += 1
            engine.start(VersionId(1, step), state, b"")
            engine.barrier(10)
            assert engine.drain(10)
        memory.image().verify()
        memory.turn = slot
        with pytest.raises(CorruptionError, match="no valid header"):
            memory.image()


def test_a_survivor_finishes_a_dead_ranks_image(engine: CaptureEngine, memory: Memory) -> None:
    state = tensors()
    version = VersionId(1, 8)
    engine.start(version, state, b"mine")
    engine.drain(10)
    buffer = unfinished(1, state, version)
    held = memory.ask(Finish(version, 1, buffer))
    assert held is not None
    assert held.rank == 1
    image = ImageReader(buffer)
    image.verify()
    assert image.small == b"the dead rank's small state"
    expected = {t.name: t.tensor.numpy().tobytes() for t in state}
    for (name, start), data in contents(image).items():
        assert data == expected[name][start : start + len(data)]


def test_a_survivor_refuses_when_its_tensors_moved_on(
    engine: CaptureEngine, memory: Memory
) -> None:
    state = tensors()
    version = VersionId(1, 8)
    engine.start(version, state, b"mine")
    engine.barrier(10)  # the optimizer may write now
    buffer = unfinished(1, state, version)
    assert memory.ask(Finish(version, 1, buffer)) is None
    assert ImageReader(buffer).state is ImageState.WRITING


def test_a_survivor_refuses_bytes_that_it_does_not_share(
    engine: CaptureEngine, memory: Memory
) -> None:
    mine = tuple(StateTensor.whole(t.name, t.tensor, "0") for t in tensors())
    version = VersionId(1, 8)
    engine.start(version, mine, b"mine")
    engine.drain(10)
    assert memory.ask(Finish(version, 1, unfinished(1, tensors(), version))) is None


def mixed() -> tuple[StateTensor, ...]:
    """Each kind, the weights last and large, so that copying them takes a while."""
    kinds = {"ema": Changes.ANYTIME, "teacher": Changes.NEVER, "model": Changes.IN_STEP}
    sizes = {"ema": 200_000, "teacher": 300_000, "model": 4_000_000}
    return tuple(
        StateTensor.whole(name, torch.arange(float(sizes[name])), "0,1", kind)
        for name, kind in kinds.items()
    )


def expect_boundary(
    memory: Memory, state: tuple[StateTensor, ...], ema: float, teacher: float
) -> None:
    """The sealed image holds what the tensors were at the boundary."""
    image = memory.image()
    image.verify()
    assert image.state is ImageState.SEALED
    added = {"ema": ema, "teacher": teacher, "model": 0.0}
    for tensor in state:
        raw = (torch.arange(float(tensor.tensor.numel())) + added[tensor.name]).numpy().tobytes()
        for (name, start), data in contents(image).items():
            assert name != tensor.name or data == raw[start : start + len(data)]


def test_what_no_optimizer_owns_is_as_it_was_at_the_boundary(
    engine: CaptureEngine, memory: Memory, notes: list[str]
) -> None:
    state = mixed()
    ema = state[0].tensor
    for step in range(5):
        engine.start(VersionId(1, step), state, b"")
        ema.data.add_(1)  # at once, while the weights are being copied
        engine.drain(10)
        ema.data.add_(1)
        engine.barrier(10)
        expect_boundary(memory, state, 2.0 * step, 0)
    assert engine.statistics().captured == 5
    assert not engine.statistics().eager
    assert notes == []


def test_a_frozen_tensor_that_changes_unseen_costs_one_version_and_is_copied_from_then_on(
    engine: CaptureEngine, memory: Memory, notes: list[str]
) -> None:
    state = mixed()
    teacher = state[1].tensor
    engine.start(VersionId(1, 1), state, b"")
    teacher.data.add_(1)  # the first copy is made at the boundary
    engine.barrier(10)
    expect_boundary(memory, state, 0, 0)
    engine.start(VersionId(1, 2), state, b"")  # nobody can say what it is at this boundary
    engine.barrier(10)
    assert memory.image().state is ImageState.WRITING
    assert "teacher" in notes[0]
    assert "copied at the boundary from now on" in notes[0]
    for step in (3, 4):
        engine.start(VersionId(1, step), state, b"")
        teacher.data.add_(1)
        engine.barrier(10)
        expect_boundary(memory, state, 0, step - 2)
    assert len(notes) == 1


def test_a_frozen_tensor_that_torch_saw_change_costs_no_version(
    engine: CaptureEngine, memory: Memory, notes: list[str]
) -> None:
    state = mixed()
    for step in range(4):
        engine.start(VersionId(1, step), state, b"")
        engine.barrier(10)
        expect_boundary(memory, state, 0, step)
        state[1].tensor.add_(1)
    assert engine.statistics().captured == 4
    assert notes == []


def test_frozen_tensors_are_copied_at_the_boundary_only_once() -> None:
    state = mixed()
    plan = plan_image(state, lambda key: share_of(0), 1024, CHUNK_BYTES)
    frozen = FrozenChunks(plan, state)
    writer = ImageWriter(bytearray(plan.total_bytes), plan, identity(VersionId(1, 1), 0))
    writer.begin(b"")
    assert not frozen.expect(writer)
    for chunk in range(writer.chunks):
        writer.finish_chunk(chunk)
    frozen.sealed(writer)
    writer.begin(b"")
    assert frozen.expect(writer)
    (teacher,) = [s for s in plan.segments if s.name == "teacher"]
    assert teacher.offset % CHUNK_BYTES == 0  # no other tensor can change its chunks' digests


def left_behind(state: tuple[StateTensor, ...], version: VersionId) -> memoryview:
    """What rank 1 leaves when it is killed while its weights are copied, in its second version."""
    memory = Memory()
    engine = CaptureEngine(
        memory, identity, lambda key: share_of(1), rank=1, chunk_bytes=CHUNK_BYTES
    )
    engine.start(VersionId(version.epoch, version.step - 1), state, b"")
    engine.barrier(10)
    assert memory.handed_in
    engine._begin(version, state, b"small", 3)  # and no further
    engine.close()
    memory.close()
    return memoryview(memory.maps[memory.turn])


@pytest.mark.parametrize("frozen_changed", [False, True])
def test_a_survivor_leaves_alone_what_was_copied_at_the_boundary(
    engine: CaptureEngine, memory: Memory, frozen_changed: bool
) -> None:
    version = VersionId(1, 8)
    buffer = left_behind(mixed(), version)
    state = mixed()
    engine.start(version, state, b"mine")
    engine.drain(10)
    state[0].tensor.data.add_(1)
    if frozen_changed:
        state[1].tensor.data.add_(1)
    held = memory.ask(Finish(version, 1, buffer))
    image = ImageReader(buffer)
    assert (held is None) is frozen_changed
    assert image.state is (ImageState.WRITING if frozen_changed else ImageState.SEALED)
    if not frozen_changed:
        image.verify()
        for (_, start), data in contents(image).items():
            numbers = torch.arange(start // 4, (start + len(data)) // 4, dtype=torch.float32)
            assert data == numbers.numpy().tobytes()


def test_a_killed_capture_never_reads_as_a_version() -> None:
    """SIGKILL at many moments of a capture into shared memory: sealed and right, or not sealed."""
    state = tensors()
    plan = plan_image(state, lambda key: share_of(0), 1024, CHUNK_BYTES)
    sealed = 0
    for delay in range(40):
        shared = mmap.mmap(-1, plan.total_bytes)
        pid = os.fork()
        if pid == 0:
            writer = ImageWriter(memoryview(shared), plan, identity(VersionId(1, 1), 0), 0)
            writer.begin(b"s")
            for chunk in range(writer.chunks):
                if chunk * 4 + 2 == delay:
                    os.kill(os.getpid(), 9)
                for piece in plan.pieces(chunk):
                    source = next(t.tensor for t in state if t.name == piece.segment.name)
                    raw = source.numpy().tobytes()[piece.start : piece.start + piece.nbytes]
                    writer.data[piece.offset : piece.offset + piece.nbytes] = raw
                writer.finish_chunk(chunk)
            writer.seal()
            os._exit(0)
        os.waitpid(pid, 0)
        image = ImageReader(memoryview(shared))
        if image.state is ImageState.SEALED:
            sealed += 1
            image.verify()
        else:
            assert image.missing_chunks()
    assert 0 < sealed < 40
