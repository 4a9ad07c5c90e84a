"""torch.distributed.checkpoint on our store: layouts, failures, and what a reader may believe."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dcp_job
import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked_script import imported
from test_interop import assert_same, publish
from test_placing import whole_tensors
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.multiprocessing import start_processes
from torch.multiprocessing.spawn import ProcessException

from ftrain.checkpoint.durable import DurableStore
from ftrain.launch.cli import main
from ftrain.runtime.dcp import FtrainReader, FtrainWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def job(folder: Path, what: str, ranks: int, *, fails: bool = False) -> Any:
    """Run some ranks; what rank 0 saw."""
    arguments = (what, str(folder), ranks)
    with pytest.raises(ProcessException) if fails else nullcontext():
        start_processes(dcp_job.run, arguments, nprocs=ranks, start_method="forkserver")
    return None if fails else torch.load(folder / f"{what}.pt", weights_only=True)


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """The process that the ranks are forked from."""
    wanted = ("fsdp", "checkpoint", "checkpoint.state_dict")
    names = (f"torch.distributed.{name}" for name in wanted)
    with imported("ftrain.runtime.dcp", "torch._dynamo", *names):
        yield


def assert_equal(found: Any, expected: Any) -> None:
    """Trees of tensors and plain values."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert_same({"": found}, {"": expected})
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    else:
        assert found == expected
        assert type(found) is type(expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, job(folder, "save", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "ranks"), [("load_sharded", 3), ("load_plain", 1)])
def test_any_layout_loads_what_two_ranks_saved(
    saved: tuple[Path, Any], what: str, ranks: int
) -> None:
    folder, state = saved
    assert state["extra"]["when"] == (1, 2.5, None, True)
    assert_equal(job(folder, what, ranks), state)


@pytest.mark.slow
def test_what_dcp_saved_is_verified_and_exported_like_any_other(
    saved: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, state = saved
    assert main(["checkpoints", "verify", str(folder / "store")]) == 0
    for more in (["--all"], []):
        out = tmp_path / f"out{len(more)}.pt"
        command = ["checkpoints", "export", "--to", "torch", *more, str(folder / "store"), str(out)]
        assert main(command) == 0
    assert_equal(torch.load(tmp_path / "out1.pt", weights_only=True), state)
    flat = torch.load(tmp_path / "out0.pt", weights_only=True)
    assert_same({name: flat[f"model.{name}"] for name in state["model"]}, state["model"])


@pytest.mark.slow
def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    before = job(tmp_path, "save_behind", 2)
    store = DurableStore(tmp_path / "store")
    assert [version.step for version in store.versions()] == [2]  # keep_last=1
    state = {name: torch.zeros_like(tensor) for name, tensor in before["model"].items()}
    dcp.load({"model": state}, storage_reader=FtrainReader(tmp_path / "store"))
    assert_same(state, before["model"])


@pytest.mark.slow
def test_what_fails_on_one_rank_is_not_published(tmp_path: Path) -> None:
    job(tmp_path, "save", 2)
    failures = job(tmp_path, "refuse", 2)["failures"]
    (sentence,) = failures.values()
    assert sentence.startswith("odd.object is a pathlib.PosixPath, which can't be saved")
    job(tmp_path, "die", 2, fails=True)
    store = DurableStore(tmp_path / "store")
    assert [version.step for version in store.versions()] == [3, 2]


def state_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {"w": torch.randn(700, 3), "b": torch.randn(5).bfloat16(), "n": seed, "d": {"x": [1.5]}}


def blank() -> dict[str, Any]:
    return {"w": torch.zeros(700, 3), "b": torch.zeros(5).bfloat16(), "n": 0, "d": {"x": [0.0]}}


def load(folder: Path, step: int | None = None) -> dict[str, Any]:
    state = blank()
    dcp.load(state, storage_reader=FtrainReader(folder, step))
    return state


def failure(action: Callable[[], object]) -> str:
    """What a rank of DCP failed with."""
    with pytest.raises(CheckpointException) as caught:
        action()
    return str(caught.value.failures[0][0])


def test_versions_of_one_process(tmp_path: Path) -> None:
    writer = FtrainWriter(tmp_path)
    for step in (1, 2):
        dcp.save(state_of(step), storage_writer=writer, checkpoint_id=str(step))
    dcp.save(state_of(3), storage_writer=FtrainWriter(tmp_path, 3))
    assert_equal(load(tmp_path), state_of(3))
    assert_equal(load(tmp_path, 1), state_of(1))
    found = blank()
    dcp.load(found, storage_reader=FtrainReader(tmp_path), checkpoint_id="2")
    assert_equal(found, state_of(2))
    versions = DurableStore(tmp_path).versions()
    assert [version.key for version in versions] == [(2, 3), (1, 2), (1, 1)]


def test_a_writer_that_is_over_is_refused(tmp_path: Path) -> None:
    zombie = FtrainWriter(tmp_path)
    dcp.save(state_of(1), storage_writer=zombie, checkpoint_id="1")
    dcp.save(state_of(2), storage_writer=FtrainWriter(tmp_path), checkpoint_id="2")
    late = failure(lambda: dcp.save(state_of(9), storage_writer=zombie, checkpoint_id="9"))
    assert "another FtrainWriter has begun" in late
    assert_equal(load(tmp_path), state_of(2))


def test_a_writer_that_another_one_overtook_does_not_say_that_it_saved(tmp_path: Path) -> None:
    class Slow(DefaultSavePlanner):
        """While this one's tensors are written another writer saves."""

        def resolve_data(self, write_item: WriteItem) -> Any:
            if not (tmp_path / "2").exists():
                dcp.save(state_of(2), storage_writer=FtrainWriter(tmp_path), checkpoint_id="2")
            return super().resolve_data(write_item)

    slow = FtrainWriter(tmp_path)
    late = failure(
        lambda: dcp.save(state_of(1), storage_writer=slow, checkpoint_id="1", planner=Slow())
    )
    assert "another FtrainWriter has begun" in late
    assert [version.step for version in DurableStore(tmp_path).versions()] == [2]


def test_a_version_is_saved_although_an_older_one_cannot_be_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = FtrainWriter(tmp_path, keep_last=1)
    dcp.save(state_of(1), storage_writer=writer, checkpoint_id="1")
    (tmp_path / "1/1/rank9.seg").mkdir()
    dcp.save(state_of(2), storage_writer=writer, checkpoint_id="2")
    assert "old versions can't be deleted" in caplog.text
    assert_equal(load(tmp_path), state_of(2))


def test_misuse_is_said_in_a_sentence(tmp_path: Path) -> None:
    writer = FtrainWriter(tmp_path)
    save = dcp.save
    assert "say which step" in failure(lambda: save(state_of(1), storage_writer=writer))
    dcp.save(state_of(1), storage_writer=writer, checkpoint_id="1")
    again = failure(lambda: save(state_of(1), storage_writer=writer, checkpoint_id="1"))
    assert "is published already" in again
    with pytest.raises(ValueError, match="has to be the step"):
        dcp.save(state_of(1), storage_writer=writer, checkpoint_id="runs/1")
    assert "no version of step 7: it has 1" in failure(lambda: load(tmp_path, 7)).replace(
        f" in {tmp_path}", ""
    )
    wider = {**blank(), "w": torch.zeros(700, 4)}
    reader = FtrainReader(tmp_path)
    assert "Size mismatch" in failure(lambda: dcp.load(wider, storage_reader=reader))


@pytest.mark.parametrize("at", [4096 + 5, -100])
def test_damage_is_found_and_the_older_version_is_there(tmp_path: Path, at: int) -> None:
    writer = FtrainWriter(tmp_path)
    for step in (1, 2):
        dcp.save(state_of(step), storage_writer=writer, checkpoint_id=str(step))
    path = DurableStore(tmp_path).find(2).file(0)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    sentence = failure(lambda: load(tmp_path))
    assert "does not match its digest" in sentence or "damaged" in sentence
    assert_equal(load(tmp_path, 1), state_of(1))


def test_types_are_converted_as_dcp_does(tmp_path: Path) -> None:
    dcp.save(state_of(1), storage_writer=FtrainWriter(tmp_path, 1))
    found = {"w": torch.zeros(700, 3, dtype=torch.float64), "b": torch.zeros(5)}
    dcp.load(found, storage_reader=FtrainReader(tmp_path))
    assert_same(found, {"w": state_of(1)["w"].double(), "b": state_of(1)["b"].float()})


class _Looks(DefaultLoadPlanner):
    """Looks at the bytes that a planner of one's own is given."""

    seen: Any = None

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        self.seen = torch.load(value, weights_only=True)


def test_a_planner_of_ones_own_gets_its_bytes(tmp_path: Path) -> None:
    dcp.save({"n": 5}, storage_writer=FtrainWriter(tmp_path, 1))
    planner = _Looks()
    dcp.load({"n": 0}, storage_reader=FtrainReader(tmp_path), planner=planner)
    assert planner.seen == 5


@pytest.mark.parametrize(("dim", "world"), [(None, 3), (0, 2)])
def test_what_a_session_saved_is_read_under_torchs_names(
    tmp_path: Path, dim: int | None, world: int
) -> None:
    tensors = whole_tensors(torch.float32)
    publish(DurableStore(tmp_path), tensors, dim, world)
    found = {"model": {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}}
    dcp.load(found, storage_reader=FtrainReader(tmp_path))
    assert_same(found["model"], tensors)


NO_UNPICKLING = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed.checkpoint as dcp
from ftrain.runtime.dcp import FtrainReader
state = {"w": torch.zeros(700, 3), "n": 0, "d": {"x": [0.0]}}
seen = []
sys.addaudithook(lambda event, args: seen.append(args) if event == "pickle.find_class" else None)
dcp.load(state, storage_reader=FtrainReader(sys.argv[1]))
assert state["n"] == 1 and state["w"].any(), state
assert not seen, seen
"""


def test_nothing_is_unpickled_in_a_load(tmp_path: Path) -> None:
    dcp.save(state_of(1), storage_writer=FtrainWriter(tmp_path, 1))
    command = [sys.executable, "-c", NO_UNPICKLING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_plans_that_torch_caches_are_refused(tmp_path: Path) -> None:
    """They are those of the first save, without what was said of the second."""
    state = {"weight": torch.ones(3)}
    writer = FtrainWriter(tmp_path)

    def save(step: int) -> None:
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, storage_writer=writer, checkpoint_id=str(step), planner=planner)

    save(1)
    with pytest.raises(CheckpointException, match="without enable_plan_caching"):
        save(2)
    assert [version.step for version in DurableStore(tmp_path).versions()] == [1]
