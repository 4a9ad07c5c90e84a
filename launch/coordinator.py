"""The coordinator's process: one per job, a sibling of the agents, started again when it dies.

``python -m ftrain.launch.coordinator --job J --listen-fd N --pulse-fd P``: N is the front's
listening socket, so that a new coordinator is reached at the same address, and P is where the front
wants answers.  All decisions are those of :class:`Membership`; this is its engine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ftrain.checkpoint.durable import DurableStore, none_usable_text, not_all_usable_text
from ftrain.comms.channel import Channel, Identity, serve
from ftrain.comms.driver import Driver
from ftrain.comms.errors import FtrainError, PeerLostError, RemoteProtocolError
from ftrain.comms.events import EventLog, read_events
from ftrain.comms.job import JobSpec, read_job
from ftrain.comms.process import die_with_parent, ignore_stop_signals
from ftrain.comms.protocol.effects import Announce, EndJob, Form, Incident, Obstacle, Publish
from ftrain.comms.protocol.membership import Membership
from ftrain.comms.protocol.messages import (
    Formation,
    JoinAnswer,
    JoinRequest,
    NodeGone,
    NodeReport,
    Notice,
    StopRequest,
    StoreOpened,
    VersionId,
)
from ftrain.comms.protocol.records import MembershipHard
from ftrain.comms.protocol.roster import ranks_to_nodes
from ftrain.comms.protocol.transitions import Phase
from ftrain.launch.advice import History, advise
from ftrain.launch.durable_side import DurableSide
from ftrain.launch.exposure import WORTH, Exposure
from ftrain.launch.group_stores import StoreOrders
from ftrain.launch.incidents import (
    Account,
    FailedStarts,
    Tracebacks,
    begins,
    complete_at,
    make_record,
)
from ftrain.launch.joining import difference, join_request, leave_mark
from ftrain.launch.news import News
from ftrain.launch.progress import Progress
from ftrain.launch.pulse import answer_pulse
from ftrain.launch.remote_copies import RemoteCopies
from ftrain.launch.state import HardStore, begin_with, withdrawn_in
from ftrain.recovery.protocol.bad_versions import BadVersions
from ftrain.recovery.protocol.planner import Memory

TICK_S = 0.05
_RESEND_TICKS = 5
_DISK_RETRY_S = 1.0
_FLUSH_S_MAX = 600.0  # for one durable version
_TRACEBACKS_S = 0.3  # after the first failure, for the other ranks that raise the same


class Coordinator:
    """The engine of the membership machine."""

    def __init__(self, job: JobSpec, job_path: Path) -> None:
        self._job = job
        self._state = Path(job.run_dir, "state")
        self._store = HardStore(self._state)
        self._launch = str(job_path.stat().st_mtime_ns)
        config = job.config
        folder = config.checkpoint.dir or str(Path(job.run_dir, "checkpoints"))
        self._durable = DurableStore(folder)
        self._epoch: tuple[int, str, VersionId | None] | None = None  # that this process began
        self._forming: asyncio.Task[None] | None = None
        self._recorded = asyncio.Event()  # the fence of the newest epoch, or why it is not is known
        self._recorded.set()
        self._copies = self._make_copies() if config.checkpoint.remote else None
        self._mark = leave_mark(job, self._launch)
        events = Path(job.run_dir, "events.jsonl")
        self._bad = BadVersions()  # what can't be put back a new process finds out again
        self._bad.withdraw(withdrawn := withdrawn_in(events))
        self._machine = Membership(
            nodes=job.nodes,
            spares=job.spares,
            hard=begin_with(self._store.load(), self._launch, self._durable, withdrawn),
            max_restarts=config.launch.max_restarts,
            lease_ticks=max(1, round(config.detection.node_lease_s / TICK_S)),
            launch=self._launch,
            resend_ticks=_RESEND_TICKS,
            flush_ticks=round(_FLUSH_S_MAX / TICK_S),
            grace_ticks=round(config.launch.stop_grace_s / TICK_S),
            save_at_end=config.checkpoint.enabled and config.snapshot.enabled,
        )
        formation = self._machine.hard.formation
        self._bad.trusted = formation is not None and formation.restore.trusted
        self._driver: Driver[MembershipHard] = Driver(
            self._machine, self._persist, self._send, self._perform
        )
        self._account = Account.read(events, self._launch, time.time())
        self._history = History.read(read_events(events))
        self._events = EventLog(events, config.events.bytes_max)
        self._news = News(self._events, self._launch)
        self._side = DurableSide(
            job,
            self._durable,
            self._bad,
            self._events,
            published=self._history.published,
            copies=self._copies,
        )
        self._stores = StoreOrders(self._send)
        self._agents: dict[int, Channel] = {}
        self._tracebacks = Tracebacks()
        self._failed_starts = FailedStarts(config.launch.max_restarts)
        self._disk_refuses = False
        self._told_unusable: tuple[str, ...] = ()
        self._phase = self._machine.phase
        self._heard_ns = 0  # when the open incident was heard of
        self._progress = Progress(self._account)
        worth = (e for e in read_events(events) if e["kind"] == WORTH)
        self._exposure = Exposure(job, told=any(e.get("launch") == self._launch for e in worth))
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._effects: dict[type, Callable[[Any], object]] = {
            Form: self._begin_forming,
            Publish: lambda effect: self._spawn(self._publish(effect)),
            Incident: self._close_incident,
            Announce: lambda effect: self._news.announce(effect.notice),
            EndJob: self._end,
        }

    async def run(self, listener: socket.socket) -> None:
        """Serve until the front ends this process."""
        identity = Identity(self._job.run_id, "coordinator", 0, os.getpid())
        secret = bytes.fromhex(self._job.secret)
        asyncio.get_running_loop().set_exception_handler(self._unexpected)
        server = await serve(listener, identity, secret, self._handle)
        with suppress(OSError):  # a full disk hides us from `ftrain inject`, no more
            (self._state / "coordinator.pid").write_text(f"{os.getpid()}\n")
        self._events.write("launch", launch=self._launch, pid=os.getpid(), run_id=self._job.run_id)
        self._driver.pump()
        for coroutine in (self._tick(), self._show_progress(), self._flush_now_and_then()):
            self._spawn(coroutine)
        self._spawn(self._persist_later())
        if self._copies is not None:
            self._spawn(self._copies.run())
        try:
            await self._failed
        finally:
            server.close()
            self._store.close()
            for task in self._tasks:
                task.cancel()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback or a connection's handler failed: a bug. The next process starts afresh."""
        loop.default_exception_handler(context)
        if not self._failed.done():
            self._failed.set_exception(context.get("exception") or RuntimeError(context["message"]))

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)  # the next process does better, or the front gives up

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._input(self._machine.tick)

    def _input(self, call: Callable[..., None], *arguments: object) -> None:
        """Every input of the machine goes through here."""
        self._failed_starts.begin(self._machine.hard, self._machine.phase)
        try:
            call(*arguments)
            self._driver.pump()
        except (OSError, FtrainError) as error:
            if not self._failed.done():
                self._failed.set_exception(error)
            return
        self._follow_failures()
        if self._machine.phase is not self._phase:
            self._follow_phase()

    def _follow_failures(self) -> None:
        hard, phase = self._machine.hard, self._machine.phase
        if hard.incident is not None and self._heard_ns == 0:
            self._heard_ns = time.monotonic_ns()
        if hard.incident is not None and hard.incident.nodes:  # known at once, or later
            self._exposure.lost(self._heard_ns / 1e9, hard.incident.epoch)
        text = self._failed_starts.end(hard, phase)
        if text:
            self._account.failed_starts += 1
            self._events.write("failed_start", launch=self._launch, text=text, data={})
            if phase is not Phase.FINISHED:  # the end says what it was
                self._news.show(Notice("warning", text, {}))

    def _follow_phase(self) -> None:
        before, self._phase = self._phase, self._machine.phase
        if self._phase is not Phase.RUNNING or before is Phase.RECOVERING:
            return
        self._progress.begin()
        if self._account.running_s == 0 and self._machine.hard.formation is not None:
            version = self._machine.hard.formation.restore.version
            first_step = 0 if version is None else version.step
            self._account.ran(time.time(), first_step)
            self._events.write("running", launch=self._launch, first_step=first_step)

    # ------------------------------------------------------------------ the driver's side

    def _persist(self, hard: MembershipHard) -> None:
        self._tell_of_disk(self._store.save(hard))

    async def _persist_later(self) -> None:
        while True:
            await asyncio.sleep(_DISK_RETRY_S)
            self._tell_of_disk(self._store.retry())

    def _tell_of_disk(self, problem: str) -> None:
        """Say once that the disk takes nothing, and once that it does again."""
        if bool(problem) == self._disk_refuses:
            return
        self._disk_refuses = bool(problem)
        if problem:
            text = (
                f"the coordinator's state can't be written to {self._state} ({problem}): training"
                " goes on, but make room there before this launch ends"
            )
        else:
            text = f"the coordinator's state is written to {self._state} again"
        self._news.announce(Notice("warning" if problem else "info", text, {}))

    def _send(self, address: object, message: object) -> None:
        channel = self._agents.get(address) if isinstance(address, int) else None
        if channel is not None:
            with suppress(PeerLostError):  # said again until it is followed
                channel.post(message)

    def _perform(self, effect: object) -> None:
        self._effects[type(effect)](effect)

    def _begin_forming(self, effect: Form) -> None:
        if self._forming is not None:
            self._forming.cancel()  # overtaken
        self._recorded = asyncio.Event()
        self._forming = self._spawn(self._form(effect, self._recorded))

    async def _form(self, effect: Form, recorded: asyncio.Event) -> None:
        try:
            durable, problems = await asyncio.to_thread(self._side.versions)
            memory = Memory(
                effect.places, effect.held, effect.parity, effect.reached, self._account.step_s
            )
            choice = self._bad.choose(memory, durable)
        except FtrainError as error:
            recorded.set()
            self._input(self._machine.formed, effect.epoch, Obstacle(str(error)))
            return
        restore, unusable = choice.plan, (*problems, *choice.remarks)
        for text in (choice.news, restore.lost):
            if text:
                self._news.announce(Notice("warning", text, {"epoch": effect.epoch}))
        if restore.level == "fresh" and unusable:
            recorded.set()
            why = none_usable_text(self._durable.directory, unusable)
            self._input(self._machine.formed, effect.epoch, Obstacle(why, lasting=True))
            return
        await self._begin_fence(effect.epoch, restore.parent)
        recorded.set()
        first = effect.places[0]
        try:
            port = await self._stores.opened(first.node, effect.epoch)
        except RuntimeError as error:
            self._input(self._machine.formed, effect.epoch, Obstacle(str(error)))
            return
        formation = Formation(
            epoch=effect.epoch,
            places=effect.places,
            store_host=first.host,
            store_port=port,
            restore=restore,
            restarts=effect.restarts,
        )
        self._events.write("formation", formation=formation)
        if effect.restarts == 0:
            where, start = self._job.run_dir, begins(restore, self._history.published)
            self._news.announce(Notice("info", f"ftrain: run directory {where}; {start}", {}))
            if advice := advise(self._job.config.checkpoint, self._history):
                self._news.announce(Notice("info", advice, {}))
        if restore.level == "durable" and restore.version is not None and unusable:
            self._tell_unusable(unusable, restore.version.step)
        self._input(self._machine.formed, effect.epoch, formation)

    def _tell_unusable(self, problems: tuple[str, ...], step: int) -> None:
        """What of the durable versions can't be used, whenever that is news."""
        if problems != self._told_unusable:
            self._told_unusable = problems
            text = not_all_usable_text(self._durable.directory, problems, step)
            self._news.announce(Notice("warning", text, {}))

    async def _begin_fence(self, epoch: int, parent: VersionId | None) -> None:
        """Before a rank of ``epoch`` runs; what can't be written now, or is deleted later, is tried
        again when a version of it is published."""
        if not self._job.config.checkpoint.enabled:
            return
        arguments = (epoch, self._job.run_id, parent)
        self._epoch = arguments
        try:
            await asyncio.to_thread(self._durable.begin_fence, *arguments)
        except FtrainError as error:
            self._news.announce(
                Notice("warning", f"epoch {epoch} can't be recorded yet: {error}", {})
            )
            return
        if self._copies is not None:
            self._spawn(self._copies.begin_fences())

    async def _publish(self, effect: Publish) -> None:
        world_size = self._job.nodes * self._job.local_world
        await self._recorded.wait()  # also of a formation that a stop has overtaken
        try:
            await asyncio.to_thread(self._durable.require_begun, effect.fence, self._epoch)
            path = await asyncio.to_thread(
                self._durable.publish_written,
                effect.fence,
                effect.version,
                self._job.run_id,
                world_size,
            )
        except FtrainError as error:
            self._input(self._machine.publish_failed, str(error))
            return
        self._events.write("published", fence=effect.fence, version=effect.version, path=path)
        if self._copies is not None:
            self._copies.published(effect.version.step)
        await asyncio.to_thread(
            self._side.sweep
        )  # before the answer: nothing else is written meanwhile
        self._input(self._machine.published, effect.fence, effect.version)
        if every := self._job.config.checkpoint.durable_every_steps:
            self._input(self._machine.request_flush, every)  # at once: it may be due already

    def _make_copies(self) -> RemoteCopies:
        def failed(text: str, kind: str, again: bool) -> None:
            self._events.write("copy_failed", text=text, reason=kind)
            if not again:
                self._news.show(Notice("warning", f"{text} (training goes on)", {}))

        return RemoteCopies(
            self._job.config.checkpoint,
            self._durable,
            self._job.run_id,
            on_copied=lambda fields: self._events.write("copied", **fields),
            on_failed=failed,
            on_told=lambda text: self._events.write("warning", text=text),
        )

    # ------------------------------------------------------------------ connections

    async def _handle(self, channel: Channel) -> None:
        if channel.peer.role == "agent":
            await self._handle_agent(channel)
        elif channel.peer.role in ("front", "cli"):
            await self._handle_watcher(channel)
        else:
            raise RemoteProtocolError(f"a {channel.peer.role} has no business with the coordinator")

    async def _handle_agent(self, channel: Channel) -> None:
        node = channel.peer.node
        self._agents[node] = channel
        try:
            while True:
                message = await channel.receive()
                if isinstance(message, NodeReport) and message.node == node:
                    self._hear(message)
                elif isinstance(message, Notice):
                    self._hear_notice(message)
                elif isinstance(message, StoreOpened):
                    self._stores.hear(message)
                else:
                    raise RemoteProtocolError(f"node {node} sent a {type(message).__name__}")
        finally:
            if self._agents.get(node) is channel:
                del self._agents[node]

    async def _handle_watcher(self, channel: Channel) -> None:
        self._news.watch(channel)
        try:
            while True:
                message = await channel.receive()
                if isinstance(message, NodeGone | StopRequest):
                    self._input(self._machine.receive, message)
                elif isinstance(message, JoinRequest):
                    channel.post(self._admit(message))
                else:
                    raise RemoteProtocolError(f"{channel.peer} sent a {type(message).__name__}")
        finally:
            self._news.unwatch(channel)

    def _admit(self, request: JoinRequest) -> JoinAnswer:
        known = [r.incarnation for r in self._machine.reports if r.node == request.node]
        refused = difference(request, join_request(self._job))
        return JoinAnswer(refused, self._mark, max(known, default=0))

    def _hear(self, report: NodeReport) -> None:
        if report.failures and self._tracebacks.add(report.epoch, report.failures):
            loop = asyncio.get_running_loop()
            loop.call_later(_TRACEBACKS_S, self._show_tracebacks, report.epoch)
        if report.step_s > 0:
            self._account.step_s = report.step_s
        self._refuse_bad_version(report)
        if self._bad.withdraw(report.withdrawn):
            self._spawn(asyncio.to_thread(self._side.remove_withdrawn))
        self._input(self._machine.receive, report)
        formation, now_s = self._machine.hard.formation, time.monotonic()
        for notice in self._exposure.hear(self._machine.member_reports(), formation, now_s):
            self._news.announce(notice)

    def _refuse_bad_version(self, report: NodeReport) -> None:
        """What a rank could not put back, or what its loss speaks against, is not taken again."""
        formation = self._machine.hard.formation
        if formation is None or formation.epoch != report.epoch:
            return
        data: dict[str, object] = {"epoch": report.epoch}
        damaged = [failure for failure in report.failures if failure.kind == "restore"]
        if damaged and self._bad.add(formation.restore):
            text = f"a version is not restored from any more: {damaged[0].cause}"
            self._news.announce(Notice("warning", text, data))
        odd = [failure for failure in report.failures if failure.kind == "loss"]
        if odd and self._bad.suspect(formation, odd):
            text = f"an older version is tried: {odd[0].cause}"
            self._news.announce(Notice("warning", text, data))

    def _learn_cost(self, data: Mapping[str, object]) -> None:
        """What writing cost becomes advice: at once if nothing was known when the launch began."""
        first, cost_s = not self._history.cost_s, data.get("cost_s")
        self._history = replace(self._history, cost_s=cost_s if isinstance(cost_s, float) else 0.0)
        if first and (advice := advise(self._job.config.checkpoint, self._history)):
            self._news.announce(Notice("info", advice, {}))

    def _hear_notice(self, notice: Notice) -> None:
        if notice.kind == "total_steps":
            total = notice.data.get("total_steps")
            self._progress.total_steps = total if isinstance(total, int) else 0
        elif notice.kind == "written":
            self._learn_cost(notice.data)
        elif notice.kind == "save" and self._job.config.snapshot.enabled:  # else ranks do it
            self._input(lambda: self._machine.request_flush(kept=True))
        self._news.announce(notice)

    # ------------------------------------------------------------------ news

    def _show_tracebacks(self, epoch: int) -> None:
        formation = self._machine.hard.formation
        nodes = {} if formation is None else ranks_to_nodes(formation.places)
        for text in self._tracebacks.take(epoch, nodes):
            self._news.announce(Notice("traceback", text, {"epoch": epoch}))

    def _close_incident(self, incident: Incident) -> None:
        self._show_tracebacks(incident.epoch)
        now_ns = time.monotonic_ns()
        launch = self._job.config.launch
        record = make_record(
            incident,
            heard_ns=self._heard_ns or now_ns,
            closed_ns=now_ns,
            one_host=bool(launch.local_nodes) or launch.nnodes == 1,
        )
        self._heard_ns = 0
        self._account.count(record.restart_s, record.steps_recomputed)
        fields = msgspec.to_builtins(record)
        self._events.write("incident", launch=self._launch, text=record.line, **fields)
        self._news.show(Notice("incident", record.line, {"step": record.step}))

    async def _show_progress(self) -> None:
        while True:
            await asyncio.sleep(self._job.config.events.progress_every_s)
            reports = self._machine.member_reports()
            if self._machine.phase is not Phase.RUNNING or not reports:
                continue
            self._news.show(self._progress.notice(reports, time.monotonic()))

    async def _flush_now_and_then(self) -> None:
        config = self._job.config
        every_s, every = config.checkpoint.durable_every_s, config.checkpoint.durable_every_steps
        if not (config.checkpoint.enabled and config.snapshot.enabled):
            return
        while True:
            await asyncio.sleep(TICK_S if every else every_s)
            self._input(self._machine.request_flush, every)

    def _end(self, effect: EndJob) -> None:
        for report in self._machine.reports:
            self._show_tracebacks(report.epoch)
            self._account.step = max(self._account.step, report.step_max)
        self._follow_failures()
        hard = self._machine.hard
        if hard.incident is not None:  # it ended with the job
            lost_s = (time.monotonic_ns() - self._heard_ns) / 1e9
            self._account.count(lost_s, hard.incident.recomputed)
        rows = self._account.rows(time.time(), max(0, hard.formations - 1))
        failed = effect.exit_code not in (0, 75)
        saved = effect.exit_code == 75 and hard.durable is not None
        again = "; the same command goes on from there" if saved else ""
        complete = complete_at(hard, self._progress.total_steps) if effect.exit_code == 0 else 0
        text = f"ftrain: {effect.reason}{again}"
        if complete:
            text = f"ftrain: already complete at step {complete} (total_steps); nothing to do"
        self._news.announce(Notice("error" if failed else "info", text, {}))
        if not complete:
            self._news.announce(Notice("summary", "summary", {"rows": rows}))
        self._news.announce(Notice("end", "", {"exit_code": effect.exit_code}))


def main() -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="ftrain.launch.coordinator")
    parser.add_argument("--job", required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--pulse-fd", type=int, required=True)
    options = parser.parse_args()
    listener = socket.socket(fileno=options.listen_fd)
    try:
        job = read_job(options.job)
        die_with_parent(job.front_pid)
        ignore_stop_signals()

        async def coordinate() -> None:
            coordinator = Coordinator(job, Path(options.job))
            answer_pulse(options.pulse_fd)
            await coordinator.run(listener)

        asyncio.run(coordinate())
    except (FtrainError, OSError) as error:
        print(f"ftrain: coordinator: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, FtrainError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
