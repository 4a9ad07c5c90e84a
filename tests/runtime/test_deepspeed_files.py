"""State dicts as DeepSpeed makes them, into files and back; DeepSpeed itself is not needed."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.files import LocalFile, NewFile
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.checkpoint.pace import Pace
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.segment_writer import plan_file, write_file, write_parts
from ftrain.comms.errors import (
    CorruptionError,
    RestoreError,
    RunDirectoryError,
    StateError,
    UsageError,
)
from ftrain.comms.protocol.messages import Share, VersionId
from ftrain.runtime.deepspeed import complete_tags, export, tags, use, verify
from ftrain.runtime.deepspeed.reading import read_state, read_torch_file
from ftrain.runtime.deepspeed.shot import Room, Shot, changes_of
from ftrain.runtime.deepspeed.tree import Folder, unfold
from ftrain.runtime.deepspeed.writing import _InTurn

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def model_state(value: float = 0.0) -> dict[str, Any]:
    weight = torch.arange(12.0).reshape(3, 4) + value
    return {
        "module": OrderedDict(
            {
                "a.weight": weight,
                "head.weight": weight,  # tied
                "mean": torch.full((5,), value, dtype=torch.float64),
                "empty": torch.empty(0, 3, dtype=torch.bfloat16),
                "turned": torch.arange(6).reshape(2, 3).t(),
                "frozen.weight": torch.full((2, 2), value, dtype=torch.bfloat16),
            }
        ),
        "param_shapes": [OrderedDict({"a.weight": torch.Size([3, 4])})],
        "args": argparse.Namespace(lr=0.1, dtype=torch.bfloat16, betas=(0.9, 0.95)),
        "number": torch.tensor(7),
        "plain": [1, None, {"x": (2.5, "y")}],
        3: "a key that is a number",
    }


def optimizer_state(value: float = 0.0) -> dict[str, Any]:
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.full((1000,), value)}
    return {"optimizer_state_dict": {"state": {0: moments}, "groups": [torch.arange(9.0)]}}


def identity(number: int = 1) -> ImageIdentity:
    return ImageIdentity("1234", "", VersionId(0, number), 0, 1, 0, 0)


def shoot(state: dict[Any, Any], path: Path, room: Room | None = None, number: int = 1) -> Shot:
    changes = changes_of(state, lazy=True)
    return Shot(path, Folder(state, path.stem), identity(number), room or Room(), changes)


def write(folder: Path, name: str, state: dict[Any, Any], save: str, number: int = 1) -> None:
    """As the writer does, up to the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    shot = shoot(state, folder / name, number=number)
    shot.complete()
    planned = plan_file(shot.image())
    with NewFile(tags.new_path(shot.path, save), planned.nbytes) as file:
        write_file(planned, file, _InTurn(), Pace())
    shot.release()
    tags.place(shot.path, save)


def opened(path: Path) -> SegmentReader:
    return SegmentReader(LocalFile(path))


def record(folder: Path, name: str, save: str) -> dict[str, tags.TagFile]:
    path = tags.new_path(folder / name, save)
    reader = opened(path if path.exists() else folder / name)
    reader.close()
    return {name: tags.TagFile(reader.nbytes, reader.digest)}


def save_tag(folder: Path, value: float, save: str) -> None:
    number = int(save)
    write(folder, MODEL, model_state(value), save, number)
    write(folder, OPTIMIZER, optimizer_state(value), save, number)
    files = record(folder, MODEL, save) | record(folder, OPTIMIZER, save)
    tags.publish(folder, save, 1, files)


def load(path: Path) -> Any:
    reader = tags.open_file(path)
    assert reader is not None
    try:
        return read_state(reader)
    finally:
        reader.close()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_tag(tmp_path / "t", 2.0, "1")
    found = load(tmp_path / "t" / MODEL)
    assert same(model_state(2.0), found)
    assert found["module"]["a.weight"] is found["module"]["head.weight"], "one tensor, two names"
    assert same(optimizer_state(2.0), load(tmp_path / "t" / OPTIMIZER))


def test_what_the_optimizer_does_not_own_is_copied_at_once(tmp_path: Path) -> None:
    state, moments = model_state(1.0), optimizer_state(1.0)
    shots = [shoot(state, tmp_path / MODEL), shoot(moments, tmp_path / OPTIMIZER)]
    for name in ("mean", "frozen.weight", "turned"):
        state["module"][name].fill_(9)
    state["number"].fill_(9)
    expected, late = model_state(1.0), optimizer_state(5.0)
    # Not yet copied: this is why DeepSpeed's commit has to wait.
    state["module"]["a.weight"].fill_(5.0)
    moments["optimizer_state_dict"]["state"][0]["exp_avg"].fill_(5.0)
    expected["module"]["a.weight"].fill_(5.0)
    for shot, states in zip(shots, (expected, late), strict=True):
        shot.complete()
        shot.wait_copied()
        planned = plan_file(shot.image())
        with NewFile(shot.path, planned.nbytes) as file:
            write_file(planned, file, _InTurn(), Pace())
        reader = opened(shot.path)
        assert same(states, read_state(reader))
        reader.close()


def test_a_script_may_call_its_own_state_as_deepspeed_does(tmp_path: Path) -> None:
    """In ``client_state``, another optimizer's."""
    state = model_state() | {"optimizer_state_dict": torch.ones(3)}
    shot = shoot(state, tmp_path / MODEL)
    state["optimizer_state_dict"].fill_(9)
    shot.complete()
    planned = plan_file(shot.image())
    with NewFile(shot.path, planned.nbytes) as file:
        write_file(planned, file, _InTurn(), Pace())
    reader = opened(shot.path)
    assert same(torch.ones(3), read_state(reader)["optimizer_state_dict"])
    reader.close()


def test_a_commit_waits_for_the_copy(tmp_path: Path) -> None:
    shot = shoot(optimizer_state(), tmp_path / OPTIMIZER)
    waiter = threading.Thread(target=shot.wait_copied)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    shot.complete()
    waiter.join(10)
    assert not waiter.is_alive()


def test_memory_is_kept_and_one_save_has_it_at_a_time(tmp_path: Path) -> None:
    room = Room()
    first = shoot(optimizer_state(), tmp_path / OPTIMIZER, room)
    first.complete()
    image = first.image().raw
    second: list[Shot] = []
    waiter = threading.Thread(
        target=lambda: second.append(shoot(optimizer_state(3.0), tmp_path / OPTIMIZER, room))
    )
    waiter.start()
    waiter.join(0.05)
    assert not second, "the memory of a copy that is being written"
    first.release()
    waiter.join(10)
    second[0].complete()
    assert second[0].image().raw.obj is image.obj, "other memory than the first time"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: state.update(f=print), "m.f is a builtins.builtin_function_or_method"),
        (lambda state: state["plain"][2].update(c=object()), "m.plain[2].c is a builtins.object"),
        (lambda state: state["args"].__dict__.update(s=slice(1)), "is a builtins.slice"),
        (lambda state: state.update(t=torch.eye(2).to_sparse()), "m.t is a sparse"),
        (lambda state: state.update(w=("\0ftrain", "object", "os.path", {})), "m.w begins with"),
    ],
)
def test_what_can_not_be_saved_is_named(spoil: Callable[[Any], None], said: str) -> None:
    state = model_state()
    spoil(state)
    with pytest.raises(StateError) as caught:
        Folder(state, "m")
    assert said in str(caught.value)


def test_a_state_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(StateError, match="contains itself"):
        Folder(state, "m")


MARK = "\0ftrain"


@pytest.mark.parametrize(
    "tree",
    [
        (MARK, "object", "subprocess.Popen", {}),
        (MARK, "enum", "os.path", "x"),
        (MARK, "eval", "1"),
        (MARK, "tensor", "absent"),
        (MARK, "tensor", []),
        (MARK,),
        (MARK, "object", "argparse.Namespace", [1]),
    ],
)
def test_a_file_that_asks_for_more_is_refused(tree: Any) -> None:
    with pytest.raises(CorruptionError, match="the file holds no state of DeepSpeed"):
        unfold(encode_tree({"x": [tree]}), {}, "the file")
    with pytest.raises(CorruptionError, match="the file holds no state of DeepSpeed"):
        unfold(b"no tree", {}, "the file")


@pytest.mark.parametrize("shape", [(2**50,), (2**25, 2**25), (5,)])
def test_a_hostile_shape_takes_no_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    segment = Segment("x", "float32", shape, "file", 0, 16, Placement.whole(shape))
    plan = ImagePlan(lay_out([segment]), (Share("file", 0, 0, 1),), 0, 4096)
    with NewFile(tmp_path / MODEL) as file:
        write_parts(file, identity(), plan, [bytes(16)], encode_tree((MARK, "tensor", "x")))
    reader = opened(tmp_path / MODEL)
    with pytest.raises(CorruptionError, match="holds a part of x only"):
        read_state(reader)
    reader.close()


class Planted:
    """What a pickle builds, if it may."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("built").absolute(),)


def test_torch_files_are_read_without_building_what_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(model_state(2.0), tmp_path / MODEL)
    assert same(model_state(2.0), read_torch_file(tmp_path / MODEL, "cpu"))
    torch.save({"x": Planted()}, tmp_path / MODEL)
    with pytest.raises(CorruptionError, match="objects of other kinds"):
        read_torch_file(tmp_path / MODEL)
    assert not (tmp_path / "built").exists()
    (tmp_path / MODEL).write_bytes(bytes(5000))
    with pytest.raises(CorruptionError, match="it is damaged"):
        read_torch_file(tmp_path / MODEL)


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    save_tag(folder, 1.0, "1")
    total = verify(tmp_path, "t")
    assert total == sum((folder / name).stat().st_size for name in (MODEL, OPTIMIZER))
    whole = {name: (folder / name).read_bytes() for name in (MODEL, OPTIMIZER)}
    manifest = (folder / tags.MANIFEST).read_bytes()
    rng = random.Random(4)
    for _ in range(150):
        name = rng.choice((MODEL, OPTIMIZER))
        content = bytearray(whole[name])
        kind = rng.randrange(4)
        if kind == 0:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[rng.randrange(len(content)) :]
        elif kind == 2:
            at = rng.randrange(0, len(content), 512)
            hole = bytes(min(4096, len(content) - at))
            if content[at : at + len(hole)] == hole:
                continue
            content[at : at + len(hole)] = hole
        else:
            content = bytearray(whole[MODEL if name == OPTIMIZER else OPTIMIZER])
        (folder / name).write_bytes(content)
        with pytest.raises(CorruptionError):
            verify(tmp_path, "t")
        (folder / name).write_bytes(whole[name])
    for at in range(0, len(manifest), 7):
        spoiled = bytearray(manifest)
        spoiled[at] ^= 1
        (folder / tags.MANIFEST).write_bytes(spoiled)
        with pytest.raises((CorruptionError, StateError)):
            verify(tmp_path, "t")
    (folder / tags.MANIFEST).write_bytes(manifest)
    (folder / MODEL).unlink()
    with pytest.raises(CorruptionError):
        verify(tmp_path, "t")


def test_a_sound_file_of_another_tag_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_tag(tmp_path / f"step{number}", float(number), str(number))
    shutil.copy(tmp_path / "step1" / MODEL, tmp_path / "step2" / MODEL)
    assert complete_tags(tmp_path) == ["step2", "step1"], "of the same size"
    for look in (lambda: verify(tmp_path, "step2"), lambda: load(tmp_path / "step2" / MODEL)):
        with pytest.raises(CorruptionError, match="not the file that its manifest names"):
            look()


def test_an_incomplete_tag_is_refused_and_a_complete_one_named(tmp_path: Path) -> None:
    save_tag(tmp_path / "step1", 1.0, "1")
    write(tmp_path / "step2", MODEL, model_state(2.0), "2")
    with pytest.raises(RestoreError, match=r"step2 is not complete: .* load another tag.*'step1'"):
        load(tmp_path / "step2" / MODEL)
    with pytest.raises(RestoreError, match="not part of the checkpoint"):
        load(tmp_path / "step1" / "mp_rank_01_model_states.pt")
    assert complete_tags(tmp_path) == ["step1"]
    (tmp_path / "step1" / OPTIMIZER).unlink()
    assert complete_tags(tmp_path) == []


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    """Least of all the checkpoint that it reads."""
    save_tag(tmp_path / "step1", 1.0, "1")
    with pytest.raises(RunDirectoryError, match="step1 exists already: export into a new"):
        export(tmp_path, "step1", tmp_path)
    assert verify(tmp_path, "step1") > 0
    export(tmp_path, "step1", tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="exists already"):
        export(tmp_path, "step1", tmp_path / "out")
    with pytest.raises(RestoreError, match="step2 is not complete"):
        export(tmp_path, "step2", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_deepspeeds_own_files_are_left_to_it(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / MODEL)
    assert tags.open_file(tmp_path / MODEL) is None
    save_tag(tmp_path / "t", 1.0, "1")
    torch.save({"a": 1}, tmp_path / "t" / MODEL)  # but the manifest says what is to be there
    with pytest.raises(CorruptionError):
        load(tmp_path / "t" / MODEL)


def test_a_tag_is_saved_again_without_a_moment_without_it(tmp_path: Path) -> None:
    """Whoever dies between any two steps of the second save leaves one of the two whole."""
    folder = tmp_path / "last"
    save_tag(folder, 1.0, "1")

    def value() -> float:
        verify(tmp_path, "last")
        assert complete_tags(tmp_path) == ["last"]
        found = load(folder / MODEL)["module"]["mean"][0].item()
        moments = load(folder / OPTIMIZER)["optimizer_state_dict"]["state"][0]["exp_avg"]
        assert moments[0].item() == found, "files of different saves"
        return float(found)

    write(folder, MODEL, model_state(2.0), "2", 2)
    assert value() == 1.0
    write(folder, OPTIMIZER, optimizer_state(2.0), "2", 2)
    assert value() == 1.0
    files = record(folder, MODEL, "2") | record(folder, OPTIMIZER, "2")
    # Killed behind the manifest, before any file took its name.
    held = {path: path.read_bytes() for path in folder.glob("*.new")}
    kept = {name: (folder / name).read_bytes() for name in files}
    tags.publish(folder, "2", 1, files)
    assert value() == 2.0
    assert not list(folder.glob("*.new"))
    for path, content in held.items():
        path.write_bytes(content)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    assert value() == 2.0
    # The next save settles it, file by file.
    tags.clear(folder / MODEL, "other")
    assert value() == 2.0
    write(folder, MODEL, model_state(3.0), "3", 3)
    assert value() == 2.0
    tags.clear(folder / MODEL, "other")  # that one was never published
    tags.clear(folder / OPTIMIZER, "other")
    assert value() == 2.0
    assert not list(folder.glob("*.new"))


def test_a_failed_save_takes_its_own_files_away_only(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save_tag(folder, 1.0, "1")
    write(folder, MODEL, model_state(2.0), "2", 2)
    tags.discard(folder, "2", record(folder, MODEL, "2"))
    assert verify(tmp_path, "last") > 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        (MODEL, OPTIMIZER, tags.MANIFEST)
    )
    fresh = tmp_path / "fresh"
    write(fresh, MODEL, model_state(2.0), "3", 3)
    tags.discard(fresh, "3", record(fresh, MODEL, "3"))
    assert not fresh.exists()


def test_latest_is_replaced_not_rewritten(tmp_path: Path) -> None:
    tags.name_latest(tmp_path, "a")
    before = os.stat(tmp_path / "latest").st_ino
    with open(tmp_path / "latest") as reading:
        tags.name_latest(tmp_path, "b")
        assert reading.read() == "a"
    assert (tmp_path / "latest").read_text() == "b"
    assert os.stat(tmp_path / "latest").st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_without_deepspeed_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", None)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UsageError, match=r"install ftrain\[deepspeed\]"):
        use()
