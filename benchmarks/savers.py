"""How the peers of ``checkpoint`` save; each as its documentation recommends, with a barrier.

Of DeepSpeed's engines only the default one is here.  The decoupled one needs ``deepspeed.comm``,
which compiles an operator when it is first used; the FAST writer needs libaio; the DataStates one
needs a package that needs CUDA.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

State = dict[str, dict[str, torch.Tensor]]
_KEPT = 2  # checkpoints that stay, as ours keeps


class Saver:
    """Saves nothing: the training without checkpoints.

    ``save`` is called at a boundary, ``barrier`` before the optimizer writes.  ``records`` has one
    entry per checkpoint with the times (CLOCK_MONOTONIC, ns) at which it was staged and durable.
    """

    needs_group = False

    def __init__(self, folder: Path, *, on_gpu: bool = False) -> None:
        self.folder = folder
        self.records: list[dict[str, int]] = []
        self._behind = ThreadPoolExecutor(1, "sweep")  # what no trainer would wait for
        self._durable: list[Path] = []

    def save(self, step: int, state: State) -> None:
        """Begin, or do, a checkpoint."""

    def barrier(self) -> None:
        """Return when the tensors may change."""

    def finish(self) -> None:
        """Return when the last checkpoint is durable."""

    def close(self) -> None:
        """Nothing is saved any more."""
        self._behind.shutdown()

    def _begin(self, step: int) -> tuple[Path, dict[str, int]]:
        record = {"step": step}
        self.records.append(record)
        return self.folder / str(step), record

    def _is_durable(self, path: Path, record: dict[str, int]) -> None:
        record["durable_ns"] = time.monotonic_ns()
        self._durable.append(path)
        while len(self._durable) > _KEPT:
            self._behind.submit(_remove, self._durable.pop(0))


class TorchSave(Saver):
    """torch.save into a file that is synced, then named."""

    def save(self, step: int, state: State) -> None:
        path, record = self._begin(step)
        fresh = path.with_suffix(".new")
        with fresh.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        _sync_folder(self.folder)
        record["staged_ns"] = time.monotonic_ns()
        self._is_durable(path, record)


class DcpSave(Saver):
    """torch.distributed.checkpoint.save; it syncs its files by itself."""

    needs_group = True

    def save(self, step: int, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        path, record = self._begin(step)
        dcp.save(state, checkpoint_id=path)
        record["staged_ns"] = time.monotonic_ns()
        self._is_durable(path, record)


class DcpAsync(Saver):
    """async_save with a stager that is kept and stages in the background.

    One that is still being written is waited for before the next one begins.
    """

    needs_group = True
    process = False

    def __init__(self, folder: Path, *, on_gpu: bool = False) -> None:
        super().__init__(folder, on_gpu=on_gpu)
        self._stager = _gpu_stager(self.process) if on_gpu else _cpu_stager(self.process)
        self._upload: Future[Any] | None = None

    def save(self, step: int, state: State) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.finish()
        path, record = self._begin(step)
        kind = AsyncCheckpointerType.PROCESS if self.process else AsyncCheckpointerType.THREAD
        response: Any = dcp.async_save(
            state, checkpoint_id=path, async_checkpointer_type=kind, async_stager=self._stager
        )

        def staged(_: object) -> None:
            record["staged_ns"] = time.monotonic_ns()

        response.staging_completion.add_done_callback(staged)
        self._upload = response.upload_completion
        assert self._upload is not None
        self._upload.add_done_callback(lambda _: self._is_durable(path, record))

    def barrier(self) -> None:
        self._stager.synchronize_staging()

    def finish(self) -> None:
        if self._upload is not None:
            self._upload.result()

    def close(self) -> None:
        self.finish()
        self._stager.close()
        super().close()


class DcpProcess(DcpAsync):
    """The same with memory that is shared with a process that writes."""

    process = True


class DeepSpeedTorch(Saver):
    """DeepSpeed's default engine, synced afterwards: it does not do that itself."""

    needs_group = True

    def __init__(self, folder: Path, *, on_gpu: bool = False) -> None:
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import (
            TorchCheckpointEngine,
        )

        super().__init__(folder, on_gpu=on_gpu)
        self._engine = TorchCheckpointEngine(
            SimpleNamespace(checkpoint_config={"checkpoint_serialization": True})
        )

    def save(self, step: int, state: State) -> None:
        path, record = self._begin(step)
        self._engine.save(state, str(path))
        self._engine.commit(SimpleNamespace(tag=str(step)))
        _sync(path)
        _sync_folder(self.folder)
        record["staged_ns"] = time.monotonic_ns()
        self._is_durable(path, record)


def _cpu_stager(process: bool) -> Any:
    """One that copies behind the caller, to shared memory for a process that writes."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return DefaultStager(StagingOptions(False, process, True, False))


def _gpu_stager(process: bool) -> Any:
    """The fastest that this version of torch can do: pinned memory, copies that do not wait."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    sample = {"model": {"weight": torch.zeros(1 << 20, device="cuda")}}
    problem: Exception = RuntimeError("no way to stage")
    for pinned, shared, unwaited in ((1, process, 1), (1, 1, 1), (0, process, 1), (0, process, 0)):
        stager = DefaultStager(StagingOptions(bool(pinned), bool(shared), True, bool(unwaited)))
        try:
            staged: Any = stager.stage(dict(sample))
            staged.result()
        except Exception as error:
            problem = error
            continue
        print(f"staged: pinned {pinned}, shared {int(shared)}, without waiting {unwaited}")
        return stager
    raise problem


PEERS: dict[str, type[Saver]] = {
    "none": Saver,
    "torch.save": TorchSave,
    "DCP": DcpSave,
    "DCP async thread": DcpAsync,
    "DCP async process": DcpProcess,
    "DeepSpeed torch": DeepSpeedTorch,
}


def form_group(folder: Path) -> None:
    """A process group of this process alone, which DCP and DeepSpeed want."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_sync_folder = _sync


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
