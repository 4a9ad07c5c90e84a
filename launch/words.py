"""Numbers as people read them, and tables and progress on a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ftrain.comms.errors import UsageError

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGTP]?)(i?)B?")
_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def size_text(nbytes: int) -> str:
    """Bytes with a unit: 1.3 GB."""
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def age_text(seconds: float) -> str:
    """A time span with a unit: 3.2 h."""
    for unit_s, unit in _AGES:
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def parse_size(option: str, text: str) -> int:
    """Bytes for "5GB", "500 MB" or "2GiB"; ``UsageError``."""
    found = _SIZE.fullmatch(text.strip())
    nbytes = 0
    if found is not None:
        number, prefix, binary = found.groups()
        nbytes = int(float(number) * (1024 if binary else 1000) ** " kMGTP".index(prefix or " "))
    if nbytes < 1:
        raise UsageError(f"{option} is a size such as 5GB or 500MB, not '{text}'")
    return nbytes


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Plain columns: a table that is fitted to 80 characters would be cut or wrapped."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


@contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while something long goes on, if that is a terminal; what is yielded
    is told how many bytes more are done."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda nbytes: bar.advance(task, nbytes)
