"""The coordinator's machine: who is in, under which epoch, and when the job is over.

One replica group of a fixed number of nodes, and spare ones.  Theory of operation:

* An **epoch** is granted when every seat of the group has a node (``seats``) and no rank is alive.
  It is in ``hard`` before anything is said under it, so no crash has it granted twice (as long as
  the disk takes it).  Who has a seat is a **member**; what the others do is no matter.
* Every node is told its whole :class:`Directive` again until its report shows that it was followed.
  So nothing here depends on a single message arriving, or on one arriving only once.
* What the nodes do is known from their reports alone.  A coordinator that is killed and started
  again waits for the reports, and goes on where the nodes stand; while they all run the epoch in
  ``hard``, nothing happens at all.
* A version is published under the epoch as its **fence**, and no newer epoch is granted before the
  publication is answered.  So no manifest appears under a fence that has passed.
* A failure with no newly committed version since the last formation is one that comes back; more
  than ``max_restarts`` of those in a row end the job, and so does a mistake that no restart mends.
  What the nodes' memory holds is saved first, as at a graceful stop, within ``grace_ticks``.

Only :meth:`Membership._enter` changes the phase, along ``transitions.TRANSITIONS``.
"""

from __future__ import annotations

from dataclasses import replace

from ftrain.comms.protocol import saving
from ftrain.comms.protocol.directives import Outbox, directive_of, for_spares
from ftrain.comms.protocol.effects import Announce, EndJob, Form, Obstacle, Publish
from ftrain.comms.protocol.flush import FlushRound, Wish, due
from ftrain.comms.protocol.messages import (
    Formation,
    NodeGone,
    NodePlace,
    NodeReport,
    NodeState,
    Notice,
    StopRequest,
    VersionId,
)
from ftrain.comms.protocol.ready import Address, Ready
from ftrain.comms.protocol.records import (
    EXIT_FAILED,
    EXIT_FORCED,
    EXIT_SAVED,
    MembershipHard,
    begin_incident,
    close_incident,
    count_failure,
    count_trouble,
    failures_in_words,
)
from ftrain.comms.protocol.roster import Roster, Trouble, places_of
from ftrain.comms.protocol.seats import changes_in_words, empty_seats, take_seats
from ftrain.comms.protocol.transitions import Event, Phase, after

_FLUSH_TRIES = 6
_SAVE_TRIES = 3
_WRITE_PAUSE_TICKS = 10  # before the end of the run is tried to be written again
_RUNS = (NodeState.RUNNING, NodeState.DONE)


class Membership:
    """The membership machine of one replica group of ``nodes`` nodes; ``spares`` more wait.

    ``launch`` names one ``ftrain launch``: equal in all coordinator processes of it, different in
    every other (the modification time of job.json serves).  What ``hard`` says besides the epoch
    and the newest durable version is forgotten when it belongs to another launch.

    Receives :class:`NodeReport`, :class:`NodeGone` and :class:`StopRequest`; sends a
    :class:`Directive` to node numbers; its effects are :class:`Form`, :class:`Publish`,
    :class:`Incident`, :class:`Announce`, :class:`EndJob`.
    """

    def __init__(
        self,
        *,
        nodes: int,
        spares: int = 0,
        hard: MembershipHard | None,
        max_restarts: int,
        lease_ticks: int,
        launch: str = "",
        resend_ticks: int = 3,
        flush_ticks: int = 3000,
        flush_margin: int = 2,
        grace_ticks: int = 600,
        save_at_end: bool = False,
    ) -> None:
        self._nodes = nodes
        self._max_restarts = max_restarts
        self._resend_ticks = resend_ticks
        self._flush_ticks = flush_ticks
        self._flush_margin = flush_margin
        self._grace_ticks = grace_ticks
        self._save_at_end = save_at_end
        self._roster = Roster(nodes + spares, lease_ticks)
        self._hard = MembershipHard.of_launch(hard, launch)
        self._stored = hard
        self._messages: list[tuple[Address, object]] = []
        self._effects: list[object] = []
        self._outbox = Outbox(resend_ticks)
        self._reason = ""
        self._committed = saving.Committed()
        self._reached = 0  # highest boundary of any rank since the last formation
        self._kept = 0  # ... of which a rank set out to keep the version
        self._failed_writes = saving.FailedWrites()
        self._refusal = ""  # why the newest attempt to get a version durable failed
        self._round: FlushRound | None = None
        self._attempts = 0  # at durable versions, by this process
        self._flush_tries = self._save_tries = self._end_tries = 0
        self._publishing: Publish | None = None
        self._wish = Wish()
        self._wait_ticks = 0  # before forming again after a formation could not be made
        formation = self._hard.formation
        self._phase = Phase.RECOVERING if formation else Phase.GATHERING
        self._places: tuple[NodePlace, ...] = formation.places if formation else ()
        if self._hard.ended >= 0:
            self._phase = Phase.FINISHED
            self._effects.append(EndJob(self._hard.ended, self._hard.end_reason))

    @property
    def phase(self) -> Phase:
        """What the coordinator is busy with."""
        return self._phase

    @property
    def reason(self) -> str:
        """Why it is in that phase, or what it waits for, in words."""
        return self._reason

    @property
    def hard(self) -> MembershipHard:
        """The newest hard state (persisted once :meth:`ready` was taken and done)."""
        return self._hard

    @property
    def members(self) -> tuple[int, ...]:
        """The nodes of the present formation, or else of the last one, in rank order."""
        granted = tuple(place.node for place in self._places)
        return granted or self._hard.seats or tuple(range(self._nodes))

    @property
    def reports(self) -> tuple[NodeReport, ...]:
        """Newest report of each node that was heard of, by node; spares too."""
        return self._roster.reports()

    def member_reports(self) -> tuple[NodeReport, ...]:
        """Newest report of each member that was heard of, in rank order."""
        return self._roster.reports(self.members)

    # ------------------------------------------------------------------ inputs

    def tick(self) -> None:
        """One unit of logical time has passed."""
        self._roster.tick()
        self._wait_ticks = max(0, self._wait_ticks - 1)
        if self._round is not None:
            self._round.tick(self._reached, over=self._all_done())
        if self._wish.waits is not None and self._can_save(kept=True):
            self.request_flush(kept=True)
        self._outbox.tick()
        self._failed_writes.tick()
        if self._hard.giving_up and self._phase is not Phase.FINISHED:
            self._grace_ticks -= 1
            if self._grace_ticks < 0:
                self._end_unsaved("what memory holds could not be saved within launch.stop_grace_s")
        self._advance()

    def receive(self, message: object) -> None:
        """A node's report, news of a node's end, or a wish to stop."""
        if isinstance(message, NodeReport):
            self._hear(message)
        elif isinstance(message, NodeGone):
            self._roster.gone(message)
        elif isinstance(message, StopRequest):
            self._ask_stop(message.cause)
        self._advance()

    def formed(self, epoch: int, formation: Formation | Obstacle) -> None:
        """Answer to :class:`Form`."""
        if self._phase is not Phase.FORMING or epoch != self._hard.epoch:
            return  # overtaken by a failure
        if isinstance(formation, Obstacle) and formation.lasting:
            self._end(EXIT_FAILED, formation.why)
        elif isinstance(formation, Obstacle):
            why = f"the group can't be formed: {formation.why}"
            self._hard = count_failure(self._hard, self._committed.newest, why)
            if self._hard.failures_in_row > self._max_restarts:
                self._give_up(Event.NOT_FORMED, EXIT_FAILED, why)
            else:
                self._wait_ticks = self._resend_ticks
                self._enter(Event.NOT_FORMED, why)
        else:
            step = formation.restore.version.step if formation.restore.version else 0
            self._hard = saving.formed(self._hard, formation, self._reached, step)
            self._reached = self._kept = step
            self._wish.renew(VersionId(epoch, step))
            self._enter(Event.FORMED, f"epoch {epoch}: {formation.restore.reason}")
        self._advance()

    def published(self, fence: int, version: VersionId) -> None:
        """Answer to :class:`Publish`: the manifest is there, for good."""
        asked = self._publishing
        if asked is None or (fence, version) != (asked.fence, asked.version):
            return
        if version in self._committed.withdrawn:  # meanwhile
            self.publish_failed(f"step {version.step} was withdrawn")
            return
        self._publishing = None
        self._wish.fulfil(version)
        self._hard = replace(self._hard, durable=version)
        self._say("info", f"step {version.step} is durable", {"step": version.step, "fence": fence})
        self._advance()

    def publish_failed(self, why: str) -> None:
        """Answer to :class:`Publish`: it could not be done, and nothing appeared."""
        self._publishing = None
        self._tell_failed(why)
        self._retry_flush(why)
        self._advance()

    def request_flush(self, every: int = 0, *, kept: bool = False) -> None:
        """Ask for a durable version, or (``every`` > 0) one of the next boundary that it divides.
        Unless the wish is ``kept`` until then, it counts only if nothing is being written."""
        if self._can_save(kept=kept):
            self._flush_tries = 0
            if kept:
                self._wish.begin(VersionId(self._hard.epoch, self._reached))
            self._aim_ahead(0 if every else self._flush_margin, every)
            self._advance()
        elif kept and self._phase in (Phase.STARTING, Phase.RUNNING):
            self._wish.waits = VersionId(self._hard.epoch, self._reached)

    def _can_save(self, *, kept: bool) -> bool:
        busy = self._round is not None and not (kept and self._round.waits(self._reached))
        return self._phase is Phase.RUNNING and not (busy or self._publishing or self._wait_ticks)

    def ready(self) -> Ready[MembershipHard]:
        """What has to be done now."""
        self._direct()
        hard = self._hard if self._hard != self._stored else None
        self._stored = self._hard
        ready = Ready(hard, tuple(self._messages), tuple(self._effects))
        self._messages, self._effects = [], []
        return ready

    # ------------------------------------------------------------------ what is heard

    def _hear(self, report: NodeReport) -> None:
        if not self._roster.accept(report):
            return
        self._committed.hear(report)
        if self._hard.durable in self._committed.withdrawn:  # whoever published it deletes it
            self._hard = replace(self._hard, durable=None)
        if report.epoch == self._hard.epoch:
            self._reached = max(self._reached, report.step_max)
            self._kept = max(self._kept, report.kept_max)
        if self._round is not None:
            self._round.hear(report)
        if report.signals and not self._hard.stop_cause:
            self._ask_stop(f"{report.signals[0]} at node {report.node}")

    def _ask_stop(self, cause: str) -> None:
        if self._phase is Phase.FINISHED:
            return
        if cause.startswith("force"):
            self._end(EXIT_FORCED, f"stopped by force: {cause}")
        elif not self._hard.stop_cause:
            self._hard = replace(self._hard, stop_cause=cause)

    # ------------------------------------------------------------------ phases

    def _enter(self, event: Event, reason: str) -> None:
        self._phase = after(self._phase, event)
        if self._phase in (Phase.STOPPING, Phase.GATHERING):
            self._round = None
            self._wish.broken_off()
        self._explain(reason)

    def _explain(self, reason: str) -> None:
        if reason != self._reason:
            self._reason = reason
            self._say("phase", reason, {"phase": self._phase.value, "epoch": self._hard.epoch})

    def _say(self, kind: str, text: str, data: dict[str, object]) -> None:
        self._effects.append(Announce(Notice(kind, text, data)))

    def _end(self, exit_code: int, reason: str) -> None:
        self._round = None
        self._hard = replace(self._hard, ended=exit_code, end_reason=reason)
        self._enter(Event.OVER, reason)
        self._effects.append(EndJob(exit_code, reason))

    def _advance(self) -> None:
        handlers = {
            Phase.RECOVERING: self._recovering,
            Phase.GATHERING: self._gathering,
            Phase.FORMING: self._forming,
            Phase.STARTING: self._starting,
            Phase.RUNNING: self._running,
            Phase.STOPPING: self._stopping,
            Phase.PAUSING: self._pausing,
            Phase.SAVING: self._saving,
        }
        for _ in handlers:  # as many phases as one input may pass through
            before = self._phase
            if before is Phase.FINISHED:
                return
            handlers[before]()
            if self._phase is before:
                return

    def _recovering(self) -> None:
        """A new coordinator process learns where the nodes stand."""
        if set(self._roster.unheard()) & set(self.members):
            self._explain("the coordinator is new and waits for the nodes' reports")
            return
        trouble = self._trouble(started=False)
        here = [r for r in self.member_reports() if r.epoch == self._hard.epoch]
        if trouble or self._hard.giving_up:
            self._break(trouble)
        elif len(here) == self._nodes and all(r.state in _RUNS for r in here):
            self._enter(Event.ALL_RUN, "every node runs on; the coordinator is new")
        elif len(here) == self._nodes and any(r.state in _RUNS for r in here):
            self._enter(Event.SOME_RUN, "the group has formed; the coordinator is new")
        else:
            # How far the ranks have come in finding each other nobody can tell.
            self._enter(Event.BROKEN, "the coordinator died while the group was forming")

    def _gathering(self) -> None:
        """No rank is alive; wait until each seat has a node, then grant the next epoch."""
        self._places = self._hard.formation.places if self._hard.formation else ()
        if self._hard.stop_cause or self._hard.giving_up:
            self._save_from_memory()
            return
        present, unheard = [r.node for r in self._roster.present()], self._roster.unheard()
        empty = empty_seats(self._hard.seats, self._nodes, present, unheard)
        missing = [f"node {node} {self._roster.absence(node)}" for node in empty]
        if missing:
            self._explain(f"waiting for {self._nodes} nodes: {'; '.join(missing)}")
        elif not self._roster.at_rest(self._hard.epoch):
            self._explain("waiting for the nodes to have no rank alive")
        elif self._publishing is None and self._wait_ticks == 0:
            self._grant()

    def _grant(self) -> None:
        present, last = self._roster.present(), self._hard.seats
        epoch = max(self._hard.epoch, *(r.epoch for r in present)) + 1
        seats = take_seats(last, self._nodes, [r.node for r in present])
        self._places = places_of(self._roster.reports(seats))
        if changes := changes_in_words(last, seats):
            self._say("info", changes, {"epoch": epoch})
        self._hard = replace(
            self._hard, epoch=epoch, formation=None, base=self._committed.newest, stop_step=-1
        )
        self._enter(Event.COMPLETE, f"all {self._nodes} nodes are there: forming epoch {epoch}")
        self._effects.append(Form(epoch, self._places, present, self._hard.restarts, self._reached))

    def _forming(self) -> None:
        if trouble := self._trouble(started=False):
            self._break(trouble)
        elif self._hard.stop_cause:
            self._enter(Event.STOP_ASKED, f"stopping before the start: {self._hard.stop_cause}")

    def _starting(self) -> None:
        """The ranks start; what fails here counts like any failure."""
        if trouble := self._trouble(started=False):
            self._break(trouble)
        elif all(r.epoch == self._hard.epoch and r.state in _RUNS for r in self.member_reports()):
            self._enter(Event.ALL_RUN, f"epoch {self._hard.epoch} runs")
        elif self._hard.stop_cause:
            self._enter(Event.STOP_ASKED, f"stopping before a step: {self._hard.stop_cause}")

    def _running(self) -> None:
        trouble = self._trouble(started=True)
        self._close_incident()
        if trouble:
            self._break(trouble)
        elif self._all_done() and all(r.stopped_at < 0 for r in self.member_reports()):
            self._finish()  # also when a stop was asked for: there is nothing left to stop
        elif self._hard.stop_cause:
            self._enter(Event.STOP_ASKED, f"stopping: {self._hard.stop_cause}")
        else:
            self._watch_flush()

    def _all_done(self) -> bool:
        return all(r.state is NodeState.DONE for r in self.member_reports())

    def _finish(self) -> None:
        """Every rank ended by itself: the last version goes to the durable level, then all is over.

        Without it, the same command would train the end of the run once more.
        """
        durable = self._hard.durable
        # What is committed may not have been heard of yet: ranks can end right behind a capture.
        target = VersionId(self._hard.epoch, self._kept)
        if not self._save_at_end or self._kept <= (0 if durable is None else durable.step):
            self._end(0, "every rank is done")
        elif self._round is not None or self._publishing is not None:
            self._watch_flush()
        else:
            if self._end_tries and self._committed.newest is not None:
                target = self._committed.newest  # the last one can't be had: what there is instead
            saved = durable is not None and durable >= target
            if saved or self._end_tries >= _SAVE_TRIES:
                self._end(EXIT_FAILED, saving.unsaved_end(self._kept, durable, self._refusal))
                return
            if self._wait_ticks:
                return
            self._aim_at(target)
            self._end_tries += 1

    def _stopping(self) -> None:
        """Every present node ends its ranks; only then may anything new begin."""
        if self._places and self._hard.incident is not None:
            trouble = self._trouble(started=False)
            if losses := trouble.losses():
                self._hard = begin_incident(self._hard, losses, self._places, self._reached)
            mistakes = trouble.mistakes()
            if mistakes and not (self._hard.stop_cause or self._hard.giving_up):
                self._give_up(None, mistakes.exit_code, mistakes.words(self._places))
                return
        if self._roster.at_rest(self._hard.epoch):
            self._enter(Event.ALL_STOPPED, "no rank is alive")

    def _pausing(self) -> None:
        """Agree on a boundary that no rank has passed, and let all ranks end there."""
        trouble = self._trouble(started=True)
        if trouble:
            self._break(trouble)
            return
        reports = self.member_reports()
        if self._hard.stop_step < 0:
            if all(r.pausing or r.state is NodeState.DONE for r in reports):
                reachable = [b for r in reports for b in (r.step_max, *r.boundaries)]
                self._hard = replace(self._hard, stop_step=max(reachable))
                self._explain(f"all ranks end at boundary {self._hard.stop_step}")
            return
        if not all(r.state is NodeState.DONE for r in reports):
            self._watch_flush()
            return
        ended_at = {r.stopped_at for r in reports}
        if ended_at == {-1}:  # they were past their last boundary when the stop came
            self._enter(Event.ALL_ENDED, "every rank ended before it was told where to")
        elif ended_at <= {-1, self._hard.stop_step}:
            self._enter(Event.ENDED, f"saving boundary {self._hard.stop_step}")
            self._aim_at(VersionId(self._hard.epoch, self._hard.stop_step))
        else:
            self._enter(Event.BROKEN, f"ranks ended at different boundaries: {sorted(ended_at)}")

    def _saving(self) -> None:
        """The last version of the job goes to the durable level."""
        if self._round is None or self._publishing is not None:
            return
        if self._hard.durable is not None and self._hard.durable >= self._round.target:
            self._end_saved(self._hard.durable.step)
            return
        waited_for = self._round.answered.union(self._roster.may_return())
        for node in sorted(set(self.members) - waited_for):
            if absence := self._roster.absence(node):
                self._end_unsaved(f"step {self._round.target.step} is lost: node {node} {absence}")
                return
        self._watch_flush()

    # ------------------------------------------------------------------ failures

    def _trouble(self, *, started: bool) -> Trouble:
        return self._roster.trouble(self._places, self._hard.epoch, started=started)

    def _break(self, trouble: Trouble) -> None:
        words = trouble.words(self._places)
        hard = count_trouble(self._hard, self._committed.newest, trouble)
        self._hard = begin_incident(hard, trouble, self._places, self._reached)
        mistakes = trouble.mistakes()
        if hard.stop_cause or hard.giving_up:
            self._enter(Event.BROKEN, hard.giving_up or words)
        elif mistakes:
            self._give_up(Event.BROKEN, mistakes.exit_code, mistakes.words(self._places))
        elif hard.failures_in_row > self._max_restarts:
            self._give_up(Event.BROKEN, EXIT_FAILED, f"{words}: {failures_in_words(hard)}")
        else:
            self._enter(Event.BROKEN, words)

    def _give_up(self, event: Event | None, exit_code: int, reason: str) -> None:
        """No restart helps: the job ends with ``exit_code`` once what memory holds is durable."""
        if not self._save_at_end:
            self._end(exit_code, reason)
            return
        self._hard = replace(self._hard, giving_up=reason, give_up_code=exit_code)
        if event is not None:
            self._enter(event, reason)

    def _close_incident(self) -> None:
        hard = self._hard
        if hard.incident is not None and hard.formation is not None:
            closed = close_incident(hard.incident, hard.formation, self.member_reports())
            self._effects.append(closed)
            self._hard = replace(hard, incident=None)

    # ------------------------------------------------------------------ durable versions

    def _aim_ahead(self, margin: int, every: int) -> None:
        hard, at = self._hard, VersionId(self._hard.epoch, self._reached)
        self._aim_at(due(at, self._committed.newest, hard.durable, margin, every), margin, every)

    def _aim_at(self, version: VersionId, margin: int = 0, every: int = 0) -> None:
        self._attempts += 1
        epoch, members = self._hard.epoch, self.members
        self._round = FlushRound(version, epoch, members, margin, self._attempts, every)

    def _watch_flush(self) -> None:
        if self._round is None or self._publishing is not None:
            return
        version = self._round.prepared()
        if version is not None:
            self._publishing = Publish(self._hard.epoch, version, self.members)
            self._effects.append(self._publishing)
            if self._phase is not Phase.SAVING:
                self._round = None
            return
        failure, failed = self._round.failure(), self._round.write_failed
        if not failure and self._round.age_ticks > self._flush_ticks:
            failure, failed = self._round.silence(), True
        if failure and failed:
            self._tell_failed(failure)
        if failure:
            self._retry_flush(failure)

    def _tell_failed(self, why: str) -> None:
        if text := self._failed_writes.warning(why):
            self._say("warning", text, {})

    def _retry_flush(self, why: str) -> None:
        before, self._refusal = self._round, why
        if before is not None and before.write_failed:
            self._wait_ticks = _WRITE_PAUSE_TICKS  # what was in the way may go
        if self._phase is Phase.SAVING:
            self._save_tries += 1
            if self._save_tries >= _SAVE_TRIES:
                self._end_unsaved(f"the last version could not be saved: {why}")
            else:
                self._enter(Event.REFUSED, f"the last version could not be saved yet: {why}")
            return
        self._round = None
        self._flush_tries += 1
        if self._phase is not Phase.RUNNING or self._all_done():
            return
        if self._flush_tries < _FLUSH_TRIES:
            margin, every = (before.margin, before.every) if before else (self._flush_margin, 0)
            self._aim_ahead(max(1, 2 * margin), every)
        else:
            self._wish.written = None
            self._tell_failed(why)

    def _save_from_memory(self) -> None:
        """The job is to end and no rank is alive: save the newest version all nodes hold."""
        silent = self._roster.may_return()
        if self._hard.formations:  # something ran: a node that has not reported may hold it
            silent += self._roster.unheard()
        silent = tuple(node for node in silent if node in self.members)
        if waiting := bool(silent) or not self._roster.at_rest(self._hard.epoch):
            self._explain(f"stopping: waiting for nodes {silent or 'to have no rank alive'}")
        if self._publishing is not None or waiting or self._wait_ticks:
            return
        # Something of this launch can be on a node that this process has not heard of.
        hidden = set(self._roster.unheard(for_ever=True)) & set(self.members)
        all_heard = not self._hard.formations or len(self.member_reports()) == self._nodes
        members = self._roster.present(self.members)
        last = saving.last_version(members, self._nodes, self._hard, self._committed, self._reached)
        if last.to_write is not None:
            event = Event.GIVEN_UP if self._hard.giving_up else Event.STOP_ASKED
            self._enter(event, f"saving step {last.to_write.step}, the newest all nodes hold")
            self._aim_at(last.to_write)
        elif last.durable is not None and not (hidden and self._hard.formations):
            self._end_saved(last.durable.step, before=True)
        elif last.nothing and all_heard:
            stopped = f"stopped ({self._hard.stop_cause}) with nothing to save"
            self._end(self._hard.exit_code(EXIT_SAVED), self._hard.giving_up or stopped)
        else:
            self._end_unsaved("no node's memory has all of a version to save")

    def _end_saved(self, step: int, *, before: bool = False) -> None:
        hard = self._hard
        self._end(hard.exit_code(EXIT_SAVED), saving.saved_end(hard, step, before=before))

    def _end_unsaved(self, why: str) -> None:
        stopped = self._hard.giving_up or f"stopped ({self._hard.stop_cause})"
        self._end(self._hard.exit_code(EXIT_FAILED), f"{stopped}, but {why}")

    # ------------------------------------------------------------------ directives

    def _direct(self) -> None:
        """Send each node its directive when it is new, and again until it is followed."""
        reports, members = self._roster.reports(), self.members
        directive = directive_of(self._phase, self._hard, reports, self._round, self._reason)
        aside = for_spares(directive, self._hard, reports)
        answered = self._round.answered if self._round is not None else set()
        told = [(r, directive if r.node in members else aside) for r in reports]
        self._messages += self._outbox.due(told, flush_answered=answered)
