"""Lazy, verified checkpoints for DeepSpeed scripts, by one line before ``deepspeed.initialize``::

    ftrain.runtime.deepspeed.use()

docs/deepspeed.md tells what is different then.  DeepSpeed is imported when :func:`use` is called.
"""

from __future__ import annotations

import importlib
import inspect
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ftrain.comms.errors import RestoreError, RunDirectoryError, UsageError
from ftrain.runtime.deepspeed import tags
from ftrain.runtime.deepspeed.engine import DurableEngine, Options, Statistics
from ftrain.runtime.deepspeed.reading import read_state

__all__ = ["DurableEngine", "Statistics", "complete_tags", "export", "use", "verify"]

_SHM = "deepspeed_shm_comm"
_MARK = "_ftrain_chooses_tags"


def use(*, lazy: bool = True, bytes_per_s: float = 0.0, build_operators: bool = False) -> None:
    """Let every engine that ``deepspeed.initialize`` makes from now on save with ftrain.

    Args:
        lazy: whether the optimizer's state and its parameters are copied behind forward and
            backward; False for scripts that write to them between ``save_checkpoint`` and ``step``.
        bytes_per_s: limit of each rank's writing; 0: none.
        build_operators: on CPUs, let DeepSpeed compile its shared-memory operator at first use.
            Such a build takes minutes, and one that was killed leaves a lock that every later
            process waits for without end; gloo serves without it.

    Raises:
        UsageError: no DeepSpeed, or one that makes its checkpoint engines another way.
    """
    try:
        engine: Any = importlib.import_module("deepspeed.runtime.engine")
        engines = importlib.import_module("deepspeed.runtime.checkpoint_engine")
        accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
        operators = importlib.import_module("deepspeed.ops").__compatible_ops__
    except ImportError as error:
        raise UsageError(
            f"DeepSpeed can't be imported ({error}): install ftrain[deepspeed]"
        ) from None
    if not hasattr(engine, "create_checkpoint_engine"):
        version = importlib.import_module("deepspeed").__version__
        raise UsageError(
            f"DeepSpeed {version} makes its checkpoint engines another way than 0.19: install "
            "deepspeed>=0.19"
        )
    if not build_operators and accelerator.device_name() == "cpu":
        operators[_SHM] = False
    options = Options(lazy=lazy, bytes_per_s=bytes_per_s)
    base = engines.checkpoint_engine.CheckpointEngine
    # What DeepSpeed's class has and ours lacks, in versions to come, is inherited.
    kind = type(DurableEngine.name, (DurableEngine, base), {})

    def create(config_params: Any = None, *unused: Any, **also_unused: Any) -> Any:
        return kind(config_params, lambda: engines.TorchCheckpointEngine(config_params), options)

    engine.create_checkpoint_engine = create
    if not hasattr(engine.DeepSpeedEngine, _MARK):  # once
        setattr(engine.DeepSpeedEngine, _MARK, True)
        _leave_out_script(engine.DeepSpeedEngine)
        _choose_tags(engine.DeepSpeedEngine)


def _leave_out_script(engine: Any) -> None:
    """DeepSpeed puts zero_to_fp32.py beside its files; it can't read ours, and a full disk that
    keeps it from being copied would end the run."""
    copy = engine._copy_recovery_script

    @wraps(copy)
    def copy_for_own(self: Any, save_path: str) -> None:
        if not isinstance(self.checkpoint_engine, DurableEngine):
            copy(self, save_path)

    engine._copy_recovery_script = copy_for_own


def _choose_tags(engine: Any) -> None:
    """A rank that finds a damaged file in the middle of loading would leave the others waiting in
    a collective; so all of them look first, and agree on a tag."""
    load = engine.load_checkpoint
    signature = inspect.signature(load)

    @wraps(load)
    def load_chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given, own = call.arguments, self.checkpoint_engine
        if isinstance(own, DurableEngine) and not self.load_universal_checkpoint():
            tag = own.choose_tag(given["load_dir"], given["tag"])
            given["tag"] = tag
            if tag is not None and _reads_files_itself(self, given):
                folder = Path(given["load_dir"]) / tag
                if tags.read_manifest(folder) is not None:
                    raise UsageError(
                        f"ZeRO-3 without optimizer states is loaded from torch files: make them of "
                        f"{folder} by ftrain.runtime.deepspeed.export"
                    )
        return load(*call.args, **call.kwargs)

    engine.load_checkpoint = load_chosen


def _reads_files_itself(engine: Any, given: dict[str, Any]) -> bool:
    return bool(
        engine.zero_optimization_partition_weights()
        and not given["load_optimizer_states"]
        and not engine.has_moe_layers
    )


def complete_tags(save_dir: str | Path) -> list[str]:
    """Tags of complete checkpoints, newest first; what is in the files is not looked at."""
    return tags.complete_tags(Path(save_dir))


def verify(save_dir: str | Path, tag: str) -> int:
    """Compare every byte of a checkpoint with its digest; returns how many bytes it has.

    Raises:
        CorruptionError: something is damaged or missing.
        RestoreError: the checkpoint is not complete.
    """
    total = 0
    for path in _files(Path(save_dir), tag):
        reader = tags.open_file(path)
        assert reader is not None
        try:
            reader.verify()
            total += reader.nbytes
        finally:
            reader.close()
    return total


def export(save_dir: str | Path, tag: str, target: str | Path) -> None:
    """Write a checkpoint again as DeepSpeed's own engine would, verified on the way: for
    ``zero_to_fp32.py``, ``ds_to_universal.py`` and whatever else reads its files.

    Raises:
        RunDirectoryError: ``target`` has this tag already; nothing is overwritten.
        CorruptionError, RestoreError: as :func:`verify`.
    """
    files = _files(Path(save_dir), tag)
    folder = Path(target) / tag
    if folder.exists():
        raise RunDirectoryError(
            f"{folder} exists already: export into a new directory, nothing is overwritten"
        )
    folder.mkdir(parents=True)
    for path in files:
        reader = tags.open_file(path)
        assert reader is not None
        try:
            torch.save(read_state(reader), folder / path.name)
        finally:
            reader.close()
    (Path(target) / tags.LATEST).write_text(tag)


def _files(save_dir: Path, tag: str) -> list[Path]:
    folder = save_dir.absolute() / tag
    manifest = tags.read_manifest(folder)
    if manifest is None:
        raise RestoreError(f"{folder} is not complete; {tags.advice(folder)}")
    return [folder / name for name in manifest.files]
