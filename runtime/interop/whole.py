"""A durable version as whole tensors on the CPU, whatever ranks and layout it was saved by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ftrain.checkpoint.boxes import Placement
from ftrain.checkpoint.catalogue import SavedTensor, catalogue
from ftrain.checkpoint.codec import decode_tree
from ftrain.checkpoint.files import page_buffer
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.tensors import StateTensor, tensor_in
from ftrain.checkpoint.versions import Files, all_readable
from ftrain.comms.errors import CorruptionError
from ftrain.runtime.restore import Restoration

_BATCH_BYTES = 64 * 1024 * 1024  # read together, so that a chunk of small tensors is read once
_READERS = 2
_ALIGNMENT = 64  # of a tensor in memory, as torch's own allocator has it


@dataclass(slots=True)
class WholeVersion:
    """The tensors of a version and the small states of its ranks."""

    files: Sequence[SegmentReader]  # of all ranks
    tensors: tuple[SavedTensor, ...] = field(init=False)  # in the order in which they lie in files
    repaired: list[str] = field(default_factory=list)  # what was damaged, in words

    def __post_init__(self) -> None:
        """Look into the footers; ``CorruptionError`` if they contradict each other."""
        self.tensors = catalogue(self.files)

    def small(self, rank: int) -> dict[str, Any]:
        """A rank's small state, verified; ``CorruptionError``."""
        reader = self.files[rank]
        tree = decode_tree(reader.small)
        if not isinstance(tree, dict):
            raise CorruptionError(f"{reader.where} holds no training state")
        return tree

    def read(self, wanted: Iterable[SavedTensor]) -> Iterator[torch.Tensor]:
        """Each of these tensors, verified; best in the order of :attr:`tensors`.

        Some are read ahead, into memory of 64 MiB, or of the largest tensor, that is used again and
        again: what a tensor holds is gone when the next one is asked for.

        Raises:
            CorruptionError: some bytes are damaged, and there is no other copy of them.
        """
        tensors = list(wanted)
        rooms = [_aligned(tensor.nbytes) for tensor in tensors]
        memory = page_buffer(min(sum(rooms), max(_BATCH_BYTES, *rooms)) if rooms else 0)
        batch: list[StateTensor] = []
        end = 0
        for tensor, room in zip(tensors, rooms, strict=True):
            if batch and end + room > _BATCH_BYTES:
                yield from self._filled(batch)
                batch, end = [], 0
            place = Placement.whole(tensor.shape, tensor.owner)
            live = tensor_in(memory, tensor.dtype, tensor.shape, end)
            batch.append(StateTensor(tensor.name, live, "all", place))
            end += room
        yield from self._filled(batch)

    def fill(self, targets: Sequence[StateTensor]) -> None:
        """Fill these tensors, or parts of tensors; raises as :meth:`read`."""
        restoration = Restoration(self.files, readers=_READERS)
        restoration.fill(targets)
        self.repaired += [text for text in restoration.damage if text not in self.repaired]

    def _filled(self, batch: Sequence[StateTensor]) -> Iterator[torch.Tensor]:
        self.fill(batch)
        for target in batch:
            yield target.tensor


@contextmanager
def whole_version(opened: AbstractContextManager[Files]) -> Iterator[WholeVersion]:
    """A version as whole tensors, while its files are open.

    Raises:
        CorruptionError: a file can't be read: what it held is not known.
    """
    with opened as files:
        yield WholeVersion(all_readable(files))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
