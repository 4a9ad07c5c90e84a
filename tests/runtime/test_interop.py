"""Versions to and from safetensors, torch.save and DCP: the same bits, whatever saved them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked_script import imported, python
from safetensors.torch import load_file
from test_placing import image_of, layout, whole_tensors

from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.files import LocalFile
from ftrain.checkpoint.manifest import DurableVersion, open_files, read_manifest
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.tensors import StateTensor
from ftrain.comms.errors import CorruptionError, StateError, UsageError
from ftrain.comms.protocol.messages import VersionId
from ftrain.launch.cli import main
from ftrain.runtime.group import GroupView
from ftrain.runtime.interop import dcp_directory, safetensors_files, torch_file
from ftrain.runtime.interop.outline import Item, model_items
from ftrain.runtime.interop.whole import whole_version

State = dict[str, torch.Tensor]
KINDS = ("safetensors", "torch", "dcp")
SMALL = encode_tree({"state": {"buffers": {"model": {}}, "groups": {}, "numbers": {}}})

SCRIPT = """
import sys, torch, ftrain

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 24)
        self.last = torch.nn.Linear(24, 50, bias=False)
        self.last.weight = self.embed.weight  # tied
        self.middle = torch.nn.Linear(24, 24, dtype=torch.bfloat16)
        self.norm = torch.nn.BatchNorm1d(24)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.none = torch.nn.Parameter(torch.empty(0, 7))

    def forward(self, x):
        x = self.middle(self.norm(self.embed(x)).bfloat16()).float()
        return self.last(x) * self.scale + self.none.sum()

seed, steps, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(seed)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
session = ftrain.Session(model=model, optimizer=optimizer, total_steps=steps)
first = {k: v.clone() for k, v in model.state_dict().items()}
begun = (session.step, len(optimizer.state))
for step, _ in session.steps():
    model(torch.randint(0, 50, (8,))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save({"begun": begun, "first": first, "model": model.state_dict(),
            "optimizer": optimizer.state_dict()}, out)
"""


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """The process that scripts are forked from."""
    with imported("ftrain", "torch._dynamo"):
        yield


def train(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """One run of the script alone; what it saved with torch.save."""
    (folder / "train.py").write_text(SCRIPT)
    done = python(folder, "train.py", str(seed), str(steps), "out.pt")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(folder / "out.pt", weights_only=True)
    return {**found, "said": done.stderr}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained")
    return folder / "ftrain-runs/train", train(folder, 1, 3)


def bits(tensor: torch.Tensor) -> list[int]:
    plain: list[int] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return plain


def assert_same(found: Any, expected: Any) -> None:
    """Types, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert bits(other) == bits(tensor), name


def checkpoints(*tokens: str | Path) -> None:
    assert main(["checkpoints", *map(str, tokens)]) == 0


def load(kind: str, path: Path, like: State) -> State:
    """As others read it, without our code."""
    if kind == "safetensors":
        found: State = {}
        for file in sorted(path.glob("*.safetensors")):
            found |= load_file(file)
        return found
    if kind == "torch":
        state: State = torch.load(path, weights_only=True)
        return state
    found = {name: torch.full_like(tensor, 3) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=path)
    return found


def without_twins(state: State) -> State:
    """Parameters with two names are saved under their first."""
    return {name: tensor for name, tensor in state.items() if name != "last.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sessions_model_goes_out_and_comes_back(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    run, ended = trained
    expected = without_twins(ended["model"])
    checkpoints("export", "--to", kind, run, tmp_path / "out")
    assert_same(load(kind, tmp_path / "out", expected), expected)
    checkpoints("import", "--from", kind, tmp_path / "out", tmp_path / "ftrain-runs/train")
    again = train(tmp_path, 9, 1)
    assert_same(again["first"], ended["model"])
    assert again["begun"] == (0, 0)
    assert "begins as imported from" in again["said"]
    assert "optimizer" in again["said"]
    if kind == "torch":
        assert train(tmp_path, 9, 1)["begun"][0] == 1  # from now on it is a run like any other


@pytest.mark.slow
def test_everything_goes_out_as_torch_names_it(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, ended = trained
    for kind in KINDS:
        checkpoints("export", "--to", kind, "--all", run, tmp_path / kind)
        checkpoints("import", "--from", kind, tmp_path / kind, tmp_path / f"new-{kind}")
        checkpoints("export", "--to", "torch", tmp_path / f"new-{kind}", tmp_path / f"{kind}.pt")
        assert_same(
            torch.load(tmp_path / f"{kind}.pt", weights_only=True), without_twins(ended["model"])
        )
    found = torch.load(tmp_path / "torch", weights_only=True)
    (group,) = found["optimizer"]["param_groups"]
    (saved,) = ended["optimizer"]["param_groups"]
    assert {**group, "params": 0} == {**saved, "params": 0}
    moments = {
        f"{name}.{key}": ended["optimizer"]["state"][number][key]
        for number, name in enumerate(group["params"])
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    state = found["optimizer"]["state"]
    assert_same({f"{n}.{k}": t for n, values in state.items() for k, t in values.items()}, moments)
    flat = load_file(tmp_path / "safetensors/model.safetensors")
    assert_same({n: flat[f"optimizer.state.{n}"] for n in moments}, moments)
    tree = {
        "model": {n: torch.full_like(t, 2) for n, t in without_twins(ended["model"]).items()},
        "optimizer": {
            "state": {
                n: {k: torch.full_like(t, 2) for k, t in values.items()}
                for n, values in state.items()
            },
            "param_groups": [{**dict.fromkeys(saved), "params": []}],
        },
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tree, checkpoint_id=tmp_path / "dcp")
    assert_same(tree["model"], without_twins(ended["model"]))
    assert tree["optimizer"]["param_groups"] == [group]


def publish(store: DurableStore, tensors: State, dim: int | None, world: int) -> DurableVersion:
    """A version saved by ``world`` ranks: cut along ``dim``, or in parts of what all have."""
    named = {f"model/{name}": tensor for name, tensor in tensors.items()}
    store.begin_fence(1, "run", None)
    for rank in range(world):
        image = image_of(layout(named, dim, world, rank), world, rank, SMALL)
        store.write_image(1, VersionId(1, 5), rank, image)
    return read_manifest(store.publish_written(1, VersionId(1, 5), "run", world))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize(("dim", "world"), [(None, 1), (None, 3), (0, 3), (1, 2)])
def test_versions_of_several_ranks_are_put_together(
    tmp_path: Path, dtype: torch.dtype, dim: int | None, world: int
) -> None:
    tensors = {**whole_tensors(dtype), "empty": torch.zeros(3, 0, dtype=dtype)}
    publish(DurableStore(tmp_path / "run/checkpoints"), tensors, dim, world)
    for kind in KINDS:
        checkpoints("export", "--to", kind, tmp_path / "run", tmp_path / kind)
        assert_same(load(kind, tmp_path / kind, tensors), tensors)


def test_shards_have_the_index_that_loaders_read(tmp_path: Path) -> None:
    tensors = whole_tensors(torch.float32)
    version = publish(DurableStore(tmp_path / "store"), tensors, 0, 2)
    done: list[int] = []
    with whole_version(open_files(version)) as whole:
        items = model_items(whole)
        safetensors_files.write_safetensors(whole, items, tmp_path / "out", 4200, done.append)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"] == {"total_size": total}
    assert sum(done) == total
    names = sorted({path.name for path in (tmp_path / "out").glob("*.safetensors")})
    assert names == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        found = load_file(tmp_path / "out" / file)[name]
        assert bits(found) == bits(tensors[name])
    origin = safetensors_files.read_safetensors(tmp_path / "out")
    assert_same({name: origin.read(name) for name in origin.tensors}, tensors)


def test_a_damaged_chunk_is_taken_from_another_nodes_copy(tmp_path: Path) -> None:
    tensors = {f"model/{n}": t for n, t in whole_tensors(torch.float32).items()}
    store = DurableStore(tmp_path / "store")
    store.begin_fence(1, "run", None)
    for rank in range(2):
        group = GroupView(rank, 2, rank, (rank,))  # each node holds all of it
        image = image_of(layout(tensors, None, 2, rank), 2, rank, SMALL, group)
        store.write_image(1, VersionId(1, 5), rank, image)
    version = read_manifest(store.publish_written(1, VersionId(1, 5), "run", 2))
    path = version.file(0)
    content = bytearray(path.read_bytes())
    content[4096 + 100] ^= 1
    path.write_bytes(content)
    with whole_version(open_files(version)) as whole:
        torch_file.write_torch(whole, model_items(whole), tmp_path / "x.pt", lambda n: None)
        (repaired,) = whole.repaired
    assert "chunk 0 does not match its digest" in repaired
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert_same({f"model/{name}": tensor for name, tensor in found.items()}, tensors)


def test_what_is_each_ranks_own_keeps_the_ranks_in_its_name(tmp_path: Path) -> None:
    store = DurableStore(tmp_path / "store")
    store.begin_fence(1, "run", None)
    from test_placing import own

    for rank in range(2):
        tensors: list[StateTensor] = [own("model/w", 10.0 + rank, rank)]
        store.write_image(1, VersionId(1, 5), rank, image_of(tensors, 2, rank, SMALL))
    version = read_manifest(store.publish_written(1, VersionId(1, 5), "run", 2))
    with whole_version(open_files(version)) as whole:
        torch_file.write_torch(whole, model_items(whole), tmp_path / "x.pt", lambda n: None)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {name: tensor[0].item() for name, tensor in found.items()} == {"w@0": 10, "w@1": 11}


def test_a_dcp_directory_is_the_one_that_torch_writes(tmp_path: Path) -> None:
    """The same bytes, and a tensor within another value has its place as well."""
    tensors = whole_tensors(torch.bfloat16)
    version = publish(DurableStore(tmp_path / "store"), tensors, 0, 2)
    others: list[Any] = [torch.tensor(0.25), 0.5]
    with whole_version(open_files(version)) as whole:
        items = model_items(whole)
        plain = [*items, Item(("step",), value=7)]
        dcp_directory.write_dcp(whole, plain, tmp_path / "plain", lambda nbytes: None)
        nested = [*items, Item(("betas",), value=others)]
        dcp_directory.write_dcp(whole, nested, tmp_path / "nested", lambda nbytes: None)
    found = {"betas": [torch.tensor(0.0), 0.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = {item.name: tensors[item.name] for item in items}
        dcp.save({**named, "step": 7}, checkpoint_id=tmp_path / "torch")
        dcp.load(found, checkpoint_id=tmp_path / "nested")
    ours = (tmp_path / "plain/__0_0.distcp").read_bytes()
    assert ours == (tmp_path / "torch/__0_0.distcp").read_bytes()
    assert found == {"betas": others}
    assert_same(load("dcp", tmp_path / "nested", tensors), tensors)


def test_parts_are_laid_over_chunks_as_the_plan_says(tmp_path: Path) -> None:
    """Sizes around a chunk's, with gaps between: what is read is what was given."""
    tensors = {
        f"t{n}": torch.arange(n, dtype=torch.int64) % 251 for n in (1, 511, 512, 513, 2048, 7, 0)
    }
    version = publish(DurableStore(tmp_path / "images"), tensors, None, 1)
    image = SegmentReader(LocalFile(version.file(0)))
    store = DurableStore(tmp_path / "parts")
    by_name = {f"model/{name}": tensor.numpy() for name, tensor in tensors.items()}
    parts = [np.ascontiguousarray(by_name[s.name]).data for s in image.segments]
    store.write_tensors(1, image.identity, image.plan, parts, image.small)
    assert (store.directory / "1/5/rank0.seg").read_bytes() == version.file(0).read_bytes()
    with pytest.raises(StateError, match=r"has 8 bytes, \d+ were planned"):
        store.write_tensors(2, image.identity, image.plan, [bytes(8)] * len(parts), b"")
    assert not list((store.directory / "2").rglob("*.seg*"))
    image.close()


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self._mark}",)


def test_nothing_that_is_imported_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"w": torch.ones(3), "x": Hostile(mark)}, tmp_path / "x.pt")
    with pytest.raises(CorruptionError, match=r"x\.pt holds posix\.system, and nothing but"):
        torch_file.read_torch(tmp_path / "x.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CorruptionError, match=r"holds torch\.nn\.modules\.linear\.Linear, and"):
        torch_file.read_torch(tmp_path / "module.pt")
    (tmp_path / "dcp").mkdir()
    torch.save(Hostile(mark), tmp_path / "dcp/.metadata", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "dcp/.metadata").read_bytes()
    (tmp_path / "dcp/.metadata").write_bytes(legacy[legacy.index(b"cposix") - 2 :])
    with pytest.raises(CorruptionError, match=r"asks for posix\.system"):
        dcp_directory.read_dcp(tmp_path / "dcp")
    assert not mark.exists()


def test_what_can_not_be_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\x10\0\0\0\0\0\0\0{no header at all")
    for read, words in (
        (safetensors_files.read_safetensors, "can't be read as safetensors"),
        (torch_file.read_torch, "can't be read as tensors"),
    ):
        with pytest.raises(CorruptionError, match=words) as caught:
            read(tmp_path / "bad")
        assert "weights_only" not in str(caught.value)  # torch's advice to run what is in the file
    (tmp_path / "folder").mkdir()
    for read, words in (
        (safetensors_files.read_safetensors, "no safetensors file"),
        (torch_file.read_torch, "is a directory: name a file of torch.save"),
        (dcp_directory.read_dcp, "has no .metadata"),
    ):
        with pytest.raises(UsageError, match=words):
            read(tmp_path / "folder")
    index = {"weight_map": {"w": "../bad"}}
    (tmp_path / "folder/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptionError, match=r"names the file '\.\./bad'"):
        safetensors_files.read_safetensors(tmp_path / "folder")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(UsageError, match="holds no tensors by name"):
        torch_file.read_torch(tmp_path / "none.pt")


def test_a_torch_file_with_other_kinds_of_tensors_is_refused_by_name(tmp_path: Path) -> None:
    for odd in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        torch.save({"a": torch.ones(3), "b": odd}, tmp_path / "odd.pt")
        with pytest.raises(StateError, match=r"odd\.pt: b is a sparse, nested"):
            torch_file.read_torch(tmp_path / "odd.pt")


def test_a_dcp_directory_must_be_complete_and_its_own(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(300)}, checkpoint_id=tmp_path / "dcp")
    origin = dcp_directory.read_dcp(tmp_path / "dcp")
    assert bits(origin.read("w")) == bits(torch.ones(300))
    path = tmp_path / "dcp/.metadata"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"__0_0.distcp", b"../__0.distc"))
    with pytest.raises(CorruptionError, match="outside the directory"):
        dcp_directory.read_dcp(tmp_path / "dcp")
    path.write_bytes(good)
    data = tmp_path / "dcp/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:200])
    with pytest.raises(CorruptionError, match="can't be read"):
        dcp_directory.read_dcp(tmp_path / "dcp").read("w")
