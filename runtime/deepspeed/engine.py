"""The checkpoint engine that DeepSpeed calls.

DeepSpeed's own order of calls, on every rank (0.19, ``runtime/engine.py``)::

    save_checkpoint    create(info), save(state_dict, path) for each file, is_decoupled()
    step, at the accumulation boundary, before anything of the state changes:
                       is_decoupled(), get_commit_info(), commit(info)
    load_checkpoint    choose_tag(folder, tag), for which use() sees; load(path) for each file
    destroy            is_decoupled(), cleanup()

``save`` copies what may change at once and leaves the rest to a thread; ``commit`` waits for that
copy, so that the step may change the state, and for nothing else.  Another thread writes the files.
Once every rank's are durable, rank 0 publishes the tag and then ``latest``; DeepSpeed itself, which
would write ``latest`` right behind ``commit``, is told that none is wanted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from ftrain.checkpoint.directory import make_folders
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.pace import Pace
from ftrain.comms.errors import CorruptionError, FtrainError, RestoreError, UsageError
from ftrain.comms.protocol.messages import VersionId
from ftrain.runtime.deepspeed import tags
from ftrain.runtime.deepspeed.peers import Peers, group_peers
from ftrain.runtime.deepspeed.reading import read_state, read_torch_file
from ftrain.runtime.deepspeed.shot import Room, Shot, changes_of
from ftrain.runtime.deepspeed.tree import Folder
from ftrain.runtime.deepspeed.writing import Save, Writer

_log = logging.getLogger("ftrain.deepspeed")


@dataclass(frozen=True, slots=True)
class Options:
    """What :func:`ftrain.runtime.deepspeed.use` was called with."""

    lazy: bool = True
    bytes_per_s: float = 0.0  # 0: no limit


@dataclass(frozen=True, slots=True)
class Statistics:
    """What became of the saves so far."""

    begun: int = 0
    durable: int = 0  # on all ranks
    failed: int = 0


class DurableEngine:
    """See the module's first lines.  All methods are called by DeepSpeed, from the training thread;
    :meth:`wait`, :attr:`failures` and :meth:`statistics` are for scripts.

    Args:
        config: DeepSpeed's.
        own: makes DeepSpeed's own engine, for what is no checkpoint of ours.
        options: how to save.
        peers: the ranks that save together; None: those of the default group.

    Raises:
        UsageError: no process group, or one without a store.
    """

    name = "FtrainCheckpointEngine"

    def __init__(
        self, config: Any, own: Callable[[], Any], options: Options, peers: Peers | None = None
    ) -> None:
        if config is not None and getattr(config, "use_node_local_storage", False):
            raise UsageError(
                "checkpoint.use_node_local_storage is set in DeepSpeed's configuration, but ftrain "
                "saves to one folder that all ranks share: remove it"
            )
        self._make_own = own
        self._own: Any = None
        self._lazy = options.lazy and _steps_only_in_step(config)
        self._peers = group_peers() if peers is None else peers
        self._pace = Pace(options.bytes_per_s)
        self._writer: Writer | None = None  # with its threads; made when it is needed
        self._rooms: dict[str, Room] = {}
        self._old_said = False
        self._count = 0
        self._open: Save | None = None  # more files may come
        self._uncommitted: Any = None
        self._uncopied: list[Shot] = []
        self._hook: Any = None
        self._failures: list[str] = []
        self._durable = 0

    # ---- for scripts

    def wait(self) -> None:
        """Return when everything that was saved so far is durable on all ranks, or has failed."""
        self._close()
        if self._writer is not None:
            self._writer.drain()
        self._complain()

    @property
    def failures(self) -> list[str]:
        """One sentence for each save that failed."""
        return self._failures + (self._writer.failures if self._writer is not None else [])

    def statistics(self) -> Statistics:
        """What became of the saves so far."""
        durable = self._durable + (self._writer.durable if self._writer is not None else 0)
        return Statistics(self._count, durable, len(self.failures))

    # ---- saving, as DeepSpeed calls it

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder that survives a power cut; what is in the way is found by the writer."""
        with suppress(OSError):
            make_folders(Path(path).absolute())

    def create(self, info: Any) -> None:
        """A checkpoint begins; its files follow."""
        self._close()
        self._complain()
        self._count += 1
        name = f"{self._peers.name}-{self._count}"
        save_dir = Path(info.save_dir).absolute()
        self._open = Save(self._count, name, save_dir, info.tag, info.save_latest)
        self._uncommitted = info

    def save(self, state_dict: Any, path: str) -> None:
        """Copy what may change at once, order the copy of the rest, and return."""
        save, target = self._open, Path(path).absolute()
        if save is None or target.parent != save.folder:
            # Not part of a checkpoint: weights for other programs (save_16bit_model).
            self._deepspeeds_own().save(state_dict, path)
            return
        try:
            folded = Folder(state_dict, target.name.removesuffix(".pt"))
            room = self._rooms.setdefault(target.name, Room())
            changes = changes_of(state_dict, lazy=self._lazy)
            shot = Shot(target, folded, self._identity(save), room, changes)
        except Exception as error:  # whatever it was: training goes on, and this is told
            save.problem = f"{error}"
            _log.warning("ftrain: %s is not saved: %s", path, error)
            return
        self._uncopied.append(shot)
        self._started().add(save, shot)

    def is_decoupled(self) -> bool:
        """True: commits come before the next step.  DeepSpeed asks when it has handed over the last
        file, so the checkpoint is closed here, and need not wait for another step."""
        self._close()
        return True

    def get_commit_info(self) -> Any:
        """What :meth:`commit` is due for, if anything; ``latest`` is written here, not there."""
        self._close()
        self._complain()
        info = self._uncommitted
        return None if info is None else dataclasses.replace(info, save_latest=False)

    def set_commit_info(self, info: Any) -> None:
        """What :meth:`commit` is due for."""
        self._uncommitted = info

    def commit(self, info: Any) -> bool:
        """Return when the state may change: it was copied.  What is on disk is another matter."""
        self._close()
        self._await_copies()
        self._uncommitted = None
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this rank writes what all data-parallel ranks hold."""
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        """False: a view is saved without the rest of its storage, so DeepSpeed need not clone."""
        return False

    def cleanup(self) -> None:
        """Return when everything is written, and end the threads; saving begins them anew."""
        self._close()
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.close()
        self._hook.remove()
        for room in self._rooms.values():
            room.close()
        self._rooms.clear()
        self._failures += writer.failures
        self._durable += writer.durable
        self._say(writer.unsaid())

    # ---- loading

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state in a file, every byte compared with its digest.

        Raises:
            CorruptionError: the file is damaged.
            RestoreError: the checkpoint is not complete.
        """
        self.wait()  # for this very file, perhaps; and the live state is about to change
        self._await_copies()
        file = Path(path).absolute()
        reader = tags.open_file(file)
        if reader is None:
            if not self._old_said:
                self._old_said = True
                _log.warning(
                    "ftrain: %s was written by DeepSpeed's own engine: nothing in it is verified",
                    path,
                )
            return read_torch_file(file, map_location)
        try:
            return read_state(reader, map_location)
        except CorruptionError as error:
            raise CorruptionError(f"{error}; {tags.advice(file.parent)}") from None
        finally:
            reader.close()

    def choose_tag(self, load_dir: str, tag: str | None) -> str | None:
        """The tag that all ranks will load: ``tag``; without one, the one that ``latest`` names or,
        if a rank finds that it can't be loaded, the newest that was written before and can.  Every
        rank calls this, and reads its part of the files.  None: nothing was saved yet.

        Raises:
            CorruptionError, RestoreError: there is none; on every rank.
        """
        self.wait()
        self._await_copies()  # the live state is about to change
        folder = Path(load_dir).absolute()
        candidates = _candidates(folder, tag) if self._peers.rank == 0 else []
        candidates = json.loads(self._peers.exchange(json.dumps(candidates))[0])
        said: list[str] = []
        for candidate in candidates:
            problem = _problem(folder, candidate, self._peers)
            found = enumerate(self._peers.exchange(problem))
            problems = [f"rank {rank}: {words}" for rank, words in found if words]
            if not problems:
                for sentence in said if self._peers.rank == 0 else []:
                    _log.warning("ftrain: %s; %s is loaded instead", sentence, candidate)
                return str(candidate)
            said.append(f"tag {candidate} is not loaded: {'; '.join(problems)}")
        if said:
            advice = "no older tag can be loaded" if tag is None else tags.advice(folder / str(tag))
            raise RestoreError(f"{'. '.join(said)}; {advice}")
        return tag

    # ---- details of the training thread

    def _identity(self, save: Save) -> ImageIdentity:
        peers = self._peers
        version = VersionId(0, save.number)
        return ImageIdentity(peers.name, "", version, peers.rank, peers.world_size, 0, 0)

    def _deepspeeds_own(self) -> Any:
        if self._own is None:
            self._own = self._make_own()
        return self._own

    def _close(self) -> None:
        """No more files come for the save that is open."""
        save, self._open = self._open, None
        if save is not None:
            self._started().finish(save)

    def _await_copies(self) -> None:
        for shot in self._uncopied:
            shot.wait_copied()
        self._uncopied.clear()

    def _complain(self) -> None:
        """Say what failed behind the script's back."""
        if self._writer is not None:
            self._say(self._writer.unsaid())

    def _say(self, sentences: list[str]) -> None:
        for sentence in sentences:
            _log.error("ftrain: %s", sentence)

    def _started(self) -> Writer:
        if self._writer is None:
            self._writer = Writer(self._peers, self._pace)
            me = weakref.ref(self)

            def before_step(*unused: object) -> None:
                # DeepSpeed's pipeline engine steps without a commit.
                engine = me()
                if engine is not None:
                    engine._await_copies()

            self._hook = register_optimizer_step_pre_hook(before_step)
        return self._writer


def _candidates(folder: Path, tag: str | None) -> list[str]:
    """Tags to load, the best one first."""
    if tag is not None:  # DeepSpeed says it if there is no such folder
        return [str(tag)] if (folder / str(tag)).is_dir() else []
    try:
        latest = (folder / tags.LATEST).read_text(errors="replace").strip()
    except OSError:  # DeepSpeed says so, and begins anew
        return []
    older = [found for found in tags.complete_tags(folder, latest) if found != latest]
    return [latest, *older]


def _problem(folder: Path, tag: str, peers: Peers) -> str:
    """Why a tag can't be loaded, as far as this rank looked; "": it can."""
    try:
        tags.check(folder, tag, peers.rank, peers.world_size)
    except FtrainError as error:
        return f"{error}"
    return ""


def _steps_only_in_step(config: Any) -> bool:
    """Whether nothing of the state changes outside ``engine.step``: some of DeepSpeed's offloading
    updates it while backward runs, or moves it to and from files."""
    zero = getattr(config, "zero_config", None)
    offload = getattr(zero, "offload_optimizer", None)
    return (
        getattr(zero, "zenflow", None) is None
        and not getattr(offload, "super_offload", False)
        and "nvme" not in str(getattr(offload, "device", "")).lower()
    )
