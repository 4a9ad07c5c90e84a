"""One rank's part in a fleet that averages gradients in every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ftrain.checkpoint.tensors import StateTensor
from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
from ftrain.comms.collectives.work import Work
from ftrain.comms.errors import FleetLeftError, FtrainError, PeerLostError, SessionError
from ftrain.comms.fleet.access import Access
from ftrain.comms.fleet.collectives import memory
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.operations import FleetOp
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.ring import Kind
from ftrain.runtime.replicas.buckets import Bucket, make_buckets
from ftrain.runtime.replicas.healing import fetch, find_donors
from ftrain.runtime.replicas.standing import StateServer

_LEAVE_S = 5.0
_HEALINGS_MAX = 20
_MEMBERS, _STEP, _FIRST_FLAG = 0, 1, 2  # words behind the last bucket
_STEP_MODULO = 4096  # so that sums of it are exact in float32


@dataclass(frozen=True, slots=True)
class FleetPlace:
    """Where a rank belongs in a fleet."""

    coordinator: str  # host:port
    run_id: str
    secret: bytes
    group: int  # number of its replica group
    bind: str = "127.0.0.1"
    host: str = ""  # under which others reach this rank; "": as bind
    join_timeout_s: float = 600.0


@dataclass(slots=True)
class Averaging:
    """The average of one step."""

    op: FleetOp
    step: int
    passes: int = 0  # backward passes so far
    ready: dict[int, int] = field(default_factory=dict)  # bucket: gradients that are there
    sent: int = 0  # buckets
    over: bool = False


class FleetMember:
    """Joins the fleet, gets its state, and averages gradients with the others.

    Args:
        parameters: of all models, in an order that is equal everywhere.
        passes: backward passes in a step.
    """

    def __init__(self, place: FleetPlace, parameters: list[torch.Tensor], passes: int = 1) -> None:
        incarnation = time.time_ns()
        self._identity = Identity(place.run_id, "rank", place.group, incarnation)
        self._place = place
        self._passes = passes
        access = Access(self._identity, place.secret, place.bind, place.host)
        self._server = StateServer(access)
        self._fleet = Fleet(
            place.coordinator,
            place.run_id,
            place.secret,
            place.group,
            incarnation,
            bind=place.bind,
            host=place.host,
            state=self._server.address,
        )
        self._buckets = make_buckets(parameters, _FIRST_FLAG)
        self._bucket_of = {
            id(parameter): number
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket.parameters
        }
        self._now: Averaging | None = None
        self._error: FtrainError | None = None
        tensors: list[Any] = [p for bucket in self._buckets for p in bucket.parameters]
        self._hooks = [t.register_post_accumulate_grad_hook(self._grown) for t in tensors]
        self.bytes_healed = 0
        self.members: tuple[int, ...] = ()  # whose gradients were in the newest average
        self.roster: tuple[int, ...] = ()  # who has samples leased in the step
        self._lost: tuple[int, ...] = ()  # positions of those of whom nothing came

    # ------------------------------------------------------------------ coming

    def join(self, step: int, load: Callable[[bytes], tuple[StateTensor, ...]]) -> bool:
        """Come with the state of ``step``; True: it was replaced by the fleet's.

        ``load`` takes everything but tensors, and returns the tensors to be filled.

        Raises FleetLeftError; PeerLostError when the fleet can't be reached.
        """
        self._server.came(step)
        try:
            self._fleet.wait_for_view(self._place.join_timeout_s)
        except TimeoutError as error:
            raise PeerLostError(f"{self._place.coordinator}: {error}") from None
        for _ in range(_HEALINGS_MAX):
            view, places = self._fleet.ring
            op = self._fleet.next_number(0)
            try:
                donors = find_donors(
                    places,
                    self._fleet.place,
                    op,
                    step,
                    self._identity,
                    self._place.secret,
                    goes_on=lambda view=view: self._fleet.view == view,  # type: ignore[misc]
                )
                if donors:
                    tensors = load(donors[0].small)
                    self.bytes_healed = fetch(tensors, donors)
                else:
                    self.members = tuple(place.node for place in places)
                self._server.settle()
                return bool(donors)
            except PeerLostError:
                self._fleet.raise_if_over()
        raise FleetLeftError("the fleet's state could not be had from any of its members")

    # ------------------------------------------------------------------ a step

    def begin(
        self, step: int, tensors: tuple[StateTensor, ...], small: bytes
    ) -> tuple[int, int] | None:
        """A boundary: the next backward's gradients are those of a new average.  Returns this
        group's place among those who have samples leased in the step, and how many they are; None
        while gradients are still being gathered.

        Those are the members of the average before, of which all know the same, and behind them
        who has come since: even if some know already that one of them is lost, and others not,
        nobody's samples are another one's.
        """
        self.raise_if_lost()
        if self._now is not None and not self._now.over:
            return None
        op = self._fleet.open(tag=0)
        self._server.stand(op.op.number, step, tensors, small)
        self._now = Averaging(op, step)
        before = self.members
        self.roster = (*before, *(one for one in self._fleet.members if one not in before))
        return self.roster.index(self._place.group), len(self.roster)

    def take_lost(self) -> tuple[int, ...]:
        """Positions in the newest step's roster of those who are not in its average, once."""
        lost, self._lost = self._lost, ()
        return lost

    def moving(self) -> None:
        """Parameters are about to change."""
        self.raise_if_lost()
        now = self._now
        if now is None or not now.over:
            raise SessionError(
                f"optimizer.step() came after {0 if now is None else now.passes} of "
                f"{self._passes} backward passes: say Session(accumulate=…) how many make a step"
            )
        self._server.move()

    def raise_if_lost(self) -> None:
        """What ended this rank's part in the fleet, not raised inside backward."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Leave in order."""
        for hook in self._hooks:
            hook.remove()
        if self._now is not None and not self._now.over:
            self._fleet.take_back(self._now.op)
        if self._error is None:
            self._fleet.leave(_LEAVE_S)
        else:
            self._fleet.close()
        self._server.close()

    # ------------------------------------------------------------------ inside backward

    def _grown(self, parameter: torch.Tensor) -> None:
        """A parameter's gradient has grown."""
        now = self._now
        if now is None or self._error is not None:
            return
        if now.over:
            self._error = SessionError(
                "backward ran again after the gradients of the step were averaged: say "
                "Session(accumulate=…) how many backward passes make a step"
            )
            return
        if not now.ready:
            at_the_end(self._pass_over)
        bucket = self._bucket_of[id(parameter)]
        now.ready[bucket] = now.ready.get(bucket, 0) + 1
        if now.passes == self._passes - 1:
            self._send_ready(now)

    def _send_ready(self, now: Averaging) -> None:
        """Buckets go in order, so that they mean the same everywhere."""
        while now.sent < len(self._buckets) - 1:  # the last one says what all had
            bucket = self._buckets[now.sent]
            if now.ready.get(now.sent, 0) < len(bucket.parameters):
                return
            self._send(now, bucket)

    def _send(self, now: Averaging, bucket: Bucket) -> None:
        number, now.sent = now.sent, now.sent + 1
        last = bucket is self._buckets[-1]

        def make(rank: int, ranks: int) -> Work:
            bucket.pack()
            if last:
                self._say(now, bucket.words)
            data, size = memory(bucket.flat), bucket.flat.element_size()
            how = Arithmetic(Reduction.SUM, bucket.flat.dtype)
            count = bucket.flat.numel()
            return Work(Kind.ALL_REDUCE, count, size, data, data, how, priority=-number)

        self._fleet.add(now.op, make, last=last)

    def _pass_over(self) -> None:
        """The end of a backward pass."""
        now = self._now
        assert now is not None
        now.passes += 1
        now.ready.clear()
        if now.passes < self._passes or self._error is not None:
            return
        while now.sent < len(self._buckets):  # some parameters may have got no gradient
            self._send(now, self._buckets[now.sent])
        try:
            now.op.handle.wait()
            self._take(now)
        except FtrainError as error:
            self._error = error
        now.over = True

    def _say(self, now: Averaging, words: torch.Tensor) -> None:
        """That this one takes part, in which step, and which parameters have a gradient."""
        flags = [p.grad is not None for bucket in self._buckets for p in bucket.parameters]
        words.copy_(torch.tensor([1, now.step % _STEP_MODULO, *flags]))

    def _take(self, now: Averaging) -> None:
        members, steps, *flags = map(int, self._buckets[-1].words.tolist())
        if steps != members * (now.step % _STEP_MODULO):
            raise SessionError(
                f"the replica groups average gradients of different steps (here {now.step}): every "
                "group has to make as many optimizer steps as the others"
            )
        first = 0
        for bucket in self._buckets:
            count = len(bucket.parameters)
            bucket.unpack(members, [flag > 0 for flag in flags[first : first + count]])
            first += count
        self.members = now.op.handle.members
        self._lost = tuple(n for n, one in enumerate(self.roster) if one not in self.members)


def at_the_end(callback: Callable[[], None]) -> None:
    """Call it once the backward pass that runs now is over, in its thread."""
    engine: Any = torch.autograd.Variable
    engine._execution_engine.queue_callback(callback)


def parameters_of(optimizers: Mapping[str, torch.optim.Optimizer]) -> list[torch.Tensor]:
    """What the optimizers change, once each."""
    found: dict[int, torch.Tensor] = {}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.setdefault(id(parameter), parameter)
    return list(found.values())
