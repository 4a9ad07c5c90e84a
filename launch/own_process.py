"""A process for the front in which every descendant is its own.

The front ends whatever is below it, orphans as well.  But the first process of a container gets the
orphans of others, and one that a wrapper shell became by ``exec`` has that shell's children: such a
process only stands in for the front, which is its child.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from ftrain.comms.errors import FtrainError
from ftrain.comms.process import die_with_parent
from ftrain.launch.children import children_of

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def in_own_process(run: Callable[[], int]) -> int:
    """``run()``, in a child where this process has or may get children that are not ours."""
    own = os.getpid()
    if own != 1 and not children_of(own):
        return run()
    # What comes before its receiver is ready waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    pid = os.fork()
    if pid == 0:
        die_with_parent(own)
        os.setpgid(0, 0)  # a Ctrl-C at the terminal comes once, through the parent
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        _run_and_exit(run)
    for number in _PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: _send(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    while True:
        ended, status = os.wait()
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _run_and_exit(run: Callable[[], int]) -> None:
    """End this process here: what the parent has on its stack is the parent's to do."""
    code = 1
    try:
        code = run()
    except FtrainError as error:
        print(f"ftrain: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:  # told like any uncaught exception, which this one is
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
