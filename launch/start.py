"""``ftrain launch``: everything between the command line and the front."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ftrain.checkpoint.durable import DurableStore
from ftrain.comms.addresses import (
    bound_address,
    check_bind,
    format_address,
    is_loopback,
    listen_tcp,
    loopback_behind,
    parse_address,
)
from ftrain.comms.environment import (
    default_run_dir,
    rack_from_environment,
    secret_from_environment,
)
from ftrain.comms.errors import UsageError
from ftrain.comms.events import EventLog
from ftrain.comms.job import JobSpec, write_job
from ftrain.comms.process import available_memory_bytes
from ftrain.comms.protocol.records import EXIT_FORCED
from ftrain.configs.schema import EventsConfig, FtrainConfig, LaunchConfig
from ftrain.launch.console import Console
from ftrain.launch.options import LaunchRequest, parse_launch
from ftrain.launch.own_process import in_own_process
from ftrain.launch.remote_copies import copy_last, fetch_newest
from ftrain.launch.resolve import resolve, to_yaml
from ftrain.launch.run_directory import (
    RunDirectory,
    check_log_directory,
    check_versions_directory,
    open_run_directory,
)
from ftrain.launch.script import Script, check_script
from ftrain.recovery.faults import check_schedule
from ftrain.snapshot.memory import in_words

_NODE_BYTES = 256 * 1024 * 1024  # agent, snapshot manager and a worker server with torch in it
_LOOPBACK = LaunchConfig().bind


def launch(tokens: Sequence[str]) -> int:
    """Run ``ftrain launch`` with these arguments; returns the exit code.

    Raises a typed error in one sentence for all that can be known before anything is started.
    """
    request = parse_launch(tokens)
    config = resolve(request.overrides)
    if request.print_config:
        sys.stdout.write(to_yaml(config))
        return 0
    if not request.argv:
        raise UsageError(
            "no script: ftrain launch [options] [group=choice key=value ...] train.py; see"
            " ftrain launch --help"
        )
    script = check_script(request.argv[0], module=request.module)
    if config.fleet.groups:
        from ftrain.launch.fleet_front import launch_fleet

        return launch_fleet(request, config, script)
    settings = config.launch
    nodes = settings.local_nodes or settings.nnodes
    world_size = nodes * settings.nproc_per_node
    check_schedule(config.faults, nodes=nodes + settings.spares, world_size=world_size)
    _check_spares(settings)
    _check_room(settings)
    secret = _secret(settings)
    notes = (*request.notes, *_check_reachable(settings))
    listener = _listen(settings, secret is not None)
    directory: RunDirectory | None = None
    try:
        directory = open_run_directory(
            Path(settings.run_dir or default_run_dir(script.stem)),
            script,
            world_size=world_size,
            run_id=settings.run_id,
            node_rank=settings.node_rank,
        )
        if config.checkpoint.enabled and listener is not None:
            check_versions_directory(_durable_folder(config, directory))
            directory.hold_versions(_durable_folder(config, directory))
        if config.checkpoint.remote and listener is not None:
            asyncio.run(_fetch(config, directory))
        secret = secret or secrets.token_hex(32)
        job = _job(request, script, config, directory, secret, listener)
        check_log_directory(Path(job.config.launch.log_dir))
        return in_own_process(lambda: asyncio.run(_run(job, directory, listener, notes)))
    finally:
        if listener is not None:
            listener.close()
        if directory is not None:
            directory.close()


async def _run(
    job: JobSpec,
    directory: RunDirectory,
    listener: socket.socket | None,
    notes: Sequence[str],
) -> int:
    from ftrain.launch.front import USAGE, Front

    events = job.config.events
    job = dataclasses.replace(job, front_pid=os.getpid())
    console = Console(progress_piped_every_s=events.progress_piped_every_s)
    for note in (*notes, *directory.notes):
        console.line(f"ftrain: {note}")
    name = (
        "job.json" if not job.config.launch.node_rank else f"job-{job.config.launch.node_rank}.json"
    )
    code = await Front(job, write_job(job, name), directory, console, listener).run()
    durable = job.config.checkpoint
    copies = durable.remote and durable.remote_end_s > 0 and listener is not None
    if copies and code not in (USAGE, EXIT_FORCED):
        with _said(events) as say, _event_log(job) as log:
            await copy_last(durable, Path(durable.dir), job.run_id, log, say)
    return code


async def _fetch(config: FtrainConfig, directory: RunDirectory) -> None:
    """A run directory gets the newest version that was copied away, if it has no newer one."""
    folder = _durable_folder(config, directory)
    with _said(config.events) as say:
        run_id = await fetch_newest(config.checkpoint, DurableStore(folder), say)
    if run_id and not config.launch.run_id:
        directory.adopt(run_id)


@contextmanager
def _said(events: EventsConfig) -> Iterator[Callable[[str], None]]:
    """Where to say something while no front does."""
    console = Console(progress_piped_every_s=events.progress_piped_every_s)
    try:
        yield lambda text: console.line(f"ftrain: {text}")
    finally:
        console.close()


@contextmanager
def _event_log(job: JobSpec) -> Iterator[EventLog]:
    """The run's, whose writer, the coordinator, is gone."""
    bytes_max = job.config.events.bytes_max
    try:
        log = EventLog(Path(job.run_dir, "events.jsonl"), bytes_max)
    except OSError:  # to copy is more than to tell of it
        log = EventLog(os.devnull, bytes_max)
    try:
        yield log
    finally:
        log.close()


def _durable_folder(config: FtrainConfig, directory: RunDirectory) -> Path:
    return Path(config.checkpoint.dir or directory.path / "checkpoints").absolute()


def _secret(settings: LaunchConfig) -> str | None:
    """The user's secret as hex; None when this launch may make its own."""
    secret = secret_from_environment()
    if settings.nnodes > 1 and not settings.local_nodes:
        for key, option in (("rdzv_endpoint", "--rdzv-endpoint HOST:PORT"), ("run_id", "--run-id")):
            if not getattr(settings, key):
                raise UsageError(f"--nnodes {settings.nnodes} needs {option}, equal on every node")
        if secret is None:
            raise UsageError(
                f"--nnodes {settings.nnodes} needs a secret: set FTRAIN_SECRET to the same value"
                " on every node"
            )
    return secret


def _check_spares(settings: LaunchConfig) -> None:
    if settings.spares and settings.nnodes == 1 and not settings.local_nodes:
        raise UsageError(
            f"--spares {settings.spares} on one node has nothing to spare: say with --local-nodes"
            " or --nnodes on how many nodes the ranks run"
        )


def _check_room(settings: LaunchConfig) -> None:
    """Refuse more nodes than this machine has memory for: it would be lost to its user as well."""
    nodes = settings.local_nodes + settings.spares if settings.local_nodes else 1
    free_bytes = available_memory_bytes()
    if nodes > 1 and nodes * _NODE_BYTES > free_bytes:
        raise UsageError(
            f"{nodes} nodes on this machine (--local-nodes and --spares) take"
            f" {in_words(nodes * _NODE_BYTES)} before training begins, and {in_words(free_bytes)}"
            " are free: ask for fewer"
        )


def _check_reachable(settings: LaunchConfig) -> tuple[str, ...]:
    """Refuse addresses at which other hosts would find themselves instead of this one.

    A loopback address that was asked for is only noted: it serves to try several hosts on one.
    """
    if settings.nnodes == 1 or settings.local_nodes:
        return ()
    endpoint = settings.rdzv_endpoint
    host = parse_address(endpoint)[0]
    if is_loopback(host):
        return (f"--rdzv-endpoint {endpoint} can be reached from this host only",)
    given = {f"--rdzv-endpoint {endpoint}": host}
    if settings.host != _LOOPBACK:  # the default: found out by the way to the endpoint
        given[f"--local-addr {settings.host}"] = settings.host
    for option, name in given.items():
        address = loopback_behind(name)
        if address:
            raise UsageError(
                f"{option}: on this host that is the loopback address {address}, at which other"
                " hosts can't reach it: give its address in the network, or mend /etc/hosts"
            )
    return ()


def _listen(settings: LaunchConfig, secret_given: bool) -> socket.socket | None:
    """The coordinator's listening socket, on the host that runs it.

    Its address is the rendezvous endpoint when there is one, else a free port of ``launch.bind``.
    """
    host, port = settings.bind, 0
    if settings.rdzv_endpoint:
        endpoint_host, port = parse_address(settings.rdzv_endpoint)
        if settings.bind == _LOOPBACK:
            host = endpoint_host
    if settings.nnodes > 1 and not settings.local_nodes:
        if port == 0:
            raise UsageError(f"--rdzv-endpoint {settings.rdzv_endpoint}: name a port other than 0")
        if settings.node_rank > 0:
            return None
    if settings.rdzv_endpoint:
        _check_host(settings.rdzv_endpoint, host)
    check_bind(host, secret_given)
    return listen_tcp(format_address(host, port))


def _check_host(endpoint: str, host: str) -> None:
    """Refuse a word that was meant as something else than a host."""
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"--rdzv-endpoint {endpoint}: there is no host '{host}' ({error.strerror}): write"
            " host:port with an address of this machine, or leave it out on one node"
        ) from None


def _job(
    request: LaunchRequest,
    script: Script,
    config: FtrainConfig,
    directory: RunDirectory,
    secret: str,
    listener: socket.socket | None,
) -> JobSpec:
    """The job with every default filled in."""
    settings = config.launch
    spread = settings.nnodes > 1 and not settings.local_nodes
    host = settings.host
    if spread and host == _LOOPBACK:
        host = _own_address(settings.rdzv_endpoint)
    settings = dataclasses.replace(
        settings,
        run_id=directory.record.run_id,
        run_dir=str(directory.path),
        log_dir=str(Path(settings.log_dir or directory.path / "logs").absolute()),
        host=host,
        bind=host if spread and settings.bind == _LOOPBACK else settings.bind,
    )
    durable = config.checkpoint
    durable = dataclasses.replace(durable, dir=str(_durable_folder(config, directory)))
    snapshot = config.snapshot
    snapshot = dataclasses.replace(snapshot, rack=snapshot.rack or rack_from_environment())
    if spread:
        coordinator = settings.rdzv_endpoint
    else:
        assert listener is not None
        coordinator = bound_address(listener)
    return JobSpec(
        run_id=directory.record.run_id,
        secret=secret,
        run_dir=str(directory.path),
        config=dataclasses.replace(config, launch=settings, checkpoint=durable, snapshot=snapshot),
        argv=request.argv,
        module=request.module,
        script_digest=script.digest,
        coordinator=coordinator,
        front_pid=0,  # said by the process that will be it
    )


def _own_address(endpoint: str) -> str:
    """This host's address on the way to ``endpoint``; no packet is sent."""
    host, port = parse_address(endpoint)
    if is_loopback(host):
        return _LOOPBACK
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(
            f"--rdzv-endpoint {endpoint} can't be reached from here ({error.strerror}): check the"
            " name, or say --local-addr"
        ) from None
