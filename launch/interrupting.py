"""Ctrl-C while pyarrow waits for a store: it ends the command at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_EXIT_CODE = 130
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


def ending_at_once(action: Callable[[], int], tidy: Callable[[], None]) -> int:
    """What ``action`` returns; Ctrl-C ends the process, after ``tidy``, whatever is going on.

    Python looks at signals in the main thread, and only between two steps of its own: in pyarrow it
    may be for minutes.  So another thread does the work, and the main thread waits.  Threads that
    wait in C++ can't be ended; the process can.
    """
    with ThreadPoolExecutor(1, "ftrain-command") as worker:
        try:
            return worker.submit(action).result()
        except KeyboardInterrupt:
            tidy()
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), _SHOW_CURSOR.encode())
            os._exit(_EXIT_CODE)
