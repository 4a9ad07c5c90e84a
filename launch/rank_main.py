"""Run a user's script in a forked rank as ``python script.py`` or ``python -m module`` would.

What differs from the real thing: the interpreter is warm, an uncaught exception is described in a
file for the agent instead of on the terminal (which shows it once for all ranks), and the process
ends by ``os._exit`` after everything that Python runs at exit.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import json
import os
import runpy
import sys
import threading
import time
import traceback
import types
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NoReturn

import ftrain
from ftrain.comms.errors import (
    MemoryShortError,
    RestoreError,
    RunDirectoryError,
    StateError,
    SuspectError,
    UsageError,
)

_OWN_FILES = os.path.dirname(ftrain.__file__ or "") + os.sep
# What comes back however often the script is started: nothing but the user can mend it.
_MISTAKES = (UsageError, StateError, RunDirectoryError, MemoryShortError)
_BOOTSTRAP_FILES = (__file__, runpy.__file__, "<frozen runpy>")


@dataclass(frozen=True, slots=True)
class Program:
    """What a rank runs. ``code`` is the compiled script, if there is one already."""

    argv: tuple[str, ...]
    module: bool
    code: types.CodeType | None = None


def run(program: Program, error_file: str) -> NoReturn:
    """Run the program as ``__main__`` and end the process with its exit code."""
    code = _run_guarded(program, error_file)
    with contextlib.suppress(Exception):  # a user's exit hook may raise anything
        threading._shutdown()  # type: ignore[attr-defined]  # joins non-daemon threads, as Python does
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _run_guarded(program: Program, error_file: str) -> int:
    try:
        if program.module:
            _run_module(program)
        else:
            _run_script(program)
    except SystemExit as ended:
        return _exit_code(ended) or _saved(error_file)
    except BaseException as error:  # the root of the process: nothing may get past it
        _linger(error)
        describe(error, error_file)
        return 1
    return _saved(error_file)


def _saved(error_file: str) -> int:
    """The exit code of a script that ended well: not 0 if its end is lost."""
    session = sys.modules.get("ftrain.runtime.session")
    why = session.unsaved() if session is not None else ""
    if why:
        _write_record(error_file, why, "unsaved", "")
    return 1 if why else 0


def _linger(error: BaseException) -> None:
    """Let the script's Session finish its capture before this process and its tensors go."""
    session = sys.modules.get("ftrain.runtime.session")
    if session is not None:
        with contextlib.suppress(Exception):  # the script's own error is the one to report
            session.linger(error)


def compile_script(path: str) -> types.CodeType:
    """Compile a script file as the interpreter would; raises SyntaxError, OSError."""
    code = compile(Path(path).read_bytes(), os.path.abspath(path), "exec", dont_inherit=True)
    assert isinstance(code, types.CodeType)
    return code


def _fresh_main() -> types.ModuleType:
    main = types.ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    return main


def _put_first_in_path(directory: str) -> None:
    """Where the script's own modules are found; ``python -P`` left this entry out."""
    if sys.flags.safe_path:
        sys.path.insert(0, directory)
    else:
        sys.path[0] = directory


def _run_script(program: Program) -> None:
    path = os.path.abspath(program.argv[0])
    sys.argv = list(program.argv)
    _put_first_in_path(os.path.dirname(os.path.realpath(path)))
    main = _fresh_main()
    main.__file__ = path
    main.__loader__ = SourceFileLoader("__main__", path)
    vars(main)["__cached__"] = None
    exec(program.code or compile_script(program.argv[0]), vars(main))


def _run_module(program: Program) -> None:
    sys.argv = list(program.argv)
    _put_first_in_path(os.getcwd())
    _fresh_main()
    # what `python -m` itself calls; the public run_module would not run in the real __main__
    runpy._run_module_as_main(program.argv[0])  # type: ignore[attr-defined]


def _exit_code(ended: SystemExit) -> int:
    if ended.code is None:
        return 0
    if isinstance(ended.code, int):
        return ended.code & 0xFF
    sys.stderr.write(f"{ended.code}\n")
    return 1


def describe(error: BaseException, error_file: str) -> None:
    """Write the error file, in the form that torchelastic uses, so that its readers work too."""
    trimmed = _without_bootstrap(error.__traceback__)
    text = "".join(traceback.format_exception(type(error), error, trimmed))
    head = traceback.format_exception_only(error)[-1].strip()
    kind, step = "exception", -1
    if isinstance(error, RestoreError):
        kind, head = "restore", str(error)
    elif isinstance(error, _MISTAKES):
        kind, head = "usage", f"{error}{_place(trimmed)}"
    elif isinstance(error, SuspectError):
        kind, head, step = "loss", str(error), error.step
    if not _write_record(error_file, head, kind, text, step):
        sys.stderr.write(text)  # better twice on the terminal than nowhere
    if sys.excepthook is not sys.__excepthook__ and not _is_torchs(sys.excepthook):
        with contextlib.suppress(Exception):  # the user's own hook
            sys.excepthook(type(error), error, trimmed)


def _write_record(error_file: str, head: str, kind: str, text: str, step: int = -1) -> bool:
    extra = {"py_callstack": text, "timestamp": str(int(time.time())), "kind": kind, "step": step}
    record = {"message": {"message": head, "extraInfo": extra}}
    try:
        fresh = f"{error_file}.new"
        Path(fresh).write_text(json.dumps(record), encoding="utf-8", errors="replace")
        os.replace(fresh, error_file)
    except OSError:
        return False
    return True


def _place(trace: types.TracebackType | None) -> str:
    """Where in the user's own files an error of ours came from."""
    theirs = [
        frame
        for frame in traceback.extract_tb(trace)
        if not frame.filename.startswith(_OWN_FILES) and "<frozen" not in frame.filename
    ]
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""


def _is_torchs(hook: object) -> bool:
    """torch.distributed's hook prints the traceback with the rank in front: once for each rank."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _without_bootstrap(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Drop the frames above the user's script; all of them stay when nothing else is there."""
    rest = trace
    while rest is not None and rest.tb_frame.f_code.co_filename in _BOOTSTRAP_FILES:
        rest = rest.tb_next
    return rest


@dataclass(frozen=True, slots=True)
class RankError:
    """What an error file says; all empty when there is none."""

    line: str = ""  # "ValueError: bad shape"
    traceback: str = ""
    kind: str = "exception"  # of a RankFailure
    step: int = -1  # of a RankFailure


def read_error_file(path: str) -> RankError:
    """The error that ended a rank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        # Half a surrogate pair (a file name that is no UTF-8) can't be sent or logged.
        whole = json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "replace")
        message = json.loads(whole)["message"]
        if isinstance(message, str):  # torchelastic's form for errors of native code
            return RankError(message, message)
        extra = message["extraInfo"]
        return RankError(
            str(message["message"]),
            str(extra["py_callstack"]),
            str(extra.get("kind", "exception")),
            int(extra.get("step", -1)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return RankError()
