"""The one object a training script adds: it resumes, captures, and ends the run in good order."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ftrain.checkpoint.capture import CaptureStatistics
from ftrain.checkpoint.codec import decode_tree, encode_tree
from ftrain.checkpoint.gpu_streams import in_cuda_graph
from ftrain.checkpoint.tensors import Changes, StateTensor
from ftrain.comms.environment import RankEnvironment, rank_environment
from ftrain.comms.errors import SessionError
from ftrain.comms.protocol.phases import Phase
from ftrain.comms.telemetry import TelemetryPage, Word
from ftrain.recovery.faults import poll_fault
from ftrain.runtime import ddp
from ftrain.runtime.data import open_data
from ftrain.runtime.heartbeat import Heartbeat, collectives_enqueued
from ftrain.runtime.imported import IMPORTED, telling
from ftrain.runtime.keeper import Keeper, open_keeper
from ftrain.runtime.loss_watch import LossWatch
from ftrain.runtime.random_state import (
    newcomer_random_state,
    random_state,
    set_random_state,
)
from ftrain.runtime.records import StepRecords, plain
from ftrain.runtime.replicas.member import FleetMember, parameters_of
from ftrain.runtime.replicas.place import fleet_place
from ftrain.runtime.state import TrainingState

_current: weakref.ref[Session] | None = None
_unsaved = ""  # why the end of the run is not durable; may outlive the Session
_UNSTEPPED_WARNING = 100  # boundaries without any optimizer.step before we say so


class Session:
    """Makes a training script fault-tolerant.

    ::

        session = ftrain.Session(model=model, optimizer=optimizer, data=loader, total_steps=1000)
        for step, batch in session.steps():
            loss = model(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)

    Under ``ftrain launch`` every version is kept in memory outside this process; alone or under
    plain torchrun only durable files are written.  State is put back in the constructor, so
    construct it after the model, the optimizer and the process group.

    Args:
        model: a module, or several by name.
        optimizer: an optimizer, or several (a sequence or by name).
        scheduler: learning-rate scheduler(s), anything with ``state_dict``/``load_state_dict``.
        scaler: a ``torch.amp.GradScaler``; its skipped steps count as steps.
        data: what ``steps()`` draws batches from: a DataLoader, anything with its own state, any
            iterable, or None.
        total_steps: where ``steps()`` ends, across epochs; None: when the data's first epoch ends.
        seed: for the order of the data and its workers; default: torch's initial seed.
        replicas: "sync": under ``ftrain launch --replica-groups`` gradients are averaged over all
            replica groups in every step, at the end of backward; groups may be lost and come back.
            The samples of an epoch are dealt out to the groups.
        accumulate: backward passes in one step of the optimizer, for ``replicas``.
        objects: anything else with state, by name; modules (an EMA copy) are treated as models.

    Raises:
        SessionError: the script uses it wrongly (an object without state, two Sessions, …).
        StateError: the run directory holds another model's state.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module | Mapping[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer
        | Sequence[torch.optim.Optimizer]
        | Mapping[str, torch.optim.Optimizer],
        scheduler: Any = None,
        scaler: Any = None,
        data: Any = None,
        total_steps: int | None = None,
        seed: int | None = None,
        replicas: str | None = None,
        accumulate: int = 1,
        **objects: Any,
    ) -> None:
        _claim(self)
        self._environment: RankEnvironment = rank_environment()
        self._page = _telemetry_page(self._environment, total_steps or 0)
        self._heartbeat: Heartbeat | None = None
        self._phase(Phase.RESTORING)
        models = _named(model, "model", torch.nn.Module)
        models |= {name: m for name, m in objects.items() if isinstance(m, torch.nn.Module)}
        optimizers = _named(optimizer, "optimizer", torch.optim.Optimizer)
        others = {"scheduler": scheduler, "scaler": scaler, **objects}
        self._state = TrainingState(
            models,
            optimizers,
            {n: o for n, o in others.items() if o is not None and n not in models},
            self._environment.rank,
            self._environment.world_size,
        )
        self._data = open_data(
            data,
            torch.initial_seed() % 2**63 if seed is None else seed,
            os.getpid(),
            rank=self._environment.rank,
            world_size=self._environment.world_size,
        )
        self._total_steps = total_steps
        self._step = 0
        self._stepped = False  # an optimizer was stepped since the last boundary
        self._replays = False  # its step is part of a CUDA graph, and calls no hook
        self._optimizer_steps = 0
        self._steps_done = 0  # by this process
        self._iterating = False
        # The newest version, while the keeper has not taken it: (step, tensors, small, collectives)
        self._pending: tuple[int, tuple[StateTensor, ...], bytes, int] | None = None
        self._skipping = False  # a deliberate fault: this step leaves its all-reduce out
        self._logged: dict[str, Any] = {}
        self._random: dict[str, Any] | None = None
        self._bucket_orders: list[list[int] | None] = []  # of each DDP module; empty: not known
        self._unsettled: dict[int, Any] | None = None  # DDP modules that have none yet
        self._watch = LossWatch.of(self._environment)
        self._boundary_state: tuple[tuple[StateTensor, ...], bytes] | None = None
        self._keeper: Keeper = open_keeper(self._environment, self._note)
        self._records = StepRecords(
            self._keeper.run_dir,
            self._environment.rank,
            self._keeper.epoch,
            self._keeper.events_bytes_max,
        )
        self._restore()
        self._members: tuple[int, ...] = ()  # of the newest average, as a newcomer is told
        self._member: FleetMember | None = None
        self._member = self._join(replicas, accumulate)
        self._hook(scaler)
        if self._page is not None:
            self._heartbeat = Heartbeat(self._page)

    # ---- what scripts use

    def steps(self) -> Iterator[tuple[int, Any]]:
        """Yield ``(step, batch)`` from where the run stands to ``total_steps`` (0-based).

        Resuming the iterator is the boundary: everything the loop's body did belongs to the step.
        A ``break`` leaves its step undone: of the versions before it the newest that was kept is
        the run's last one.
        """
        if self._iterating:
            raise SessionError("session.steps() is already being iterated: use one loop")
        self._iterating = True
        try:
            if self._random is not None:
                set_random_state(self._random)
                self._random = None
            else:
                self._capture()
                self._keeper.expect(self._state.expected())
            while self._total_steps is None or self._step < self._total_steps:
                self._phase(Phase.BOUNDARY)
                self._end_if_asked()
                self._begin_average()
                try:
                    batch = self._data.next()
                except StopIteration:
                    break
                if self._total_steps is None and self._data.epoch > 0:
                    break
                began = self._begin_step()
                yield self._step, batch
                self._boundary(began)
            if self._steps_done == self._step < _UNSTEPPED_WARNING:
                self._doubt()
            self._keep_last()
            self._finish()
            self._phase(Phase.FINISHED)
        except GeneratorExit:  # a break, or an exception in the body: who knows what it changed
            if not sys.is_finalizing():  # threads run no more
                self._finish()
            raise
        finally:
            self._iterating = False
            if self._page is not None and self._page[Word.PHASE] != Phase.STOPPED:
                self._phase(Phase.FINISHED)

    def log(self, **values: Any) -> None:
        """Record values of this step (numbers or tensors); ``loss`` is shown while training, and if
        it is not finite soon after a restore, an older version is tried."""
        self._logged.update(values)

    def save(self) -> None:
        """Ask for a durable version soon: alone of the next boundary, in a group of one that all
        ranks agree on, about a second later at most; all ranks have to ask, in the same step."""
        self._keeper.save()
        self._set(Word.SAVE_STEP, self._step + 2)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Declare work that may take long ("evaluate"): slowness inside it is no sign of a hang."""
        before = self._page[Word.PHASE] if self._page is not None else 0
        self._phase(Phase.DECLARED)
        self._records.note(f"phase {name} begins")
        try:
            yield
        finally:
            self._phase(Phase(before))

    @property
    def stopping(self) -> bool:
        """Whether a graceful stop was asked for; the run ends at one of the next boundaries."""
        page = self._page
        told = page is not None and bool(page[Word.PAUSE] or page[Word.STOP_AT])
        return told or self._keeper.stop_asked

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self._step

    @property
    def replica_groups(self) -> tuple[int, ...]:
        """The replica groups whose gradients were in the newest average; alone: none."""
        return self._member.members if self._member is not None else ()

    def on_membership_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback()`` once per membership in which this process trains: before its first
        step when the run was resumed after a change."""
        if self._keeper.resumed:
            callback()

    def statistics(self) -> CaptureStatistics:
        """What capturing cost this process so far."""
        return self._keeper.statistics()

    # ---- the boundary

    def _begin_step(self) -> int:
        now = time.monotonic_ns()
        self._set(Word.STEP_BEGAN_NS, now)
        self._phase(Phase.STEP)
        self._stepped = self._replays
        if self._fault(Phase.STEP):
            for module in self._ddp_modules():
                module.require_backward_grad_sync = False  # until the boundary
            self._skipping = True
        return now

    def _boundary(self, began_ns: int) -> None:
        now = time.monotonic_ns()
        self._phase(Phase.BOUNDARY)
        self._fault(Phase.BOUNDARY)
        if self._skipping:
            for module in self._ddp_modules():
                module.require_backward_grad_sync = True
            self._skipping = False
        self._step += 1
        self._steps_done += 1
        if self._stepped:
            self._settle_buckets()
        if self._member is not None and (lost := self._member.take_lost()):
            self._data.give_back(lost)
        collectives = collectives_enqueued()
        seconds = (now - began_ns) / 1e9
        loss = self._take_loss()
        self._records.step(self._step - 1, now, seconds, self._data.ledger(), self._logged)
        if loss is not None:
            self._watch.see(self._step, loss)
        if self._stepped:
            self._capture(collectives)  # before anybody can see that the boundary was reached
        if self._page is not None:
            self._page[Word.STEP] = self._step
            self._page[Word.STEPS_DONE] += 1
            self._page.record_boundary(self._step, collectives, now)
            if not self._page[Word.FIRST_STEP_NS]:
                self._page[Word.FIRST_STEP_NS] = now
            self._page[Word.STEP_MEDIAN_NS] = int(self._records.median_s * 1e9)
            if "loss" in self._logged:
                self._page.loss = loss or 0.0
        self._logged = {}
        if self._steps_done == _UNSTEPPED_WARNING:
            self._doubt()

    def _take_loss(self) -> float | None:
        """This step's loss, read once for all who want it: a GPU is waited for, as ever."""
        if "loss" not in self._logged:
            return None
        loss = self._logged["loss"] = plain(self._logged["loss"])
        return float(loss) if isinstance(loss, int | float) else None

    def _settle_buckets(self) -> None:
        """Of modules whose layout is not known yet: some have their first backward later."""
        if self._unsettled is None:
            modules = self._ddp_modules()
            self._bucket_orders = self._bucket_orders or [None for _ in modules]
            self._unsettled = {
                number: module
                for number, module in enumerate(modules)
                if self._bucket_orders[number] is None and ddp.will_rebuild(module)
            }
        for number, module in list(self._unsettled.items()):
            if (order := ddp.settle_buckets(module)) is not None:
                self._bucket_orders[number] = order
                del self._unsettled[number]

    def _finish(self) -> None:
        global _unsaved
        if self._member is not None:
            self._member.close()
            self._member = None
        self._keeper.finish()
        _unsaved = self._keeper.unsaved

    def _doubt(self) -> None:
        """Say so when the script does not seem to step what it registered."""
        if self._optimizer_steps == 0 and self._steps_done and self._environment.rank == 0:
            self._note(
                f"{self._steps_done} steps went by and no registered optimizer was stepped: "
                "nothing of them was captured; give Session the optimizer whose step() the script "
                "calls"
            )

    def _capture(self, collectives: int = -1) -> None:
        tensors, small = self._describe()
        self._pending = (self._step, tensors, small, collectives)
        if self._keeper.capture(*self._pending, last=self._finished):
            self._set(Word.KEPT_STEP, self._step)
            self._pending = None

    def _describe(self) -> tuple[tuple[StateTensor, ...], bytes]:
        """The state at this boundary: the tensors, and everything else."""
        layout = self._state.layout()
        small = {
            "state": self._state.small(layout),
            "random": random_state(),
            "data": self._data.state(),
            "buckets": self._bucket_orders,
            "step": self._step,
            "odd_loss": self._watch.odd(self._step),
            "world": [self._environment.rank, self._environment.world_size],
            "members": list(self._member.members) if self._member is not None else [],
        }
        self._boundary_state = layout.tensors, encode_tree(small)
        return self._boundary_state

    def _join(self, replicas: str | None, accumulate: int) -> FleetMember | None:
        """Join the fleet, and take its state, if there is one."""
        place = fleet_place(self._environment, replicas, accumulate)
        if place is None:
            return None
        member = FleetMember(place, parameters_of(self._state.optimizers), accumulate)
        came_at = self._step
        if member.join(self._step, self._take_from_fleet):
            member.members = self._members
            self._note(
                f"joined the fleet at step {self._step} (came with step {came_at}; "
                f"{member.bytes_healed / 1e6:.1f} MB from the others)"
            )
        self._set(Word.STEP, self._step)
        return member

    def _take_from_fleet(self, encoded: bytes) -> tuple[StateTensor, ...]:
        small = decode_tree(encoded)
        self._state.load_small(small["state"])
        self._step = small["step"]
        self._data.load(small["data"])
        self._members = tuple(small["members"])
        group = self._environment.context.config.fleet.group if self._environment.context else 0
        self._random = newcomer_random_state(small["random"], group)
        self._watch.restored(self._step, odd=small.get("odd_loss", False))
        return self._state.layout().tensors

    def _begin_average(self) -> None:
        """A boundary: the samples of the next step are dealt out among who is in the fleet now."""
        if self._member is None:
            return
        tensors, small = self._boundary_state or self._describe()
        position = self._member.begin(self._step, tensors, small)
        if position is not None:
            rank, world = position
            self._data.deal(world, rank)

    def _keep_last(self) -> None:
        """The run ends: have the newest version kept, if it was not and still can be.

        Code of the script that ran since its boundary may have changed what no optimizer owns.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        lazy = all(tensor.changes is Changes.IN_STEP for tensor in pending[1])
        if lazy or pending[0] == self._step:
            self._keeper.capture(*pending, last=True)
            self._set(Word.KEPT_STEP, pending[0])

    @property
    def _finished(self) -> bool:
        return self._total_steps is not None and self._step >= self._total_steps

    def _end_if_asked(self) -> None:
        """Hold here while a stop is agreed on, and end the script at the agreed boundary."""
        page = self._page
        if page is None:
            if self._keeper.stop_here(self._step):
                self._keeper.stop(self._step)
            return
        if not page[Word.PAUSE] and not page[Word.STOP_AT]:
            return
        self._phase(Phase.HOLDING)
        page[Word.HELD_AT] = self._step + 1
        while page[Word.PAUSE] and not page[Word.STOP_AT]:
            time.sleep(0.001)  # a word in shared memory has no event
        page[Word.HELD_AT] = 0
        if page[Word.STOP_AT] == self._step + 1:
            self._keep_last()
            self._finish()
            self._phase(Phase.STOPPED)
            raise SystemExit(0)
        self._phase(Phase.BOUNDARY)

    # ---- setting up

    def _restore(self) -> None:
        self._fault(Phase.RESTORING)
        small = self._keeper.restore(self._state)
        if small is not None and IMPORTED in small:
            if self._environment.rank == 0:
                self._note(telling(small[IMPORTED]))
        elif small is not None:
            self._step = small["step"]
            random, rank = small["random"], self._environment.rank
            joined = rank >= small["world"][1]
            self._random = newcomer_random_state(random, rank) if joined else random
            self._data.load(small["data"])
            self._watch.restored(self._step, odd=small.get("odd_loss", False))
            orders = small["buckets"]
            modules = self._ddp_modules()
            here = [self._environment.rank, self._environment.world_size]
            if small["world"] != here:
                orders = None  # they are of another group
            if orders is not None and len(orders) == len(modules):
                self._bucket_orders = orders
                for module, order in zip(modules, orders, strict=True):
                    if order is not None and not ddp.restore_buckets(module, order):
                        self._note(
                            "DDP's bucket layout of before can't be put back (another model, a "
                            "communication hook or mixed precision): with three or more ranks the "
                            "next step's sums may differ in their last bits"
                        )
        self._set(Word.STEP, self._step)
        self._set(Word.KEPT_STEP, self._step)
        self._set(Word.RESTORED_NS, time.monotonic_ns())

    def _ddp_modules(self) -> list[Any]:
        if not ddp.supported():
            return []
        return list(ddp.modules_of(list(self._state.models.values())))

    def _hook(self, scaler: Any) -> None:
        for optimizer in self._state.optimizers.values():
            optimizer.register_step_pre_hook(self._before_optimizer)
            optimizer.register_step_post_hook(self._after_optimizer)
        if scaler is not None:
            attempt = scaler.step

            def step(*args: Any, **kwargs: Any) -> Any:
                self._stepped = True  # also when it finds an inf and skips the optimizer
                self._optimizer_steps += 1
                return attempt(*args, **kwargs)

            scaler.step = step

    def _before_optimizer(self, *_: Any) -> None:
        self._pending = self._boundary_state = None
        if self._member is not None:
            self._member.moving()
        self._replays = self._replays or in_cuda_graph()
        self._keeper.barrier()
        self._phase(Phase.OPTIMIZER)
        self._fault(Phase.OPTIMIZER)

    def _after_optimizer(self, *_: Any) -> None:
        self._stepped = True
        self._optimizer_steps += 1
        self._set(Word.OPTIMIZER_STEPS, self._optimizer_steps)
        self._phase(Phase.STEP)
        if self._page is not None:
            statistics = self._keeper.statistics()
            self._page[Word.BARRIER_NS] = statistics.barrier_ns
            self._page[Word.CAPTURE_NS] = statistics.copy_ns + statistics.hash_ns
            self._page[Word.CAPTURE_BYTES] = statistics.bytes_copied
            self._page[Word.CAPTURES_SKIPPED] = statistics.skipped
            self._page[Word.CAPTURED_STEP] = statistics.captured_step + 1

    def _fault(self, phase: Phase) -> bool:
        """Commit the deliberate fault that is due here; True: leave this step's all-reduce out."""
        return self._page is not None and poll_fault(self._page, self._step, phase) is not None

    def _set(self, word: Word, value: int) -> None:
        if self._page is not None:
            self._page[word] = value

    def _phase(self, phase: Phase) -> None:
        if self._page is not None:
            self._page.set_phase(phase, time.monotonic_ns())

    def _note(self, text: str) -> None:
        sys.stderr.write(f"ftrain: {text}\n")


def _telemetry_page(environment: RankEnvironment, total_steps: int) -> TelemetryPage | None:
    """Where this rank is watched from, under ``ftrain launch``."""
    context = environment.context
    if context is None or context.telemetry_fd < 0:
        return None
    page = TelemetryPage(context.telemetry_fd)
    page[Word.SESSION_NS] = page[Word.FORMED_NS] = time.monotonic_ns()
    page[Word.TOTAL_STEPS] = total_steps
    return page


def _claim(session: Session) -> None:
    global _current
    if _current is not None and _current() is not None:
        raise SessionError(
            "this process already has a Session: register everything in one, as further arguments"
        )
    _current = weakref.ref(session)


def _named(value: Any, name: str, kind: type) -> dict[str, Any]:
    """One object, a sequence or a mapping of them, by name."""
    if isinstance(value, Mapping):
        named = {f"{name}.{key}": entry for key, entry in value.items()}
    elif isinstance(value, Sequence):
        named = {f"{name}{index}": entry for index, entry in enumerate(value)}
    else:
        named = {name: value}
    for key, entry in named.items():
        if not isinstance(entry, kind):
            raise SessionError(
                f"Session({name}=…) got a {type(entry).__name__} for {key!r}, "
                f"expected a torch {kind.__name__}"
            )
    return named


def linger(error: BaseException | None, wait_s: float = 5.0) -> None:
    """Called when the script ends: finish the capture first.

    A rank whose collective broke because a peer died holds the only good copy of what the dead one
    had not captured; it stays until it is told to go, or ``wait_s`` is over.
    """
    session = _current() if _current is not None else None
    if session is None:
        return
    session._keeper.drain()
    if error is not None and peer_failed(error):
        time.sleep(wait_s)  # ends with our SIGKILL: the agent knows of the peer already


def unsaved() -> str:
    """Why the end of the run is not durable, if that is known here; "" otherwise."""
    return _unsaved


def peer_failed(error: BaseException) -> bool:
    """Whether an exception only says that another rank went away."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        mark in text
        for mark in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
    )
