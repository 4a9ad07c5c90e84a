"""The agent's machine: what one node's ranks should be doing, and what the coordinator is told.

Theory of operation:

* The newest directive is what is *wanted*; after every input :meth:`NodeMember._pursue` takes the
  next step from what *is* to what is wanted.  Within one epoch wishes only go forward (run, hold,
  stop at a boundary, stop, finish), so a late or repeated directive can't undo a newer one, and a
  directive of an epoch before the wanted one is dropped.
* Ranks start only for a formation that names this agent's own incarnation: after a restart the
  agent remembers nothing, and must not take orders that were meant for the agent before it.
* A rank failure starts the finishing of captures at once.  The surviving ranks are left alone until
  the coordinator orders a stop: they wait in a collective and do no harm.
* The agent has no hard state.  Its incarnation is new at each start; ``sequence`` orders its
  reports.

Only :meth:`NodeMember._enter` changes the phase, along ``TRANSITIONS``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType

from ftrain.comms.errors import LocalProtocolError
from ftrain.comms.protocol.effects import (
    Exit,
    FinishCaptures,
    FlushVersion,
    ForkRanks,
    HoldRanks,
    KillRanks,
    ReleaseRanks,
    UpdatePeers,
)
from ftrain.comms.protocol.messages import (
    Directive,
    Formation,
    Held,
    HeldParity,
    NodeReport,
    NodeState,
    Order,
    Phases,
    RankFailure,
    VersionId,
)
from ftrain.comms.protocol.ready import Address, Ready

_WITHDRAWN_MAX = 8  # versions named in a report
_PREPARED_KEPT = 8  # versions named in a report as written under the present fence


class Phase(StrEnum):
    """What the node is busy with."""

    IDLE = "idle"  # no rank was ever started by this agent
    FORKING = "forking"
    STARTING = "starting"  # the ranks are there; not every one has done a step
    RUNNING = "running"
    FINISHING = "finishing"  # captures are being finished
    BROKEN = "broken"  # captures are finished; waiting to be told to stop
    KILLING = "killing"  # the ranks are being ended
    STOPPED = "stopped"
    DONE = "done"
    EXITING = "exiting"


class Event(StrEnum):
    """What changes the phase."""

    RUN = "told to run"
    FORKED = "ranks are forked"
    STEPPED = "every rank did a step"
    ENDED = "every rank ended by itself"
    FAILED = "a rank failed"
    STOP = "told to stop"
    CAPTURED = "captures are finished"
    KILL = "told to end the ranks"
    GONE = "no rank is left"
    LEAVE = "told to leave"


def _alive(**others: Phase) -> dict[Event, Phase]:
    """The row of a phase in which ranks are alive."""
    row = {
        Event.FAILED: Phase.FINISHING,
        Event.STOP: Phase.FINISHING,
        Event.KILL: Phase.KILLING,
        Event.ENDED: Phase.DONE,
    }
    return row | {Event[name]: phase for name, phase in others.items()}


TRANSITIONS: Mapping[Phase, Mapping[Event, Phase]] = MappingProxyType(
    {
        Phase.IDLE: {
            Event.RUN: Phase.FORKING,
            Event.STOP: Phase.STOPPED,
            Event.LEAVE: Phase.EXITING,
        },
        Phase.FORKING: {
            Event.FORKED: Phase.STARTING,
            Event.FAILED: Phase.FINISHING,
            Event.STOP: Phase.FINISHING,
            Event.KILL: Phase.KILLING,
        },
        Phase.STARTING: _alive(STEPPED=Phase.RUNNING),
        Phase.RUNNING: _alive(),
        Phase.FINISHING: {Event.CAPTURED: Phase.BROKEN, Event.KILL: Phase.KILLING},
        Phase.BROKEN: {Event.KILL: Phase.KILLING},
        Phase.KILLING: {Event.GONE: Phase.STOPPED},
        Phase.STOPPED: {
            Event.RUN: Phase.FORKING,
            Event.STOP: Phase.STOPPED,
            Event.LEAVE: Phase.EXITING,
        },
        Phase.DONE: {Event.KILL: Phase.KILLING, Event.LEAVE: Phase.EXITING},
        Phase.EXITING: {},
    }
)

_REPORTED: Mapping[Phase, NodeState] = MappingProxyType(
    {
        Phase.IDLE: NodeState.IDLE,
        Phase.FORKING: NodeState.STARTING,
        Phase.STARTING: NodeState.STARTING,
        Phase.RUNNING: NodeState.RUNNING,
        Phase.STOPPED: NodeState.STOPPED,
        Phase.DONE: NodeState.DONE,
        Phase.EXITING: NodeState.STOPPED,
    }
)

# Within one epoch a directive counts only if it is no step back from the wanted one.
_RANK_OF_ORDER: Mapping[Order, int] = MappingProxyType(
    {Order.RUN: 0, Order.PAUSE: 1, Order.STOP_AT: 2, Order.STOP: 3, Order.FINISH: 4}
)
# What a report says of an epoch in which nothing has happened yet.
_NOTHING_YET: Mapping[str, object] = MappingProxyType(
    {
        "failures": (),
        "phases": Phases(),
        "step": 0,
        "step_max": 0,
        "kept_max": 0,
        "pausing": False,
        "boundaries": (),
        "stopped_at": -1,
    }
)
_AT_WORK = (Phase.STARTING, Phase.RUNNING)
_AT_REST = (Phase.IDLE, Phase.STOPPED)


class NodeMember:
    """The machine of node ``node``'s agent, in its process number ``incarnation``.

    ``incarnation`` must be greater than that of any agent of this node before, within the run.
    Receives :class:`Directive`; sends its :class:`NodeReport` to ``"coordinator"``: at once when
    something happened, with the next tick when only progress did, else every
    ``report_every_ticks``.  Its other inputs are the engine's answers; each names the epoch that it
    is about, and is dropped when that has passed.
    """

    def __init__(
        self,
        *,
        node: int,
        incarnation: int,
        local_world: int,
        host: str,
        rack: str = "",
        report_every_ticks: int = 5,
    ) -> None:
        self._report = NodeReport(
            node, incarnation, 0, 0, NodeState.IDLE, local_world, host, smp_address="", rack=rack
        )
        self._report_every_ticks = report_every_ticks
        self._ticks = 0
        self._phase = Phase.IDLE
        self._epoch = 0
        self._wanted = Directive(0, Order.RUN)
        self._formation: Formation | None = None
        self._holding = False  # HoldRanks was asked for in this epoch
        self._stop_step = -1  # ReleaseRanks was asked for, with this boundary
        # Target, fence and attempt: asked of the engine and not answered yet; to be asked then.
        self._flushing: tuple[VersionId, int, int] | None = None
        self._flush_next: tuple[VersionId, int, int] | None = None
        self._urgent = True
        self._changed = True
        self._messages: list[tuple[Address, object]] = []
        self._effects: list[object] = []

    @property
    def phase(self) -> Phase:
        """What the node is busy with."""
        return self._phase

    @property
    def epoch(self) -> int:
        """The epoch that the ranks belong to, or that was stopped last."""
        return self._epoch

    @property
    def report(self) -> NodeReport:
        """The report as of now."""
        return self._report

    # ------------------------------------------------------------------ the machine

    def tick(self) -> None:
        """One unit of logical time has passed."""
        self._ticks += 1
        if self._changed or self._ticks >= self._report_every_ticks:
            self._urgent = True

    def receive(self, message: object) -> None:
        """The coordinator's wish."""
        if not isinstance(message, Directive) or not self._accepts(message):
            return
        if message.formation is not None and message.epoch == self._epoch:
            self._update_peers(message.formation)
        if message.order is Order.FLUSH:
            self._ask_flush(message)
        else:
            self._wanted = message
        self._pursue()

    def ready(self) -> Ready[None]:
        """What has to be done now."""
        if self._urgent:
            self._urgent = self._changed = False
            self._ticks = 0
            self._report = replace(self._report, sequence=self._report.sequence + 1)
            self._messages.append(("coordinator", self._report))
        ready: Ready[None] = Ready(None, tuple(self._messages), tuple(self._effects))
        self._messages, self._effects = [], []
        return ready

    def _accepts(self, directive: Directive) -> bool:
        """The one place where stale directives, and those for another incarnation, are dropped."""
        if directive.epoch < max(self._epoch, self._wanted.epoch):
            return False
        if directive.order in (Order.WAIT, Order.FLUSH):
            return directive.order is Order.FLUSH
        if directive.order is Order.RUN and not self._is_mine(directive.formation):
            return False
        if directive.epoch > self._wanted.epoch:
            return True
        return _RANK_OF_ORDER[directive.order] >= _RANK_OF_ORDER[self._wanted.order]

    def _is_mine(self, formation: Formation | None) -> bool:
        me = (self._report.node, self._report.incarnation)
        return formation is not None and me in {(p.node, p.incarnation) for p in formation.places}

    # ------------------------------------------------------------------ from what is to the wanted

    def _pursue(self) -> None:
        """Take every step towards the wanted directive that can be taken now."""
        wanted = self._wanted
        if wanted.order is Order.FINISH:
            self._leave(wanted.exit_code)
        elif wanted.epoch > self._epoch and self._phase not in _AT_REST:
            self._stop()  # whatever is wanted of a newer epoch, the old ranks go first
        elif wanted.order is Order.RUN and wanted.epoch > self._epoch:
            self._run(wanted)
        elif wanted.order is Order.STOP:
            self._stop()
        elif self._phase in _AT_WORK and wanted.epoch == self._epoch:
            if wanted.order in (Order.PAUSE, Order.STOP_AT) and not self._holding:
                self._holding = True
                self._effects.append(HoldRanks(self._epoch))
            if wanted.order is Order.STOP_AT and self._stop_step < 0:
                self._stop_step = wanted.stop_step
                self._effects.append(ReleaseRanks(self._epoch, wanted.stop_step))

    def _run(self, wanted: Directive) -> None:
        assert wanted.formation is not None  # _accepts has seen to it
        self._epoch = wanted.epoch
        self._formation = wanted.formation
        self._holding, self._stop_step = False, -1
        version = wanted.formation.restore.version
        step = 0 if version is None else version.step
        self._tell(epoch=self._epoch, **_NOTHING_YET)
        # What the epoch before left is known; of many ranks it would be most of each report.
        self._tell(step=step, step_max=step, kept_max=step, held=(), parity=())
        self._effects.append(ForkRanks(wanted.formation))
        self._enter(Event.RUN)

    def _stop(self) -> None:
        if self._phase in _AT_REST:
            if self._wanted.epoch > self._epoch or self._phase is Phase.IDLE:
                # Nothing runs: promise that nothing of this epoch ever will.
                self._epoch = max(self._epoch, self._wanted.epoch)
                self._tell(epoch=self._epoch, **_NOTHING_YET)
                self._enter(Event.STOP)
        elif self._phase in (Phase.BROKEN, Phase.DONE):
            self._kill()
        elif self._phase not in (Phase.FINISHING, Phase.KILLING, Phase.EXITING):
            self._finish_captures()
            self._enter(Event.STOP)

    def _kill(self) -> None:
        self._effects.append(KillRanks(self._epoch))
        self._enter(Event.KILL)

    def _leave(self, code: int) -> None:
        if self._phase in (Phase.IDLE, Phase.STOPPED, Phase.DONE):
            self._effects.append(Exit(code))
            self._enter(Event.LEAVE)
        elif self._phase not in (Phase.KILLING, Phase.EXITING):
            self._kill()

    def _finish_captures(self) -> None:
        dead = tuple(sorted({f.rank for f in self._report.failures}))
        self._effects.append(FinishCaptures(self._epoch, dead))

    def _update_peers(self, formation: Formation) -> None:
        if self._phase in (Phase.FORKING, *_AT_WORK) and formation != self._formation:
            self._formation = formation
            self._effects.append(UpdatePeers(formation))

    def _enter(self, event: Event) -> None:
        try:
            self._phase = TRANSITIONS[self._phase][event]
        except KeyError:
            raise LocalProtocolError(
                f"node: {event.value!r} can't happen while {self._phase.value}: a bug in ftrain"
            ) from None
        self._tell(state=_REPORTED.get(self._phase, self._report.state))
        self._urgent = True

    def _tell(self, **changes: object) -> None:
        """Change the report; news that can't wait for the next tick also set ``_urgent``."""
        if any(getattr(self._report, name) != value for name, value in changes.items()):
            self._report = replace(self._report, **changes)  # type: ignore[arg-type]
            self._changed = True

    def _tell_now(self, **changes: object) -> None:
        self._tell(**changes)
        self._urgent = self._urgent or self._changed

    # ------------------------------------------------------------------ the engine's answers

    def ranks_forked(self, epoch: int) -> None:
        """Every local rank has a process."""
        if epoch == self._epoch and self._phase is Phase.FORKING:
            self._enter(Event.FORKED)
            self._pursue()

    def ranks_stepped(self, epoch: int, phases: Phases) -> None:
        """Every local rank completed its first step; ``phases`` says when what happened."""
        if epoch == self._epoch and self._phase in (Phase.FORKING, Phase.STARTING):
            self.ranks_forked(epoch)  # steps are proof enough
            self._tell(phases=phases)
            self._enter(Event.STEPPED)

    def rank_failed(self, epoch: int, failure: RankFailure) -> None:
        """A local rank died, hung or could not be forked; not one that ``KillRanks`` ended."""
        if epoch != self._epoch or self._phase in (*_AT_REST, Phase.KILLING, Phase.EXITING):
            return
        if any(f.rank == failure.rank for f in self._report.failures):
            return
        self._tell_now(failures=(*self._report.failures, failure))
        if self._phase in (Phase.FORKING, *_AT_WORK):
            self._finish_captures()
            self._enter(Event.FAILED)

    def captures_finished(
        self, epoch: int, held: Sequence[Held], parity: Sequence[HeldParity] = ()
    ) -> None:
        """No capture is pending that could still be finished."""
        if epoch != self._epoch or self._phase is not Phase.FINISHING:
            return
        self._tell_now(held=tuple(held), parity=tuple(parity))
        self._enter(Event.CAPTURED)
        self._pursue()

    def ranks_gone(
        self, epoch: int, held: Sequence[Held], parity: Sequence[HeldParity] = ()
    ) -> None:
        """No process of any rank is left on this node; that is the final inventory."""
        if epoch != self._epoch or self._phase is not Phase.KILLING:
            return
        self._tell_now(held=tuple(held), parity=tuple(parity))
        self._enter(Event.GONE)
        self._pursue()

    def ranks_done(self, epoch: int, stopped_at: int = -1) -> None:
        """Every local rank ended with code 0: by itself (-1), or at boundary ``stopped_at``."""
        if epoch == self._epoch and self._phase in (Phase.FORKING, *_AT_WORK):
            self.ranks_forked(epoch)  # an end is proof enough
            self._tell(stopped_at=stopped_at)
            self._enter(Event.ENDED)
            self._pursue()

    def holding(self, epoch: int, boundaries: Sequence[int]) -> None:
        """The ranks were told to hold, and then hold, or will hold, at these boundaries."""
        if epoch == self._epoch and self._phase in _AT_WORK and self._holding:
            self._tell_now(pausing=True, boundaries=tuple(boundaries))

    def progress(
        self,
        step: int,
        step_max: int,
        kept_max: int,
        committed: VersionId | None,
        loss: float,
        step_s: float,
    ) -> None:
        """How far the ranks are: lowest and highest boundary reached, highest one whose version is
        to be kept, newest committed version."""
        self._tell(committed=committed)
        if self._phase not in _AT_REST:  # else they are of ranks that are gone
            self._tell(step=step, step_max=step_max, kept_max=kept_max, loss=loss, step_s=step_s)

    def smp(self, address: str) -> None:
        """The snapshot manager's data address; empty while it is down."""
        self._tell_now(smp_address=address)

    def held(self, held: Sequence[Held], parity: Sequence[HeldParity] = ()) -> None:
        """What the snapshot manager holds, told while no rank runs."""
        if self._phase in _AT_REST:
            self._tell_now(held=tuple(held), parity=tuple(parity))

    def protected(self, version: VersionId, epoch: int) -> None:
        """Every node of ``epoch`` has its parity of a version."""
        self._tell(protected=version, protected_in=epoch)

    def withdrawn(self, version: VersionId) -> None:
        """A rank here found that it had captured ``version`` wrongly; its files are no good."""
        prepared = tuple(found for found in self._report.prepared if found != version)
        withdrawn = (*self._report.withdrawn, version)[-_WITHDRAWN_MAX:]
        self._tell_now(prepared=prepared, withdrawn=withdrawn)

    def signal(self, name: str) -> None:
        """This agent received a signal that asks for a graceful stop."""
        if name not in self._report.signals:
            self._tell_now(signals=(*self._report.signals, name))

    # ------------------------------------------------------------------ flushes

    def _ask_flush(self, directive: Directive) -> None:
        if directive.flush is None or self._phase is Phase.EXITING:
            return
        order = (directive.flush, directive.fence, directive.flush_attempt)
        report = self._report
        if order in ((report.flush, report.fence, report.flush_attempt), self._flushing):
            return  # answered, or being done
        self._flush_next = order
        self._next_flush()

    def _next_flush(self) -> None:
        if self._flushing is None and self._flush_next is not None:
            self._flushing, self._flush_next = self._flush_next, None
            target, fence, _ = self._flushing
            self._effects.append(FlushVersion(target, fence))

    def flushed(self, version: VersionId) -> None:
        """The files of ``version`` are written and synced, under the fence that was asked for."""
        if self._flushing is not None:
            fence = self._flushing[1]
            earlier = self._report.prepared if fence == self._report.fence else ()
            prepared = (*(v for v in earlier if v != version), version)[-_PREPARED_KEPT:]
            self._answer_flush(self._flushing, prepared, "")

    def flush_refused(self, why: str, *, write_failed: bool = False) -> None:
        """Nothing was written: passed over, not there, or (``write_failed``) a full disk, …"""
        if self._flushing is not None:
            fence = self._flushing[1]
            earlier = self._report.prepared if fence == self._report.fence else ()
            self._answer_flush(self._flushing, earlier, why, write_failed=write_failed)

    def _answer_flush(
        self,
        order: tuple[VersionId, int, int],
        prepared: tuple[VersionId, ...],
        refused: str,
        *,
        write_failed: bool = False,
    ) -> None:
        self._flushing = None
        target, fence, attempt = order
        self._tell_now(
            flush=target,
            flush_attempt=attempt,
            fence=fence,
            prepared=prepared,
            refused=refused,
            write_failed=write_failed,
        )
        self._next_flush()
