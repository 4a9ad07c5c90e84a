"""The engine's calls in DeepSpeed's order, in a group of one; DeepSpeed itself is not needed."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ftrain.comms.errors import RestoreError, UsageError
from ftrain.runtime.deepspeed import complete_tags, verify
from ftrain.runtime.deepspeed.engine import DurableEngine, Options
from ftrain.runtime.deepspeed.peers import Peers

FILE = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@dataclass
class CommitInfo:
    """As DeepSpeed's CheckpointCommitInfo."""

    tag: str
    save_dir: str
    save_latest: bool


class TorchFiles:
    """Plain torch files, as DeepSpeed's own engine writes and reads them."""

    def save(self, state: Any, path: str) -> None:
        torch.save(state, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)


HELD: list[Held] = []


class Held:
    """Keeps one of the engine's threads busy until it is let go."""

    def __init__(self, engine: DurableEngine, queue: str) -> None:
        self._go = threading.Event()
        HELD.append(self)
        getattr(engine._started(), queue).put(self._go.wait)
        self.let_go = self._go.set


def let_all_go() -> None:
    """So that a test that failed ends."""
    for held in HELD:
        held.let_go()
    HELD.clear()


@pytest.fixture
def group() -> Iterator[None]:
    # The first step of a process imports half of torch, which holds on to a group that is there.
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    let_all_go()
    dist.destroy_process_group()


@pytest.fixture
def engine(group: None) -> Iterator[DurableEngine]:
    engine = DurableEngine(None, TorchFiles, Options())
    yield engine
    let_all_go()
    engine.cleanup()


@pytest.fixture
def ranks(group: None) -> Iterator[tuple[DurableEngine, DurableEngine]]:
    """The engines of two ranks, in one process."""
    store = dist.HashStore()
    peers = [Peers(rank, 2, "abc", store) for rank in (0, 1)]
    first, second = (DurableEngine(None, TorchFiles, Options(), peers=one) for one in peers)
    yield first, second
    let_all_go()
    on_both(DurableEngine.cleanup, (first, second))


def on_both(call: Callable[[DurableEngine], Any], ranks: Sequence[DurableEngine]) -> list[Any]:
    """What it returns or raises on each."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(call, engine) for engine in ranks]
        return [future.exception(30) or future.result() for future in futures]


def state(value: float = 1.0) -> dict[str, Any]:
    return {"optimizer_state_dict": {"moments": torch.full((100,), value)}}


def save(
    engine: DurableEngine, folder: Path, tag: str, content: dict[str, Any], file: str = FILE
) -> None:
    """What ``DeepSpeedEngine.save_checkpoint`` calls."""
    engine.makedirs(str(folder), exist_ok=True)
    engine.create(CommitInfo(tag, str(folder), True))
    engine.makedirs(str(folder / tag), exist_ok=True)
    engine.save(state_dict=content, path=str(folder / tag / file))
    assert engine.is_decoupled()


def commit(engine: DurableEngine) -> bool:
    """What ``DeepSpeedEngine.step`` calls at the accumulation boundary; whether it committed."""
    info = engine.get_commit_info()
    if info is None:
        return False
    assert engine.commit(info)
    assert not info.save_latest, "DeepSpeed would write latest before the files are durable"
    return True


def moments(engine: DurableEngine, folder: Path, tag: str) -> float:
    loaded = engine.load(str(folder / tag / FILE), map_location="cpu")
    return float(loaded["optimizer_state_dict"]["moments"][-1].item())


def still_waits(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    return thread


def test_a_commit_waits_for_the_copy_and_for_nothing_else(
    engine: DurableEngine, tmp_path: Path
) -> None:
    copying, writing = Held(engine, "_copying"), Held(engine, "_writing")
    content = state(1.0)
    save(engine, tmp_path, "a", content)
    thread = still_waits(lambda: commit(engine))
    copying.let_go()
    thread.join(10)
    assert not thread.is_alive()
    content["optimizer_state_dict"]["moments"].fill_(2.0)  # the step
    assert not list((tmp_path / "a").iterdir())
    assert not (tmp_path / "latest").exists()
    writing.let_go()
    engine.wait()
    assert (tmp_path / "latest").read_text() == "a"
    assert moments(engine, tmp_path, "a") == 1.0
    assert engine.statistics().durable == 1


def test_an_optimizer_that_steps_without_a_commit_waits_too(
    engine: DurableEngine, tmp_path: Path
) -> None:
    parameter = torch.nn.Parameter(torch.full((100,), 1.0))
    parameter.grad = torch.ones(100)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    copying = Held(engine, "_copying")
    save(engine, tmp_path, "a", {"optimizer_state_dict": {"moments": parameter.detach()}})
    thread = still_waits(optimizer.step)
    assert parameter[0].item() == 1.0
    copying.let_go()
    thread.join(10)
    assert parameter[0].item() == 0.0
    assert moments(engine, tmp_path, "a") == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_copy_from_a_device_is_ordered_behind_its_kernels(
    engine: DurableEngine, tmp_path: Path
) -> None:
    content = {"optimizer_state_dict": {"moments": torch.zeros(1 << 24, device="cuda")}}
    live = content["optimizer_state_dict"]["moments"]
    factor = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):  # so that the save comes long before the value is there
        factor = factor @ factor
    live.add_(1 + 0 * factor.nan_to_num(0.0, 0.0, 0.0)[0, 0])
    save(engine, tmp_path, "a", content)
    commit(engine)
    live.fill_(2.0)
    assert moments(engine, tmp_path, "a") == 1.0


def test_a_commit_is_due_once_after_a_save(engine: DurableEngine, tmp_path: Path) -> None:
    assert not commit(engine)
    save(engine, tmp_path, "a", state())
    assert commit(engine)
    assert not commit(engine)


def test_a_second_save_waits_for_the_memory_of_the_first(
    engine: DurableEngine, tmp_path: Path
) -> None:
    writing = Held(engine, "_writing")
    save(engine, tmp_path, "a", state(1.0))
    thread = still_waits(lambda: save(engine, tmp_path, "b", state(2.0)))
    writing.let_go()
    thread.join(10)
    engine.wait()
    assert (tmp_path / "latest").read_text() == "b"
    assert [moments(engine, tmp_path, tag) for tag in "ab"] == [1.0, 2.0]


def test_a_failure_is_told_at_the_next_save(
    engine: DurableEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(engine, tmp_path, "a", state())
    engine.wait()
    (tmp_path / "b").write_text("a file is in the way")
    save(engine, tmp_path, "b", state())
    engine._started().drain()
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        save(engine, tmp_path, "c", state())
    (said,) = [record.getMessage() for record in caplog.records]
    assert "b was not saved: rank 0: " in said
    assert "can't be written (Not a directory)" in said
    engine.wait()
    statistics = engine.statistics()
    assert (statistics.begun, statistics.durable, statistics.failed) == (3, 2, 1)
    assert (tmp_path / "latest").read_text() == "c"
    assert len(engine.failures) == 1


OTHER = FILE.replace("rank_0", "rank_1", 1)


def test_latest_names_a_tag_once_the_files_of_every_rank_are_durable(
    ranks: tuple[DurableEngine, DurableEngine], tmp_path: Path
) -> None:
    first, second = ranks
    writing = Held(second, "_writing")
    save(first, tmp_path, "a", state(1.0))
    save(second, tmp_path, "a", state(2.0), OTHER)
    thread = still_waits(first.wait)
    assert (tmp_path / "a" / FILE).exists()
    assert not (tmp_path / "latest").exists()
    assert complete_tags(tmp_path) == []
    writing.let_go()
    thread.join(10)
    assert not thread.is_alive()
    assert (tmp_path / "latest").read_text() == "a"
    second.wait()
    assert [engine.statistics().durable for engine in ranks] == [1, 1]
    assert verify(tmp_path, "a") > 0


def test_names_appear_once_what_they_stand_for_is_synced(
    engine: DurableEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def record_sync(fd: int) -> None:
        sync(fd)
        done.append(("synced", Path(os.readlink(f"/proc/self/fd/{fd}")).name))

    def record_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(("named", target.name))

    engine.makedirs(str(tmp_path / "a"))
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    save(engine, tmp_path, "a", state())
    engine.wait()
    names = [name if name != tmp_path.name else "." for _, name in done]
    assert [(what, name) for (what, _), name in zip(done, names, strict=True)] == [
        ("synced", f"{FILE}.{engine._peers.name}-1.new"),
        ("synced", "a"),
        ("synced", "ftrain.json.new"),
        ("named", "ftrain.json"),
        ("synced", "a"),
        ("synced", "a"),
        ("synced", "latest.new"),
        ("named", "latest"),
        ("synced", "."),
    ]


def test_a_failure_of_one_rank_is_one_of_all(
    ranks: tuple[DurableEngine, DurableEngine], tmp_path: Path
) -> None:
    first, second = ranks
    save(first, tmp_path, "a", state())
    save(second, tmp_path, "a", state() | {"f": print}, OTHER)
    on_both(DurableEngine.wait, ranks)
    for engine in ranks:
        (failure,) = engine.failures
        assert "a was not saved: rank 1: " in failure
        assert "optim_states.f is a builtins.builtin_function" in failure
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "latest").exists()
    save(first, tmp_path, "b", state())
    save(second, tmp_path, "b", state(), OTHER)
    on_both(DurableEngine.wait, ranks)
    assert (tmp_path / "latest").read_text() == "b"


def test_a_rank_ahead_of_the_others_leaves_what_they_will_publish(
    ranks: tuple[DurableEngine, DurableEngine], tmp_path: Path
) -> None:
    """Both save to the same tag again and again; rank 1 has its second file in hand while rank 0
    has not begun with its own."""
    first, second = ranks
    save(first, tmp_path, "last", state(1.0))
    save(second, tmp_path, "last", state(1.0), OTHER)
    on_both(DurableEngine.wait, ranks)
    writing = Held(first, "_writing")
    save(second, tmp_path, "last", state(2.0), OTHER)
    save(second, tmp_path, "last", state(3.0), OTHER)
    thread = still_waits(second.wait)
    assert verify(tmp_path, "last") > 0
    save(first, tmp_path, "last", state(2.0))
    writing.let_go()
    first.wait()
    assert verify(tmp_path, "last") > 0
    save(first, tmp_path, "last", state(3.0))
    first.wait()
    thread.join(10)
    assert verify(tmp_path, "last") > 0
    assert moments(first, tmp_path, "last") == 3.0
    assert [engine.failures for engine in ranks] == [[], []]
    assert not list(tmp_path.rglob("*.new"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_newest_tag_that_is_whole_on_every_rank_is_loaded(
    ranks: tuple[DurableEngine, DurableEngine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def choose(engine: DurableEngine, tag: str | None = None) -> str | None:
        return engine.choose_tag(str(tmp_path), tag)

    assert on_both(choose, ranks) == [None, None]
    for number, tag in enumerate("abcd"):
        save(ranks[0], tmp_path, tag, state(number))
        save(ranks[1], tmp_path, tag, state(number), OTHER)
    on_both(DurableEngine.wait, ranks)
    (tmp_path / "latest").write_text("c")
    assert on_both(choose, ranks) == ["c", "c"]
    flip(tmp_path / "c" / OTHER, 4200)
    assert on_both(choose, ranks) == ["b", "b"], "neither the damaged one nor the later one"
    assert caplog.text.count("b is loaded instead") == 1
    for found in on_both(lambda engine: choose(engine, "c"), ranks):
        assert isinstance(found, RestoreError)
        assert "tag c is not loaded: rank 1: " in str(found)
        assert "load another tag, such as 'd'" in str(found)
    (tmp_path / "latest").write_text("gone")
    assert on_both(choose, ranks) == ["d", "d"]
    shutil.rmtree(tmp_path / "d")
    shutil.rmtree(tmp_path / "c")
    flip(tmp_path / "b" / "ftrain.json", 20)
    flip(tmp_path / "a" / FILE, 4200)
    for found in on_both(choose, ranks):
        assert isinstance(found, RestoreError)
        assert "no older tag can be loaded" in str(found)


def test_a_tag_that_is_there_stays_when_latest_can_not_be_written(
    engine: DurableEngine, tmp_path: Path
) -> None:
    save(engine, tmp_path, "last", state(1.0))
    engine.wait()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()  # in the way
    save(engine, tmp_path, "last", state(2.0))
    engine.wait()
    (failure,) = engine.failures
    assert "latest" in failure
    assert verify(tmp_path, "last") > 0
    assert moments(engine, tmp_path, "last") == 2.0


def test_what_belongs_to_no_checkpoint_is_a_plain_file_at_once(
    engine: DurableEngine, tmp_path: Path
) -> None:
    """As ``save_16bit_model`` calls it, between a save and its commit."""
    save(engine, tmp_path, "a", state())
    info = CommitInfo("global_step1", str(tmp_path), False)
    engine.create(info)
    engine.save({"weight": torch.ones(3)}, str(tmp_path / "pytorch_model.bin"))
    loaded = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert loaded["weight"].sum() == 3
    assert engine.commit(info)
    engine.wait()
    assert (tmp_path / "latest").read_text() == "a"
    assert not (tmp_path / "global_step1").exists()
    assert engine.failures == []


def test_files_of_deepspeeds_own_engine_are_loaded_by_it_and_that_is_said_once(
    engine: DurableEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"x": 1}, tmp_path / FILE)
    for _ in range(2):
        assert engine.load(str(tmp_path / FILE)) == {"x": 1}
    assert caplog.text.count("written by DeepSpeed's own engine") == 1


def test_a_save_that_was_cut_off_is_not_loaded(engine: DurableEngine, tmp_path: Path) -> None:
    save(engine, tmp_path, "a", state())
    save(engine, tmp_path, "b", state())
    engine.wait()
    (tmp_path / "b" / "ftrain.json").unlink()
    with pytest.raises(RestoreError, match=r"not complete.*'a'"):
        engine.load(str(tmp_path / "b" / FILE))


def test_it_can_be_cleaned_up_and_used_again(engine: DurableEngine, tmp_path: Path) -> None:
    engine.cleanup()
    save(engine, tmp_path, "a", state())
    engine.cleanup()
    engine.cleanup()
    assert verify(tmp_path, "a") > 0
    save(engine, tmp_path, "b", state())
    engine.cleanup()
    assert (tmp_path / "latest").read_text() == "b"
    assert engine.statistics().durable == 2


def test_scripts_that_write_to_the_state_ask_for_eager_copies(group: None, tmp_path: Path) -> None:
    engine = DurableEngine(None, TorchFiles, Options(lazy=False))
    copying = Held(engine, "_copying")
    content = state(1.0)
    save(engine, tmp_path, "a", content)
    content["optimizer_state_dict"]["moments"].fill_(2.0)
    copying.let_go()
    assert moments(engine, tmp_path, "a") == 1.0
    engine.cleanup()


def test_states_that_change_outside_the_step_are_copied_at_once(
    group: None, tmp_path: Path
) -> None:
    offload = SimpleNamespace(super_offload=True)
    zero = SimpleNamespace(zenflow=None, offload_optimizer=offload)
    engine = DurableEngine(SimpleNamespace(zero_config=zero), TorchFiles, Options())
    copying = Held(engine, "_copying")
    content = state(1.0)
    save(engine, tmp_path, "a", content)
    content["optimizer_state_dict"]["moments"].fill_(2.0)
    copying.let_go()
    assert moments(engine, tmp_path, "a") == 1.0
    engine.cleanup()


def test_node_local_folders_are_refused(group: None) -> None:
    with pytest.raises(UsageError, match="use_node_local_storage"):
        DurableEngine(SimpleNamespace(use_node_local_storage=True), TorchFiles, Options())


def test_without_a_group_there_is_no_engine() -> None:
    with pytest.raises(UsageError, match=r"deepspeed\.initialize"):
        DurableEngine(None, TorchFiles, Options())
