"""What the benchmarks share: launches that never outlive them, step records, tables, results."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "llama" / "train.py"
RESULTS = ROOT / "benchmarks" / "results"
FTRAIN = (sys.executable, "-m", "ftrain.launch.cli")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

Record = dict[str, Any]


class LaunchError(RuntimeError):
    """A launch ended, or stood still, before the benchmark had what it needs."""


class Launch:
    """One running job: its process, its log, and the step records of its ranks.

    Training and every peer write ``<run_dir>/steps/rank<r>.jsonl``, one line per completed step
    with ``step``, ``t_ns`` (CLOCK_MONOTONIC) and ``epoch`` (which start of the ranks it was).
    """

    def __init__(
        self, command: Sequence[str | Path], run_dir: Path, environment: dict[str, str]
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.log = run_dir / "output.log"
        self.began_ns = time.monotonic_ns()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=run_dir,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._files: dict[Path, tuple[int, list[Record]]] = {}

    def records(self) -> list[Record]:
        """All complete step records so far, in order of time; each knows its ``rank``."""
        for path in (self.run_dir / "steps").glob("rank*.jsonl"):
            offset, found = self._files.get(path, (0, []))
            with path.open("rb") as file:
                file.seek(offset)
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            rank = int(path.stem.removeprefix("rank"))
            for line in whole.splitlines():
                record = json.loads(line)
                if "step" in record:
                    found.append({**record, "rank": rank})
            self._files[path] = (offset + len(whole), found)
        every = [record for _, found in self._files.values() for record in found]
        return sorted(every, key=lambda record: record["t_ns"])

    def wait_for(self, wanted: Callable[[list[Record]], bool], timeout_s: float) -> list[Record]:
        """Records as soon as they are as wanted; :class:`LaunchError` when they never are."""
        deadline = time.monotonic() + timeout_s
        while True:
            records = self.records()
            if wanted(records):
                return records
            if self.process.poll() is not None:
                raise LaunchError(f"ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise LaunchError(f"nothing new for {timeout_s:g} s:\n{self.tail()}")
            time.sleep(0.005)

    def finish(self, timeout_s: float) -> None:
        """Wait for a good end."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LaunchError(f"not done after {timeout_s:g} s:\n{self.tail()}") from None
        if code:
            raise LaunchError(f"ended with {code}:\n{self.tail()}")

    def tail(self, lines: int = 25) -> str:
        """The end of the job's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        """Stop it, by force if it does not go."""
        for number, patience_s in ((signal.SIGINT, 0.2), (signal.SIGINT, 5), (signal.SIGTERM, 10)):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def launched(
    command: Sequence[str | Path], run_dir: Path, environment: dict[str, str] | None = None
) -> Iterator[Launch]:
    """A job for the length of a ``with`` block."""
    launch = Launch(command, run_dir, environment or {})
    try:
        yield launch
    finally:
        launch.end()


def median_step_s(records: Sequence[Record], rank: int = 0) -> float:
    """Median time between consecutive steps of one start of a rank."""
    mine = [record for record in records if record["rank"] == rank]
    seconds: list[float] = [
        (after["t_ns"] - before["t_ns"]) / 1e9
        for before, after in itertools.pairwise(mine)
        if after["epoch"] == before["epoch"] and after["step"] == before["step"] + 1
    ]
    return median(seconds)


def machine() -> Record:
    """What the figures were measured on."""
    import torch

    with open("/proc/meminfo") as file:
        memory_kb = int(file.readline().split()[1])
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(memory_kb / 1e6),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver() if torch.cuda.is_available() else None,
        "date": date.today().isoformat(),
        "load_at_start": os.getloadavg()[0],
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table; floats with three significant digits."""
    text = [
        [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *text, strict=True)]
    print(f"\n{title}")
    for row in (list(head), ["-" * width for width in widths], *text):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    sys.stdout.flush()


Columns = Sequence[tuple[str, Callable[[Record], str]]]  # heads, and what stands below them


def print_records(title: str, columns: Columns, records: Sequence[Record]) -> None:
    """A table with a line for each record."""
    rows = [[cell(record) for _, cell in columns] for record in records]
    print_table(title, [name for name, _ in columns], rows)


def write_results(name: str, results: Record) -> Path:
    """Keep the figures of a run as ``benchmarks/results/<name>-<cores>cores.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{os.cpu_count()}cores.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"\nwritten to {os.path.relpath(path)}")
    return path
