"""The reader in docs/checkpoint_format.md uses nothing of ours, and reads what we write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_placing import TOPOLOGY, as_file, images, whole_tensors

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import FileRecord
from ftrain.comms.protocol.messages import VersionId

DOC = Path(__file__).parents[2] / "docs" / "checkpoint_format.md"
VERSION = VersionId(1, 5)


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """What the page's program defines."""
    (program,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(program.splitlines()) <= 64
    assert "ftrain" not in program
    names: dict[str, Any] = {}
    exec(compile(program, str(DOC), "exec"), names)
    return names


def publish(folder: Path, dtype: torch.dtype, dim: int | None, *, compress: bool) -> Path:
    """A version of three ranks; returns its manifest."""
    store = DurableStore(folder)
    store.begin_fence(1, "run", None)
    records = []
    for rank, image in enumerate(images(dtype, dim, 3)):
        if compress:
            path = folder / "1" / "5" / f"rank{rank}.seg"
            path.parent.mkdir(exist_ok=True)
            file = as_file(path, image)
            records.append(FileRecord(rank, file.nbytes, file.digest))
            file.close()
        else:
            records.append(store.write_image(1, VERSION, rank, image.raw))
    return store.publish(1, VERSION, "run", TOPOLOGY, 3, records)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pages_reader_reads_every_tensor(
    reader: dict[str, Any], tmp_path: Path, dtype: torch.dtype, dim: int | None, compress: bool
) -> None:
    manifest = publish(tmp_path, dtype, dim, compress=compress)
    found = reader["read_version"](manifest)
    wanted = whole_tensors(dtype)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        bits = tensor.reshape(-1).view(torch.uint8).numpy()
        assert (np.ascontiguousarray(found[name]).reshape(-1).view(np.uint8) == bits).all()


def test_the_pages_reader_notices_damage(reader: dict[str, Any], tmp_path: Path) -> None:
    manifest = publish(tmp_path, torch.float32, 0, compress=False)
    path = tmp_path / "1" / "5" / "rank1.seg"
    whole = bytearray(path.read_bytes())
    whole[5000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(AssertionError, match=r"rank1\.seg is damaged"):
        reader["read_version"](manifest)


def test_reading_a_version_needs_no_torch(tmp_path: Path) -> None:
    manifest = publish(tmp_path, torch.float32, None, compress=False)
    program = (
        "import sys\n"
        "from ftrain.checkpoint.manifest import open_files, read_manifest\n"
        "with open_files(read_manifest(sys.argv[1])) as files:\n"
        "    for file in files: file.verify()\n"
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(manifest)], check=True)
