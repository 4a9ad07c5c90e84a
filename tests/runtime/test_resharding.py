"""A run goes on with another number of ranks or another layout, and no bit of its state changes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_script import FORKED, imported
from forked_script import run as run_script

JOB = Path(__file__).with_name("layouts_job.py")
Result = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """The process that the ranks are forked from."""
    wanted = ("fsdp", "tensor.parallel", "checkpoint.state_dict", "device_mesh")
    with imported("ftrain", "torch._dynamo", *(f"torch.distributed.{name}" for name in wanted)):
        yield


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def run(
    folder: Path, layout: str, world_size: int, steps: int, start: Path | None = None
) -> Result:
    """One run of the job, to the end; what it wrote."""
    out = folder / f"{'torch-' if start else ''}{layout}{world_size}-{steps}.json"
    command = [str(JOB), "--steps", str(steps), "--layout", layout]
    command += ["--out", str(out), *(["--from", str(start)] if start else [])]
    port = str(free_port())
    log = folder / "log"
    ranks = [
        FORKED.Process(
            target=run_script,
            args=(
                command,
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
                log,
            ),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()  # who still waits for one that failed
    assert codes == [0] * world_size, log.read_text()[-6000:]
    return {"path": out, **json.loads(out.read_text())}


def go_through(folder: Path, stations: list[tuple[str, int]], steps_each: int = 4) -> None:
    """Each station goes on exactly where the one before ended."""
    last: Result | None = None
    for number, (layout, world_size) in enumerate(stations, start=1):
        found = run(folder, layout, world_size, number * steps_each)
        if last is not None:
            assert found["before"] == last["after"], (layout, world_size)
            assert min(map(int, found["losses"])) == (number - 1) * steps_each
        last = found


@pytest.mark.slow
def test_a_run_goes_through_layouts_and_numbers_of_ranks(tmp_path: Path) -> None:
    stations = [("ddp", 2), ("fsdp", 3), ("tp", 4), ("plain", 1), ("ddp", 3), ("fsdp", 2)]
    go_through(tmp_path, stations)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "stations",
    [
        [("ddp", n) for n in (1, 2, 3, 4, 2, 4, 1, 3, 1)],
        [("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("ddp", 2), ("fsdp", 4), ("fsdp", 1), ("ddp", 3)],
        [("tp", 2), ("ddp", 2), ("tp", 4), ("fsdp", 3), ("tp", 2), ("plain", 1), ("tp", 4)],
    ],
)
def test_any_layout_goes_on_from_any_other(tmp_path: Path, stations: list[tuple[str, int]]) -> None:
    go_through(tmp_path, stations)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("ddp2", "fsdp3", marks=pytest.mark.soak),
        ("fsdp2", "ddp4"),
        ("tp4", "tp2"),
    ],
)
def test_the_next_losses_are_those_of_torchs_own_resharding(
    tmp_path: Path, before: str, after: str
) -> None:
    first = run(tmp_path, before[:-1], int(before[-1]), 5)
    ours = run(tmp_path, after[:-1], int(after[-1]), 25)
    torchs = run(tmp_path, after[:-1], int(after[-1]), 25, first["path"])
    assert len(ours["losses"]) == 20
    assert ours["before"] == torchs["before"]
    assert ours["losses"] == torchs["losses"]
    assert ours["after"] == torchs["after"]
