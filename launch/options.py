"""The command line of ``ftrain launch``: torchrun's option names, overrides, the script.

Three parts in this order; options and overrides may mix, and the first token that is neither is
the script.  Everything after it belongs to the script, verbatim.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ftrain.comms.errors import UsageError
from ftrain.launch.resolve import groups, is_override

EXAMPLES = """\
The command line has three parts:

  ftrain launch [options] [group=choice key=value ...] train.py [its arguments]
                ----1----  -------------2-------------  ----------3-----------

  1  options carry torchrun's names          --nproc-per-node 2 --tee 3
  2  configuration: a group's choice, or     checkpoint=off snapshot.slots=2
     any key (see them with --cfg job)
  3  the script (or -m module); all that     train.py --lr 0.1 data=big
     follows is the script's own

  ftrain launch --nproc-per-node 2 train.py --steps 200
  ftrain launch --nproc-per-node 2 faults=kill_rank faults.at_step=50 train.py
  ftrain launch checkpoint.durable_every_steps=500 checkpoint.keep_last=3 train.py
  ftrain launch checkpoint.remote=s3://bucket/prefix train.py
  ftrain launch --replica-groups 3 train.py       (Session(replicas="sync"))
  ftrain launch --local-nodes 2 --nproc-per-node 2 launch.max_restarts=5 -m my.package.train
  ftrain launch -- odd=name.py            (-- when the script's name contains '=')
  ftrain launch --cfg job snapshot=off    (print the resolved configuration)

Exit codes: 0 done · 1 the script failed, or the end of the run could not be saved · 2 wrong command
line, configuration or run directory, or no memory for snapshots · 75 stopped on request and saved,
run the same command again to go on · 130 forced to stop
"""

# Torchrun options that mean nothing here, and what to do instead.
_NO_MEANING = {
    "--rdzv-conf": "the rendezvous is ftrain's own and needs no settings: leave it out",
    "--monitor-interval": "a rank's end is noticed at once, without polling: leave it out",
    "--start-method": "ranks are forked from the worker server: leave it out",
    "--event-log-handler": "events are in <run dir>/events.jsonl: leave it out",
    "--role": "there is one role of worker: leave it out",
    "--local-ranks-filter": "choose with --tee instead, for example --tee 0:3",
    "--duplicate-stdout-filters": "every rank's log is in the log directory: leave it out",
    "--duplicate-stderr-filters": "every rank's log is in the log directory: leave it out",
    "--logs-specs": "logs have torchrun's default layout: leave it out",
    "--numa-binding": "binding to NUMA nodes is not supported in this version: leave it out",
    "--signals-to-handle": "SIGTERM, SIGINT and SIGUSR1 save and stop: leave it out",
    "--shutdown-timeout": "write launch.stop_grace_s=SECONDS instead",
}
_NO_MEANING_FLAGS = {
    "--no-python": "scripts are Python and run in ranks forked from the worker server",
    "--run-path": "scripts already run as __main__: leave it out",
    "--virtual-local-rank": "ranks see every device and choose by LOCAL_RANK: leave it out",
}
_NEAR = 0.75  # likeness from which an option may be meant; the script's own are less like ours
_USER_OF_URI = re.compile(r"://\S*@")
_BACKENDS = ("ftrain", "c10d", "static")


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What the user asked for, before the configuration is resolved."""

    overrides: tuple[str, ...]  # options as overrides, then the user's own
    argv: tuple[str, ...]  # script or module and its arguments; empty: none was given
    module: bool
    print_config: bool
    notes: tuple[str, ...]  # said once at start


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are :class:`UsageError`, one sentence each."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting; no password of a URI is repeated."""
        raise UsageError(f"{_USER_OF_URI.sub('://', message)}; see {self.prog} --help")


class _Refuse(argparse.Action):
    """An option of torchrun that ftrain does not take."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Raise the reason."""
        raise UsageError(f"{option_string} is torchrun's: {self.metavar}")


class _LaunchParser:
    """The options' parser, and which of them take a value."""

    def __init__(self) -> None:
        self.parser = Parser(
            prog="ftrain launch",
            usage="ftrain launch [options] [group=choice key=value ...] train.py [its arguments]",
            description="Train a PyTorch script on one or more nodes and survive faults.",
            epilog=EXAMPLES + _group_lines(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._takes_value: set[str] = set()
        self._known: set[str] = {"--help"}
        self._add_options()
        for name, reason in _NO_MEANING.items():
            self._option(name, action=_Refuse, nargs=1, metavar=reason, help=argparse.SUPPRESS)
        for name, reason in _NO_MEANING_FLAGS.items():
            self._option(name, action=_Refuse, nargs=0, metavar=reason, help=argparse.SUPPRESS)

    def split(self, tokens: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
        """Options, overrides, and the script with its arguments."""
        options: list[str] = []
        overrides: list[str] = []
        rest = list(tokens)
        while rest:
            if rest[0] == "--":
                return options, overrides, rest[1:]
            if rest[0].startswith("-"):
                name, equals, value = rest[0].partition("=")
                if name.startswith("--"):
                    name = f"--{name[2:].replace('_', '-')}"  # torchrun takes both spellings
                    rest[0] = f"{name}{equals}{value}"
                    self._check_known(name)
                count = 2 if rest[0] in self._takes_value else 1
                options += rest[:count]
                del rest[:count]
            elif is_override(rest[0]):
                overrides.append(rest.pop(0))
            else:
                break
        return options, overrides, rest

    def _check_known(self, name: str) -> None:
        if name in self._known:
            return
        known = sorted(self._known - {*_NO_MEANING, *_NO_MEANING_FLAGS})
        longer = [option for option in known if option.startswith(name)]
        near = longer or difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
        hint = f"did you mean {near[0]}?" if near else "see ftrain launch --help"
        if not longer:
            hint = f"the script's own options come after the script; {hint}"
        raise UsageError(f"there is no option {name}; {hint}")

    def _option(self, *names: str, **settings: Any) -> None:
        action = self.parser.add_argument(*names, **settings)
        self._known.update(action.option_strings)
        if action.nargs != 0:
            self._takes_value.update(action.option_strings)

    def _add_options(self) -> None:
        option = self._option
        option("--nnodes", metavar="N", help="number of nodes (default 1)")
        option(
            "--nproc-per-node",
            metavar="N",
            help="ranks per node: a number, auto, cpu or gpu (default 1)",
        )
        option("--local-nodes", metavar="N", help="run N nodes on this machine, each with an agent")
        option(
            "--spares",
            metavar="N",
            help="N nodes more wait, each with an agent; one takes the place of a node that is lost"
            " at once, and that node waits as a spare when it is back (0)",
        )
        option(
            "--replica-groups",
            metavar="N",
            help="train with N replica groups on this machine, each a job of its own, that average"
            " gradients in every step; one that is lost costs the others nothing, and comes back",
        )
        option(
            "--join",
            metavar="HOST:PORT",
            help="join a fleet of replica groups that runs already, as fleet.group=K",
        )
        option("--node-rank", metavar="K", help="this machine's node, from 0")
        option("--run-dir", metavar="DIR", help="state of the run (./ftrain-runs/<script name>)")
        option("--run-id", "--rdzv-id", dest="run_id", metavar="ID", help="name of the run")
        option("--rdzv-endpoint", metavar="HOST:PORT", help="the coordinator, for several nodes")
        option("--rdzv-backend", metavar="NAME", help="ftrain; c10d and static mean the same")
        option("--master-addr", metavar="HOST", help="with --master-port: like --rdzv-endpoint")
        option("--master-port", metavar="PORT", help="with --master-addr: like --rdzv-endpoint")
        option("--local-addr", metavar="HOST", help="where other nodes reach this one")
        option("--standalone", action="store_true", help="one node, no endpoint (the default)")
        option(
            "--max-restarts",
            metavar="N",
            help="restarts in a row without a new version (3); the next failure ends the run",
        )
        option("--log-dir", metavar="DIR", help="logs of the ranks (<run dir>/logs)")
        option("-r", "--redirects", metavar="STD", help="0 none, 1 stdout, 2 stderr, 3 both, 0:1,…")
        option("-t", "--tee", metavar="STD", help="as --redirects, and to the terminal as well (3)")
        option("-m", "--module", action="store_true", help="the script is a module, as python -m")
        option("--cfg", choices=["job"], help="print the resolved configuration and exit")


def _group_lines() -> str:
    lines = [f"  {name:<12}{', '.join(choices)}" for name, choices in groups().items()]
    return "\nGroups and their choices:\n" + "\n".join(lines) + "\n"


def parse_launch(tokens: Sequence[str]) -> LaunchRequest:
    """Parse the arguments of ``ftrain launch``.

    Raises :class:`UsageError` in one sentence; ``--help`` prints and exits.
    """
    launch = _LaunchParser()
    options, overrides, argv = launch.split(tokens)
    found = launch.parser.parse_args(options)
    notes: list[str] = []
    given = _option_overrides(found, notes)
    for key, (option, _) in given.items():
        twice = next((o for o in overrides if o.lstrip("+").startswith(f"{key}=")), None)
        if twice is not None:
            raise UsageError(f"{option} and {twice} set the same thing: leave one of them out")
    if found.module and not argv:
        raise UsageError("-m needs the name of a module after it")
    return LaunchRequest(
        overrides=(*(f"{key}={value}" for key, (_, value) in given.items()), *overrides),
        argv=tuple(argv),
        module=found.module,
        print_config=found.cfg is not None,
        notes=tuple(notes),
    )


def _option_overrides(found: argparse.Namespace, notes: list[str]) -> dict[str, tuple[str, str]]:
    """Configuration key -> (option, value), for every option that was given."""
    given: dict[str, tuple[str, str]] = {}
    for name in ("local_nodes", "spares", "node_rank", "max_restarts"):
        value = getattr(found, name)
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            given[f"launch.{name}"] = (option, str(_whole(option, value, least=0)))
    for name in ("run_dir", "run_id", "log_dir", "redirects", "tee"):
        value = getattr(found, name)
        if value is not None:
            given[f"launch.{name}"] = (f"--{name.replace('_', '-')}", value)
    if found.replica_groups is not None:
        count = _whole("--replica-groups", found.replica_groups, least=1)
        given["fleet.groups"] = ("--replica-groups", str(count))
    if found.join is not None:
        given["fleet.coordinator"] = ("--join", found.join)
    if found.local_addr is not None:
        given["launch.host"] = ("--local-addr", found.local_addr)
    if found.nnodes is not None:
        given["launch.nnodes"] = ("--nnodes", str(_fixed_nodes(found.nnodes)))
    if found.nproc_per_node is not None:
        ranks = str(_ranks(found.nproc_per_node))
        given["launch.nproc_per_node"] = ("--nproc-per-node", ranks)
    if found.rdzv_backend is not None:
        if found.rdzv_backend not in _BACKENDS:
            raise UsageError(
                f"--rdzv-backend {found.rdzv_backend} is not supported: leave it out, ftrain"
                f" brings its own (also accepted: {', '.join(_BACKENDS)})"
            )
        if found.rdzv_backend != "ftrain":
            notes.append(f"--rdzv-backend {found.rdzv_backend}: using ftrain's own rendezvous")
    endpoint = _endpoint(found)
    if endpoint is not None and not found.standalone:
        given["launch.rdzv_endpoint"] = endpoint
    if found.standalone and given.get("launch.nnodes", ("", "1"))[1] != "1":
        raise UsageError("--standalone is one node: leave --nnodes out, or take --local-nodes")
    return given


def _endpoint(found: argparse.Namespace) -> tuple[str, str] | None:
    if found.rdzv_endpoint is not None:
        value: str = found.rdzv_endpoint
        return "--rdzv-endpoint", value if ":" in value else f"{value}:29400"
    if found.master_addr is not None or found.master_port is not None:
        port = _whole("--master-port", found.master_port or "29500", least=1)
        host = (found.master_addr or "127.0.0.1").strip("[]")
        return "--master-addr", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return None


def _whole(option: str, text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise UsageError(f"{option} must be a whole number of at least {least}, not '{text}'")
    return int(text)


def _fixed_nodes(text: str) -> int:
    low, colon, high = text.partition(":")
    if colon and low != high:
        raise UsageError(
            f"--nnodes {text}: this version needs a fixed number of nodes, such as --nnodes {high}"
        )
    return _whole("--nnodes", low, least=1)


def _ranks(text: str) -> int:
    """``--nproc-per-node``: a number, or what torchrun makes of cpu, gpu and auto."""
    if text == "cpu":
        return os.cpu_count() or 1
    if text in ("gpu", "auto"):
        gpus = _gpu_count()
        if gpus:
            return gpus
        if text == "auto":
            return os.cpu_count() or 1
        raise UsageError("--nproc-per-node gpu: this machine has no GPU that torch can use")
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"--nproc-per-node is a number, auto, cpu or gpu, not '{text}'")
    return _whole("--nproc-per-node", text, least=1)


def _gpu_count() -> int:
    """GPUs that torch can use; asks in another process, because torch takes long to import."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    question = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, check=False
    )
    return int(answer.stdout.strip() or 0) if answer.returncode == 0 else 0
