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
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.tensors import StateTensor
from ftrain.checkpoint.versions import Files, all_readable
from ftrain.comms.errors import CorruptionError
from ftrain.runtime.restore import Restoration

_BATCH_BYTES = 64 * 1024 * 1024  # read together, so that a chunk of small tensors is read once
_READERS = 2


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

    def read(self, wanted: Iterable[SavedTensor]) -> Iterator[tuple[SavedTensor, torch.Tensor]]:
        """Each of these tensors, verified; best in the order of :attr:`tensors`.

        Some are read ahead; no more than 64 MiB, or one tensor, is held here.

        Raises:
            CorruptionError: some bytes are damaged, and there is no other copy of them.
        """
        batch: list[SavedTensor] = []
        held = 0
        for tensor in wanted:
            if batch and held + tensor.nbytes > _BATCH_BYTES:
                yield from self._fill(batch)
                batch, held = [], 0
            batch.append(tensor)
            held += tensor.nbytes
        yield from self._fill(batch)

    def fill(self, targets: Sequence[StateTensor]) -> None:
        """Fill these tensors, or parts of tensors; raises as :meth:`read`."""
        restoration = Restoration(self.files, readers=_READERS)
        restoration.fill(targets)
        self.repaired += [text for text in restoration.damage if text not in self.repaired]

    def _fill(self, batch: list[SavedTensor]) -> Iterator[tuple[SavedTensor, torch.Tensor]]:
        memory = [torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for t in batch]
        self.fill(
            [
                StateTensor(t.name, m, "all", Placement.whole(t.shape, t.owner))
                for t, m in zip(batch, memory, strict=True)
            ]
        )
        for tensor in batch:
            yield tensor, memory.pop(0)


@contextmanager
def whole_version(opened: AbstractContextManager[Files]) -> Iterator[WholeVersion]:
    """A version as whole tensors, while its files are open.

    Raises:
        CorruptionError: a file can't be read: what it held is not known.
    """
    with opened as files:
        yield WholeVersion(all_readable(files))
