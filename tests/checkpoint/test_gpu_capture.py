"""Capture from a GPU: behind its kernels, ahead of the next ones, and the host waits for neither.

Run on a machine that has one; everything here is skipped elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from capture_samples import Finish, Memory, capturing, contents, identity, share_of, unfinished

from ftrain.checkpoint.capture import CaptureEngine
from ftrain.checkpoint.copying import bytes_of
from ftrain.checkpoint.header import ImageState
from ftrain.checkpoint.image import ImageReader
from ftrain.checkpoint.pinned import PageLock
from ftrain.checkpoint.tensors import Changes, StateTensor
from ftrain.comms.protocol.messages import Share, VersionId

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CHUNK_BYTES = 1024 * 1024
LONG = 10_000_000_000  # clock cycles of a kernel that does nothing else: about five seconds


@pytest.fixture
def memory() -> Iterator[Memory]:
    torch.zeros(1, device="cuda")
    found = Memory()
    yield found
    found.close()


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def engine(memory: Memory, notes: list[str]) -> Iterator[CaptureEngine]:
    with capturing(memory, lambda key: Share(key, 0, 0, 1), CHUNK_BYTES, notes) as found:
        yield found


def state() -> tuple[StateTensor, ...]:
    """Each kind, each layout, some on the host as AdamW's step counters are."""
    generator = torch.Generator("cuda").manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    kinds = {
        "weight": (normal(2000, 1500), Changes.IN_STEP),
        "half": (normal(1000, 700).bfloat16(), Changes.IN_STEP),
        "image": (normal(64, 32, 3, 3).to(memory_format=torch.channels_last), Changes.IN_STEP),
        "flags": (normal(1001) > 0, Changes.IN_STEP),
        "scalar": (normal(1).squeeze(), Changes.IN_STEP),
        "none": (normal(0, 4), Changes.IN_STEP),
        "steps": (torch.tensor(7.0), Changes.IN_STEP),
        "offloaded": (torch.randn(300_000), Changes.IN_STEP),
        "running": (normal(700_000), Changes.ANYTIME),
        "seen": (torch.tensor(12), Changes.ANYTIME),
        "teacher": (normal(900_000), Changes.NEVER),
    }
    return tuple(
        StateTensor.whole(name, tensor, "0,1", kind) for name, (tensor, kind) in kinds.items()
    )


def raw(tensors: tuple[StateTensor, ...]) -> dict[str, bytes]:
    return {t.name: bytes_of(t.tensor).cpu().numpy().tobytes() for t in tensors}


def change(tensors: tuple[StateTensor, ...], *kinds: Changes) -> None:
    """What the script or the optimizer launches next."""
    for tensor in tensors:
        if tensor.changes in kinds:
            found = tensor.tensor
            found.logical_not_() if found.dtype is torch.bool else found.add_(1)


def expect(memory: Memory, expected: dict[str, bytes]) -> None:
    image = memory.image()
    image.verify()
    assert image.state is ImageState.SEALED
    found = {name: data for (name, _), data in contents(image).items()}
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_a_version_is_what_the_state_was_at_its_boundary(
    engine: CaptureEngine, memory: Memory, notes: list[str]
) -> None:
    tensors = state()
    for step in range(6):
        expected = raw(tensors)
        engine.start(VersionId(1, step), tensors, b"small")
        change(tensors, Changes.ANYTIME)  # a forward pass: running statistics
        engine.barrier(10)
        change(tensors, Changes.IN_STEP)
        assert engine.drain(10)
        expect(memory, expected)
        assert memory.image().small == b"small"
    assert engine.statistics().captured == 6
    assert notes == []


def test_the_host_waits_for_no_kernel(engine: CaptureEngine, memory: Memory) -> None:
    # What lies on a GPU and has to be made contiguous is waited for.
    tensors = tuple(t for t in state() if t.tensor.is_contiguous())
    engine.start(VersionId(1, 0), tensors, b"")  # memory is locked, and frozen tensors are known
    engine.barrier(10)
    assert engine.drain(10)
    change(tensors, Changes.IN_STEP)
    expected = raw(tensors)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    asleep = torch.cuda.Event()
    asleep.record()
    engine.start(VersionId(1, 1), tensors, b"")
    change(tensors, Changes.ANYTIME)
    engine.barrier(10)
    change(tensors, Changes.IN_STEP)
    assert not asleep.query()
    assert engine.drain(10)
    expect(memory, expected)


def test_kernels_that_are_still_to_run_belong_to_the_version(
    engine: CaptureEngine, memory: Memory
) -> None:
    tensors = state()
    torch.cuda._sleep(LONG)
    change(tensors, Changes.IN_STEP, Changes.ANYTIME)
    engine.start(VersionId(1, 0), tensors, b"")
    engine.barrier(10)
    assert engine.drain(10)
    expect(memory, raw(tensors))


@pytest.mark.parametrize("by", [lambda t: t.add_(1), lambda t: t.data.mul_(2)])
def test_a_write_outside_the_optimizer_is_noticed(
    engine: CaptureEngine,
    memory: Memory,
    notes: list[str],
    by: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    tensors = tuple(t for t in state() if t.name in ("weight", "half"))
    for step in range(60):
        engine.start(VersionId(1, step), tensors, b"")
        assert engine.drain(10)
        for tensor in tensors:
            by(tensor.tensor)
        engine.barrier(10)
        engine.start(VersionId(1, step + 100), tensors, b"")  # the sample is looked at before
        engine.barrier(10)
        assert engine.drain(10)
        if engine.statistics().eager:
            break
    assert "between a boundary and the next optimizer.step" in notes[0]
    assert memory.withdrawn[0] == VersionId(1, step)
    expected = raw(tensors)
    engine.start(VersionId(1, 999), tensors, b"")  # what follows comes behind its copies
    change(tensors, Changes.IN_STEP)
    assert engine.drain(10)
    expect(memory, expected)


def test_steps_as_they_should_be_are_never_taken_for_writes(
    engine: CaptureEngine, notes: list[str]
) -> None:
    tensors = tuple(t for t in state() if t.name in ("weight", "half"))
    for step in range(100):
        engine.start(VersionId(1, step), tensors, b"")
        engine.barrier(10)
        change(tensors, Changes.IN_STEP)
    assert engine.drain(10)
    assert (engine.statistics().eager, notes) == (False, [])


def test_a_step_in_a_cuda_graph_comes_behind_the_copies(
    engine: CaptureEngine, memory: Memory, notes: list[str]
) -> None:
    """Replays call no hook: from the recording on, everything is copied at the boundary."""
    tensors = tuple(t for t in state() if t.name in ("weight", "half"))
    engine.start(VersionId(1, 0), tensors, b"")
    assert engine.drain(10)  # what another thread does to a GPU can spoil a recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.barrier(10)
        change(tensors, Changes.IN_STEP)
    assert "CUDA graph" in notes[-1]
    graph.replay()
    assert engine.drain(10)
    for step in range(1, 4):
        expected = raw(tensors)
        engine.start(VersionId(1, step), tensors, b"")
        graph.replay()
        assert engine.drain(10)
        if memory.handed_in and memory.handed_in[-1][0] == VersionId(1, step):
            expect(memory, expected)
    assert engine.statistics().captured
    assert raw(tensors) != expected


@pytest.mark.parametrize("unseen", [False, True])
def test_a_frozen_tensor_that_changes_is_captured_as_it_is(
    engine: CaptureEngine, memory: Memory, unseen: bool
) -> None:
    tensors = state()
    teacher = next(t.tensor for t in tensors if t.name == "teacher")
    for step in range(4):
        if step == 2:
            (teacher.data if unseen else teacher).mul_(3)
        expected = raw(tensors)
        engine.start(VersionId(1, step), tensors, b"")
        engine.barrier(10)
        assert engine.drain(10)
        if step != 2 or engine.statistics().captured == 3:
            expect(memory, expected)
    assert engine.statistics().captured == (3 if unseen else 4)


def test_a_survivor_finishes_a_dead_ranks_image(memory: Memory) -> None:
    found = CaptureEngine(
        memory, identity, lambda key: share_of(0), rank=0, chunk_bytes=CHUNK_BYTES
    )
    tensors = tuple(t for t in state() if t.name in ("weight", "half", "steps"))
    version = VersionId(1, 8)
    found.start(version, tensors, b"mine")
    assert found.drain(10)
    buffer = unfinished(1, tensors, version, CHUNK_BYTES)
    assert memory.ask(Finish(version, 1, buffer)) is not None
    ImageReader(buffer).verify()
    expected = raw(tensors)
    for (name, start), data in contents(ImageReader(buffer)).items():
        assert data == expected[name][start : start + len(data)]
    found.close()


def test_memory_is_locked_as_long_as_somebody_wants_it(memory: Memory) -> None:
    memory.reserve(1024 * 1024)
    view = memoryview(memory.maps[0])
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    lock = PageLock(view)
    assert tensor.is_pinned()
    again = PageLock(view)  # refused, and no kernel hears of it
    torch.zeros(10, device="cuda").add_(1)
    again.release()
    assert tensor.is_pinned()
    lock.release()
    assert not tensor.is_pinned()
    lock = PageLock(view)
    assert tensor.is_pinned()
    del lock  # whoever forgets it can do no harm
    assert not tensor.is_pinned()


def test_slots_may_grow_and_memory_may_be_made_again(engine: CaptureEngine, memory: Memory) -> None:
    tensors: tuple[StateTensor, ...] = ()
    for step in range(1, 6):
        more = torch.randn(step * 300_000, device="cuda")
        tensors = (*tensors, StateTensor.whole(f"more{step}", more, "0,1"))
        for version in (10 * step, 10 * step + 1):
            expected = raw(tensors)
            engine.start(VersionId(1, version), tensors, b"")
            engine.barrier(10)
            change(tensors, Changes.IN_STEP)
            assert engine.drain(10)
            expect(memory, expected)


def test_the_version_behind_a_withdrawn_one_is_right_or_there_is_none(
    engine: CaptureEngine, memory: Memory
) -> None:
    """A script writes outside the optimizer at every step: that one was begun in ignorance, while
    the sample that shows it was still on its way."""
    tensors = (StateTensor.whole("ema", torch.randn(1000, device="cuda"), "0,1"),)
    for step in range(5):
        at_boundary = (replace(tensors[0], tensor=tensors[0].tensor.clone()),)
        engine.start(VersionId(1, step), tensors, b"")
        change(tensors, Changes.IN_STEP)  # outside
        assert engine.drain(10)
        if step == 0:
            torch.cuda._sleep(LONG)
        engine.barrier(10)
        if step and memory.handed_in[-1][0] == VersionId(1, step):
            expect(memory, raw(at_boundary))
    assert memory.withdrawn == [VersionId(1, 0)]
    assert engine.statistics().eager
    assert engine.statistics().captured >= 3
