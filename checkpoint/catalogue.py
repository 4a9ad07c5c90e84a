"""Which tensors a version holds, put together from the footers of its files, without torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ftrain.checkpoint.boxes import Box, disjoint
from ftrain.checkpoint.dtypes import item_bytes
from ftrain.checkpoint.image_plan import Segment
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.comms.errors import CorruptionError


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a version. ``label`` is its name, with ``@ranks`` behind it where it is one of
    several of this name, each the own one of some ranks."""

    name: str
    owner: str
    label: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]  # of all files

    @property
    def nbytes(self) -> int:
        """Size of its elements."""
        return prod(self.shape) * item_bytes(self.dtype)

    @property
    def boxes(self) -> list[Box]:
        """The parts that ranks had it in, without those that are empty."""
        return sorted({s.box for s in self.segments if s.box.volume}, key=lambda box: box.origin)

    @property
    def missing_bytes(self) -> int:
        """How many of its bytes are in no file."""
        item = item_bytes(self.dtype)
        missing = 0
        runs: dict[Box, list[tuple[int, int]]] = defaultdict(list)
        for segment in self.segments:
            runs[segment.box].append((segment.start, segment.start + segment.nbytes))
        for box in self.boxes:
            end = 0
            for start, stop in sorted(runs[box]):
                missing += max(0, start - end)
                end = max(end, stop)
            missing += box.volume * item - end
        if disjoint(self.boxes):
            missing += (prod(self.shape) - sum(box.volume for box in self.boxes)) * item
        return missing


def catalogue(readers: Iterable[SegmentReader]) -> tuple[SavedTensor, ...]:
    """The tensors of all ranks' files, in the order in which they lie in them.

    Raises:
        CorruptionError: the files contradict each other.
    """
    found: dict[tuple[str, str], list[Segment]] = {}
    for reader in readers:
        for segment in reader.segments:
            same = found.setdefault((segment.name, segment.place.owner), [segment])
            if (same[0].dtype, same[0].place.shape) != (segment.dtype, segment.place.shape):
                raise CorruptionError(
                    f"{reader.where}: {segment.name} has another shape or type than in another "
                    "rank's file"
                )
            if same[0] is not segment:
                same.append(segment)
    owners = Counter(name for name, _ in found)
    return tuple(
        SavedTensor(
            name,
            owner,
            f"{name}@{owner}" if owners[name] > 1 else name,
            segments[0].dtype,
            segments[0].place.shape,
            tuple(segments),
        )
        for (name, owner), segments in found.items()
    )
