"""What may be on a disk after a power cut, given the operations before it.

The model is as bad as POSIX allows, worse than any file system in use: of what was not synced, each
sector of each write and each change of each name may be there or not, whatever the order was; the
contents of a file are synced by its own fsync alone, a name by its folder's alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

SECTOR_BYTES = 512
ROOT = 0

Op = tuple[str, *tuple[object, ...]]
"""("file" | "folder", id), ("name", folder, name, id or None), ("write", file, offset, bytes),
("size", file, bytes), ("sync", id), ("said", words)."""


@dataclass
class File:
    """The content of one inode: what is safe, and what came after."""

    safe: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        self.resize(offset + len(data))
        self.now[offset : offset + len(data)] = data
        for start in range(0, len(data), SECTOR_BYTES):
            self.pending.append((offset + start, data[start : start + SECTOR_BYTES]))

    def resize(self, size: int) -> None:
        self.now.extend(bytes(max(0, size - len(self.now))))
        self.sizes.append(len(self.now))

    def sync(self) -> None:
        self.safe = bytes(self.now)
        self.pending, self.sizes = [], []

    def after_cut(self, chance: random.Random, share: float) -> bytes:
        if not self.pending and not self.sizes:
            return self.safe
        sizes = [size for size in self.sizes if chance.random() < share]
        found = bytearray(self.safe.ljust(max([len(self.safe), *sizes]), b"\0"))
        for offset, data in self.pending:
            if chance.random() < share and offset < len(found):
                part = data[: len(found) - offset]
                found[offset : offset + len(part)] = part
        return bytes(found)


@dataclass
class Folder:
    """The names in one folder: those that are safe, and each one's changes since."""

    safe: dict[str, int] = field(default_factory=dict)
    changes: dict[str, list[int | None]] = field(default_factory=dict)

    def sync(self) -> None:
        for name, states in self.changes.items():
            if states[-1] is None:
                self.safe.pop(name, None)
            else:
                self.safe[name] = states[-1]
        self.changes = {}

    def after_cut(self, chance: random.Random, share: float) -> dict[str, int]:
        found: dict[str, int] = dict(self.safe)
        for name, states in self.changes.items():
            if chance.random() < share:
                state = states[-1] if chance.random() < 0.7 else chance.choice(states)
                if state is None:
                    found.pop(name, None)
                else:
                    found[name] = state
        return found


class Disk:
    """The sum of operations, as far as it is safe."""

    def __init__(self) -> None:
        self._nodes: dict[int, File | Folder] = {ROOT: Folder()}

    def apply(self, op: Op) -> None:
        match op:
            case ("file", int(node)):
                self._nodes[node] = File()
            case ("folder", int(node)):
                self._nodes[node] = Folder()
            case ("name", int(folder), str(name), state):
                place = self._nodes[folder]
                assert isinstance(place, Folder)
                assert state is None or isinstance(state, int)
                place.changes.setdefault(name, []).append(state)
            case ("write", int(node), int(offset), bytes(data)):
                self._file(node).write(offset, data)
            case ("size", int(node), int(size)):
                self._file(node).resize(size)
            case ("sync", int(node)):
                self._nodes[node].sync()
            case ("said", _):
                pass
            case _:
                raise AssertionError(f"unknown operation {op}")

    def after_cut(self, place: Path, chance: random.Random, share: float) -> None:
        """Make ``place`` what the disk may hold; ``share`` of what is not safe is there."""
        self._make(ROOT, place, chance, share)

    def _make(self, node: int, place: Path, chance: random.Random, share: float) -> None:
        found = self._nodes[node]
        if isinstance(found, File):
            place.write_bytes(found.after_cut(chance, share))
            return
        place.mkdir()
        for name, below in found.after_cut(chance, share).items():
            self._make(below, place / name, chance, share)

    def _file(self, node: int) -> File:
        found = self._nodes[node]
        assert isinstance(found, File)
        return found
