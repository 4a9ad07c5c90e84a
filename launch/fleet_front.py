"""``ftrain launch --replica-groups N``: a coordinator and N launches, one for each replica group.

Every group is a whole job of its own, with its run directory (``<run_dir>/group-K``), agents and
snapshots.  This front starts them, shows what they say, passes stop signals on, and starts again
what was killed; what the groups do together is between their ranks and the coordinator.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from ftrain.comms.addresses import bound_address, check_bind, format_address, listen_tcp
from ftrain.comms.environment import (
    SECRET_VARIABLE,
    default_run_dir,
    inherited_environment,
    secret_from_environment,
)
from ftrain.comms.errors import UsageError
from ftrain.comms.process import available_memory_bytes, describe_returncode, python_command
from ftrain.comms.protocol.records import EXIT_FAILED
from ftrain.configs.schema import FtrainConfig
from ftrain.launch.console import Console
from ftrain.launch.fleet_job import FleetJob
from ftrain.launch.options import LaunchRequest
from ftrain.launch.own_process import in_own_process
from ftrain.launch.script import Script
from ftrain.snapshot.memory import in_words

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_GROUP_BYTES = 256 * 1024 * 1024  # agent, snapshot manager, worker server
_PAUSE_S = 0.2  # before what was killed is started again
_RESTARTS_MAX = 20
_OWN = ("fleet.", "launch.run_dir=")


def launch_fleet(request: LaunchRequest, config: FtrainConfig, script: Script) -> int:
    """Run a fleet; returns the exit code: 0 when every group ended well.

    Raises UsageError and RunDirectoryError for what can be known before anything is started.
    """
    fleet = config.fleet
    if config.launch.nproc_per_node != 1 or config.launch.nnodes != 1 or config.launch.local_nodes:
        raise UsageError(
            "a replica group has one rank in this version: leave --nproc-per-node, --nnodes and "
            "--local-nodes out"
        )
    needed, free = fleet.groups * _GROUP_BYTES, available_memory_bytes()
    if needed > free:
        raise UsageError(
            f"{fleet.groups} replica groups on this machine take {in_words(needed)} before training"
            f" begins, and {in_words(free)} are free: ask for fewer"
        )
    given = secret_from_environment()
    check_bind(fleet.bind, given is not None)
    secret = bytes.fromhex(given).decode() if given else secrets.token_hex(32)
    run_dir = Path(config.launch.run_dir or default_run_dir(script.stem)).absolute()
    directory = run_dir / "fleet"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{directory} can't be made ({error.strerror}): choose another --run-dir"
        ) from None
    job = FleetJob(
        run_id=fleet.run_id or script.stem,
        secret=secret,
        directory=str(directory),
        width=1,
        config=fleet,
    )
    with listen_tcp(format_address(fleet.bind, fleet.port)) as listener:
        front = FleetFront(request, config, job, run_dir, listener)
        return in_own_process(lambda: asyncio.run(front.run()))


class FleetFront:
    """One launch of a fleet."""

    def __init__(
        self,
        request: LaunchRequest,
        config: FtrainConfig,
        job: FleetJob,
        run_dir: Path,
        listener: socket.socket,
    ) -> None:
        self._request, self._config, self._job = request, config, job
        self._run_dir, self._listener = run_dir, listener
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = False
        self._over = False

    async def run(self) -> int:
        """Until the last group has ended."""
        self._console = Console(progress_piped_every_s=self._config.events.progress_piped_every_s)
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._stop, number)
        path = str(self._job.write())
        fd = self._listener.fileno()
        coordinator = loop.create_task(
            self._keep(
                "fleet",
                ["-m", "ftrain.launch.fleet_coordinator", "--job", path, "--listen-fd", str(fd)],
                fd,
            )
        )
        groups = [self._group(number) for number in range(self._config.fleet.groups)]
        self._console.line(
            f"ftrain: {len(groups)} replica groups in {self._run_dir}; others join with "
            f"--join {self._address}"
        )
        try:
            codes = await asyncio.gather(*groups)
        finally:
            self._over = True
            for process in self._running.values():
                process.kill()
            await coordinator
            self._console.close()
        return max(codes)

    @property
    def _address(self) -> str:
        fleet, address = self._config.fleet, bound_address(self._listener)
        return (
            format_address(fleet.host, int(address.rpartition(":")[2])) if fleet.host else address
        )

    def _group(self, number: int) -> Coroutine[Any, Any, int]:
        own = [o for o in self._request.overrides if not o.lstrip("+").startswith(_OWN)]
        kept = [
            o
            for o in self._request.overrides
            if o.lstrip("+").startswith(("fleet.bind", "fleet.host", "fleet.join_timeout_s"))
        ]
        arguments = [
            *own,
            *kept,
            f"launch.run_dir={self._run_dir / f'group-{number}'}",
            f"fleet.coordinator={self._address}",
            f"fleet.group={number}",
            f"fleet.run_id={self._job.run_id}",
        ]
        if self._config.launch.threads_per_rank == 0:
            cores = len(os.sched_getaffinity(0))
            each = max(1, cores // self._config.fleet.groups)
            arguments.append(f"launch.threads_per_rank={each}")
        module = ["-m"] if self._request.module else []
        script = [*module, "--", *self._request.argv]
        return self._keep(
            f"group {number}", ["-m", "ftrain.launch.cli", "launch", *arguments, *script]
        )

    async def _keep(self, name: str, arguments: list[str], fd: int = -1) -> int:
        """Run a process, again when it was killed; returns the code that it ended with."""
        code = EXIT_FAILED
        for _ in range(_RESTARTS_MAX):
            code = await self._run_once(name, arguments, fd)
            if self._over or self._stopping or code >= 0:
                break
            self._console.line(
                f"ftrain: {name}: its launch {describe_returncode(code)}: it is started again",
                "warning",
            )
            await asyncio.sleep(_PAUSE_S)
        return code if code >= 0 else EXIT_FAILED

    async def _run_once(self, name: str, arguments: list[str], fd: int) -> int:
        environment = {**inherited_environment(), SECRET_VARIABLE: self._job.secret}
        process = await asyncio.create_subprocess_exec(
            *python_command(),
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[fd] if fd >= 0 else [],
            process_group=0,
        )
        self._running[name] = process
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                text = line.decode(errors="replace").rstrip()
                self._console.line(f"ftrain: {text}" if fd >= 0 else f"[{name}] {text}")
        except ValueError:  # a line longer than the buffer: the rest is not shown
            pass
        code = await process.wait()
        del self._running[name]
        return code

    def _stop(self, number: signal.Signals) -> None:
        """Every group saves and stops; a second Ctrl-C forces them, as it does one launch."""
        self._stopping = True
        for name, process in self._running.items():
            if name != "fleet" and process.returncode is None:
                os.kill(process.pid, number)
