"""Which of the front's processes is started again, and when: not for ever, if it never works."""

from __future__ import annotations

from ftrain.launch.children import Child

_QUICK_S = 3.0  # a process that ends sooner than this never worked
# So many in a row, and it never will: its own mistake comes again, who kills it may stop.
_QUICK_EXITS_MAX, _QUICK_KILLS_MAX = 3, 6
_PAUSE_S_MIN, _PAUSE_S_MAX = 0.1, 2.0


class Restarts:
    """The quick ends in a row of one process and those that took its place."""

    def __init__(self) -> None:
        self._quick = 0

    def ended(self, child: Child, *, explained: bool = False) -> float:
        """How long to wait before the next one is started.

        ``explained``: who ended it is known; so it is of a child that the front gave up and killed.
        """
        if child.age_s >= _QUICK_S or explained or child.lost:
            self._quick = 0
            return 0.0
        self._quick += 1
        return float(min(_PAUSE_S_MIN * 2 ** (self._quick - 1), _PAUSE_S_MAX))

    def hopeless(self, child: Child) -> str:
        """Why no further one will be started after ``child``, as a sentence; empty: one will."""
        killed = child.popen.returncode < 0
        if self._quick < (_QUICK_KILLS_MAX if killed else _QUICK_EXITS_MAX):
            return ""
        where = "" if killed else "; its complaint is above"
        return (
            f"the {child.name} ended with {child.ended} {self._quick} times right after its start"
            f"{where}"
        )
