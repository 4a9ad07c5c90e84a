"""Versions without ``ftrain launch``: durable files only, written by the ranks themselves."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ftrain.checkpoint.capture import CaptureEngine, CaptureStatistics
from ftrain.checkpoint.durable import DurableStore, none_usable_text, not_all_usable_text
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.lock import hold_versions
from ftrain.checkpoint.manifest import DurableVersion, open_files
from ftrain.checkpoint.pinned import PageLock
from ftrain.checkpoint.retention import Retention
from ftrain.checkpoint.slots import FinishRequest
from ftrain.checkpoint.tensors import StateTensor
from ftrain.comms.environment import RankEnvironment, default_run_dir, running_script
from ftrain.comms.errors import (
    CorruptionError,
    FtrainError,
    MemoryShortError,
    RestoreError,
    RunDirectoryError,
)
from ftrain.comms.protocol.messages import Held, VersionId
from ftrain.comms.protocol.records import EXIT_SAVED
from ftrain.configs.schema import CheckpointConfig, EventsConfig, FtrainConfig
from ftrain.runtime.group import GroupView
from ftrain.runtime.imported import IMPORTED
from ftrain.runtime.restore import Restoration, file_readers, restore

if TYPE_CHECKING:
    from ftrain.runtime.state import TrainingState

_RUN_ID = "alone"  # of a run without a launcher
_LOOK_EVERY_S = 1.0  # how often the ranks of a group ask each other whether something is due
_LOOK_STEPS_MAX = 64
_locks: dict[str, int] = {}  # by directory: descriptors of what this process holds
_holders: Counter[str] = Counter()  # how many Sessions of it save there


class LocalSlots:
    """One image in this process's own memory, for the capture engine to write to."""

    def __init__(self) -> None:
        self.denied = ""
        self.image: memoryview | None = None
        self.held: Held | None = None
        self._map: mmap.mmap | None = None
        self._lock: PageLock | None = None

    def reserve(self, image_bytes: int) -> None:
        """Have room for one image of this size; raises MemoryShortError."""
        if self._map is None or len(self._map) < image_bytes:
            self.close()
            try:
                self._map = mmap.mmap(-1, image_bytes)
            except OSError as error:
                raise MemoryShortError(
                    f"no memory for a copy of the training state ({image_bytes} bytes): {error}"
                ) from None

    def begin(self, version: VersionId, wait_s: float | None = None) -> memoryview | None:
        """The room."""
        if self._map is None:
            return None
        self.image, self.held = memoryview(self._map), None
        return self.image

    def enter(self) -> None:
        """Have GPUs copy to it at full speed; else its pages are taken when they are written to."""
        if self._map is not None and self._lock is None:
            self._lock = PageLock(memoryview(self._map))

    def close(self) -> None:
        """Nothing is copied to it any more."""
        if self._lock is not None:
            self._lock.release()
        self._lock = self._map = self.image = self.held = None

    def enter_more(self) -> bool:
        """There is no other."""
        return False

    def begun(self, version: VersionId) -> None:
        """Nobody has to know."""

    def sealed(self, version: VersionId, held: Held) -> None:
        """The image is complete."""
        self.held = held

    def withdraw(self, version: VersionId) -> None:
        """Never called: nothing changes while a version is written."""

    def fileno(self) -> int:
        """Nobody ever asks anything."""
        return -1

    def poll(self) -> FinishRequest | None:
        """Nobody ever asks anything."""
        return None

    def finished(self, version: VersionId, rank: int, held: Held | None) -> None:
        """Nobody ever asks anything."""


class Agreement:
    """What the ranks of the group say together; each call is a collective of the default group."""

    @property
    def lone(self) -> bool:
        """Whether there is nobody to agree with."""
        return not dist.is_initialized() or dist.get_world_size() == 1

    def share(self, numbers: list[int]) -> list[int]:
        """Rank 0's numbers, on every rank."""
        if self.lone:
            return numbers
        tensor = self._tensor(numbers)
        dist.broadcast(tensor, 0)
        return [int(number) for number in tensor.tolist()]

    def most(self, numbers: list[int]) -> list[int]:
        """The highest of all ranks' numbers, place by place."""
        if self.lone:
            return numbers
        tensor = self._tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(number) for number in tensor.tolist()]

    def everyone(self, well: bool) -> bool:
        """Whether all ranks said True."""
        return self.most([int(not well)]) == [0]

    def _tensor(self, numbers: list[int]) -> torch.Tensor:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return torch.tensor(numbers, dtype=torch.int64, device=device)


class Looks:
    """At which boundaries the ranks ask each other: about once in ``_LOOK_EVERY_S``."""

    def __init__(self, every_s: float) -> None:
        self._every_s = min(every_s, _LOOK_EVERY_S)
        self._steps = 1
        self._next = 0
        self._at: tuple[int, float] | None = None  # step and time of the last one

    def due(self, step: int) -> bool:
        """Whether this boundary is one of them; equal on all ranks."""
        return step >= self._next

    def proposal(self, step: int, now_s: float) -> int:
        """How many steps from here the next one should be; rank 0's counts."""
        steps = 1
        if self._at is not None and now_s > self._at[1]:
            per_s = (step - self._at[0]) / (now_s - self._at[1])
            steps = max(1, min(2 * self._steps, int(self._every_s * per_s), _LOOK_STEPS_MAX))
        self._at = (step, now_s)
        return steps

    def agree(self, step: int, steps: int) -> None:
        """What rank 0 proposed at this boundary."""
        self._steps, self._next = steps, step + steps


class AloneKeeper:
    """Writes durable versions: every ``durable_every_s``, on request or signal, at the end."""

    def __init__(self, environment: RankEnvironment, note: Callable[[str], None]) -> None:
        context = environment.context
        config = context.config if context is not None else FtrainConfig()
        self._environment = environment
        self._config: CheckpointConfig = config.checkpoint
        self._note = note
        self._run_id = context.job_id if context is not None else _RUN_ID
        self._granted = context.formation.epoch if context is not None else 0
        self.run_dir = context.run_dir if context is not None else default_run_dir(running_script())
        self.epoch = context.epoch if context is not None else 1
        self.events_bytes_max = EventsConfig().bytes_max
        self.resumed = False
        self.stop_asked = False
        self._store = DurableStore(self._config.dir or f"{self.run_dir}/checkpoints")
        self._agreement = Agreement()
        self._looks = Looks(self._config.durable_every_s / 4)
        self._slots = LocalSlots()
        self._engine: CaptureEngine | None = None
        self._save_asked = False
        self._saved_step = -1
        self._refusal = ""  # why this rank's part of the newest attempt failed
        self.unsaved = ""
        self._stopped_step = -1  # where a version was to be written because of a stop
        self._saved_at = time.monotonic()
        self._topology = ""
        self._fence = 0
        self._parent: VersionId | None = None  # what this run goes on from
        self._held = ""  # the directory, once it is held for this Session
        self._group = GroupView(
            environment.rank,
            environment.world_size,
            0,
            tuple(range(environment.world_size)),
        )
        # torchrun ends ranks by SIGTERM also when another one died, and waits for each of them.
        if context is None and not environment.run_id:
            self._catch_signals()

    # ---- Keeper

    def restore(self, state: TrainingState) -> dict[str, Any] | None:
        """Go on from the newest durable version that verifies on every rank, if there is one."""
        self._topology = state.topology()
        in_use = self._hold_versions()
        survey = self._store.survey()
        # A launcher's epoch is a fence that was granted, and above every one in the directory.
        fence = self._granted or survey.fence + 1
        count, self._fence, damaged, refused = self._agreement.share(
            [len(survey.versions), fence, len(survey.problems), int(bool(in_use))]
        )
        if refused:
            raise RunDirectoryError(in_use or f"{self._store.directory} is in use, says rank 0")
        self.epoch = self._fence
        problems = list(survey.problems)
        for index in range(count):
            # To another rank the directory may look as it was a moment ago: rank 0 says which.
            own = survey.versions[index].key if not self._environment.rank else (0, 0)
            fence, step = self._agreement.share(list(own))
            version = next((v for v in survey.versions if v.key == (fence, step)), None)
            small, problem = self._put_back(state, version)
            if self._agreement.everyone(small is not None):
                assert version is not None
                assert small is not None
                if IMPORTED in small and index:
                    # Optimizers, schedulers and more hold what was read of the versions before.
                    raise RestoreError(_only_imported_text(survey.versions[0]))
                self._tell_unusable(survey.problems, version.step)
                self._tell(f"resumes at step {version.step} from {version.path}")
                self.resumed = True
                self._saved_step = version.step
                self._parent = version.version
                return small
            problems.append(problem or f"step {step} is damaged")
            self._note(f"the version of step {step} is not used: {problem or 'damaged'}")
        if count or damaged:
            problems = problems or ["another rank finds them damaged"]
            raise RestoreError(none_usable_text(self._store.directory, problems))
        return None

    def _tell_unusable(self, problems: Sequence[str], step: int) -> None:
        if problems:
            self._tell(not_all_usable_text(self._store.directory, problems, step))

    def _tell(self, text: str) -> None:
        """Say once what a launch says by itself."""
        if self._environment.rank == 0 and self._environment.context is None:
            self._note(text)

    def _hold_versions(self) -> str:
        """Be the only one who writes there; why that can't be. A launcher sees to it itself."""
        if self._environment.rank or self._environment.context or not self._config.enabled:
            return ""
        path = os.path.realpath(self._store.directory)
        if path not in _locks:
            try:
                _locks[path] = hold_versions(Path(path), "run the script in another directory")
            except RunDirectoryError as error:
                return str(error)
        if not self._held:
            _holders[path] += 1
            self._held = path
        return ""

    def _put_back(
        self, state: TrainingState, version: DurableVersion | None
    ) -> tuple[dict[str, Any] | None, str]:
        """The small tree of a version that was put back; otherwise why it can't be."""
        if version is None:
            return None, f"it is not in {self._store.directory} as this rank sees it"
        with open_files(version) as files:
            readers = file_readers(self._environment.local_world_size)
            restoration = Restoration(files, verify=self._config.verify, readers=readers)
            try:
                small = restore(state, restoration, self._environment.rank, self._topology)
            except (CorruptionError, RestoreError) as error:
                return None, str(error)
        return small, ""

    def capture(
        self,
        step: int,
        tensors: tuple[StateTensor, ...],
        small: bytes,
        collectives: int,
        *,
        last: bool,
    ) -> bool:
        """Write the version at boundary ``step`` if one is due; whether it is written."""
        if not self._config.enabled or step == 0:
            return True
        if self._due(step) or last:
            self._refusal = ""
            self._write(step, tensors, small, collectives)
            self.unsaved = ""
            if last and self._refusal:
                self.unsaved = f"step {step}, the end of the run, is not durable: {self._refusal}"
        return self._saved_step == step

    def expect(self, tensors: tuple[StateTensor, ...]) -> None:
        """Room is made when a version is written."""

    def barrier(self) -> None:
        """Nothing is captured behind the step."""

    def drain(self) -> None:
        """Nothing is captured behind the step."""

    def finish(self) -> None:
        """The loop is over."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._slots.close()
        path, self._held = self._held, ""
        if path:
            _holders[path] -= 1
            if not _holders[path]:
                _let_go(path)

    def save(self) -> None:
        """A durable version is wanted soon."""
        self._save_asked = True

    def stop_here(self, step: int) -> bool:
        """Whether the script is to end at this boundary: only where a version could be written."""
        return self._stopped_step == step

    def stop(self, step: int) -> None:
        """End the script, and say whether this boundary was saved."""
        if dist.is_initialized():  # its threads may abort a process that ends without this
            with suppress(RuntimeError):
                dist.destroy_process_group()
        if self._saved_step == step:
            sys.stderr.write(f"ftrain: saved step {step} in {self.run_dir}; run me again\n")
            raise SystemExit(EXIT_SAVED)
        sys.stderr.write(f"ftrain: stopped, but step {step} was not saved in {self.run_dir}\n")
        raise SystemExit(1)

    def statistics(self) -> CaptureStatistics:
        """What capturing cost so far."""
        return self._engine.statistics() if self._engine is not None else CaptureStatistics()

    # ---- details

    def _due(self, step: int) -> bool:
        """Whether the version at this boundary is to be written; equal on all ranks."""
        if not self._agreement.lone and not self._looks.due(step):
            return False
        now_s = time.monotonic()
        first = self._environment.rank == 0
        late = first and now_s - self._saved_at > self._config.durable_every_s
        stop, save, steps = self._agreement.most(
            [
                int(self.stop_asked),
                int(self._save_asked or late),
                self._looks.proposal(step, now_s) if first else 0,
            ]
        )
        self._looks.agree(step, steps)
        if stop:
            self._stopped_step = step
        if save:
            self._save_asked = False
        return bool(stop or save)

    def _write(
        self, step: int, tensors: tuple[StateTensor, ...], small: bytes, collectives: int
    ) -> None:
        if step == self._saved_step:
            return
        engine = self._engine
        if engine is None:
            engine = self._engine = CaptureEngine(
                self._slots,
                self._identity,
                self._group.share,
                rank=self._environment.rank,
                chunk_bytes=FtrainConfig().snapshot.chunk_bytes,
                compare=False,
                on_note=self._note,
            )
        version = VersionId(self.epoch, step)
        well = False
        try:
            self._slots.held = None  # that of the version before
            engine.start(version, tensors, small, collectives)
            engine.barrier(float("inf"))
            engine.drain(float("inf"))
            well = self._slots.held is not None
            if well:
                assert self._slots.image is not None
                self._store.write_image(
                    self._fence, version, self._environment.rank, self._slots.image
                )
            else:
                self._refusal = engine.statistics().skip_reason
        except (FtrainError, OSError, RuntimeError) as error:  # the others wait for this rank
            self._refusal = str(error)
            self._note(f"step {step} was not saved: {error}")
            well = False
        if self._agreement.everyone(well):
            first = self._environment.rank == 0
            if self._agreement.everyone(self._publish(version) if first else True):
                self._saved_step = step
        self._saved_at = time.monotonic()

    def _publish(self, version: VersionId) -> bool:
        try:
            self._store.begin_fence(self._fence, self._run_id, self._parent)
            self._store.publish_written(
                self._fence, version, self._run_id, self._environment.world_size
            )
        except (FtrainError, OSError, RuntimeError) as error:
            self._refusal = str(error)
            self._note(f"step {version.step} was not published: {error}")
            return False
        try:
            policy = Retention(self._config.keep_last, self._config.keep_every)
            self._store.sweep(policy, self._run_id)
        except FtrainError as error:  # the new one is saved all the same
            self._note(f"old versions can't be deleted: {error}")
        return True

    def _identity(self, version: VersionId, rank: int) -> ImageIdentity:
        return ImageIdentity(
            run_id=self._run_id,
            topology=self._topology,
            version=version,
            rank=rank,
            world_size=self._environment.world_size,
            node=0,
            incarnation=os.getpid(),
        )

    def _catch_signals(self) -> None:
        """SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop at the next boundary."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            before = signal.getsignal(number)
            if before not in (signal.SIG_DFL, signal.default_int_handler):
                continue  # the script has its own

            def ask(number: int, frame: FrameType | None, before: Any = before) -> None:
                self.stop_asked = True
                signal.signal(number, before)

            signal.signal(number, ask)


def _let_go(path: str) -> None:
    fd = _locks.pop(path, -1)
    if fd >= 0:
        os.close(fd)


def _let_go_of_all() -> None:
    _holders.clear()
    for path in list(_locks):
        _let_go(path)


# A loader's workers may live on for a while when this process is killed.
os.register_at_fork(after_in_child=_let_go_of_all)


def _only_imported_text(newest: DurableVersion) -> str:
    return (
        f"step {newest.step} can't be put back, and all that is left to go on from is the imported "
        f"model: to begin anew with that, move {newest.path} away and run the script again"
    )
