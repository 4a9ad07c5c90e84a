"""What the injector sees of a running job: its nodes' files and its ranks' telemetry pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftrain.comms.process import start_ticks
from ftrain.comms.protocol.phases import Phase
from ftrain.comms.telemetry import TelemetryPage, Word
from ftrain.recovery.node_file import NodeFile, NodeRank, node_file_path, read_node_file


@dataclass(frozen=True, slots=True)
class Sighting:
    """One rank of one node, with its page."""

    file: NodeFile
    entry: NodeRank
    page: TelemetryPage

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.entry.rank

    @property
    def step(self) -> int:
        """Last boundary reached."""
        return self.page[Word.STEP]

    @property
    def phase(self) -> Phase:
        """What its main thread does."""
        return Phase(self.page[Word.PHASE])

    @property
    def median_s(self) -> float:
        """Median step time; 0 unknown."""
        return self.page[Word.STEP_MEDIAN_NS] * 1e-9


class Sightings:
    """The nodes of this host, looked at again and again."""

    def __init__(self, run_dir: str | os.PathLike[str], nodes: int) -> None:
        self.files: dict[int, NodeFile] = {}
        self.reached = -1  # highest boundary that any rank was ever seen at
        self.first_epoch = -1  # of the first formation seen
        self._paths = {node: node_file_path(run_dir, node) for node in range(nodes)}
        self._versions: dict[int, tuple[int, int]] = {}
        # Kept for good: a page tells what its rank did last, also when the node is gone.
        self._pages: dict[tuple[int, int, int], TelemetryPage] = {}

    def look(self) -> None:
        """Read what changed. Costs one stat per node and a few words per rank."""
        for node, path in self._paths.items():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            version = (stat.st_ino, stat.st_mtime_ns)
            if version != self._versions.get(node):
                self._versions[node] = version
                self._read(node, path)
        formed = [file.epoch for file in self.files.values() if file.ranks]
        if formed and self.first_epoch < 0:
            self.first_epoch = min(formed)
        self.reached = max(self.reached, *(seen.step for seen in self.ranks()), -1)

    def ranks(self, node: int = -1, rank: int = -1) -> Iterator[Sighting]:
        """The ranks of ``node`` (-1: of any), only ``rank`` unless that is -1.

        A rank is where its newest epoch has it: a spare may have taken its node's place.
        """
        newest = {
            entry.rank: (file, entry)
            for file in sorted(self.files.values(), key=lambda each: each.epoch)
            for entry in file.ranks
        }
        for file, entry in newest.values():
            page = self._pages.get(_key(file, entry))
            if page is not None and node in (-1, file.node) and rank in (-1, entry.rank):
                yield Sighting(file, entry, page)

    def there(self, node: int = -1, rank: int = -1) -> list[Sighting]:
        """Like :meth:`ranks`, but only on nodes whose agents live."""
        return [seen for seen in self.ranks(node, rank) if _agent_lives(seen.file)]

    def close(self) -> None:
        """Unmap the pages."""
        for page in self._pages.values():
            page.close()
        self._pages.clear()
        self.files.clear()

    def _read(self, node: int, path: Path) -> None:
        file = read_node_file(path)
        if file is None or not _agent_lives(file):
            return  # left over from an earlier launch
        self.files[node] = file
        for entry in file.ranks:
            key = _key(file, entry)
            if key not in self._pages:
                page = _map(file.agent_pid, entry.telemetry_fd)
                if page is not None:
                    self._pages[key] = page


def _key(file: NodeFile, entry: NodeRank) -> tuple[int, int, int]:
    return file.agent_pid, file.incarnation, entry.telemetry_fd


def _agent_lives(file: NodeFile) -> bool:
    try:
        return start_ticks(file.agent_pid) == file.starts.get(file.agent_pid)
    except ProcessLookupError:
        return False


def _map(agent_pid: int, telemetry_fd: int) -> TelemetryPage | None:
    """The page behind another process's descriptor; None when that process is gone."""
    try:
        fd = os.open(f"/proc/{agent_pid}/fd/{telemetry_fd}", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        return TelemetryPage(fd)
    except ValueError:
        return None  # the descriptor is something else by now
    finally:
        os.close(fd)
