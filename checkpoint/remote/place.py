"""The operations that an object store has, on names under one URI; each tried again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ftrain.checkpoint.directory import make_folders
from ftrain.checkpoint.files import sync_folder
from ftrain.checkpoint.manifest import MANIFEST_BYTES_MAX
from ftrain.checkpoint.remote.filesystems import Filesystem, open_filesystem, place_name
from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.trouble import Retrying, explained
from ftrain.comms.errors import CorruptionError, StoreMissingError

Write = Callable[[memoryview | bytes], object]
_A = TypeVar("_A")
_B = TypeVar("_B")


def _silent(text: str) -> None:
    """Nobody wants to know."""


class Place:
    """Objects under a URI; thread-safe.  Names are relative to it, with slashes.

    ``tell`` gets a sentence for each attempt that failed and is made again.  All operations raise
    :class:`ObjectStoreError` after their last attempt, and ConfigError for a URI that is none.
    """

    def __init__(
        self, uri: str, limits: Limits | None = None, tell: Callable[[str], None] = _silent
    ) -> None:
        self.name = place_name(uri)
        self.limits = limits or Limits()
        self._uri = uri
        self._retrying = Retrying(self.limits, tell)

    def where(self, name: str) -> str:
        """An object in a message."""
        return f"{self.name}/{name}"

    def again(self, what: str, action: Callable[[], _A]) -> _A:
        """What ``action`` returns in one of several attempts."""

        def attempt() -> _A:
            with explained(self.name):
                return action()

        return self._retrying.run(what, attempt)

    def side_by_side(self, action: Callable[[_A], _B], values: Iterable[_A]) -> list[_B]:
        """What ``action`` returns for each of the values, several at a time."""
        with ThreadPoolExecutor(self.limits.threads, "ftrain-store") as pool:
            return list(pool.map(action, values))

    def sizes(self) -> dict[str, int]:
        """Every object, with its size."""
        return self.again(f"listing {self.name}", self._sizes)

    def size(self, name: str) -> int | None:
        """An object's size; None when there is none."""
        return self.again(f"looking for {self.where(name)}", lambda: self._size(name))

    def get(self, name: str) -> bytes | None:
        """A small object's content; None when there is none."""
        return self.again(f"reading {self.where(name)}", lambda: self._get(name))

    def put(self, name: str, content: bytes) -> None:
        """Make a small object appear, or another one in its place."""

        def write() -> None:
            with self.writing(name) as sink:
                sink(content)

        self.again(f"writing {self.where(name)}", write)

    def open_reading(self, name: str) -> Any:
        """A pyarrow.RandomAccessFile, in one attempt; FileNotFoundError when there is none."""
        return self._fs.open_input_file(self._path(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[Write]:
        """Write an object in order, in one attempt.

        What is written when an exception comes out of the block is published all the same where
        there are no folders (pyarrow can't take back a stream): only a manifest makes it count.
        """
        path = self._path(name)
        if self._filesystem.is_bucket:
            with self._fs.open_output_stream(path, compression=None) as stream:
                yield stream.write
            return
        fresh = f"{path}.{os.getpid()}.new"
        self._make_folder(path.rpartition("/")[0])
        try:
            with self._fs.open_output_stream(fresh, compression=None) as stream:
                yield stream.write
            if self._is_local:
                _sync_file(fresh)
            self._fs.move(fresh, path)
            if self._is_local:
                self._sync_names(Path(path))
        except BaseException:  # whatever it was: nothing stays behind
            with suppress(OSError):
                self._fs.delete_file(fresh)
            raise

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        self.again(f"removing {self.where(name)}", lambda: self._remove(name))

    def names_in(self, name: str) -> frozenset[str]:
        """What the names of all objects that begin with ``name`` and a slash go on with."""
        found = self.again(f"listing {self.where(name)}", lambda: self._files(self._path(name)))
        return frozenset(found)

    def remove_folder(self, name: str) -> None:
        """Remove every object whose name begins with ``name`` and a slash."""
        self.again(f"removing {self.where(name)}", lambda: self._remove_folder(name))

    def close(self) -> None:
        """Let go of its connections; the next operation makes new ones."""
        self.__dict__.pop("_filesystem", None)

    # ---- one attempt each

    @cached_property
    def _filesystem(self) -> Filesystem:
        return open_filesystem(self._uri, self.limits)

    @property
    def _fs(self) -> Any:
        return self._filesystem.fs

    def _path(self, name: str) -> str:
        return f"{self._filesystem.root}/{name}"

    def _sizes(self) -> dict[str, int]:
        found = self._files(self._filesystem.root)
        if not found and self._filesystem.is_bucket:
            self._require_bucket()  # one that is not there looks empty
        return found

    def _require_bucket(self) -> None:
        from pyarrow.fs import FileType

        bucket = self._filesystem.root.partition("/")[0]
        if self._fs.get_file_info(bucket).type == FileType.NotFound:
            raise StoreMissingError(
                f"the bucket of {self.name} does not exist: make it, or correct the URI"
            )

    def _size(self, name: str) -> int | None:
        from pyarrow.fs import FileType

        info = self._fs.get_file_info(self._path(name))
        return int(info.size) if info.type == FileType.File else None

    def _get(self, name: str) -> bytes | None:
        try:
            with self.open_reading(name) as file:
                nbytes = file.size()
                if nbytes > MANIFEST_BYTES_MAX:
                    raise CorruptionError(f"{self.where(name)} has {nbytes} bytes: no manifest")
                return bytes(file.read_at(nbytes, 0))
        except FileNotFoundError:
            return None

    def _remove(self, name: str) -> None:
        try:
            self._fs.delete_file(self._path(name))
        except FileNotFoundError:
            return
        except OSError:
            # pyarrow then puts a mark for the folder, which some stores do not take.
            if self._size(name) is not None:
                raise

    def _remove_folder(self, name: str) -> None:
        from pyarrow.fs import FileSelector

        path = self._path(name)
        try:
            self._fs.delete_dir(path)
        except FileNotFoundError:
            return
        except OSError:
            if self._fs.get_file_info(FileSelector(path, allow_not_found=True)):
                raise

    def _files(self, path: str) -> dict[str, int]:
        """Sizes of the objects below ``path``, by what their names go on with."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(path, recursive=True, allow_not_found=True)
        return {
            info.path[len(path) + 1 :]: info.size
            for info in self._fs.get_file_info(selector)
            if info.type == FileType.File
        }

    @property
    def _is_local(self) -> bool:
        """Whether it is for us to see that a power cut takes nothing."""
        return bool(self._fs.type_name == "local")

    def _make_folder(self, path: str) -> None:
        if self._is_local:
            make_folders(Path(path))
        else:
            self._fs.create_dir(path, recursive=True)

    def _sync_names(self, path: Path) -> None:
        """Every name on the way to a file: who made it may have died before it was synced."""
        for folder in path.parents:
            sync_folder(folder)
            if str(folder) == self._filesystem.root:
                return


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
