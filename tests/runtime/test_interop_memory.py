"""How much memory a version takes on its way out or in: that of its largest tensor, not its own.

Each process is measured against itself, after it has done the same with a small version: peaks of
the process that started it are not in it, nor are imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from test_placing import TOPOLOGY

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Segment, lay_out
from ftrain.comms.protocol.messages import Share, VersionId

KINDS = ("safetensors", "torch", "dcp")
MIB = 1 << 20
LARGEST = 96 * MIB
OTHERS = 64 * MIB  # what may be taken beside the largest tensor
SIZES = [*[LARGEST] * 3, *[8 * MIB] * 8]
SMALL = encode_tree({"state": {"buffers": {"model": {}}, "groups": {}, "numbers": {}}})

MEASURE = """
import sys
from pathlib import Path

def told(*fields):
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":") for line in lines)
    return sum(int(values[field].split()[0]) * 1024 for field in fields)
"""

EXPORT = (
    MEASURE
    + """
from ftrain.launch.cli import main

def export(run, out):
    assert main(["checkpoints", "export", "--to", sys.argv[1], run, out]) == 0

export(*sys.argv[2:4])
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is taken now
before = told("VmHWM")
export(*sys.argv[4:])
print(told("VmHWM") - before)
"""
)

IMPORT = (
    MEASURE
    + """
from ftrain.checkpoint.durable import DurableStore
from ftrain.runtime.interop.dcp_directory import read_dcp
from ftrain.runtime.interop.importing import import_model
from ftrain.runtime.interop.safetensors_files import read_safetensors
from ftrain.runtime.interop.torch_file import read_torch

def load(path, run, progress):
    origin = dict(dcp=read_dcp, safetensors=read_safetensors, torch=read_torch)[kind](Path(path))
    import_model(kind, path, DurableStore(run), origin, dtype="float64", progress=progress)

kind, *places = sys.argv[1:]
load(places[0], places[1], lambda nbytes: None)
Path("/proc/self/clear_refs").write_text("5")
before = told("VmHWM"), told("RssAnon", "RssShmem")
own = []  # without the pages of mapped files
load(places[2], places[3], lambda nbytes: own.append(told("RssAnon", "RssShmem")))
print(told("VmHWM") - before[0], max(own) - before[1])
"""
)


def publish(run: Path, sizes: list[int]) -> None:
    """A version of one rank: one tensor of each of these sizes in bytes."""
    segments = lay_out(
        Segment(f"model/w{n}", "float32", shape, "0", 0, nbytes, Placement.whole(shape))
        for n, nbytes in enumerate(sizes)
        for shape in [(nbytes // 4,)]
    )
    plan = ImagePlan(segments, (Share("0", 0, 0, 1),), 0, 16 * MIB)
    identity = ImageIdentity("run", TOPOLOGY, VersionId(1, 5), 0, 1, 0, os.getpid())
    store = DurableStore(run / "checkpoints")
    store.begin_fence(1, "run", None)
    parts = (np.full(prod(segment.shape), n, np.float32) for n, segment in enumerate(segments))
    store.write_tensors(1, identity, plan, parts, SMALL)
    store.publish_written(1, VersionId(1, 5), "run", 1)


def measured(script: str, *words: str | Path) -> list[int]:
    """The numbers of bytes in the last line that the script prints."""
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small one, and one that is almost four times as large as its largest tensor."""
    folder = tmp_path_factory.mktemp("runs")
    publish(folder / "small", [4000])
    publish(folder / "large", SIZES)
    return folder / "small", folder / "large"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.soak) if k != "dcp" else k for k in KINDS]
)
def test_a_version_takes_the_memory_of_its_largest_tensor(
    runs: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    small, large = runs
    out = tmp_path / "large"
    (peak,) = measured(EXPORT, kind, small, tmp_path / "small", large, out)
    assert peak < LARGEST + OTHERS, f"{peak / MIB:.0f} MiB to export"
    places = (tmp_path / "small", tmp_path / "small-run", out, tmp_path / "large-run")
    peak, own = measured(IMPORT, kind, *places)
    converted = 2 * LARGEST
    if kind == "dcp":  # torch reads a tensor, and copies it to where it is wanted
        assert peak < 2 * LARGEST + converted + OTHERS, f"{peak / MIB:.0f} MiB to import"
    else:
        assert own < converted + OTHERS, f"{own / MIB:.0f} MiB to import"
