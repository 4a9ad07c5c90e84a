"""``ftrain``: the command line. Everything heavy is imported when it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ftrain
from ftrain.comms.errors import FtrainError, UsageError
from ftrain.launch.options import Parser

_HELP = """\
usage: ftrain COMMAND ...

Fault-tolerant training of PyTorch scripts.

  launch [options] [group=choice key=value ...] train.py [its arguments]
                         train, and survive faults (ftrain launch --help)
  status RUN_DIR         what runs, and where it stands (--json)
  inject RUN_DIR kind=sigkill rank=1
                         break something in a running job, on purpose
  report RUN_DIR         what happened in a run
  checkpoints list|show|verify|export|import|prune RUN_OR_URI
                         durable versions (ftrain checkpoints --help)
  doctor [train.py]      whether this machine and a script have what ftrain needs

ftrain --version         print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one sentence on standard error."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(tokens)
        sys.stdout.flush()
        return code
    except FtrainError as error:
        print(f"ftrain: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        if error.filename is None:
            raise  # nothing that the user named
        print(f"ftrain: {error.filename}: {error.strerror}", file=sys.stderr)
        return UsageError.exit_code
    except BrokenPipeError:  # `ftrain report … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _dispatch(tokens: list[str]) -> int:
    if not tokens or tokens[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if tokens else 2
    if tokens[0] in ("-V", "--version"):
        print(f"ftrain {ftrain.__version__}")
        return 0
    command = _COMMANDS.get(tokens[0])
    if command is None:
        raise UsageError(
            f"there is no command '{tokens[0]}': it is one of {', '.join(_COMMANDS)}"
            + (f" (did you mean: ftrain launch {tokens[0]}?)" if tokens[0].endswith(".py") else "")
        )
    return command(tokens[1:])


def _launch(tokens: Sequence[str]) -> int:
    from ftrain.launch.start import launch

    return launch(tokens)


def _status(tokens: Sequence[str]) -> int:
    parser = Parser(prog="ftrain status", description="What runs in a run directory.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    found = parser.parse_args(tokens)
    from ftrain.launch.status import show_status

    return show_status(found.run_dir, as_json=found.json)


def _inject(tokens: Sequence[str]) -> int:
    parser = Parser(
        prog="ftrain inject",
        description="Break something in a running job, on purpose.",
        epilog="example: ftrain inject ftrain-runs/train kind=sigkill rank=1",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("fault", nargs="+", metavar="key=value", help="kind, rank, node, phase, …")
    found = parser.parse_args(tokens)
    from ftrain.launch.run_directory import read_run_record
    from ftrain.recovery.faults import parse_fault
    from ftrain.recovery.injection import inject_now

    read_run_record(Path(found.run_dir))
    done = inject_now(found.run_dir, parse_fault(found.fault))
    where = [f"{key} {done[key]}" for key in ("rank", "node", "pid") if done.get(key, -1) >= 0]
    print(f"{done['fault']} ({', '.join(where)}): {done['outcome']}")
    return 0


def _report(tokens: Sequence[str]) -> int:
    parser = Parser(prog="ftrain report", description="What happened in a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    found = parser.parse_args(tokens)
    from ftrain.launch.report import show_report

    return show_report(found.run_dir)


def _checkpoints(tokens: Sequence[str]) -> int:
    from ftrain.launch.checkpoints import checkpoints

    return checkpoints(tokens)


def _doctor(tokens: Sequence[str]) -> int:
    parser = Parser(
        prog="ftrain doctor",
        description="Whether this machine (and a script) have what ftrain needs.",
    )
    parser.add_argument("script", nargs="?", help="also look for what can't be bit-reproducible")
    found = parser.parse_args(tokens)
    from ftrain.launch.doctor import show_doctor

    return show_doctor(found.script)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "launch": _launch,
    "status": _status,
    "inject": _inject,
    "report": _report,
    "checkpoints": _checkpoints,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
