"""The worker server: imports torch once, then forks ranks in milliseconds.

``python -m ftrain.launch.worker_server --fd N``, started by an agent; N is a local socket to it.
It stays single-threaded, because a fork copies only the calling thread; it touches neither an
accelerator nor anything else that does not survive a fork.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import io
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

from ftrain.comms.environment import inherited_environment, replace_environment
from ftrain.comms.errors import PeerLostError
from ftrain.comms.local import LocalSocket, from_descriptor
from ftrain.comms.process import (
    STOP_SIGNALS,
    describe_exit,
    die_with_parent,
    ignore_stop_signals,
    set_oom_score_adj,
)
from ftrain.comms.telemetry import TelemetryPage, Word
from ftrain.launch import rank_main
from ftrain.launch.stores import serve_store
from ftrain.launch.worker_messages import (
    FDS_PER_RANK,
    TELEMETRY_FD,
    Forked,
    ForkFailed,
    ForkRequest,
    Preload,
    RankSpec,
    ScriptEdited,
    ServerReady,
    StoreRequest,
    StoreServed,
)

STACK_SIGNAL = signal.SIGRTMIN + 1  # a rank writes all its stacks to its stderr
_AGENT_GONE = 3  # exit code of a copy
_RANK_OOM_SCORE = 300  # a rank is killed before the processes that can bring it back

# What a training script pulls in by its first step; most of it through the constructor of
# DistributedDataParallel, which imports torch._dynamo and FSDP (1.8 s on the machine measured).
PRELOADED = (
    "torch",
    "numpy.random",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.utils.data",
    "torch.utils.data.distributed",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.nn",
    "torch.distributed.tensor.parallel",
    "torch.nn.attention",
    "torch.profiler._cupti_monitor",
    "multiprocessing.popen_fork",
    "multiprocessing.queues",
    "multiprocessing.synchronize",
    "ftrain.runtime.session",
)


class ScriptCache:
    """The compiled script, compiled again only when the file changes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._code: types.CodeType | None = None

    def refresh(self) -> bool:
        """Compile if needed; True when the script was edited since the last call."""
        try:
            status = os.stat(self.path)
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return False
            edited, self._stamp, self._code = self._stamp is not None, stamp, None
            self._code = rank_main.compile_script(self.path)
        except (OSError, SyntaxError, ValueError):
            return False  # each rank meets the same error and reports it with its traceback
        return edited

    @property
    def code(self) -> types.CodeType | None:
        """The code object, or None when the script does not compile."""
        return self._code


class WorkerServer:
    """Imports once, then keeps a copy of itself ready that answers the next request.

    The copy was forked ahead of time, forks the ranks, or a formation's store, and ends, which
    makes them the agent's children.  A rank that the server forked itself would end, or lose its
    parent, with the server.
    """

    def __init__(self, socket: LocalSocket) -> None:
        self._socket = socket
        self._agent_pid = socket.peer_pid
        self._program = rank_main.Program((), module=False)
        self._script: ScriptCache | None = None

    def serve(self) -> None:
        """Answer the agent until it closes the connection."""
        order = self._receive(Preload)[0]
        self._preload(order)
        while True:
            threads = thread_count()
            if threads != 1:
                self._refuse(
                    f"the worker server runs {threads} threads, so it can't fork safely: one of "
                    "the preloaded modules starts a thread at import, take it out of launch.preload"
                )
                continue
            if self._script is not None:
                self._script.refresh()
            server = os.getpid()
            try:
                copy = os.fork()
            except OSError as error:
                self._refuse(f"the worker server can't fork: {error.strerror}")
                continue
            if copy == 0:
                try:
                    die_with_parent(server)
                    self._serve_one()
                except PeerLostError:
                    os._exit(_AGENT_GONE)
                except BaseException:  # the copy's root: what goes past it would serve here
                    traceback.print_exc()
                finally:
                    os._exit(1)
            status = os.waitpid(copy, 0)[1]
            if status != 0 and os.waitstatus_to_exitcode(status) == _AGENT_GONE:
                raise PeerLostError("the agent is gone")
            if status != 0:
                self._socket.send(ForkFailed(0, f"forking ended with {describe_exit(status)}"))

    def _receive(self, *kinds: type[Any]) -> tuple[Any, list[int]]:
        """The next message of one of these kinds, with its descriptors."""
        while True:
            message, fds = self._socket.receive()
            if isinstance(message, kinds):
                return message, fds
            for fd in fds:
                os.close(fd)

    def _preload(self, order: Preload) -> None:
        began = time.monotonic()
        self._program = rank_main.Program(order.argv, order.module)
        if not order.module:
            sys.path.insert(0, os.path.dirname(os.path.realpath(order.argv[0])))
            self._script = ScriptCache(order.argv[0])
        problems = import_all(PRELOADED, required=False) + import_all(order.modules, required=True)
        if not order.module:
            del sys.path[0]
        gc.collect()
        gc.freeze()  # the collector of a rank leaves these pages shared
        self._socket.send(ServerReady(time.monotonic() - began, tuple(problems)))

    def _refuse(self, why: str) -> None:
        request, fds = self._receive(ForkRequest, StoreRequest)
        for fd in fds:
            os.close(fd)
        if isinstance(request, StoreRequest):
            self._socket.send(StoreServed(0, 0, why))
        else:
            self._socket.send(ForkFailed(request.epoch, why))

    def _serve_one(self) -> NoReturn:
        """The copy's life: wait for a request, fork its ranks or a store, end."""
        request, fds = self._receive(ForkRequest, StoreRequest)
        if isinstance(request, StoreRequest):
            self._fork_store(request)
        if self._script is not None and self._script.refresh():
            self._socket.send(ScriptEdited(self._script.path))
        for index, spec in enumerate(request.ranks):
            try:
                pid = os.fork()
            except OSError as error:
                self._socket.send(ForkFailed(request.epoch, f"can't fork: {error.strerror}"))
                break
            if pid == 0:
                try:
                    self._become_rank(request, spec, fds, index)
                except BaseException as error:  # the root of the rank's process
                    rank_main.describe(error, spec.error_file)
                finally:
                    os._exit(1)
            self._socket.send(Forked(request.epoch, spec.rank, pid, time.monotonic_ns()))
        os._exit(0)

    def _fork_store(self, request: StoreRequest) -> NoReturn:
        try:
            pid = os.fork()
        except OSError as error:
            self._socket.send(StoreServed(0, 0, f"can't fork: {error.strerror}"))
            os._exit(0)
        if pid == 0:
            try:
                os.setsid()
                _await_adoption(self._agent_pid)
                die_with_parent(self._agent_pid)
                serve_store(self._socket, request.bind)
            finally:
                os._exit(1)
        os._exit(0)

    def _become_rank(
        self, request: ForkRequest, spec: RankSpec, fds: list[int], index: int
    ) -> NoReturn:
        os.setsid()  # a group of its own: the agent ends it together with its DataLoader workers
        own = fds[FDS_PER_RANK * index : FDS_PER_RANK * (index + 1)]
        _take_descriptors(own, fds, self._socket)
        faulthandler.enable(file=2)
        faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)
        _guard_descendants()
        replace_environment({**inherited_environment(), **request.environment, **spec.environment})
        _reseed()
        _await_adoption(self._agent_pid)
        die_with_parent(self._agent_pid)
        _mark_started()
        code = self._script.code if self._script is not None else None
        program = rank_main.Program(self._program.argv, self._program.module, code)
        rank_main.run(program, spec.error_file)


def import_all(names: tuple[str, ...], *, required: bool) -> list[str]:
    """Import modules; what fails is reported, not raised, because the script will say it better."""
    problems = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if required or not _is_part_of(name, error.name):
                problems.append(f"module {name} can't be preloaded: {error}")
        except (Exception, SystemExit) as error:  # an import runs anybody's code
            problems.append(f"module {name} can't be preloaded: {type(error).__name__}: {error}")
    return problems


def _is_part_of(name: str, missing: str | None) -> bool:
    """``missing`` is ``name`` or one of its parents: this version simply has no such module."""
    return missing is not None and (name == missing or name.startswith(f"{missing}."))


def thread_count() -> int:
    """Threads of this process, native ones included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Threads:"):
            return int(line.split()[1])
    return 1


def _take_descriptors(own: list[int], received: list[int], socket: LocalSocket) -> None:
    socket.close()  # first, because it may have the page's number
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(own[0], 1)
    os.dup2(own[1], 2)
    # With many ranks the descriptors received, and the page's own, reach as far.
    if own[2] != TELEMETRY_FD:
        os.dup2(own[2], TELEMETRY_FD, inheritable=False)
    for fd in (null, *received):
        if fd != TELEMETRY_FD:
            os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _guard_descendants() -> None:
    """Stop signals are the agent's business here, but not in processes that the script starts.

    A handler that does nothing (instead of "ignore") is undone by exec; forked children undo it
    here.  They also die with the rank: DataLoader workers would look for it every 5 s only.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _do_nothing)
    rank = os.getpid()
    forking = threading.local()

    def before() -> None:
        forking.from_main = threading.current_thread() is threading.main_thread()
        # or else one that comes before the child has undone the handler would be lost
        forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    def in_child() -> None:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is _do_nothing:
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
        if forking.from_main and os.getppid() == rank:  # ends with the forking thread
            die_with_parent(rank)
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)


def _do_nothing(number: int, frame: types.FrameType | None) -> None:
    """The agent has the same signal, and stops the whole group at one boundary."""


def _reseed() -> None:
    """Give the rank random states of its own, as every fresh interpreter has."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()


def _await_adoption(agent_pid: int) -> None:
    """Wait until the process between has ended and this one is the agent's child."""
    parent = os.getppid()
    if parent == agent_pid:
        return
    try:
        watched = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    if os.getppid() == parent:
        select.select([watched], [], [], 10.0)
    os.close(watched)


def _mark_started() -> None:
    set_oom_score_adj(_RANK_OOM_SCORE)
    page = TelemetryPage(TELEMETRY_FD)
    page[Word.PID] = os.getpid()
    page[Word.SCRIPT_NS] = time.monotonic_ns()
    page.close()


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="ftrain.launch.worker_server")
    parser.add_argument("--fd", type=int, required=True)
    socket = from_descriptor(parser.parse_args().fd)
    die_with_parent(socket.peer_pid)
    ignore_stop_signals()  # the agent decides when this process ends
    try:
        WorkerServer(socket).serve()
    except PeerLostError:
        return  # the agent needs no more ranks


if __name__ == "__main__":
    main()
