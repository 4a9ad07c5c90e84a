"""A node's agent: starts the node's processes, watches them, and does what the coordinator wants.

``python -m ftrain.launch.agent --job J --node N --incarnation I --pulse-fd P``, started by the
front, who wants answers on P.  All decisions are those of :class:`NodeMember`; this is its engine.
Everything below the agent ends with it: its death is the node's death.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from ftrain.comms.driver import Driver
from ftrain.comms.errors import FtrainError, UsageError
from ftrain.comms.job import JobSpec, read_job
from ftrain.comms.local import close_all
from ftrain.comms.process import STOP_SIGNALS, allow_many_descriptors, die_with_parent
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
    Held,
    HeldParity,
    NodeState,
    Notice,
    RankFailure,
    VersionId,
)
from ftrain.comms.protocol.node import NodeMember
from ftrain.launch.contract import (
    own_environment,
    place_of,
    seats,
    shared_environment,
    threads_per_rank,
)
from ftrain.launch.group_stores import GroupStores
from ftrain.launch.manager_link import ManagerLink
from ftrain.launch.output import OutputPump, parse_std, prune_attempts
from ftrain.launch.protection import rack_of
from ftrain.launch.pulse import answer_pulse
from ftrain.launch.rank_watch import RankWatch
from ftrain.launch.ranks import LocalRank, PageStore, RankGroup, append_traceback, lacking_file
from ftrain.launch.reaper import Reaper
from ftrain.launch.uplink import Uplink
from ftrain.launch.waits import Waits
from ftrain.launch.worker_link import WorkerLink
from ftrain.launch.worker_messages import Forked, ForkRequest, RankSpec
from ftrain.recovery.node_file import NodeFile, write_node_file
from ftrain.snapshot.protocol import messages as smp

TICK_S = 0.1
_FIRST_STEP_POLL_S = 0.005
_HOLD_SETTLES_S = 0.005  # a rank that has not seen PAUSE by then has not reached a boundary
_MANAGER_S_MAX = 5.0  # what waits for the snapshot manager goes on without it after this long
_STRAYS_S_MAX = 5.0  # for ending what dead ranks left behind
_DRAIN_S = 2.0
_NO_SESSION = "ftrain: the script made no ftrain.Session: nothing of it was saved or protected"


class Agent:
    """The engine of one node."""

    def __init__(self, job: JobSpec, node: int, incarnation: int) -> None:
        self._job = job
        self._node = node
        self._incarnation = incarnation
        self._machine = _member(job, node, incarnation)
        self._uplink = Uplink(
            job,
            node,
            incarnation,
            report=lambda: self._machine.report,
            on_directive=lambda directive: self._driver.receive(directive),
            on_store=lambda order: self._stores.order(order),
        )
        self._driver: Driver[None] = Driver(
            self._machine,
            persist=lambda _: None,
            send=lambda _, report: self._uplink.send(report),
            perform=lambda effect: self._effects[type(effect)](effect),
        )
        self._loop = asyncio.get_running_loop()
        self._reaper = Reaper()
        self._pump = OutputPump(self._output_trouble)
        self._pages = PageStore()
        self._threads = threads_per_rank(job)
        self._server = WorkerLink(
            job,
            self._threads,
            self._reaper,
            on_forked=self._forked,
            on_failed=self._forks_failed,
            on_change=self._write_node_file,
            on_down=lambda how: self._stores.server_down(how),
            on_ready=lambda: self._stores.server_ready(),
            on_store=lambda served: self._stores.served(served),
            say=self._say,
        )
        self._stores = GroupStores(
            self._server,
            self._reaper,
            job.config.launch.bind,
            opened=self._uplink.send,
            lost=self._store_lost,
            say=self._say,
        )
        self._manager = self._manager_link() if job.config.snapshot.enabled else None
        self._group: RankGroup | None = None
        self._killing = False
        self._failed_ns = 0  # when the first failure of the epoch was noticed
        self._stopped_ns = 0
        self._committed: VersionId | None = None
        self._flush: smp.Flush | None = None  # asked of the manager, and of the next one
        self._total_steps = self._save_step = 0
        self._watch = RankWatch(job.config.detection, node, partial(self._uplink.say, "warning"))
        self._waits = Waits(self._loop)  # for the snapshot manager
        self._over: asyncio.Future[int] = self._loop.create_future()
        self._effects: dict[type, Callable[[Any], None]] = {
            ForkRanks: self._fork_ranks,
            UpdatePeers: self._update_peers,
            FinishCaptures: self._finish_captures,
            KillRanks: self._kill_ranks,
            HoldRanks: self._hold_ranks,
            ReleaseRanks: self._release_ranks,
            FlushVersion: self._flush_version,
            Exit: lambda effect: self._leave(effect.code),
        }

    def _manager_link(self) -> ManagerLink:
        return ManagerLink(
            self._job,
            self._node,
            self._incarnation,
            self._reaper,
            on_started=self._manager_started,
            on_message=self._from_manager,
            on_down=self._manager_down,
            on_mistake=lambda why: self._fail(UsageError(why)),
            say=partial(self._say, "warning"),
        )

    async def run(self) -> int:
        """Serve until the job is over; returns the exit code, with every child gone."""
        self._loop.set_exception_handler(self._unexpected)
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._signalled, number.name)
        if self._manager is not None:
            self._manager.start()
        self._server.start()
        tasks = [
            self._loop.create_task(coroutine)
            for coroutine in (self._uplink.run(), self._tick(), self._observe())
        ]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        try:
            return await self._over
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._clean_up()

    async def _clean_up(self) -> None:
        self._stores.close()
        self._server.close()
        if self._manager is not None:
            self._manager.close()
        if not await self._reaper.kill_all():
            print(f"ftrain: node {self._node}: a process can't be killed", file=sys.stderr)
        self._watch.end()
        self._pump.close(_DRAIN_S)
        self._pages.close()

    def _leave(self, code: int) -> None:
        if not self._over.done():
            self._over.set_result(code)

    def _fail(self, error: BaseException) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    def _say(self, kind: str, text: str) -> None:
        self._uplink.say(kind, f"node {self._node}: {text}")

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback failed. What is known here may be wrong; the next agent takes over."""
        error = context.get("exception")
        if not isinstance(error, FtrainError | OSError):  # those are said in a sentence
            loop.default_exception_handler(context)
        self._fail(error or RuntimeError(context["message"]))

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._fail(error)

    # ------------------------------------------------------------------ the driver's side

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._tell_progress()
            self._driver.tick()

    def _signalled(self, name: str) -> None:
        self._machine.signal(name)
        self._driver.pump()

    # ------------------------------------------------------------------ forking

    def _fork_ranks(self, effect: ForkRanks) -> None:
        formation = effect.formation
        if self._manager is not None:
            self._manager.set_group(formation)
        place = place_of(formation, self._node)
        group = RankGroup.plan(formation, seats(self._job, formation, place), self._pages)
        group.noticed_ns, group.stopped_ns = self._failed_ns, self._stopped_ns
        self._group, self._killing, self._failed_ns = group, False, 0
        self._reaper.forget_strays()
        attempts = group.ranks[0].seat.directory.parent.parent
        self._loop.run_in_executor(
            None, prune_attempts, attempts, self._job.config.launch.log_attempts
        )
        fds: list[int] = []
        try:
            for rank in group.ranks:
                self._open_outputs(rank, fds)
        except OSError as error:  # no descriptors: another start may find some
            close_all(fds)
            self._forks_failed(error.strerror or str(error))
            return
        smp_socket = self._manager.socket_path if self._manager is not None else ""
        environment = shared_environment(
            self._job, formation, place, smp_socket=smp_socket, threads=self._threads
        )
        specs = tuple(
            RankSpec(rank.rank, own_environment(rank.seat), rank.seat.error_file)
            for rank in group.ranks
        )
        self._server.fork(ForkRequest(formation.epoch, specs, environment), fds)

    def _open_outputs(self, rank: LocalRank, fds: list[int]) -> None:
        """Add a rank's stdout, stderr and telemetry page."""
        launch, seat = self._job.config.launch, rank.seat
        prefix = f"[node{self._node} rank{rank.rank}] "
        redirects = parse_std(launch.redirects, seat.local_rank)
        tee = parse_std(launch.tee, seat.local_rank)
        with suppress(OSError):  # the pump says so; without its file an error is not described
            seat.directory.mkdir(parents=True, exist_ok=True)
        for kind in ("stdout", "stderr"):
            out = self._pump.open(kind, seat.directory, prefix, redirects=redirects, tee=tee)
            fds.append(out)
        fds.append(os.dup(rank.page_fd))

    def _output_trouble(self, text: str) -> None:
        self._loop.call_soon_threadsafe(self._say, "warning", text)

    def _forked(self, message: Forked) -> None:
        group = self._group
        if group is None or group.epoch != message.epoch:
            return
        rank = group.of(message.rank)
        rank.pid = message.pid
        self._reaper.watch(message.pid, partial(self._rank_ended, group, rank))
        if self._killing:
            self._reaper.kill(rank.pid)
        if group.all_forked:
            group.forked_ns = message.forked_ns
            self._machine.ranks_forked(group.epoch)
            self._driver.pump()
            self._write_node_file()
            self._watch_first_step(group)
            self._watch.begin(group)
        self._settle(group)

    def _forks_failed(self, cause: str) -> None:
        group = self._group
        if group is None:
            return
        rank = next((r for r in group.ranks if not r.pid), group.ranks[0])
        failure = RankFailure(rank.rank, "fork", f"not started: {cause}", time.monotonic_ns())
        self._report_failure(group, failure)
        self._settle(group)

    def _store_lost(self, how: str) -> None:
        """The ranks that met there need it no more; those on their way would seek it for long."""
        if self._group is not None and self._machine.report.state is NodeState.STARTING:
            self._forks_failed(f"the process with the group's store ended: {how}")

    # ------------------------------------------------------------------ running

    def _watch_first_step(self, group: RankGroup) -> None:
        """Poll quickly until every rank completed a step, then be quiet."""
        if group is not self._group or group.stepped or self._killing:
            return
        if group.has_stepped():
            self._stepped(group)
        else:
            self._loop.call_later(_FIRST_STEP_POLL_S, self._watch_first_step, group)

    def _stepped(self, group: RankGroup) -> None:
        group.stepped = True
        self._tell_progress()
        self._machine.ranks_stepped(group.epoch, group.phases())
        self._driver.pump()

    def _rank_ended(self, group: RankGroup, rank: LocalRank, status: int) -> None:
        now_ns = time.monotonic_ns()
        rank.status = status
        if self._manager is not None:
            self._manager.rank_died(group.epoch, rank.rank)
        if status != 0 and not self._killing:
            failure = group.failure(rank, now_ns)
            append_traceback(rank.seat, failure)
            deserter = group.deserter(failure) if self._failed_ns == 0 else None
            if deserter is not None:
                self._report_failure(group, group.desertion(deserter, now_ns))
            self._report_failure(group, failure)
        self._settle(group)

    def _report_failure(self, group: RankGroup, failure: RankFailure) -> None:
        if group is not self._group:
            return
        self._failed_ns = self._failed_ns or failure.noticed_ns
        self._tell_progress()
        self._machine.rank_failed(group.epoch, failure)
        self._driver.pump()

    def _settle(self, group: RankGroup) -> None:
        """A rank came or went: see whether that was the last one."""
        if group is not self._group:
            return
        if self._killing:
            self._see_whether_gone(group)
        elif group.all_done:
            if not group.stepped:
                self._stepped(group)
            if self._node == 0 and group.unprotected:  # said once is enough
                self._uplink.say("warning", _NO_SESSION)
            self._tell_progress()
            self._machine.ranks_done(group.epoch, group.stopped_at())
            self._driver.pump()

    def _tell_progress(self) -> None:
        progress = self._group.progress() if self._group is not None else None
        if progress is None or self._killing:
            return
        self._machine.progress(
            progress.step,
            progress.step_max,
            progress.kept_max,
            self._committed,
            progress.loss,
            progress.step_s,
        )
        if progress.total_steps != self._total_steps:
            self._total_steps = progress.total_steps
            self._uplink.say("total_steps", "", total_steps=self._total_steps)
        if progress.save_step > self._save_step:
            self._uplink.say("save", "", step=progress.save_step)
        self._save_step = progress.save_step

    def _hold_ranks(self, effect: HoldRanks) -> None:
        if self._group is not None:
            self._group.hold()
            self._loop.call_later(_HOLD_SETTLES_S, self._tell_boundaries, self._group)

    def _tell_boundaries(self, group: RankGroup) -> None:
        if group is self._group and not self._killing:
            self._machine.holding(group.epoch, group.boundaries())
            self._driver.pump()

    def _release_ranks(self, effect: ReleaseRanks) -> None:
        if self._group is not None:
            self._group.release(effect.stop_step)

    async def _observe(self) -> None:
        while True:
            await asyncio.sleep(self._job.config.detection.poll_s)
            group = self._group
            if group is not None and not self._killing:
                for failure in self._watch.failures(group):
                    self._report_failure(group, failure)

    # ------------------------------------------------------------------ stopping

    def _kill_ranks(self, effect: KillRanks) -> None:
        self._killing = True
        if self._group is None:
            self._tell_gone((), ())
            return
        for rank in self._group.ranks:
            if rank.alive:
                self._reaper.kill(rank.pid)
        self._server.call_off()
        self._see_whether_gone(self._group)

    def _see_whether_gone(self, group: RankGroup) -> None:
        if group.any_alive or self._server.forking or "gone" in self._waits:
            return
        self._stopped_ns = time.monotonic_ns()
        self._watch.end()
        self._waits.begin("gone", _MANAGER_S_MAX + _STRAYS_S_MAX, self._kill_late)
        if self._reaper.strays() != []:
            self._loop.create_task(self._kill_strays())
        else:
            self._ask_inventory()

    async def _kill_strays(self) -> None:
        await self._reaper.kill_strays(_STRAYS_S_MAX)
        if "gone" in self._waits:  # else a manager that started meanwhile has said what it holds
            self._ask_inventory()

    def _ask_inventory(self) -> None:
        if self._manager is None:
            self._tell_gone((), ())
        else:
            self._waits.begin("gone", _MANAGER_S_MAX, self._kill_late)  # anew, from here on
            self._manager.post(smp.AskInventory())

    def _ask_again(self) -> None:
        """A manager that was started after the ranks had ended."""
        if self._manager is not None and (self._group is None or self._killing):
            self._manager.post(smp.AskInventory())

    def _kill_late(self) -> None:
        self._say("warning", "no answer from the snapshot manager")
        report = self._machine.report  # what it said last, before the ranks ended
        self._tell_gone(report.held, report.parity)

    def _tell_gone(self, held: tuple[Held, ...], parity: tuple[HeldParity, ...]) -> None:
        self._waits.end("gone")
        self._machine.ranks_gone(self._machine.epoch, held, parity)
        self._driver.pump()

    # ------------------------------------------------------------------ the snapshot manager

    def _manager_started(self, started: smp.ManagerStarted) -> None:
        self._write_node_file()
        self._machine.smp(started.address)
        self._machine.held(started.held, started.parity)
        self._driver.pump()
        if self._flush is not None and self._manager is not None:
            self._manager.post(self._flush)
        # It is asked even for what it has just said: from its answer on it changes nothing, and a
        # plan is made of that.
        if "captures" in self._waits:
            self._ask_captures(self._machine.epoch, 0.0)
        elif "gone" not in self._waits or self._reaper.strays() == []:
            self._ask_again()

    def _manager_down(self, how: str) -> None:
        self._say("warning", f"the snapshot manager ended ({how}); no version is lost")
        self._write_node_file()
        self._machine.smp("")
        self._driver.pump()

    def _from_manager(self, message: Any) -> None:
        if isinstance(message, smp.Committed):
            self._committed = message.version
        elif isinstance(message, smp.ParityComplete):
            self._machine.protected(message.version, message.epoch)
        elif isinstance(message, smp.Withdrawn):
            text = f"step {message.version.step} was captured wrongly: it is not restored from"
            self._uplink.say("withdrawn", text, **asdict(message.version))
            self._machine.withdrawn(message.version)
            self._driver.pump()
        elif isinstance(message, smp.CapturesFinished):
            self._captures_finished(message.epoch, message.held, message.parity)
        elif isinstance(message, smp.Inventory):
            if "gone" in self._waits:
                self._tell_gone(message.held, message.parity)
            else:
                self._machine.held(message.held, message.parity)
                self._driver.pump()
        elif isinstance(message, smp.Flushed):
            self._flush = None
            self._machine.flushed(message.version)
            self._driver.pump()
        elif isinstance(message, smp.FlushRefused):
            self._flush = None
            self._machine.flush_refused(message.reason, write_failed=message.write_failed)
            self._driver.pump()
        elif isinstance(message, smp.BoundaryCounts):
            if self._machine.epoch == message.version.epoch:
                counts = dict(zip(message.ranks, message.collectives, strict=True))
                self._watch.boundaries(message.version.step, counts)
        elif isinstance(message, Notice):
            self._uplink.say(message.kind, message.text, **message.data)

    def _update_peers(self, effect: UpdatePeers) -> None:
        if self._manager is not None and self._group is not None:
            self._manager.set_group(effect.formation, self._group.dead())

    def _finish_captures(self, effect: FinishCaptures) -> None:
        if self._manager is None or self._group is None or not self._group.any_alive:
            self._ask_captures(effect.epoch, 0.0)
        else:
            self._ask_captures(effect.epoch, self._job.config.snapshot.finish_capture_s)

    def _ask_captures(self, epoch: int, deadline_s: float) -> None:
        if self._manager is None:
            self._captures_finished(epoch, (), ())
            return
        late = partial(self._captures_finished, epoch, (), ())
        self._waits.begin("captures", _MANAGER_S_MAX + deadline_s, late)
        self._manager.post(smp.FinishCaptures(epoch, deadline_s))

    def _captures_finished(
        self, epoch: int, held: tuple[Held, ...], parity: tuple[HeldParity, ...]
    ) -> None:
        self._waits.end("captures")
        self._machine.captures_finished(epoch, held, parity)
        self._driver.pump()

    def _flush_version(self, effect: FlushVersion) -> None:
        if self._manager is None:
            lack = lacking_file(self._job, self._group, effect)
            if lack:
                self._machine.flush_refused(lack)
            else:
                self._machine.flushed(effect.version)
        else:
            self._flush = smp.Flush(effect.version, effect.fence)
            self._manager.post(self._flush)  # lost while there is none: see _manager_started

    # ------------------------------------------------------------------ for others to see

    def _write_node_file(self) -> None:
        group = self._group
        file = NodeFile(
            node=self._node,
            incarnation=self._incarnation,
            epoch=group.epoch if group is not None else 0,
            agent_pid=os.getpid(),
            smp_pid=self._manager.pid if self._manager is not None else 0,
            worker_server_pid=self._server.pid,
            ranks=group.listing() if group is not None else (),
        )
        with suppress(OSError):  # a full disk hides the node from `ftrain status`, no more
            write_node_file(self._job.run_dir, file)


def _member(job: JobSpec, node: int, incarnation: int) -> NodeMember:
    return NodeMember(
        node=node,
        incarnation=incarnation,
        local_world=job.local_world,
        host=job.config.launch.host,
        rack=rack_of(job, node),
    )


def main() -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="ftrain.launch.agent")
    parser.add_argument("--job", required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--pulse-fd", type=int, required=True)
    options = parser.parse_args()
    try:
        job = read_job(options.job)
        die_with_parent(job.front_pid)
        allow_many_descriptors()

        async def serve() -> int:
            agent = Agent(job, options.node, options.incarnation)
            answer_pulse(options.pulse_fd)
            return await agent.run()

        return asyncio.run(serve())
    except FtrainError as error:
        print(f"ftrain: node {options.node}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"ftrain: node {options.node}: the agent can't work: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
