"""The front: starts the coordinator and this host's agents, prints news, returns the exit code.

It decides nothing about training.  It keeps the coordinator's listening socket, so that a restarted
coordinator listens on the same port at once; it replaces agents that died, under a new incarnation;
it passes stop signals on; and nothing that it started outlives it.  On a host that joins another
one's coordinator nothing is started before that has agreed, and all ends when it stays away.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ftrain.comms.channel import Channel, Identity, connect
from ftrain.comms.errors import AuthenticationError, FtrainError
from ftrain.comms.job import JobSpec
from ftrain.comms.protocol.messages import JoinAnswer, NodeGone, Notice, StopRequest
from ftrain.comms.protocol.records import EXIT_FAILED, EXIT_FORCED, EXIT_SAVED
from ftrain.launch.children import Child, Children
from ftrain.launch.console import Console
from ftrain.launch.joining import find_mark, join_request
from ftrain.launch.pulse import PERIOD_S, Pulse
from ftrain.launch.restarts import Restarts
from ftrain.launch.run_directory import RunDirectory
from ftrain.recovery.hold import is_held
from ftrain.recovery.injection import never_struck

USAGE = 2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# With these an agent ends only when the job is over.
_FINAL_CODES = (0, EXIT_SAVED, EXIT_FORCED)
_GRACE_AFTER_END_S = 5.0  # for agents to end their ranks and themselves, once the job is over
_KILL_S = 2.0
_WORD_S = 0.3  # for the coordinator's word that the job is over, when an agent was faster
_HOLD_POLL_S = 0.02
_COORDINATOR_LEASES = 2  # of silence, until it is replaced: nobody needs its memory
_AGENT_LEASES = 12  # ... an agent's node loses its memory with it
_REFUSED_PAUSE_S = 1.0  # before what the system did not start is tried again
_RELAY_BYTES = 1 << 16
_WAITING_S = 5.0  # when to say what is being waited for
_WAITING_PHASES = ("recovering", "gathering", "forming", "stopping")


@dataclass(slots=True)
class _Agent:
    node: int
    incarnation: int
    child: Child
    successor: bool  # of one that worked
    replaced: bool = False  # it ended, and another one takes its place


@dataclass(slots=True)
class _Absence:
    """A time without a coordinator."""

    since_s: float
    limit_s: float
    said: bool = False


@dataclass(slots=True)
class _News:
    """What the coordinator must know from us, whenever it was restarted."""

    gone: list[NodeGone] = field(default_factory=list)
    stop: StopRequest | None = None

    def messages(self) -> list[NodeGone | StopRequest]:
        """Everything, oldest first."""
        return [*self.gone, *([self.stop] if self.stop is not None else [])]


class Front:
    """One launch, from the first process to the last."""

    def __init__(
        self,
        job: JobSpec,
        job_path: Path,
        directory: RunDirectory,
        console: Console,
        listener: socket.socket | None,
    ) -> None:
        """``listener`` is the coordinator's socket, None when another host runs the coordinator."""
        self._job = job
        self._job_path = job_path
        self._directory = directory
        self._console = console
        self._listener = listener
        self._children = Children()
        self._agents: dict[int, _Agent] = {}
        self._coordinator: Child | None = None
        self._served = False  # a coordinator has ever answered
        self._restarts: defaultdict[str, Restarts] = defaultdict(Restarts)  # by a child's name
        self._nodes_started = False
        self._injector: Child | None = None
        self._channel: Channel | None = None
        self._news = _News()
        self._reason_later: asyncio.TimerHandle | None = None
        self._exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._relays: list[tuple[int, int, int]] = []  # (reading end, writing end, whose place)
        self._out: int | None = None  # where agents and ranks print; None: where we do
        self._err: int | None = None
        self._incarnation = 0  # newest that an agent got
        self._mark = ""  # of the launch that was joined

    async def run(self) -> int:
        """Run the job to its end; returns the exit code, with every process gone."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._children.reap)
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a background job
                loop.add_signal_handler(number, self._stop, number)
        self._out, self._err = self._relay(1), self._relay(2)
        if self._listener is not None:
            self._start("coordinator", self._start_coordinator)
            self._start_nodes()
        self._spawn(self._follow_coordinator())
        self._spawn(self._replace_silent())
        try:
            code = await self._exit_code
            if code != EXIT_FORCED:
                await self._let_end()
        finally:
            await self._kill_everything()
            self._tell_missed_faults()
            if self._reason_later is not None:
                self._reason_later.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._close_relays()
            for number in (signal.SIGCHLD, *_STOP_SIGNALS):
                loop.remove_signal_handler(number)
            self._console.close()
        return code

    def _local_nodes(self) -> range:
        launch = self._job.config.launch
        if launch.local_nodes or launch.nnodes == 1:
            return range(self._job.all_nodes)
        return range(launch.node_rank, launch.node_rank + 1)

    def _end(self, code: int) -> None:
        if not self._exit_code.done():
            self._exit_code.set_result(code)

    def _fail(self, sentence: str, code: int = EXIT_FAILED) -> None:
        if not self._exit_code.done():
            self._console.line(f"ftrain: {sentence}", "error")
            self._end(code)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"internal error: {error!r}")

    # ------------------------------------------------------------------ processes

    def _start(self, name: str, start: Callable[[], None], *, again: bool = False) -> None:
        """Start a process; what the system has no room for now is tried until it has."""
        if self._exit_code.done():
            return
        try:
            start()
        except OSError as error:
            if not again:
                why = error.strerror or error
                why = f"{error.filename}: {why}" if error.filename else why
                self._console.line(
                    f"ftrain: the {name} can't be started ({why}): it is tried again", "warning"
                )
            later = partial(self._start, name, start, again=True)
            asyncio.get_running_loop().call_later(_REFUSED_PAUSE_S, later)

    def _start_nodes(self) -> None:
        self._nodes_started = True
        for node in self._local_nodes():
            self._start(f"agent of node {node}", partial(self._start_agent, node))
        if self._job.config.faults.schedule or self._job.config.faults.replay:
            self._start("fault injector", self._start_injector)

    def _start_coordinator(self) -> None:
        assert self._listener is not None
        fd = self._listener.fileno()
        self._coordinator = self._children.start(
            "coordinator",
            "ftrain.launch.coordinator",
            ["--job", str(self._job_path), "--listen-fd", str(fd)],
            self._coordinator_ended,
            pass_fds=[fd],
            pulse=Pulse(self._job.config.detection.node_lease_s, _COORDINATOR_LEASES),
        )

    def _coordinator_ended(self, child: Child) -> None:
        if self._exit_code.done():
            return
        code = child.popen.returncode
        if code == USAGE and not self._served:
            self._end(USAGE)  # its sentence was printed; another one would say the same
            return
        restarts = self._restarts[child.name]
        pause_s = restarts.ended(child, explained=is_held(self._directory.path))
        if why := restarts.hopeless(child):
            self._fail(why, USAGE if code == USAGE else EXIT_FAILED)
            return
        self._spawn(self._restart_coordinator(pause_s))

    async def _restart_coordinator(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        while is_held(self._directory.path):
            await asyncio.sleep(_HOLD_POLL_S)
        self._start("coordinator", self._start_coordinator)

    def _next_incarnation(self) -> int:
        """A number that no agent of this job had before: the time, which no other host has to know
        of and no lost directory can set back."""
        self._incarnation = max(self._incarnation + 1, time.time_ns())
        return self._incarnation

    def _start_agent(self, node: int) -> None:
        incarnation = self._next_incarnation()
        arguments = ["--job", str(self._job_path), "--node", str(node)]

        def ended(_: Child) -> None:
            self._agent_ended(self._agents[node])

        child = self._children.start(
            f"agent of node {node}",
            "ftrain.launch.agent",
            [*arguments, "--incarnation", str(incarnation)],
            ended,
            stdout=self._out,
            stderr=self._err,
            pulse=Pulse(self._job.config.detection.node_lease_s, _AGENT_LEASES),
        )
        self._agents[node] = _Agent(node, incarnation, child, node in self._agents)

    def _agent_ended(self, agent: _Agent) -> None:
        if self._exit_code.done():
            return
        if agent.child.popen.returncode < 0:
            self._replace_agent(agent)
        else:
            self._spawn(self._agent_left(agent))

    def _replace_agent(self, agent: _Agent) -> None:
        child = agent.child
        cause = f"its agent {child.lost}" if child.lost else child.ended
        self._tell(NodeGone(agent.node, agent.incarnation, cause))
        restarts = self._restarts[child.name]
        pause_s = restarts.ended(child)
        if why := restarts.hopeless(child):
            self._fail(why)
            return
        agent.replaced = True
        start = partial(self._start, child.name, partial(self._start_agent, agent.node))
        asyncio.get_running_loop().call_later(pause_s, start)

    async def _agent_left(self, agent: _Agent) -> None:
        """An agent ended of itself: told to, or by a mistake of ours. Who knows is the coordinator,
        whose word may be under way."""
        await asyncio.sleep(_WORD_S)
        if self._exit_code.done():
            return
        code = agent.child.popen.returncode
        if code == USAGE and not agent.successor:
            self._end(USAGE)  # its sentence was printed; another one would say the same
        elif code not in _FINAL_CODES:
            self._replace_agent(agent)
        elif all(a.child.ended and not a.replaced for a in self._agents.values()):
            await asyncio.sleep(_GRACE_AFTER_END_S)  # the coordinator may be restarting
            self._end(max(a.child.popen.returncode for a in self._agents.values()))

    async def _replace_silent(self) -> None:
        """What lives and does nothing is as lost as what died, and replaced in the same way."""
        while True:
            await asyncio.sleep(PERIOD_S)
            for child in self._children.kill_silent():
                self._console.line(
                    f"ftrain: the {child.name} {child.lost}: it is being replaced", "warning"
                )

    def _start_injector(self) -> None:
        self._injector = self._children.start(
            "fault injector",
            "ftrain.recovery.injection",
            ["--job", str(self._job_path)],
            self._injector_ended,
        )

    def _injector_ended(self, child: Child) -> None:
        if child.popen.returncode and not self._exit_code.done():
            self._console.line(f"ftrain: the fault injector ended: {child.ended}", "warning")

    def _tell_missed_faults(self) -> None:
        """A fault beyond the end of the run proves nothing, and should not seem to have done so."""
        if self._injector is None or len(self._local_nodes()) < self._job.all_nodes:
            return  # other hosts' injectors have done their part
        missed = []
        with suppress(FtrainError):  # a replay that can't be read: the injector has said so
            missed = never_struck(self._job, self._injector.pid)
        if missed:
            what = ", ".join(missed)
            self._console.line(f"ftrain: never struck, the run was over before: {what}", "warning")

    async def _let_end(self) -> None:
        """The job is over: agents end their ranks, then themselves."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _GRACE_AFTER_END_S
        while not all(a.child.ended for a in self._agents.values()) and loop.time() < deadline_s:
            await asyncio.sleep(0.01)  # SIGCHLD is handled meanwhile

    async def _kill_everything(self) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _KILL_S
        self._children.kill_all()
        while not self._children.none_left() and loop.time() < deadline_s:
            await asyncio.sleep(0.005)

    # ------------------------------------------------------------------ stopping

    def _stop(self, number: signal.Signals) -> None:
        if self._exit_code.done():
            return  # how it ended is said; what still runs ends within seconds
        interrupt = number == signal.SIGINT
        if self._news.stop is not None:
            if interrupt:
                text = "ftrain: forced to stop: what is not durable is lost"
                self._console.line(text, "warning")
                self._end(EXIT_FORCED)
            return
        if not self._agents:
            self._console.line(f"ftrain: {number.name}: nothing runs here yet")
            self._end(EXIT_SAVED)
            return
        cause = "Ctrl-C" if interrupt else number.name
        grace_s = self._job.config.launch.stop_grace_s
        hint = "; once more to force" if interrupt else ""
        self._console.line(f"ftrain: {cause}: saving and stopping (up to {grace_s:g} s{hint})")
        self._tell(StopRequest(cause))
        self._spawn(self._stop_limit(grace_s))

    async def _stop_limit(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s + _GRACE_AFTER_END_S)
        self._fail(
            f"nothing was saved within {grace_s:g} s of the stop request: give it longer with"
            " launch.stop_grace_s"
        )

    # ------------------------------------------------------------------ the coordinator's word

    def _tell(self, message: NodeGone | StopRequest) -> None:
        if isinstance(message, NodeGone):
            self._news.gone.append(message)
        else:
            self._news.stop = message
        if self._channel is not None and not self._channel.closed:
            try:
                self._channel.post(message)
            except FtrainError:
                pass  # said again on the next connection

    async def _follow_coordinator(self) -> None:
        """Stay connected to the coordinator and print what it says, until the job is over."""
        launch = self._job.config.launch
        identity = Identity(self._job.run_id, "front", launch.node_rank, os.getpid())
        secret = bytes.fromhex(self._job.secret)
        loop = asyncio.get_running_loop()
        absence = _Absence(loop.time(), launch.join_timeout_s)
        pause_s = 0.02
        while True:
            try:
                self._channel = await connect(self._job.coordinator, identity, secret)
                self._served, pause_s = True, 0.02
                if self._listener is None:
                    self._channel.post(join_request(self._job))
                for message in self._news.messages():
                    self._channel.post(message)
                await self._listen(self._channel)
            except AuthenticationError as error:
                self._fail(str(error), error.exit_code)
                return
            except FtrainError:
                pass  # it is being restarted, or not up yet
            finally:
                if self._channel is not None:
                    self._channel.close()
                    self._channel = None
                    absence = _Absence(loop.time(), launch.rejoin_timeout_s)
            if self._listener is None:
                self._wait_longer(absence, loop.time())
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.5)

    def _wait_longer(self, absence: _Absence, now_s: float) -> None:
        """Another host's coordinator is not there: say so, and give up after a while."""
        where, limit_s = self._job.coordinator, absence.limit_s
        if now_s > absence.since_s + limit_s:
            self._fail(
                f"the coordinator at {where} was not there for {limit_s:g} s: see whether node 0's"
                f" launch runs there and can be reached, then launch this node again"
            )
        elif now_s > absence.since_s + _WAITING_S and not absence.said:
            absence.said = True
            self._console.line(
                f"ftrain: waiting for the coordinator at {where}, up to {limit_s:g} s"
            )

    async def _join(self, answer: JoinAnswer) -> None:
        """The coordinator knows who we are: start this host's node, or say what is in the way."""
        why = answer.refused
        if not why and answer.mark != self._mark:  # of another launch than the one we joined
            why = await find_mark(self._job, answer)
        if why:
            self._fail(why, USAGE)
            return
        self._mark = answer.mark
        if not self._nodes_started:
            self._incarnation = answer.incarnation  # also if this host's clock was set back
            self._start_nodes()

    async def _listen(self, channel: Channel) -> None:
        while True:
            message = await channel.receive()
            if isinstance(message, JoinAnswer):
                await self._join(message)
            if not isinstance(message, Notice):
                continue
            if message.kind == "phase":
                self._phase_began(message)
            elif message.kind == "end":
                if message.text:
                    self._console.line(message.text, "info")
                code = message.data.get("exit_code")
                self._end(code if isinstance(code, int) else EXIT_FAILED)
            else:
                self._console.notice(message)

    def _phase_began(self, notice: Notice) -> None:
        """Say what the job waits for, once it has waited for a while."""
        if self._reason_later is not None:
            self._reason_later.cancel()
            self._reason_later = None
        if notice.data.get("phase") in _WAITING_PHASES:
            loop = asyncio.get_running_loop()
            say = f"ftrain: {notice.text}"
            self._reason_later = loop.call_later(_WAITING_S, self._console.line, say)

    # ------------------------------------------------------------------ the ranks' output

    def _relay(self, fd: int) -> int | None:
        """On a terminal the ranks' output comes through us, so that it and the progress line do not
        write over each other; otherwise the agents inherit ours."""
        if not (self._console.in_place and os.isatty(fd)):
            return None
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reading, False)
        self._relays.append((reading, writing, fd))
        asyncio.get_running_loop().add_reader(reading, self._pass_on, reading, fd)
        return writing

    def _pass_on(self, reading: int, fd: int) -> None:
        try:
            data = os.read(reading, _RELAY_BYTES)
        except BlockingIOError:
            return
        if data:
            self._console.output(data, fd)

    def _close_relays(self) -> None:
        loop = asyncio.get_running_loop()
        for reading, writing, fd in self._relays:
            loop.remove_reader(reading)
            self._pass_on(reading, fd)
            os.close(reading)
            os.close(writing)
